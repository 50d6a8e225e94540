"""Videos: frames from files, LLaVA-OneVision's way to see them, and that of other models.

For who asks about a film, a GIF or a folder of frames. LLaVA-OneVision has a placeholder of its own
for a video; to other models its frames are pictures.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from PIL import Image, ImageSequence
from torch import Tensor

from dymu import DyMU
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
    placeholders = ("<video>",)

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

        x, maps = anyres.chain(frames)
        nothing = at.new_empty(1, 0)  # stands before the one newline
        newline = llava.image_newline
        return anyres.end_rows(x, torch.cat(maps), nothing, newline, True, settings.after)


class OneVision(anyres.AnyRes):
    def prepare(self, ids, pixels, settings: DyMU):
        """Raises ValueError where a placeholder is not of the kind of what stands for it."""
        c = self.config
        kinds = {True: c.video_token_index, False: c.image_token_index}
        names = [getattr(one, "placeholders", None) for one in as_list(pixels)]
        wanted = [kinds[name == Video.placeholders] for name in names]
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


# ---- Other models ----


class Frames:
    """A video for a model that sees each frame as a picture: one in which `after` sees them all.

    frames: what the processor makes of each: (3, H, W), or a `Picture` without tiles
    """

    def __init__(self, frames: list):
        self.frames = frames
        self.placeholders = ("<image>",) * len(frames)

    def grids(self, c) -> list[tuple[int, int]]:
        """(rows, columns) of each frame's positions, as of all of its `Picture`'s"""
        return [(1, anyres.positions(frame, c)) for frame in self.frames]

    def encode(self, llava, settings: DyMU) -> list[tuple[Tensor, Tensor]]:
        """Of each frame rows and token_at, in which a number below 0 is a row of one before it."""
        visual = llava.encode(self.frames, replace(settings, after=None))
        if settings.after is None:
            return visual

        # a newline, which never merges, is a frame's last row, at its last position
        newlines = [x[-1:] if isinstance(llava, anyres.AnyRes) else x[:0] for x, _ in visual]
        positions = [at[: len(at) - len(end)] for (_, at), end in zip(visual, newlines)]
        rows = [x[: len(x) - len(end)] for (x, _), end in zip(visual, newlines)]
        x, maps = anyres.chain(list(zip(rows, positions)))
        x, at = settings.after(x, torch.cat(maps))

        ends = len(x) + torch.arange(len(torch.cat(newlines)), device=x.device)
        maps = zip(at.split([len(one) for one in maps]), ends.split([len(end) for end in newlines]))
        return part(torch.cat((x, *newlines)), [torch.cat(one) for one in maps])


def part(x: Tensor, maps: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """x (R, D), and which of these rows stand in each frame -> of each its new rows, token_at

    A number below 0 is a row of a frame before, as in `Llava.splice`.
    """
    visual = []
    new_number = torch.full((len(x),), -1, device=x.device)
    n = 0
    for at in maps:
        old = new_number[at] >= 0
        new = at[~old].unique()
        new_number[new] = n + torch.arange(len(new), device=x.device)
        visual.append((x[new], new_number[at] - n))
        n += len(new)
    return visual


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
    return [see_one(processor, one, several) for one in shown]


def see_one(processor, one, several: bool):
    """A picture, which may be one of several, or a list of frames"""
    if not isinstance(one, list):
        return processor.image(one, several)
    frames = processor.video(one)
    return Frames(frames) if isinstance(frames, list) else frames


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
