"""AnyRes and video as arithmetic on positions: what the full model does to a grid of features, done to token_at.

For high resolution a model sees a picture whole and in tiles. It puts the features of the tiles side by side, drops the
rows and columns that were padding, may resize what is left, and ends each row with one learned feature, image_newline.
All but the resizing moves features without changing them. So it is done here to the tokens' places in the map: with
merging the virtual sequence is position by position the full model's, and newline is one token that stands at many
(where nothing has merged each has a row of its own: the average of Eq. 11 over them would not be the full model's).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dymu import join_frames, remerge


class Picture(NamedTuple):
    """What an AnyRes model takes of a picture: the whole as one crop, then its tiles, row by row."""

    crops: Tensor  # (1 + tiles, 3, H, W)
    size: tuple[int, int] | None  # height and width of the picture, which decide the tiles; None: there are none


class Video(NamedTuple):
    frames: Tensor  # (F, 3, H, W)


def as_list(shown) -> list:
    """One of what a prompt shows, or a list of them -> a list."""
    return shown if isinstance(shown, list) else [shown]


def cut(size: tuple[int, int], c) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """How a picture of size (height, width) is cut: the (rows, columns) of its tiles; in their grid of patches the
    padding (above, left), and as much below and right; and the (h, w) of the rest, which the cap may have made smaller.

    c: LlavaConfig. The tiles are those that show the most pixels of the picture; of equals those with least padding.
    """
    (height, width), g, side = size, c.vision_config.grid, c.vision_config.image_size

    def shows(resolution):
        h, w = resolution
        scale = min(w / width, h / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - h * w

    rows, columns = (edge // side for edge in max(c.image_grid_pinpoints, key=shows))
    h, w, above, left = rows * g, columns * g, 0, 0
    if width / height > w / h:
        above = (h - int(round(height * (w / width), 7))) // 2
    else:
        left = (w - int(round(width * (h / height), 7))) // 2
    h, w = h - 2 * above, w - 2 * left
    over = math.sqrt(h * w / (c.anyres_max * g**2)) if c.anyres_max else 0
    return (rows, columns), (above, left), (int(h // over), int(w // over)) if over > 1.1 else (h, w)


def grids(pixels: Picture | Video, c) -> list[tuple[int, int]]:
    """The grids (rows, columns) of virtual positions that a picture or video takes, one after another.

    The whole, then the tiles, whose last column is newlines; or the frames. Without tiles one newline is at the end.
    """
    g = c.vision_config.grid
    if isinstance(pixels, Video):
        return [(math.ceil(g / 2), math.ceil(g / 2))] * len(pixels.frames) + [(1, 1)]
    h, w = cut(pixels.size, c)[2] if pixels.size else (1, 0)
    return [(g, g), (h, w + 1)]


def positions(pixels, c) -> int:
    """The virtual positions N that pixels, as `Llava.encode` takes them, will have."""
    if isinstance(pixels, list):
        return sum(positions(one, c) for one in pixels)
    return c.visual_tokens if isinstance(pixels, Tensor) else sum(h * w for h, w in grids(pixels, c))


def arrange(x: Tensor, at: Tensor, newline: Tensor, pixels: Picture | Video, c, temporal=None) -> tuple[Tensor, Tensor]:
    """Rows x (R, D) of crops or frames, at (C, N) which of them stands where in each -> rows, token_at (N,) of it all.

    newline: (D,). temporal: as in `DyMU`. Raises ValueError for a number of crops that is not the picture's.
    """
    g, merged = c.vision_config.grid, len(x) < at.numel()
    front, grid = at[0], at.new_empty(1, 0)  # the whole; and nothing before the one newline
    if isinstance(pixels, Video):  # frames are pooled 2 x 2
        frames = [resample(x, frame.view(g, g), grids(pixels, c)[0]) for frame in at]
        x, front = map(torch.cat, zip(*join_frames([(x, frame.flatten()) for x, frame in frames], temporal)))
    elif pixels.size:
        (rows, columns), (above, left), size = cut(pixels.size, c)
        if len(at) != 1 + rows * columns:
            raise ValueError(f"{len(at)} crops of a picture of {pixels.size} (h, w), wanted {1 + rows * columns}")
        grid = rearrange(at[1:], "(r c) (h w) -> (r h) (c w)", r=rows, h=g)  # the tiles side by side
        grid = grid[above : rows * g - above, left : columns * g - left]  # without the padding
        if grid.shape != size:
            resized, grid = resample(x, grid, size)
            x, grid = torch.cat((x, resized)), len(x) + grid
    line = len(x) + torch.arange(len(grid), device=x.device) * (not merged)
    x = torch.cat((x, newline.expand(len(grid), -1)))
    return settle(x, torch.cat((front, torch.cat((grid, line[:, None]), dim=1).flatten())))


def settle(x: Tensor, token_at: Tensor) -> tuple[Tensor, Tensor]:
    """x (R, D), token_at (N,) -> the rows that stand somewhere, numbered anew. Where no position shares its row with
    another they are put in the order of positions: token_at is the identity then, and the decoder plain Llama."""
    used, token_at = token_at.unique(return_inverse=True)
    if len(used) < len(token_at):
        return x[used], token_at
    return x[used[token_at]], torch.arange(len(used), device=x.device)


def resample(x: Tensor, grid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows x (R, D), grid (h, w) which of them stands where -> the same of that grid resized to `size`.

    The virtual grid is resized bilinearly, all of its positions, as the full model does. Which of the new positions
    share a token says the nearest old one; the average over them, as in Eq. 11, is the token's row. Where nothing has
    merged this is the full model's resizing and nothing else.
    """
    resized = F.interpolate(rearrange(x[grid], "h w d -> 1 d h w"), size, mode="bilinear")
    nearest = F.interpolate(grid[None, None].float(), size, mode="nearest-exact").long().flatten()
    used, token_at = nearest.unique(return_inverse=True)
    return remerge(rearrange(resized, "1 d h w -> (h w) d"), token_at, len(used)), token_at.view(size)
