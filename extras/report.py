"""What an answer cost: for the line of figures, and for --json."""

import contextlib
import time
from dataclasses import dataclass
from functools import partial

import torch

from dymu import DyMU
from extras.chat import Session
from model import Llava, as_list


@dataclass
class Report:
    """What --json prints, behind the model and the settings."""

    answer: str
    visual_tokens: int
    virtual_tokens: int
    tokens_per_layer: list[int]  # visual tokens after the merge of each encoder layer
    reused: int  # positions of the prompt that an earlier question had read
    encoder_s: float  # 0 where an earlier question had the pictures encoded
    prefill_s: float
    decode_tokens_per_s: float
    cache_bytes: int
    capped_tau: list[float | None]  # of each picture, to which --cap lowered the second stage's
    device: str
    dtype: str

    def __str__(self):
        reused = f"{self.reused} positions reused, " if self.reused else ""
        taus = ", ".join(f"{tau:.3f}" for tau in self.capped_tau if tau is not None)
        capped = f"capped with tau {taus}, " if taus else ""
        return (
            f"visual tokens {self.virtual_tokens} -> {self.visual_tokens} "
            f"({100 * self.visual_tokens / self.virtual_tokens:.0f} %), {capped}{reused}"
            f"encoder {self.encoder_s:.2f} s, prefill {self.prefill_s:.2f} s, "
            f"{self.decode_tokens_per_s:.1f} tokens/s, cache {self.cache_bytes / 2**20:.3g} MiB"
        )

    def row(self, name: str) -> str:
        counts = f"{self.visual_tokens:4} of {self.virtual_tokens} tokens"
        times = f"encoder {1000 * self.encoder_s:4.0f} ms, prefill {1000 * self.prefill_s:4.0f} ms"
        return f"{name:>6} {counts}, {times}: {' '.join(self.answer.split())}"


class Measured(Session):
    """A session that answers in text and says what it cost.

    turns: (question, answer) of the conversation so far; options: as in `Session`
    """

    def __init__(self, llava: Llava, processor, pixels, settings: DyMU = DyMU(), **options):
        self.processor = processor
        self.pixels = pixels
        self.turns = []
        start = time.perf_counter()
        with count_tokens(llava) as self.tokens_per_layer:
            super().__init__(llava, pixels, settings, **options)
        where = llava.language_model.embed_tokens.weight.device
        if where.type != "cpu":
            torch.accelerator.synchronize(where)
        self.encoder_s = time.perf_counter() - start
        self.capped_tau = [getattr(one, "tau", None) for one in as_list(pixels)]
        self.used = [getattr(one, "used", None) for one in as_list(pixels)]  # see `Controlled`

    def prompt(self, question: str) -> torch.Tensor:
        return self.processor.prompt(question, self.pixels, self.turns)

    def reply(
        self, ids, max_new_tokens: int = 128, pick=torch.argmax, stream=None, stoppable=False
    ) -> Report:
        """The answer to ids (T,); stream, if there is one, is called with each new piece of it.

        stoppable: Ctrl-C ends it where it is, but not before the first piece
        """
        encoder_s = 0.0 if self.ids else self.encoder_s
        new = []
        streamed = ""
        start = prefilled = time.perf_counter()
        try:
            for id in self.ask(ids, max_new_tokens, pick=pick):
                if not new:
                    prefilled = time.perf_counter()
                new.append(id)
                text = self.processor.decode(new).strip() if stream else ""
                whole = not text.endswith("\ufffd")  # else more bytes of a character are to come
                if text and whole:
                    stream(text[len(streamed) :])
                    streamed = text
        except KeyboardInterrupt:
            if not (stoppable and new):
                raise
        end = time.perf_counter()

        text = self.processor.decode(new).strip()
        if stream:
            stream(text[len(streamed) :])
        weight = self.llava.language_model.embed_tokens.weight
        return Report(
            answer=text,
            visual_tokens=sum(len(x) for x, _ in self.visual),
            virtual_tokens=sum(len(at) for _, at in self.visual),
            tokens_per_layer=self.tokens_per_layer,
            reused=self.reused,
            encoder_s=encoder_s,
            prefill_s=prefilled - start,
            decode_tokens_per_s=max(len(new) - 1, 0) / (end - prefilled),
            cache_bytes=self.cache.bytes,
            capped_tau=self.capped_tau,
            device=str(weight.device),
            dtype=str(weight.dtype).removeprefix("torch."),
        )


@contextlib.contextmanager
def count_tokens(llava: Llava):
    """Gives a list in which the tokens that leave each encoder layer are counted meanwhile."""
    c = llava.config
    first = int(c.vision_config.class_token and c.vision_feature_select_strategy == "default")
    layers = llava.vision_tower.layers
    counts = [0] * len(layers)

    def count(i, fc2, args, out):
        counts[i] += len(out) - first

    hooks = [layer.fc2.register_forward_hook(partial(count, i)) for i, layer in enumerate(layers)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
