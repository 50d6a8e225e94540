"""What commands that measure time have in common: clocks, options, and the JSON file."""

import argparse
import ctypes
import datetime
import os
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from extras.devices import choose_device, choose_dtype
from extras.door import one_line, read_json
from extras.options import number
from lab.tables import save

# ---- what watches a run: run() -> its result, and what it took ----


def timed(run):
    """Seconds."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    start, out = time.perf_counter(), run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return out, time.perf_counter() - start


def clocked(function, spent: list):
    """The same function; spent gets the seconds of each call."""

    def call(*args, **options):
        out, seconds = timed(lambda: function(*args, **options))
        spent.append(seconds)
        return out

    return call


def peak_on(device):
    def peak(run):
        """Seconds, and the most bytes held beyond those held before, None where nothing tells.

        On CPU: resident set.
        """
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out, seconds = timed(run)
            return out, (seconds, torch.cuda.max_memory_allocated() - before)
        status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if device.type != "cpu" or not reset.exists():
            out, seconds = timed(run)
            return out, (seconds, None)
        # memory freed before must not be there to be used again
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        reset.write_text("5")  # the peak starts anew
        before = status.read_text()
        out, seconds = timed(run)
        most = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        least = re.search(r"VmRSS:\s+(\d+)", before)
        return out, (seconds, 1024 * (int(most[1]) - int(least[1])))

    return peak


# ---- the command ----


def command(
    p: argparse.ArgumentParser,
    file_of: Callable,
    run: Callable,
    show: Callable,
    check: Callable = bool,
    argv: list[str] | None = None,
) -> None:
    """Measures, writes the JSON file, and prints its tables: p has the options of its own

    file_of(options, device) -> where it is if --save does not say; run(options, device, dtype) ->
    what is measured; show(results, file) -> text; check(options) raises ValueError.
    """
    add = p.add_argument
    add("--device", help="cuda, mps or cpu (the first there is)")
    add("--dtype", help="(bfloat16 where the device does that well, else float32 or float16)")
    threads = torch.get_num_threads()
    add("--threads", type=number(int, 1), default=threads, help="of the CPU (%(default)s)")
    add("--save", type=Path, metavar="FILE", help="the JSON file (in lab/)")
    add("--render", action="store_true", help="measure nothing, print the tables of the JSON file")
    a = p.parse_args(argv)
    try:
        check(a)
        device = choose_device(a.device)
        path = a.save or file_of(a, device)
        if not (path.is_file() if a.render else path.parent.is_dir()):
            raise ValueError(f"there is no {path if a.render else path.parent}")
        if not a.render:
            dtype = choose_dtype(a.dtype, device, half=True)
            save(measured(a, device, dtype, run), path, depth=2)
        print(show(read_json(path), path))
    except (ValueError, OSError) as e:
        p.error(one_line(e))


def measured(a, device, dtype, run) -> dict:
    """What run gives, behind what it was run on"""
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    told = ("shape", "layers", "questions", "repeats")
    results = {name: vars(a)[name] for name in told if name in a}
    results |= dict(date=datetime.date.today().isoformat(), machine=machine(device))
    results |= dict(cores=os.cpu_count(), threads=a.threads)
    results |= dict(device=device.type, dtype=str(dtype).removeprefix("torch."))
    results |= {name: version(name) for name in ("torch", "transformers", "pillow")}
    results |= run(a, device, dtype)
    return results | dict(seconds=round(time.perf_counter() - start))


def machine(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
