"""The door: files, checkpoints, devices and pictures are found here, or what is wrong is told.

For who wants to know what happens to bad input. Every complaint is a ValueError of one line that
says what, where and what to do. Only data is read, never a pickle that could run code.
"""

import contextlib
import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError
from PIL import Image, ImageOps

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


def note(message: str) -> None:
    """One line for the user, who reads the answer on standard output."""
    print(f"demo.py: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def atomically(file: Path):
    """A path to write to, which becomes the file when all is written; else nothing is left."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".demo-") as folder:
        part = Path(folder) / file.name
        yield part
        part.replace(file)


def read_picture(picture) -> Image.Image:
    """A PIL image or the path of one -> upright, RGB. Transparency is laid on white."""
    try:
        if not isinstance(picture, Image.Image):
            if Path(picture).exists() and not Path(picture).is_file():
                raise OSError("it is not a file")
            picture = Image.open(picture)

        image = ImageOps.exif_transpose(picture)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as e:  # OSError, SyntaxError, ValueError, struct.error and more
        raise ValueError(f"picture {str(picture)!r} cannot be read: {one_line(e)}") from e


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

    try:
        if announce is not None:
            with contextlib.suppress(DryRunError):  # no connection: it may be in the cache
                files = snapshot_download(name, allow_patterns=FILES, dry_run=True)
                size = sum(f.file_size for f in files if f.will_download)
                if size:
                    announce(size, HF_HUB_CACHE)
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as e:  # of many types: no such repository, no network, no right, a full disk
        why = f"no connection, no such repository or no right to it ({type(e).__name__})"
        raise ValueError(
            f"model {name!r} is no folder, and not to be had from the Hub: {why}"
        ) from e


def announce_download(size: int, cache: str) -> None:
    note(f"downloading {size / 1e9:.1f} GB to {cache}")


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


# ---- devices ----


def choose_device(device=None) -> torch.device:
    """The one asked for, else a GPU if there is one, else the CPU."""
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        there = torch.zeros(1, device=device)
        there.tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        why = one_line(e).split(". ")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {why}") from e
    return there.device


def choose_dtype(dtype, device: torch.device, half: bool) -> torch.dtype:
    """The one asked for; else float32, or for a half-precision checkpoint what is fast and safe.

    That is bfloat16 where the device computes in it; else float16 on a GPU, float32 on a CPU.
    """
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(f"dtype {name!r} is not one of float32, bfloat16, float16")
        return getattr(torch, name)
    if not half:
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if good else torch.float16
