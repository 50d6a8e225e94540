"""Peak resident memory and time of loading a checkpoint of LLaVA-1.5-7B's shape.

    python -m lab.loading            # Linux or macOS

It loads in float16 and converted to bfloat16, from a sparse file of 14 GB in a temporary folder,
which takes no disk. Each load runs in a process of its own, which then reads a byte of every page,
so that mapped weights count as well.
"""

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from extras.families import read_config
from load import load_model
from model import Llava


def write_checkpoint(folder: Path) -> None:
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
    # else transformers' defaults
    config = {"model_type": "llava", "torch_dtype": "float16", "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        write_tensors(folder / "model.safetensors", Llava(read_config(folder)).state_dict())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file with tensors of these names and shapes, in float16: sparse, all zeros."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    packed = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        file.truncate(8 + len(packed) + end)


def peak() -> float:
    """GiB of resident memory, at most so far."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(folder: Path, dtype: str) -> None:
    before, start = peak(), time.perf_counter()
    parameters = list(load_model(folder, "cpu", dtype).parameters())
    seconds = time.perf_counter() - start
    for p in parameters:
        p.view(-1)[::2048].sum()  # 4 KiB of two-byte numbers are a page
    weights = sum(p.numel() * p.element_size() for p in parameters) / 2**30
    print(
        f"{dtype}: weights {weights:.2f} GiB, peak {before:.2f} -> {peak():.2f} GiB, "
        f"loaded in {seconds:.1f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Peak resident memory and time of loading a checkpoint of LLaVA-1.5-7B's "
        "shape, in float16 and converted to bfloat16."
    )
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(Path(args.one[0]), args.one[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder))
            command = [sys.executable, "-m", "lab.loading", "--one", folder]
            for dtype in ("float16", "bfloat16"):
                subprocess.run([*command, dtype], check=True)
