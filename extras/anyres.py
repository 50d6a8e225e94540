"""AnyRes: pictures that a model sees whole and in tiles. For LLaVA-NeXT and LLaVA-OneVision.

Such a model puts the features of the tiles side by side, drops the rows and columns that were
padding, may resize what is left, and ends each row with one learned feature, image_newline. All but
the resizing moves features without changing them. So it is done here to the tokens' positions, in
token_at: with merging the virtual sequence is position by position the full model's, and newline is
one token that stands at many.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import Tensor, nn

from dymu import DyMU, remerge
from extras.door import read_picture
from extras.families import supported
from load import Processor, width_height
from model import Llava, LlavaConfig, as_list

NOT_ITS_OWN = "not what this model's processor makes of a picture"


@strict
@dataclass
class AnyResConfig(LlavaConfig):
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()  # (height, width) that tiles may form

    @property
    def anyres_max(self) -> int | None:
        """Tiles whose patches a picture may have at most: more are resized to that. None: any."""
        return None

    def validate_grids(self):
        side = self.vision_config.image_size
        edges = [edge for grid in self.image_grid_pinpoints for edge in grid]
        if not edges or any(edge < side or edge % side for edge in edges):
            wanted = f"a list of [height, width] in multiples of the tower's {side} pixels"
            raise ValueError(
                f"image_grid_pinpoints is {self.image_grid_pinpoints}, wanted {wanted}"
            )

    def validate_strategy(self):
        """The tokens of a crop must be the square of its patches."""
        fitting = "default" if self.vision_config.class_token else "full"
        found = self.vision_feature_select_strategy
        supported("vision_feature_select_strategy", found, fitting)


class AnyRes(Llava):
    """What is special about it is done by what it is shown: a Picture encodes itself."""

    def __init__(self, c: AnyResConfig):
        super().__init__(c)
        self.image_newline = nn.Parameter(torch.zeros(c.text_config.hidden_size))

    def encode(self, pixels, settings: DyMU = DyMU()):
        for one in as_list(pixels):
            if isinstance(one, Tensor):
                raise ValueError(f"pixels are a Tensor, {NOT_ITS_OWN}")
        return super().encode(pixels, settings)


class Picture(NamedTuple):
    """A picture as one crop, then its tiles, row by row."""

    crops: Tensor  # (1 + tiles, 3, H, W)
    size: tuple[int, int] | None  # height and width, which decide the tiles; None: there are none

    def grids(self, c: AnyResConfig) -> list[tuple[int, int]]:
        """(rows, columns) of its positions: the whole; then the tiles, where newlines are last"""
        g = c.vision_config.grid
        h, w = cut(self.size, c)[2] if self.size else (1, 0)
        return [(g, g), (h, w + 1)]

    def encode(self, llava: AnyRes, settings: DyMU) -> tuple[Tensor, Tensor]:
        """-> rows (R, D), token_at (N,). Raises ValueError for a wrong number of crops."""
        check_model(llava, AnyRes, self)
        x, at = encode_crops(llava, self.crops, settings)
        merged = len(x) < at.numel()
        whole = at[0]
        if not self.size:
            nothing = at.new_empty(1, 0)
            return end_rows(x, whole, nothing, llava.image_newline, merged, settings.after)

        (rows, columns), _, size = cut(self.size, llava.config)
        if len(at) != 1 + rows * columns:
            raise ValueError(
                f"{len(at)} crops of a picture of {self.size} (h, w), wanted {1 + rows * columns}"
            )

        grid = self.side_by_side(at[1:], llava.config)
        if grid.shape != size:
            resized, grid = resample(x, grid, size)
            grid = len(x) + grid
            x = torch.cat((x, resized))
        return end_rows(x, whole, grid, llava.image_newline, merged, settings.after)

    def side_by_side(self, tiles: Tensor, c: AnyResConfig) -> Tensor:
        """What stands in the tiles (tiles, N) -> the same as one grid (h, w), without padding"""
        (rows, columns), (above, left), _ = cut(self.size, c)
        g = c.vision_config.grid
        grid = rearrange(tiles, "(r c) (h w) -> (r h) (c w)", r=rows, h=g)
        return grid[above : rows * g - above, left : columns * g - left]


class AnyResProcessor(Processor):
    def __init__(self, folder, pad: bool = False):
        if pad:
            raise ValueError(
                "padding is for models that see one crop; AnyRes pads its tiles itself"
            )
        super().__init__(folder)
        self.pad = False  # do_pad is about batches here

    def check(self) -> None:
        side = self.config.vision_config.image_size
        grids = self.pictures.get("image_grid_pinpoints")
        if grids and sorted(map(tuple, grids)) != sorted(self.config.image_grid_pinpoints):
            raise ValueError("its image_grid_pinpoints are not those of config.json")
        if width_height(self.pictures["size"]) != (side, side):
            raise ValueError(f"its size is {self.pictures['size']}, the tower's {side}")

        black = Image.new("RGB", (side, side))
        for p in (self.pictures, self.frames):
            if not self.one_crop(black, p).isfinite().all():
                raise ValueError("pixels are not finite")

    def view(self, picture, several: bool = False) -> Image.Image:
        return read_picture(picture)

    def image(self, picture, several: bool = False):
        """As in `Processor`; of each picture a Picture."""
        if isinstance(picture, list):
            return super().image(picture)
        picture = self.view(picture, several)
        w, h = picture.size
        tiles = self.tiles(picture, cut((h, w), self.config)[0])
        return Picture(torch.stack([self.one_crop(picture, self.pictures), *tiles]), (h, w))

    def tiles(self, picture: Image.Image, grid: tuple[int, int]) -> list[Tensor]:
        """The picture as large as a grid (rows, columns) lets it be, padded with black and cut."""
        side = self.config.vision_config.image_size
        H, W = (side * n for n in grid)
        w, h = picture.size
        if W / w < H / h:
            size = W, min(math.ceil(h * (W / w)), H)
        else:
            size = min(math.ceil(w * (H / h)), W), H

        resized = picture.resize(size, self.pictures["resample"])
        left = (W - size[0]) // 2
        top = (H - size[1]) // 2
        padded = resized.crop((-left, -top, W - left, H - top))
        corners = [(x, y) for y in range(0, H, side) for x in range(0, W, side)]
        tiles = [padded.crop((x, y, x + side, y + side)) for x, y in corners]
        return [self.pixels(tile, self.pictures) for tile in tiles]

    def video(self, frames: list):
        """As in `Processor`; of each frame a Picture without tiles."""
        return [Picture(frame[None], None) for frame in self.all_frames(frames)]

    def all_frames(self, frames: list) -> list[Tensor]:
        if not frames:
            raise ValueError("a video without frames")
        return [self.one_crop(read_picture(frame), self.frames) for frame in frames]

    def one_crop(self, picture: Image.Image, p: dict) -> Tensor:
        """All of a picture as one crop, whatever its shape -> (3, H, W)"""
        side = self.config.vision_config.image_size
        return self.pixels(picture.resize((side, side), p["resample"]), p)


# ---- Arithmetic on positions ----


def cut(size: tuple[int, int], c: AnyResConfig):
    """How a picture of size (height, width) is cut, by transformers' rules. -> three pairs:

    the (rows, columns) of its tiles; in their grid of patches the padding (above, left), with as
    much below and right; and the (h, w) of the rest, which the cap may have made smaller.
    """
    height, width = size
    g = c.vision_config.grid
    side = c.vision_config.image_size

    def shows(resolution):
        """The grid that shows most pixels is best; of equals the one with least padding."""
        h, w = resolution
        scale = min(w / width, h / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - h * w

    rows, columns = (edge // side for edge in max(c.image_grid_pinpoints, key=shows))
    h = rows * g
    w = columns * g

    above = left = 0
    if width / height > w / h:
        above = (h - int(round(height * (w / width), 7))) // 2
    else:
        left = (w - int(round(width * (h / height), 7))) // 2
    h -= 2 * above
    w -= 2 * left

    # more patches than those of anyres_max tiles, by more than a tenth, are resized to that
    if c.anyres_max is not None:
        over = math.sqrt(h * w / (c.anyres_max * g**2))
        if over > 1.1:
            h = int(h // over)
            w = int(w // over)
    return (rows, columns), (above, left), (h, w)


def positions(pixels, c: LlavaConfig) -> int:
    """N of pixels, as `Llava.encode` takes them, before any merging"""
    counts = [
        c.visual_tokens if isinstance(one, Tensor) else sum(h * w for h, w in one.grids(c))
        for one in as_list(pixels)
    ]
    return sum(counts)


def placeholders(pixels) -> int:
    """How many stand for pixels in a prompt"""
    return sum(len(getattr(one, "placeholders", (one,))) for one in as_list(pixels))


def check_model(llava: Llava, kind: type, shown) -> None:
    """Raises ValueError where something is shown to a model that was not trained on its kind."""
    if not isinstance(llava, kind):
        raise ValueError(f"pixels are a {type(shown).__name__}, {NOT_ITS_OWN}")


def encode_crops(llava: Llava, crops, settings: DyMU) -> tuple[Tensor, Tensor]:
    """crops (C, 3, H, W) -> the rows of all (R, D), and which of them stand where in each (C, N)"""
    x, maps = chain([llava.vision_tower(crop, settings) for crop in crops])
    return llava.multi_modal_projector(x), torch.stack(maps)


def chain(visual: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Of each x (R, D), token_at (N,) -> all rows, and each map over all of them"""
    maps = []
    n = 0
    for x, token_at in visual:
        maps.append(n + token_at)
        n += len(x)
    return torch.cat([x for x, _ in visual]), maps


