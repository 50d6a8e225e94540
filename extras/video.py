"""Videos: frames from files, LLaVA-OneVision's way to see them, joining what stands still.

For who asks about a film, a GIF or a folder of frames. LLaVA-OneVision has a placeholder of its own
for a video; to other models its frames are pictures.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from PIL import Image, ImageSequence
from torch import Tensor

from dymu import DyMU, average, cosine
from extras import anyres
from extras.door import one_line, read_picture
from extras.families import supported
from extras.options import note
from load import pad_to_square
from model import as_list

FILMS = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm", ".wmv", ".3gp", ".mpg", ".mpeg", ".flv")
FILMS += (".ogv", ".mts", ".m2ts")

# ---- LLaVA-OneVision ----


@strict
@dataclass
class OneVisionConfig(anyres.AnyResConfig):
    video_token_index: int = 151647
    vision_aspect_ratio: str = "anyres_max_9"

    @property
    def anyres_max(self) -> int:
        return int(self.vision_aspect_ratio.removeprefix("anyres_max_"))

    @property
    def placeholders(self) -> tuple[int, int]:
        return (self.image_token_index, self.video_token_index)

    def validate_aspect_ratio(self):
        found = self.vision_aspect_ratio
        fits = re.fullmatch(r"anyres_max_[1-9]\d*", found)
        supported("vision_aspect_ratio", found, found if fits else "anyres_max_N")


class Video(NamedTuple):
    frames: Tensor  # (F, 3, H, W)
    temporal: float | None = None  # joins its frames, see `join`
    placeholder = "<video>"

    def grids(self, c: OneVisionConfig) -> list[tuple[int, int]]:
        """(rows, columns) of its positions: of each frame, pooled 2 x 2; and one newline"""
        side = math.ceil(c.vision_config.grid / 2)
        return [(side, side)] * len(self.frames) + [(1, 1)]

    def encode(self, llava, settings: DyMU) -> tuple[Tensor, Tensor]:
        """-> rows (R, D), token_at (N,)"""
        anyres.check_model(llava, OneVision, self)
        x, at = anyres.encode_crops(llava, self.frames, settings)
        g = llava.config.vision_config.grid
        size = self.grids(llava.config)[0]

        frames = []
        for frame in at:
            pooled, grid = anyres.resample(x, frame.view(g, g), size)
            frames.append((pooled, grid.flatten()))
        if self.temporal is not None:
            frames = join(frames, self.temporal)

        x, maps = anyres.chain(frames)
        nothing = at.new_empty(1, 0)  # stands before the one newline
        return anyres.end_rows(x, torch.cat(maps), nothing, llava.image_newline, merged=True)


class OneVision(anyres.AnyRes):
    def prepare(self, ids, pixels, settings: DyMU):
        """Raises ValueError where a placeholder is not of the kind of what stands for it."""
        c = self.config
        kinds = {True: c.video_token_index, False: c.image_token_index}
        wanted = [kinds[isinstance(one, Video)] for one in as_list(pixels)]
        found = [i for i in torch.as_tensor(ids).tolist() if i in c.placeholders]
        if len(found) == len(wanted) and found != wanted:
            raise ValueError(
                f"the placeholders in the prompt are {found}, "
                f"those of the pictures and videos {wanted}"
            )
        return super().prepare(ids, pixels, settings)


class OneVisionProcessor(anyres.AnyResProcessor):
    """One of several pictures is seen as a padded square, without tiles."""

    def view(self, picture, several: bool = False) -> Image.Image:
        picture = read_picture(picture)
        return pad_to_square(picture, self.pictures["image_mean"]) if several else picture

    def image(self, picture, several: bool = False):
        if not several:
            return super().image(picture)
        return anyres.Picture(self.one_crop(self.view(picture, several), self.pictures)[None], None)

    def video(self, frames: list) -> Video:
        return Video(torch.stack(self.all_frames(frames)))


# ---- Joining: not in the paper, which names it as future work ----


def join(visual: list[tuple[Tensor, Tensor]], threshold: float) -> list[tuple[Tensor, Tensor]]:
    """A token that is like one of the frame before joins it: what stands still costs one frame.

    visual: of each frame (or picture) x (N_un, D), token_at (N,), as `Llava.encode` gives them ->
    of each the tokens that are new in it, and its map, where a negative number is a token of a
    frame before it, as in `Llava.splice`. A token joins where the cosine is above the threshold.
    It stands in both frames then, so that the next frame's may join it, too, and is the average
    over all its positions. Raises ValueError for a threshold that is no cosine.
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"temporal is {threshold}; it is a cosine, from -1 to 1")
    if not visual:
        return []

    x = visual[0][0][:0]
    size = torch.zeros(0, device=x.device)
    maps = []  # of each frame over all tokens so far
    starts = []  # how many tokens there were before it
    for new, at in visual:
        n = len(x)
        goes_to = n + torch.arange(len(new), device=x.device)
        if maps:
            before = maps[-1].unique()  # the tokens that stand in the frame before
            similarity = cosine(torch.cat((new, x[before])))
            score, partner = similarity[: len(new), len(new) :].max(dim=-1)
            joins = score > threshold
            goes_to = torch.where(joins, before[partner], n - 1 + (~joins).cumsum(0))

        left = n + int((goes_to >= n).sum())
        x = torch.cat((x, new))
        size = torch.cat((size, torch.bincount(at).to(size)))
        if left < len(x):
            goes_to_all = torch.cat((torch.arange(n, device=x.device), goes_to))
            x, size = average(x, goes_to_all, left, size)

        maps.append(goes_to[at])
        starts.append(n)

    ends = [*starts[1:], len(x)]
    return [(x[start:end], at - start) for start, end, at in zip(starts, ends, maps)]


