"""A page for a browser that shows the tokens merge, layer by layer: for `--show FILE.html`.

One file that needs nothing else: page.html, and in it, as JSON, what was run. What the encoder does
is noted while it encodes for the answer, by settings that change nothing (`Recording`). Of all that
there is of a token the page has it at each patch: that is a few arrays of one length, packed.
"""

import base64
import hashlib
import io
import json
import re
import zlib
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from dymu import DyMU, Seen, at_least_float32, match, merge
from extras import show
from extras.anyres import nearest
from extras.control import plain
from extras.decoding import sampler
from extras.door import atomically
from extras.looked import looked
from extras.options import NONE
from extras.sampled import fewer_if_long
from extras.video import Video
from model import KVCache

TEMPLATE = Path(__file__).with_suffix(".html")
ROOM = 150_000  # bytes of attention that the page keeps of a budget, for each of up to 3 pictures


def asked(a) -> bool:
    """a: the options"""
    return a.show is not None and a.show.name.lower().endswith(".html")


@dataclass(frozen=True)
class Recording(DyMU):
    """Settings that do what `DyMU` does, and note it: of each crop, layer by layer."""

    noted: list = field(default_factory=list)

    def choose(self, score: Tensor, seen: Seen) -> Tensor:
        """The encoder is timed: what is made of it is made later, by `steps_of`"""
        chosen = super().choose(score, seen)
        keys = at_least_float32(seen.k).mean(0, keepdim=True)  # all that `similar_keys` reads
        self.noted.append((score, chosen, replace(seen, x=None, q=None, k=keys, v=None)))
        return chosen

    def at_positions(self, score: Tensor, chosen: Tensor, seen: Seen) -> Tensor:
        """What was noted of a layer -> (5, N) at each position: its token before and after, that
        which it was compared with, the score (-inf for the tokens of B), and whether they merged"""
        _, partner = match(self.similarity(seen), seen.class_token)
        _, _, after = merge(seen.size[:, None], seen.size, seen.token_at, partner, chosen)
        pairs = score.new_zeros(3, len(seen.size))
        pairs[1] = -torch.inf
        pairs[:, ::2] = torch.stack((1 + 2 * partner, score, chosen))
        return torch.cat((torch.stack((seen.token_at, after)), pairs[:, seen.token_at])).cpu()


def save(a, shown: list, masks, sessions: dict, reports: dict, question: str) -> None:
    """As `show.save`, for sessions whose settings are `Recording`s"""
    session = next(iter(sessions.values()))
    prompt = session.prompt(question)
    views = show.views_of(session.processor, shown)
    position = show.patches(session.processor.config, session.pixels, each_position(session.visual))
    views = [(view.convert("RGB"), *at.shape) for view, at in zip(views, position)]
    colours = [mean_colours(*view) for view in views]
    for (view, *_), mask in zip(views, show.regions_of(session.processor, masks)):
        view.paste(show.ACCENT, mask=show.outline(mask, view.size))
    # the decoder reads what the last layer leaves, or there is a step behind it, of all budgets
    pairs = [(one, reports[name]) for name, one in sessions.items()]
    further = any(
        second_stage_of(one) or report.visual_tokens != report.tokens_per_layer[-1]
        for one, report in pairs
    )
    budgets = [budget(a, one, prompt, report, further) for one, report in pairs]
    reference = budgets[0]["answers"][0]
    for name, one in zip(sessions, budgets):
        one["name"] = name
        one["answers"] = [compared(answer, reference) for answer in one["answers"]]

    undrawn = budgets[0]["of"] - len(flat(position)) > len(position)  # as in `show.words`
    data = {
        "question": question,
        "model": a.model,
        "method": {"dtome": "DToMe", "tome": "ToMe"}[a.method],
        "files": list(map(str, a.pictures)),
        "about": show.WHOLE * undrawn + " " + show.crops(session.processor, shown),
        "frames": all(isinstance(one, list) for one in shown),
        "views": [{"h": h, "w": w, "picture": webp(view, h, w)} for view, h, w in views],
        "colours": pack(torch.cat(colours)),
        "position": pack(flat(position)),
        "budgets": budgets,
    }
    with atomically(a.show) as part:
        part.write_text(filled(data), encoding="utf-8", newline="\n")


