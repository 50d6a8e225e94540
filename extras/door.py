"""The door: files, checkpoints and pictures are found here, or what is wrong is told.

For who wants to know what happens to bad input. Every complaint is a ValueError of one line that
says what, where and what to do. Only data is read, never a pickle that could run code.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError
from PIL import Image, ImageOps

from extras.options import note

# all that is read of a checkpoint, or downloaded
FILES = ["*.json", "*.safetensors", "chat_template.jinja"]


# ---- files ----


def read_json(path: Path, kind=dict):
    """An empty dict for a file that does not exist."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as JSON ({one_line(e)})") from e
    if not isinstance(data, kind):
        raise ValueError(f"{path}: the JSON is a {type(data).__name__}, not an object")
    return data


def dump(results, depth: int) -> str:
    """JSON with a line for each key down to that depth.

    So a difference between two files shows where it is.
    """
    if depth == 0 or not isinstance(results, dict):
        return json.dumps(results)
    lines = (f"{json.dumps(k)}: {dump(v, depth - 1)}" for k, v in results.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def one_line(e: BaseException) -> str:
    return " ".join(str(e).split()) or type(e).__name__


@contextlib.contextmanager
def atomically(file: Path):
    """A path to write to, which becomes the file when all is written; else nothing is left."""
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".demo-") as folder:
            part = Path(folder) / file.name
            yield part
            part.replace(file)
    except OSError as e:
        raise ValueError(f"{file} cannot be written: {e.strerror or one_line(e)}") from e


def check_writable(file: Path) -> None:
    """Tells before the work what `atomically` would tell after it."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} cannot be written: it is no file")
    try:
        with tempfile.TemporaryFile(dir=file.parent) as part:
            part.write(bytes(4096))
    except OSError as e:
        raise ValueError(f"{file} cannot be written: {e.strerror}") from e


def transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def on_white(image: Image.Image) -> Image.Image:
    """-> RGB. Transparency is laid on white."""
    if transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_picture(picture, read: Callable = on_white) -> Image.Image:
    """A PIL image or the path of one -> what `read` makes of it, upright"""
    try:
        image = picture
        if not isinstance(picture, Image.Image):
            if Path(picture).exists() and not Path(picture).is_file():
                raise OSError("it is not a file")
            image = Image.open(picture)

        return read(ImageOps.exif_transpose(image))
    except Exception as e:  # OSError, SyntaxError, ValueError, struct.error and more
        why = one_line(e)
        if str(picture).lower().endswith((".heic", ".heif")) and Path(picture).is_file():
            why = "Pillow does not read HEIC: save it as a JPEG, for which pillow-heif is one way"
        raise ValueError(f"picture {str(picture)!r} cannot be read: {why}") from e


# ---- checkpoints ----


def find(path_or_repo_id, announce=None) -> Path:
    """The folder of a checkpoint; "tiny" is the built-in one.

    A Hub id is downloaded, after announce(bytes, cache), unless it is in the cache.
    """
    name = str(path_or_repo_id)
    folder = Path(__file__).parent.with_name("tiny") if name == "tiny" else Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model {name!r} has no config.json")
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f"model {name!r} is neither a folder nor a Hub id (owner/name)")

    get = partial(snapshot_download, name, allow_patterns=FILES)
    return from_hub(get, f"model {name!r} is no folder, and", announce)


def download(repo: str, file: str) -> Path:
    """One file of a repository on the Hub; its size is told before."""
    return from_hub(partial(hf_hub_download, repo, file), f"{repo}/{file} is", announce_download)


def from_hub(get: Callable, what: str, announce) -> Path:
    """get(dry_run=True) and get(): what would be downloaded, and where it then is"""
    try:
        if announce is not None:
            with contextlib.suppress(DryRunError):  # no connection: it may be in the cache
                files = get(dry_run=True)
                files = files if isinstance(files, list) else [files]
                size = sum(f.file_size for f in files if f.will_download)
                if size:
                    announce(size, HF_HUB_CACHE)
        return Path(get())
    except Exception as e:  # of many types: no such repository, no network, no right, a full disk
        why = f"no connection, no such repository or file, or no right to it ({type(e).__name__})"
        raise ValueError(f"{what} not to be had from the Hub: {why}") from e


def announce_download(size: int, cache: str) -> None:
    note(f"downloading {size / 1e9:.3g} GB to {cache}")


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: weight_map is missing or malformed")

    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} points outside the folder")
        if not (folder / name).is_file():
            pickles = "; pytorch_model.bin is a pickle, which is never read"
            pickles = pickles if list(folder.glob("*.bin")) else ""
            raise ValueError(f"{folder / name} is missing{pickles}")
    return [folder / name for name in names]