def encode(llava, pixels, settings: DyMU, temporal: float | None):
    """`Llava.encode`, with frames and pictures joined; temporal=None: as it is"""
    if temporal is None:
        return llava.encode(pixels, settings)
    pixels = [
        one._replace(temporal=temporal) if isinstance(one, Video) else one
        for one in as_list(pixels)
    ]
    return join(llava.encode(pixels, settings), temporal)


# ---- Frames from files ----


def read_any(path: str, frames: int) -> Image.Image | list[Image.Image]:
    """A picture, or as many frames of a video"""
    if is_video(path):
        return read_frames(path, frames)
    picture = read_picture(path)
    with Image.open(path) as file:
        if file.mode.startswith("I"):  # as in transformers, what is above 255 is white
            note(
                f"note: {path} has 16 bits of grey, of which a model sees 8: convert it to 8 first"
            )
    return picture


def several_pictures(shown: list) -> bool:
    """Whether a picture among pictures and videos is one of several, which some models see whole"""
    return sum(isinstance(one, Image.Image) for one in shown) > 1


def see(processor, shown: list) -> list:
    """Pictures, and videos as lists of frames -> what `Llava.encode` takes"""
    several = several_pictures(shown)
    pixels = []
    for one in shown:
        seen = processor.video(one) if isinstance(one, list) else processor.image(one, several)
        pixels += as_list(seen)
    return pixels


def is_video(path) -> bool:
    """Whether `read_frames` is to read it: a folder, a film, a GIF, or another moving picture."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() in (*FILMS, ".gif"):
        return True
    try:
        if not path.is_file():
            return False
        with Image.open(path) as image:
            moves = getattr(image, "n_frames", 1) > 1
            return image.format in ("GIF", "PNG", "WEBP", "AVIF") and moves
    except Exception:  # what is wrong with it is said where it is read
        return False


def read_frames(path, count: int = 8) -> list[Image.Image]:
    """`count` frames of a video, RGB: the first, the last and evenly between them, or all it has.

    path: a folder of pictures, by name, where frame2 comes before frame10; an animated picture
    (GIF, WebP, PNG); or a film, for which PyAV must be installed. Raises ValueError for what
    cannot be read or has but one frame.
    """
    path = Path(path)
    try:
        total = sum(1 for _ in each_frame(path))
        if total < 2:
            frames = "1 frame" if total == 1 else f"{total} frames"
            still = "; a still picture may be a PNG" if path.is_file() else ""
            raise ValueError(f"it has {frames}, a video has two or more{still}")

        count = min(count, total)
        wanted = [i * (total - 1) // max(count - 1, 1) for i in range(count)]
        return [read() for i, read in enumerate(each_frame(path)) if i in wanted]
    except ImportError as e:
        raise ValueError(f"video {str(path)!r} needs PyAV: pip install -e '.[video]'") from e
    except Exception as e:  # of many types, as in read_picture
        raise ValueError(f"video {str(path)!r} cannot be read: {one_line(e)}") from e


def each_frame(path: Path) -> Iterator[Callable[[], Image.Image]]:
    """For each frame a function that makes it a picture: those that are not wanted cost little."""
    if path.is_dir():
        for file in sorted(picture_files(path), key=by_number):
            yield partial(read_picture, file)
    elif not path.is_file():  # a pipe would be waited for
        raise OSError("No such file or folder")
    elif path.suffix.lower() in FILMS:
        import av  # the `video` extra

        with av.open(str(path)) as film:
            if not film.streams.video:
                raise ValueError("it has no pictures")
            for frame in film.decode(video=0):
                yield partial(upright, frame)
    else:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield partial(read_picture, frame)


def picture_files(folder: Path) -> list[Path]:
    """By their suffix, in no order."""
    return [f for f in folder.iterdir() if f.suffix.lower() in Image.registered_extensions()]


def by_number(path: Path) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def upright(frame) -> Image.Image:
    """PyAV's frame as a picture, turned as the film says, as phones' do."""
    return frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)
