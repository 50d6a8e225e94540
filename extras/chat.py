"""Several questions about the same pictures: what two prompts begin with is computed once.

For who asks more than once. The pictures are encoded once, and the cache goes back to where the
next prompt differs from the last: behind the pictures for another question, behind the last answer
for the next turn of a conversation.
"""

import contextlib
import sys
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from dymu import DyMU
from extras.decoding import prefill_expanded
from extras.door import one_line
from extras.options import note
from model import KVCache, Llava


class Session:
    """A model and the pictures that all its prompts are about.

    pixels: as `Llava.encode` takes them; expand: read pictures into a cache of all N positions
    (extras/decoding.py). visual: what `Llava.encode` gave; reused: how many positions of the last
    prompt were in the cache.
    """

    @torch.no_grad()
    def __init__(self, llava: Llava, pixels, settings: DyMU = DyMU(), expand: bool = False):
        self.llava = llava
        self.settings = settings
        self.expand = expand
        self.visual = llava.encode(pixels, settings)
        self.cache = KVCache()
        self.ids = []  # of the last prompt and its answer
        self.reused = 0

    @torch.no_grad()
    def ask(self, ids: Tensor, max_new_tokens: int = 128, **options):
        """Yields the ids of the answer to ids (T,), as `Llava.decode`, whose options it takes.

        It may be left before its end. Raises ValueError for a prompt that the model cannot take.
        """
        rows, token_at = self.llava.splice(ids, self.visual, self.settings.vtu)
        ids = torch.as_tensor(ids).tolist()
        shared = self.go_back(ids, len(token_at) - len(ids))
        self.reused = self.cache.positions

        if self.expand and shared:
            token_at = torch.arange(len(token_at), device=rows.device)
        elif self.expand:
            rows, token_at = prefill_expanded(
                self.llava, rows, token_at, self.cache, self.settings.queries
            )
        if shared:
            rows = rows[shared - len(ids) :]

        self.ids = ids
        queries = self.settings.queries
        for id in self.llava.decode(rows, token_at, self.cache, queries, max_new_tokens, **options):
            self.ids.append(id)
            yield id

    def go_back(self, ids: list[int], more: int) -> int:
        """Leaves in the cache what ids begin with -> how many of them; none, or all pictures.

        more: positions of the pictures beyond one for each placeholder
        """
        # the answer's last id is not in the cache, nor what it was stopped before
        cached = self.ids[: max(self.cache.positions - more, 0)]
        shared = 0
        while shared < min(len(cached), len(ids) - 1) and cached[shared] == ids[shared]:
            shared += 1

        placeholders = self.llava.config.placeholders
        if not shared or any(id in placeholders for id in ids[shared:]):
            self.cache = KVCache()
            self.ids = []
            return 0
        self.cache.rows -= len(cached) - shared
        self.cache.positions -= len(cached) - shared
        return shared


# ---- Where questions come from ----


def questions(given: str | None, converse: bool) -> tuple[str, Iterator[str]]:
    """-> the first question, and an iterator over all of them, it too

    given: the one on the command line; without one, or to converse, more are asked for: typed in a
    terminal, or one on each line of standard input. Raises ValueError if there is none.
    """
    if given is not None and not converse:
        return given, iter([given])
    asked = typed() if sys.stdin.isatty() else (line.strip() for line in sys.stdin if line.strip())
    first = given if given is not None else next(asked, None)
    if first is None:
        raise ValueError("the question is missing: it stands behind the picture, or in the input")
    return first, chain([first], asked)


def typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input then has history, and keys to edit
    note("one question a line; Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if line:
            yield line


def a_person_asks(a) -> bool:
    """a: the options"""
    return sys.stdin.isatty() and (a.question is None or a.chat)


@contextlib.contextmanager
def unless_stopped(a):
    """Where a person asks, what is wrong with a question, or Ctrl-C, is not the end."""
    try:
        yield
    except (ValueError, KeyboardInterrupt) as e:
        if not a_person_asks(a):
            raise
        note("stopped" if isinstance(e, KeyboardInterrupt) else one_line(e))