def end_rows(
    x: Tensor, front: Tensor, grid: Tensor, newline: Tensor, merged: bool, after=None
) -> tuple[Tensor, Tensor]:
    """Ends each row of positions with newline -> rows, token_at

    x (R, D), front (F,) what stands before the grid, grid (h, w), newline (D,). It is one token
    that stands at all ends. Where nothing has merged each end has a row of its own: the average of
    Eq. 11 over one at many positions would not be the full model's. after: see `DyMU`; newline
    does not take part in it.
    """
    if after is not None:
        x, at = after(*settle(x, torch.cat((front, grid.flatten()))))
        front, rest = at.split((len(front), grid.numel()))
        grid = rest.view_as(grid)
        merged = merged or len(x) < len(at)

    ends = len(x) + torch.arange(len(grid), device=x.device) * (not merged)
    x = torch.cat((x, newline.expand(len(grid), -1)))
    grid = torch.cat((grid, ends[:, None]), dim=1)
    return settle(x, torch.cat((front, grid.flatten())))


def settle(x: Tensor, token_at: Tensor) -> tuple[Tensor, Tensor]:
    """x (R, D), token_at (N,) -> the rows that stand somewhere, numbered anew.

    Where no position shares its row with another the rows are put in the order of positions:
    token_at is the identity then, and the decoder plain Llama.
    """
    used, token_at = token_at.unique(return_inverse=True)
    if len(used) < len(token_at):
        return x[used], token_at
    return x[used[token_at]], torch.arange(len(used), device=x.device)


def resample(x: Tensor, grid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows x (R, D), grid (h, w) which of them stands where -> the same of that grid resized.

    The virtual grid is resized bilinearly, all of its positions, as the full model does. New
    positions share a token where the nearest old ones did, and its row is the average over them,
    as in Eq. 11. Where nothing has merged this is the full model's resizing and nothing else.
    """
    resized = F.interpolate(rearrange(x[grid], "h w d -> 1 d h w"), size, mode="bilinear")
    used, token_at = nearest(grid, size).flatten().unique(return_inverse=True)
    rows = remerge(rearrange(resized, "1 d h w -> (h w) d"), token_at, len(used))
    return rows, token_at.view(size)


def nearest(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """A grid (h, w) of whole numbers, resized: at each new position what stood nearest to it"""
    return F.interpolate(grid[None, None].float(), size, mode="nearest-exact")[0, 0].long()
