"""Control over the tokens of a picture: how many at most, and where in it they matter.

For who has room for so many tokens and no more (`--cap`), or knows from a detector, an OCR or a
background remover what a question is about (`--box`, `--mask`; Fig. 6 of the paper). The second
stage does both: a cap lowers its tau, and what lies outside the regions has a tau of its own.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor, nn

from dymu import DyMU, Seen, remerge, similar_keys
from extras.anyres import AnyResProcessor, positions
from extras.door import on_white, read_picture, transparent
from extras.families import classes
from extras.options import OUTSIDE, note
from extras.second_stage import between, second_stage
from extras.video import Frames, see_one, several_pictures
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
    outside: float = OUTSIDE  # tau outside, where that inside is not lower still
    cap: int | None = None  # tokens at most: where there are more, tau falls until there are not

    # of the picture when it was last encoded: the tau to which the cap made it fall, None: it did
    # not; and (tau inside, tau outside) that were used, None where there was none, or neither
    tau: float | None = None
    used: tuple[float | None, float | None] | None = None

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
        inside = inside.to(x.device)

        def merged(stage: Callable, tau: float):
            return apart(x, token_at, inside, stage, second_stage(min(tau, self.outside)))

        def count(rows) -> int:
            """Where rows merged, one newline stands at the ends of all, but of each frame anew"""
            one = len(rows[0]) < len(token_at) and type(self.picture) is not Frames
            return len(rows[0]) + (min(newlines, 1) if one else newlines)

        self.tau = None
        most = getattr(settings.after, "tau", 1.0)  # of 1 nothing merges
        rows = merged(settings.after or second_stage(most), most)
        if self.cap is not None and count(rows) > self.cap:
            rows = self.fall(merged, count, most)

        here = getattr(settings.after, "tau", None) if self.tau is None else self.tau
        there = None if everywhere else min(most if here is None else here, self.outside)
        self.used = None if here is None and there is None else (here, there)
        return rows

    def fall(self, merged: Callable, count: Callable, most: float):
        """The highest tau below most, as near as 12 halvings come, with which the cap is kept"""

        def at(tau):
            return merged(second_stage(tau), tau)

        self.tau = -1.0
        rows = at(self.tau)
        if count(rows) > self.cap:
            raise ValueError(
                f"--cap {self.cap} cannot be kept: {count(rows)} tokens are left where all merge "
                "that may (no newline, and nothing inside with what is outside)"
            )
        self.tau, _ = between(lambda tau: count(at(tau)) <= self.cap, self.tau, most, halvings=12)
        return at(self.tau)


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


def find_inside(processor: Processor, shown: list, i: int, of: list) -> tuple:
    """Which positions of shown[i] are in a region, (N,) bool; and all regions as a mask, or masks

    shown: pictures, and videos as lists of frames; of: regions, see `paint`; without one None in
    the place of positions. Painted in black and white, they go the way of the picture itself:
    resized, cropped, padded, cut into tiles. Raises ValueError for one of which nothing arrives.
    """
    one = shown[i]
    size = one[0].size if isinstance(one, list) else one.size
    inside = None
    together = Image.new("L", size)
    for start in range(0, len(of), 3):  # three at a time: one is red, one green, one blue
        three = [paint(region, size) for region in of[start : start + 3]]
        together = reduce(ImageChops.lighter, three, together)
        three += [Image.new("L", size)] * (3 - len(three))
        mask = Image.merge("RGB", three)
        masks = in_each(one, mask) if isinstance(one, list) else mask
        share = shares(processor, masks, several_pictures(shown))

        most = share.amax(0)
        for region, m in zip(of[start:], most):
            if m == 0:
                raise ValueError(
                    f"nothing of {told(region)} is in what the model sees, {why_nothing(processor)}"
                )
        here = (share >= most.clamp(1e-6, PART)).any(1)
        inside = here if inside is None else inside | here

    return inside, in_each(one, together) if isinstance(one, list) else together


def in_each(frames: list, mask: Image.Image) -> list:
    return [mask.resize(frame.size, Image.Resampling.NEAREST) for frame in frames]


def why_nothing(processor: Processor) -> str:
    whole = isinstance(processor, AnyResProcessor) or processor.pad
    if whole or not processor.pictures["do_center_crop"]:
        return "which is the whole picture: it is too small, or black"
    return "which is a crop of the picture, or it is too small; --pad shows a picture whole"


def shares(processor: Processor, one, several: bool) -> Tensor:
    """How much of each colour there is in the patch at each position -> (N, 3)

    one: a picture, which may be one of several, or a list of frames.
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

    model.encode(see_one(unnormalised(processor), one, several), DyMU(after=keep))
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
    one is a float, in shares of its width and height; or a picture or its file, which is resized:
    white inside or, where it is transparent in part, whatever is not. Raises ValueError for a box
    that lies outside.
    """
    w, h = size
    if not isinstance(region, tuple):
        mask = read_picture(region, white)
        if mask.size != size:
            note(f"note: {told(region)} was resized from {mask.size} to the picture's {size}")
        return mask.resize(size, Image.Resampling.NEAREST)

    x0, y0, x1, y1 = region
    if max(region) <= 1 and any(isinstance(edge, float) for edge in region):
        x0, y0, x1, y1 = x0 * w, y0 * h, x1 * w, y1 * h
    if x1 <= 0 or y1 <= 0 or x0 >= w or y0 >= h:
        raise ValueError(f"{told(region)} lies outside the picture, which is {w} x {h}")
    mask = Image.new("L", size)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, w), min(y1, h)
    corners = (math.floor(x0), math.floor(y0), math.ceil(x1) - 1, math.ceil(y1) - 1)
    ImageDraw.Draw(mask).rectangle(corners, 255)
    return mask


def white(image: Image.Image) -> Image.Image:
    """How far each pixel is inside, "L": see `paint`. Of masks from 0 to 1 the ones are white."""
    if transparent(image) and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        return image.convert("RGBA").getchannel("A")
    mask = on_white(image).convert("L")
    return mask.point(lambda value: 255 * value) if mask.getextrema()[1] == 1 else mask


def told(region) -> str:
    """As the command line has it"""
    if isinstance(region, tuple):
        return f"--box {','.join(map(str, region))}"
    return f"--mask {getattr(region, 'filename', region)}"


# ---- The command line ----


def control(a, processor: Processor, shown: list, pixels: list) -> tuple[list, list | None]:
    """What --cap, --box and --mask ask for, a: the options -> pixels; masks for --show, or None"""
    given = a.box + a.mask
    if not given:
        return [Controlled(one, cap=a.cap) for one in pixels] if a.cap else pixels, None

    controlled = []
    masks = []
    for i, picture in enumerate(pixels):
        of = [region for number, region in given if number == i + 1]
        inside, mask = find_inside(processor, shown, i, of)
        outside = OUTSIDE if a.outside is None else a.outside
        controlled.append(Controlled(picture, inside, outside, a.cap))
        masks.append(mask)
    return controlled, masks