def filled(data: dict) -> str:
    """The template with the data in it, and with a policy by which nothing else is run or loaded"""
    template = TEMPLATE.read_text(encoding="utf-8")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:"
    for kind in ("style", "script"):
        inside = re.search(rf"<{kind}>(.*?)</{kind}>", template, re.S)[1]
        digest = hashlib.sha256(inside.encode()).digest()
        policy += f"; {kind}-src 'sha256-{base64.b64encode(digest).decode()}'"

    # without a < no text can end the element that it stands in
    before, after = template.replace("%POLICY%", policy).split("%DATA%")
    return before + json.dumps(data).replace("<", "\\u003c") + after


# ---- What a budget did ----


def budget(a, session, prompt: Tensor, report, further: bool) -> dict:
    """All that the page says of a budget; further: there is a step behind the encoder's layers"""
    settings = session.settings
    c = session.processor.config
    grids, crops = sources(c, session.pixels)
    steps = steps_of(settings, c.vision_layers, flat(grids))
    counts = [crops * c.visual_tokens, *report.tokens_per_layer]
    behind = None
    if further:
        by = second_stage_of(session)
        behind = f"Behind the second stage ({by})" if by else "What the model reads"
        drawn = flat(show.patches(c, session.pixels, session.visual))
        steps.append({"token": drawn.unique(return_inverse=True)[1]})
        counts.append(report.visual_tokens)

    answers = [report.answer, other_answer(a, session, prompt)]
    if not settings.vtu and answers[1] is not None:
        answers.reverse()
    return {
        "tokens": report.visual_tokens,
        "of": report.virtual_tokens,
        "counts": counts,
        "taus": settings.thresholds,
        "behind": behind,
        "steps": [{key: pack(value) for key, value in one.items()} for one in steps],
        "answers": answers,
        "looked": attention(session, prompt),
    }


def second_stage_of(session) -> str:
    """What it went by, of all pictures; empty: there was none"""
    own = getattr(session.settings.after, "tau", None)
    said = []
    for used in session.used:
        for tau, where in zip(used or (own, None), ("", " outside the regions")):
            if tau is not None:
                rule = "all into one token" if tau == NONE else f"cosine above {tau:.4f}"
                said.append(rule + where)
    return ", ".join(dict.fromkeys(said))


