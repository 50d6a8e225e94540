"""Where a model runs: the device, the dtype, and whether its weights fit.

For who wants to know what is chosen where nothing is asked for.
"""

import os
import re
from pathlib import Path

import torch

from extras.door import one_line
from extras.options import note


def choose_device(device=None) -> torch.device:
    """The one asked for, else a GPU if there is one, else the CPU."""
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as e:
        raise ValueError(f"device {str(device)!r} is not cuda, mps, cpu or cuda:1") from e

    try:
        there = torch.zeros(1, device=device)
        there.tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        missing = {"cuda": torch.cuda, "mps": torch.backends.mps}.get(kind)
        absent = missing and not missing.is_available()
        why = f"there is no {kind} here" if absent else one_line(e).split(". ")[0]
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


def check_memory(needed: int, device: torch.device, announce=None) -> None:
    """Raises ValueError if so many bytes cannot fit on the device.

    announce(needed, free) is told before; free is None where it cannot be known.
    """
    free, total = memory(device)
    if announce is not None:
        announce(needed, free)
    if total is not None and needed > total:
        raise ValueError(
            f"the weights take {needed / 1e9:.1f} GB, {device.type} has {total / 1e9:.1f} GB: "
            "a smaller model, or --dtype bfloat16 if this is float32"
        )


def announce_memory(needed: int, free: int | None) -> None:
    if needed > 1e9:
        there = f", {free / 1e9:.1f} GB are free" if free is not None else ""
        note(f"loading {needed / 1e9:.1f} GB of weights{there}")


def memory(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes that are free, and all there are, with swap; None where the system does not tell"""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    try:
        lines = Path("/proc/meminfo").read_text()
        found = {name: 1024 * int(kib) for name, kib in re.findall(r"(\w+): +(\d+) kB", lines)}
        return found["MemAvailable"], found["MemTotal"] + found["SwapTotal"]
    except (OSError, KeyError):  # not Linux
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        return None, pages and pages * os.sysconf("SC_PAGE_SIZE")
