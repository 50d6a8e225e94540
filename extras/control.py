"""Control over the tokens of a picture: how many at most, and where in it they matter.

For who has room for so many tokens and no more (`--cap`), or knows from a detector, an OCR or a
background remover what a question is about (`--box`, `--mask`; Fig. 6 of the paper). The second
stage does both: a cap lowers its tau, and what lies outside the regions has a tau of its own.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor, nn

from dymu import DyMU, Seen, remerge, similar_keys
from extras.anyres import positions
from extras.door import read_picture
from extras.families import classes
from extras.options import OUTSIDE, note
from extras.second_stage import second_stage
from extras.video import Frames, see
from load import Processor
from model import Llava

PART = 1 / 8  # of a patch: if so much of it is inside, it is

# ---- The second stage, within limits ----


@dataclass
class Controlled:
    """A picture or a video, as `Llava.encode` takes it, whose tokens the second stage limits.

    Inside, it is the settings' own, if they have one. Where the settings merge nothing at all, as
    in the plain model, `inside` is not heeded.
    """

    picture: object
    inside: Tensor | None = None  # (N,) bool, from `find_inside`; None: all of it
    outside: float = OUTSIDE  # rows outside that are more alike than this become one
    cap: int | None = None  # tokens at most: where there are more, tau falls until there are not
    tau: float | None = None  # to which it fell when the picture was last encoded

    @property
    def placeholders(self) -> tuple[str, ...]:
        return getattr(self.picture, "placeholders", ("<image>",))

    def encode(self, llava: Llava, settings: DyMU):
        """As `Llava.encode`. Raises ValueError for a cap that cannot be kept."""

        def after(x, token_at):
            newlines = positions(self.picture, llava.config) - len(token_at)
            return self.limit(x, token_at, settings, newlines)

        return llava.encode(self.picture, replace(settings, after=after))

    def limit(self, x: Tensor, token_at: Tensor, settings: DyMU, newlines: int):
        """x (R, D), token_at (N,), newlines: not among them -> the same with fewer rows"""
        everywhere = self.inside is None or (not settings.merging and settings.after is None)
        inside = torch.ones_like(token_at, dtype=torch.bool) if everywhere else self.inside
        merged = partial(apart, x, token_at, inside.to(x.device))

        def count(rows) -> int:
            """Where rows merged, one newline stands at the ends of all, but of each frame anew"""
            one = len(rows[0]) < len(token_at) and type(self.picture) is not Frames
            return len(rows[0]) + (min(newlines, 1) if one else newlines)

        self.tau = None
        stage = settings.after or second_stage(1.0)  # which merges nothing
        rows = merged(stage, second_stage(self.outside))
        if self.cap is None or count(rows) <= self.cap:
            return rows

        self.tau = -1.0
        most = getattr(stage, "tau", 1.0)
        rows = merged(second_stage(-1.0), second_stage(-1.0))
        if count(rows) > self.cap:
            raise ValueError(
                f"--cap {self.cap} cannot be kept: {count(rows)} tokens are left where all merge "
                "that may (no newline, and nothing inside with what is outside)"
            )
        for _ in range(12):
            tau = (self.tau + most) / 2
            found = merged(second_stage(tau), second_stage(min(tau, self.outside)))
            if count(found) <= self.cap:
                self.tau, rows = tau, found
            else:
                most = tau
        return rows


def plain(pixels: list) -> list:
    """The pictures and videos themselves, without what limits them"""
    return [one.picture if isinstance(one, Controlled) else one for one in pixels]


def apart(x: Tensor, token_at: Tensor, inside: Tensor, here: Callable, there: Callable):
    """Two second stages, `here` among the rows inside and `there` among the others.

    x (R, D), token_at (N,), inside (N,) bool -> the same with fewer rows. A row that stands on both
    sides is where most of its positions are.
    """
    share = remerge(inside[:, None].float(), token_at, len(x))[:, 0]
    merged = []
    new_at = torch.empty_like(token_at)
    n = 0
    for side, stage in ((share >= 0.5, here), (share < 0.5, there)):
        where = side[token_at]
        used, old_at = token_at[where].unique(return_inverse=True)
        rows, at = stage(x[used], old_at)
        merged.append(rows)
        new_at[where] = n + at
        n += len(rows)

    if n == len(x):  # the order stays
        return x, token_at
    return torch.cat(merged), new_at


def regions(inside: Tensor, similarity: Callable = similar_keys, gain: float = 2.0) -> Callable:
    """The same for the encoder, as a similarity: what is outside first, and never across an edge.

    inside (N,) bool, of a picture without tiles; gain: on pairs that are both outside. Its
    thresholds are found with a floor of -inf.
    """

    def with_regions(seen: Seen) -> Tensor:
        of = torch.zeros(len(seen.x), device=seen.x.device)  # the class token is on no side
        of[seen.token_at[-len(inside) :]] = 1 + inside.to(of)
        outside = of == 1
        bonus = gain * (outside[:, None] & outside)
        return (similarity(seen) + bonus).masked_fill(of[:, None] != of, -torch.inf)

    return with_regions


# ---- From regions of a picture to positions ----


def find_inside(processor: Processor, shown: list, i: int, found: list) -> tuple:
    """Which positions of shown[i] are in a region, (N,) bool; and all regions as a mask, or masks

    shown: pictures, and videos as lists of frames; found: regions, see `paint`; without one None in
    the place of positions. Painted in black and white, they go the way of the picture itself:
    resized, cropped, padded, cut into tiles. Raises ValueError for one of which nothing arrives.
    """
    one = shown[i]
    size = one[0].size if isinstance(one, list) else one.size
    inside = None
    together = Image.new("L", size)
    for start in range(0, len(found), 3):  # three at a time: one is red, one green, one blue
        three = [paint(region, size) for region in found[start : start + 3]]
        together = reduce(ImageChops.lighter, three, together)
        three += [Image.new("L", size)] * (3 - len(three))
        mask = Image.merge("RGB", three)
        masks = [mask.resize(frame.size, 0) for frame in one] if isinstance(one, list) else mask
        share = shares(processor, [*shown[:i], masks, *shown[i + 1 :]], i)

        most = share.amax(0)
        for region, m in zip(found[start:], most):
            if m == 0:
                raise ValueError(
                    f"nothing of {told(region)} is in what the model sees, which is a crop of the "
                    "picture, or it is too small; --pad shows a picture whole"
                )
        here = (share >= most.clamp(1e-6, PART)).any(1)
        inside = here if inside is None else inside | here

    if isinstance(one, list):
        return inside, [together.resize(frame.size, 0) for frame in one]
    return inside, together


def shares(processor: Processor, shown: list, i: int) -> Tensor:
    """How much of each colour there is in the patch at each position of shown[i] -> (N, 3)

    The positions are those that the second stage sees: what `encode` does to tokens is done to
    patches, by a model whose tower does nothing but give them.
    """
    c = processor.config

    def tower(pixels, settings):
        x = F.avg_pool2d(pixels, c.vision_config.patch_size).flatten(1).T
        # a class token that is kept is outside; of SigLIP a first patch may be dropped
        x = F.pad(x, (0, 0, c.visual_tokens - len(x), 0))
        return x, torch.arange(len(x))

    kind = classes(c.model_type)[1]
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = c
    model.vision_tower = tower
    model.multi_modal_projector = nn.Identity()
    model.image_newline = torch.zeros(3)

    found = []

    def keep(x, token_at):
        found.append(x[token_at])
        return x, token_at

    model.encode(see(unnormalised(processor), shown)[i], DyMU(after=keep))
    return found[0]


def unnormalised(processor: Processor) -> Processor:
    """One that gives pixels from 0 to 1, and pads with black"""
    plain = dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=False, image_mean=[0] * 3)
    processor = copy.copy(processor)
    processor.pictures = processor.pictures | plain
    processor.frames = processor.frames | plain
    return processor


def paint(region, size: tuple[int, int]) -> Image.Image:
    """A region in white on black, of this size, "L".

    region: a box (x0, y0, x1, y1), in pixels of the upright picture or, where none is above 1 and
    one is a float, in shares of its width and height; or a picture or its file, white inside, which
    is resized. Raises ValueError for a box that lies outside.
    """
    w, h = size
    if not isinstance(region, tuple):
        mask = read_picture(region).convert("L")
        if mask.size != size:
            note(f"note: {told(region)} was resized from {mask.size} to the picture's {size}")
        return mask.resize(size, Image.Resampling.NEAREST)

    x0, y0, x1, y1 = region
    if max(region) <= 1 and any(isinstance(edge, float) for edge in region):
        x0, y0, x1, y1 = x0 * w, y0 * h, x1 * w, y1 * h
    if x1 <= 0 or y1 <= 0 or x0 >= w or y0 >= h:
        raise ValueError(f"{told(region)} lies outside the picture, which is {w} x {h}")
    mask = Image.new("L", size)
    corners = (math.floor(x0), math.floor(y0), math.ceil(x1) - 1, math.ceil(y1) - 1)
    ImageDraw.Draw(mask).rectangle(corners, 255)
    return mask


def told(region) -> str:
    """As the command line has it"""
    if isinstance(region, tuple):
        return f"--box {','.join(map(str, region))}"
    return f"--mask {getattr(region, 'filename', region)}"


# ---- The command line ----


def control(a, processor: Processor, shown: list, pixels: list) -> tuple[list, list | None]:
    """What --cap, --box and --mask ask for, a: the options -> pixels; masks for --show, or None"""
    if not (a.cap or a.box or a.mask):
        return pixels, None

    controlled = []
    masks = []
    for i, picture in enumerate(pixels):
        of = [region for number, region in a.box + a.mask if number == i + 1]
        inside, mask = find_inside(processor, shown, i, of)
        outside = OUTSIDE if a.outside is None else a.outside
        controlled.append(Controlled(picture, inside, outside, a.cap))
        masks.append(mask)
    return controlled, masks
