"""Budgets of visual tokens, low, mid and high: the thresholds that meet them, from files or found anew (Eq. 4)."""

import dataclasses
import os
import re
import statistics
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from config import LlavaConfig, one_line, read_json
from dymu import DyMU, find_thresholds, schedule

BUDGETS = {"low": 93 / 576, "mid": 208 / 576, "high": 392 / 576}  # share of the N tokens left, on average over images
BATCH = 64  # images that share one ranking of edges in Eq. 4


def merges(budget: str, config: LlavaConfig) -> tuple[int, ...]:
    """The r_i that leave the budget's share of the N tokens at the layer that is read."""
    return schedule(config.visual_tokens - round(config.visual_tokens * BUDGETS[budget]), config.vision_layers)


def read_thresholds(spec: str, folder: Path, config: LlavaConfig) -> tuple[tuple[float, ...], dict]:
    """The tau_i that spec names, and the provenance that came with them.

    spec: low, mid or high, looked for in the checkpoint's folder and then among those shipped for its vision tower;
    or a file: a JSON list, one that `demo.py --calibrate` wrote (FILE:mid and FILE:high name another budget than low),
    or a checkpoint of the authors (.pth), of which the thresholds alone are read.
    """
    tower = dataclasses.asdict(config.vision_config)
    shipped = sorted((Path(__file__).parent / "thresholds").glob("*.json"))
    if spec in BUDGETS:
        for file in (folder / "thresholds.json", *shipped):
            data = read_json(file)
            if spec in data and all(tower.get(k) == v for k, v in dict(data.get("tower") or ()).items()):
                return check_thresholds(data[spec], file, config), data
        command = f"python demo.py --calibrate IMAGES_FOLDER --model {folder}"
        raise ValueError(f"no {spec!r} thresholds are known for this vision tower; this finds them: {command}")
    name, _, budget = spec.rpartition(":") if spec.endswith(tuple(f":{b}" for b in BUDGETS)) else (spec, "", "")
    file = Path(name)
    if not file.is_file():
        raise ValueError(f"--tokens {spec!r} is none of full, high, mid, low and all, and not a file")
    if file.suffix in (".pth", ".pt", ".bin"):
        return check_thresholds(read_pth(file), file, config), {}
    data = read_json(file, (dict, list))
    if isinstance(data, list) or "thresholds" in data:
        return check_thresholds(data, file, config), data if isinstance(data, dict) else {}
    budget = budget or next((b for b in BUDGETS if b in data), "low")
    return check_thresholds(data.get(budget), file, config), data


def read_pth(file: Path) -> list[float]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        found = sorted((int(m[1]), float(v)) for k, v in state.items() if (m := re.search(r"\.(\d+)\.threshold$", k)))
    except Exception as e:  # UnpicklingError, RuntimeError, EOFError; or it is no dictionary of tensors
        raise ValueError(f"{file}: not a checkpoint of plain tensors ({one_line(e)[:200]})") from e
    if (layers := [i for i, _ in found]) != list(range(len(found))):
        raise ValueError(f"{file}: the layers that have a threshold are {layers}")
    return [tau for _, tau in found]


def check_thresholds(values, file: Path, config: LlavaConfig) -> tuple[float, ...]:
    values = values.get("thresholds") if isinstance(values, dict) else values
    if not isinstance(values, list) or not all(type(t) in (int, float) and -1 <= t <= 1 for t in values):
        raise ValueError(f"{file}: thresholds must be a list of numbers from -1 to 1")
    config.check(DyMU(thresholds=tuple(values)))
    return tuple(float(t) for t in values)


# ---- finding thresholds ----


def process() -> tuple[int, int]:
    """Which of torchrun's processes this is, and how many there are; without it the first of one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(one) -> list:
    """What every process gives, in their order."""
    everyone = [one] * process()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, one)
    return everyone


def read_ahead(read, files: list[Path], ahead: int = 16):
    """read(file) for each file, in order, done by threads in the background, never more than `ahead` at once."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        waiting = deque()
        for file in files:
            waiting.append(pool.submit(read, file))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def unreadable(read, files: list[Path], progress) -> dict[Path, str]:
    """file -> what is wrong with it. Found first, so that batches hold the same pictures however many processes run."""

    def check(file):
        try:
            read(file)
        except ValueError as e:
            return file, str(e)

    rank, world = process()
    mine = files[rank::world]
    found = [bad for bad in progress(read_ahead(check, mine), len(mine), lambda: "reading") if bad]
    return dict(bad for part in gather(found) for bad in part)


def calibrate(vision_tower, read, files: list[Path], progress):
    """Eq. 4 for each budget over pictures: yields its name and what a file of thresholds says of it.

    read(file) -> pixels (3, H, W). progress(iterable, length, text) wraps what is gone through. Under torchrun each
    process takes every K-th batch, and all yield the same.
    """
    rank, world = process()
    mine = [file for i, file in enumerate(files) if i // BATCH % world == rank]
    for budget in BUDGETS:
        r, count = merges(budget, vision_tower.config), []
        batches, found = -(-len(mine) // BATCH), [0.0] * vision_tower.config.vision_layers
        if mine or not files:
            images = progress(read_ahead(read, mine), len(mine), lambda budget=budget: f"{budget}, ranking")
            found = find_thresholds(vision_tower, images, r, BATCH)
        parts = gather((batches, found))
        total = sum(n for n, _ in parts)
        thresholds = tuple(sum(n * taus[i] for n, taus in parts) / total for i in range(len(found)))

        def so_far(budget=budget, count=count):
            return f"{budget}, {statistics.fmean(count or [0]):.1f} tokens"

        with torch.inference_mode():
            for pixels in progress(read_ahead(read, mine), len(mine), so_far):
                count.append(len(vision_tower(pixels, DyMU(thresholds=thresholds))[0]))
        count = [n for part in gather(count) for n in part]
        mean, std = statistics.fmean(count), statistics.pstdev(count)
        yield budget, dict(images=len(count), tokens_mean=mean, tokens_std=std, r=r, thresholds=thresholds)
