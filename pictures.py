"""Files to pictures: upright, RGB, as Pillow images; and the frames of a video."""

import re
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps, ImageSequence

from config import one_line

FILMS = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm")


def read_picture(picture) -> Image.Image:
    """A PIL image or the path of one -> upright, RGB. Transparency is laid on white, as transformers does."""
    try:
        if not isinstance(picture, Image.Image) and Path(picture).exists() and not Path(picture).is_file():
            raise OSError("it is not a file")
        image = ImageOps.exif_transpose(picture if isinstance(picture, Image.Image) else Image.open(picture))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more on broken files
        raise ValueError(f"picture {str(picture)!r} cannot be read: {one_line(e)}") from e


def is_video(path) -> bool:
    """Whether a path is to be read by `read_frames`: a folder, a film, a GIF, or another picture that moves."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() in (*FILMS, ".gif"):
        return True
    try:
        if not path.is_file():
            return False
        with Image.open(path) as image:
            return image.format in ("GIF", "PNG", "WEBP", "AVIF") and getattr(image, "n_frames", 1) > 1
    except Exception:  # what is wrong with it is said where it is read
        return False


def read_frames(path, count: int = 8) -> list[Image.Image]:
    """`count` frames of a video, RGB: the first, the last and evenly between them, or all if it has no more.

    path: a folder of pictures, by name, where frame2 comes before frame10; an animated picture (GIF, WebP, PNG); or a
    film, for which PyAV must be installed. Raises ValueError for what cannot be read or has but one frame.
    """
    path = Path(path)
    try:
        total = sum(1 for _ in each_frame(path))
        if total < 2:
            still = "; a still picture may be a PNG" if path.is_file() else ""
            raise ValueError(f"it has {total} frame{'s' * (total != 1)}, a video has two or more{still}")
        wanted = range(total) if count >= total else [i * (total - 1) // max(count - 1, 1) for i in range(count)]
        return [read() for i, read in enumerate(each_frame(path)) if i in wanted]
    except ImportError as e:
        raise ValueError(f"video {str(path)!r} needs PyAV: pip install -e '.[video]'") from e
    except Exception as e:  # of many types, as in read_picture
        raise ValueError(f"video {str(path)!r} cannot be read: {one_line(e)}") from e


def each_frame(path: Path):
    """Yields a function for each frame, which makes it a picture."""
    if not path.is_dir() and not path.is_file():  # a pipe would be waited for
        raise OSError("No such file or folder")
    if path.is_dir():
        for file in sorted(picture_files(path), key=by_number):
            yield partial(read_picture, file)
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