def attention(session, prompt: Tensor) -> dict | None:
    """What `looked` finds, at each patch, as bytes of which 255 is a word's most: of as many layers
    as there is ROOM for"""
    found = looked(session, prompt)
    if found is None:
        return None
    words, weight = found
    visual = each_position(session.visual) if session.settings.vtu else session.visual
    drawn = flat(show.patches(session.processor.config, session.pixels, visual))

    layers = len(weight)
    fit = min(max(ROOM * min(len(session.visual), 3) // weight[0].numel(), 1), layers)
    kept = [(i + 1) * layers // fit - 1 for i in range(fit)]
    share = weight[kept].sum(-1)
    weight = weight[kept][:, :, drawn] * (drawn >= 0)
    most = weight.amax(-1, keepdim=True)
    return {
        "words": words,
        "layers": [i + 1 for i in kept],
        "of": layers,
        "share": pack(share),
        "most": pack(most),
        "weight": pack((255 * weight / most.clamp(min=1e-30)).round().byte()),
    }


def steps_of(settings: Recording, layers: int, at: Tensor) -> list[dict[str, Tensor]]:
    """At each patch, before the first layer and behind each: the number of its token, and in the
    layer its score, a patch of the token that it was compared with (len(at): none is drawn), and
    whether they merged.

    at (P,): where the patches are among the positions of all crops
    """
    own = {"token": torch.arange(len(at))}
    if not settings.noted:  # nothing merges
        return [own] * (1 + layers)

    noted = torch.stack([settings.at_positions(*one) for one in settings.noted])
    N = noted.shape[-1]
    noted[:, :3] += N * (torch.arange(len(noted))[:, None, None] // layers)  # another crop, others
    steps = [own]
    for layer in rearrange(noted, "(c l) k n -> l k (c n)", l=layers)[:, :, at]:
        before, after, partner = layer[:3].long()
        patch_of = torch.full((N * len(noted),), len(at))
        patch_of[before] = torch.arange(len(at))
        steps.append({"token": after, "score": layer[3].float(), "partner": patch_of[partner]})
        steps[-1]["chosen"] = layer[4].byte()
    return steps


def sources(c, pixels: list) -> tuple[list[Tensor], int]:
    """Where the patches (h, w) that `show.patches` gives are among the positions of all crops, one
    crop after another, class tokens among them; and how many crops there are"""
    g = c.vision_config.grid
    first = int(c.vision_config.class_token)
    crops = 0
    found = []
    for part in plain(pixels):
        of_frame = part.grids(c)[0] if isinstance(part, Video) else (g, g)
        for one in getattr(part, "frames", [part]):
            n = 1 if isinstance(one, Tensor) else len(one.crops)
            at = (crops + torch.arange(n))[:, None] * (first + g * g) + first + torch.arange(g * g)
            crops += n
            if n == 1:
                found.append(nearest(at.view(g, g), of_frame))
            else:
                h, w = one.grids(c)[1]
                found.append(nearest(one.side_by_side(at[1:], c), (h, w - 1)))
    return found, crops


@torch.no_grad()
def other_answer(a, session, prompt: Tensor) -> str | None:
    """The answer without VTU, or with, where the budget's own is without; None: nothing merged"""
    if all(len(x) == len(at) for x, at in session.visual):
        return None
    llava = session.llava
    vtu = not session.settings.vtu
    queries = fewer_if_long if vtu else None  # as demo.py by default
    rows, token_at = llava.splice(prompt, session.visual, vtu)
    pick = sampler(a.temperature, a.seed, rows.device)
    ids = llava.decode(rows, token_at, KVCache(), queries, a.max_new_tokens, pick=pick)
    return session.processor.decode(ids).strip()


def compared(answer: str | None, reference: str) -> list[tuple[str, bool]] | None:
    """The words of an answer, and of each whether it differs from those of the reference"""
    if answer is None:
        return None
    words = answer.split()
    differs = [True] * len(words)
    matcher = SequenceMatcher(None, reference.split(), words, autojunk=False)
    for _, start, n in matcher.get_matching_blocks():
        differs[start : start + n] = [False] * n
    return list(zip(words, differs))


# ---- Small things ----


def each_position(visual: list) -> list[tuple[Tensor, Tensor]]:
    """What `Llava.encode` gave, as if each position had a row of its own"""
    return [(at[:, None], torch.arange(len(at))) for _, at in visual]


def flat(grids: list[Tensor]) -> Tensor:
    return torch.cat([grid.flatten() for grid in grids])


def pack(x: Tensor) -> dict[str, str]:
    """-> {the type of its numbers: their bytes}; whole numbers are as narrow as they can be"""
    if not x.is_floating_point():
        kinds = {torch.uint8: 2**8, torch.uint16: 2**16, torch.int32: 2**31}
        most = 2**16 if int(x.min()) < 0 else int(x.max())
        x = x.to(next(kind for kind, end in kinds.items() if most < end))
    data = bytes(x.contiguous().view(torch.uint8).flatten().tolist())
    return {str(x.dtype).removeprefix("torch."): base64.b64encode(zlib.compress(data)).decode()}


def webp(view: Image.Image, h: int, w: int) -> str:
    """A picture or frame of (h, w) patches as a URL"""
    side = max(14, 336 // max(h, w))
    file = io.BytesIO()
    view.resize((w * side, h * side)).save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def mean_colours(view: Image.Image, h: int, w: int) -> Tensor:
    return torch.tensor(list(view.resize((w, h), Image.Resampling.BOX).tobytes()))
