"""Where thresholds come from: schedules (Appendix B), Eq. 4, files, calibration on a folder.

For who needs low, mid and high for another vision tower, or another similarity.
"""

import datetime
import os
import re
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.utils import tqdm

from dymu import DyMU, Seen, match, merge, similar_keys, size_bias
from extras.anyres import Picture
from extras.door import (
    announce_download,
    atomically,
    choose_device,
    dump,
    find,
    note,
    one_line,
    read_json,
)
from extras.families import section
from extras.video import picture_files
from load import load_model, load_processor
from model import LlavaConfig, VisionTower, check_layers

# the share of the N tokens that is left, on average over pictures
BUDGETS = {"low": 93 / 576, "mid": 208 / 576, "high": 392 / 576}

BATCH = 64  # pictures that share one ranking of their pairs

# ---- Appendix B and Eq. 4 ----


def schedule(r_total: int, layers: int, kind: str = "constant") -> tuple[int, ...]:
    """Appendix B: spreads r_total merges over the layers that run -> r_i of each

    kind: constant, linear (more merges early) or reverse_linear, which is linear reversed. Shares
    are rounded down, and the remainder goes one each to the first layers (of linear), so that the
    sum is exact. The authors' linear schedule rounds in another way.
    """
    if kind == "constant":
        weights = [1] * layers
    elif kind in ("linear", "reverse_linear"):
        weights = [layers - i for i in range(layers)]
    else:
        raise ValueError(f"unknown schedule {kind!r}: constant, linear or reverse_linear")

    shares = [r_total * weight // sum(weights) for weight in weights]
    for i in range(r_total - sum(shares)):  # the remainder is smaller than layers
        shares[i] += 1

    if kind == "reverse_linear":
        shares.reverse()
    return tuple(shares)


def merges(budget: str, config: LlavaConfig) -> tuple[int, ...]:
    """The r_i that leave the budget's share of the N tokens at the layer that is read."""
    left = round(config.visual_tokens * BUDGETS[budget])
    return schedule(config.visual_tokens - left, config.vision_layers)


@torch.no_grad()
def find_thresholds(
    tower: VisionTower,
    pictures: Iterable,
    r: tuple[int, ...],
    batch_size: int,
    settings: DyMU = DyMU(),
    floor: float = 0.0,
) -> tuple[float, ...]:
    """Eq. 4: tau_i of every layer that runs, such that r_i pairs per picture are above it.

    pictures: pixels (3, H, W), of which batch_size are held at a time; tau_i is averaged over these
    batches. settings: only their similarity counts. floor: the least tau, 0 as in the authors'
    code; -inf for a similarity that is no cosine.

    The tower should be in float32: bfloat16 keys are coarser than the gaps between scores. Raises
    ValueError for no pictures or a wrong number of r.
    """
    check_layers(DyMU(r=r), len(tower.layers), tower.c.num_hidden_layers)
    pictures = iter(pictures)
    found = []
    while batch := list(islice(pictures, batch_size)):
        found.append(thresholds_of(tower, batch, r, settings, floor))

    if not found:
        raise ValueError("no images to find thresholds with")
    return tuple(sum(taus) / len(found) for taus in zip(*found))


def thresholds_of(
    tower: VisionTower, batch: list, r: tuple[int, ...], settings: DyMU, floor: float
) -> list[float]:
    """This is VisionTower.forward with all pictures of a batch side by side.

    They stay together, since a layer's threshold ranks all their pairs.
    """
    tokens = []  # of each picture x, size, token_at
    for pixels in batch:
        x = tower.embed(pixels)
        once = torch.ones(len(x), device=x.device)
        tokens.append((x, once, torch.arange(len(x), device=x.device)))

    thresholds = []
    for i, (layer, r_i) in enumerate(zip(tower.layers, r)):
        seen = []
        pairs = []
        for x, size, token_at in tokens:
            bias = size_bias(size).to(x.dtype) if len(x) < len(token_at) else None
            x, q, k, v = layer.attend(x, bias)
            seen.append(Seen(i, x, q, k, v, size, token_at, tower.c.class_token))
            pairs.append(match(settings.similarity(seen[-1]), tower.c.class_token))

        ranked = torch.cat([score for score, _ in pairs]).sort(descending=True).values
        first_left_out = ranked[min(r_i * len(batch), len(ranked) - 1)]

        # Eq. 4. All from the first score that is left out to the last that merges would do, and
        # the authors' code takes the first, too
        tau = max(float(first_left_out), floor)
        if r_i == 0:  # nothing must merge
            tau = max(1.0, float(ranked[0]))
        thresholds.append(tau)

        tokens = []
        for one, (score, partner) in zip(seen, pairs):
            x, size, token_at = merge(one.x, one.size, one.token_at, partner, score > tau)
            tokens.append((layer.feed_forward(x), size, token_at))

    return thresholds


# ---- Files ----


def read_thresholds(
    spec: str, folder: Path, config: LlavaConfig, similarity: Callable = similar_keys
) -> tuple[tuple[float, ...], dict]:
    """The tau_i that spec names, and the provenance that came with them.

    spec: low, mid or high, looked for in the checkpoint's folder, then among those shipped for its
    vision tower; or a file: a JSON list, one that `demo.py --calibrate` wrote (FILE:mid, FILE:high
    name another budget than low), or a checkpoint of the authors (.pth), of which the thresholds
    alone are read. Raises ValueError for thresholds that were found with another similarity.
    """
    file, budget = find_file(spec, folder, config)
    if file.suffix in (".pth", ".pt", ".bin"):
        data = read_pth(file)
    else:
        data = read_json(file, (dict, list))
    if isinstance(data, list):
        data = {"thresholds": data}

    values = data
    if "thresholds" not in data:
        budget = budget or next((b for b in BUDGETS if b in data), "low")
        values = data.get(budget)
    if isinstance(values, dict):
        values = values.get("thresholds")

    name = name_of(similarity)
    found_with = data.get("similarity", "similar_keys")
    if found_with != name:
        raise ValueError(f"{file}: found with the similarity {found_with!r}, not {name!r}")

    most = 1 if similarity is similar_keys else 1e9
    if not isinstance(values, list) or not all(is_number(tau, most) for tau in values):
        raise ValueError(f"{file}: thresholds must be a list of numbers from -{most} to {most}")
    thresholds = tuple(float(tau) for tau in values)
    tower = config.vision_config.num_hidden_layers
    check_layers(DyMU(thresholds=thresholds), config.vision_layers, tower)
    return thresholds, data


def find_file(spec: str, folder: Path, config: LlavaConfig) -> tuple[Path, str]:
    """Where spec's thresholds are, and under which budget if spec says so"""
    if spec not in BUDGETS:
        name, _, budget = spec.rpartition(":")
        if budget not in BUDGETS:
            name, budget = spec, ""
        if not Path(name).is_file():
            known = "none of full, high, mid, low and all"
            raise ValueError(f"--tokens {spec!r} is {known}, and not a file")
        return Path(name), budget

    tower = asdict(config.vision_config)
    shipped = sorted((Path(__file__).parent.parent / "thresholds").glob("*.json"))
    for file in (folder / "thresholds.json", *shipped):
        data = read_json(file)
        of = section(data, "tower")
        if spec in data and all(tower.get(name) == value for name, value in of.items()):
            return file, spec

    command = f"python demo.py --calibrate IMAGES_FOLDER --model {folder}"
    raise ValueError(
        f"no {spec!r} thresholds are known for this vision tower; this finds them: {command}"
    )


def read_pth(file: Path) -> list[float]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        names = {name: re.search(r"\.(\d+)\.threshold$", name) for name in state}
        found = sorted((int(m[1]), float(state[name])) for name, m in names.items() if m)
    except Exception as e:  # UnpicklingError, RuntimeError, EOFError; or no dictionary of tensors
        why = one_line(e)[:200]
        raise ValueError(f"{file}: not a checkpoint of plain tensors ({why})") from e

    layers = [i for i, _ in found]
    if layers != list(range(len(layers))):
        raise ValueError(f"{file}: the layers that have a threshold are {layers}")
    return [tau for _, tau in found]


def name_of(similarity: Callable) -> str:
    """By which a file says what it was found with: a function's own"""
    return getattr(similarity, "__name__", repr(similarity))


def is_number(value, most: float) -> bool:
    return type(value) in (int, float) and -most <= value <= most


# ---- Calibration ----


def process() -> tuple[int, int]:
    """Which of torchrun's processes this is, of how many; without it the first of one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(one) -> list:
    """What every process gives, in their order."""
    everyone = [one] * process()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, one)
    return everyone


def read_ahead(read: Callable, files: list[Path], what: str) -> Iterator:
    """read(file) for each file, in order, by threads in the background, with a bar."""
    bar = tqdm(total=len(files), desc=what, disable=True if process()[0] else None)
    with bar, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        waiting = deque()
        for file in files:
            waiting.append(pool.submit(read, file))
            if len(waiting) == 16:
                yield waiting.popleft().result()
                bar.update()
        while waiting:
            yield waiting.popleft().result()
            bar.update()


def unreadable(read: Callable, files: list[Path]) -> dict[Path, str]:
    """file -> what is wrong with it.

    Found first, so that batches hold the same pictures however many processes run.
    """

    def check(file):
        try:
            read(file)
        except ValueError as e:
            return file, str(e)

    rank, world = process()
    found = [bad for bad in read_ahead(check, files[rank::world], "reading") if bad]
    return dict(bad for part in gather(found) for bad in part)


def calibrate(
    tower: VisionTower,
    read: Callable,
    files: list[Path],
    config: LlavaConfig,
    settings: DyMU = DyMU(),
    floor: float = 0.0,
) -> Iterator[tuple[str, dict]]:
    """Eq. 4 for each budget over pictures: its name, and what a file of thresholds says of it.

    read(file) -> pixels (3, H, W). settings, floor: as in `find_thresholds`. Under torchrun each
    process takes every K-th batch, and all yield the same.
    """
    rank, world = process()
    mine = [file for i, file in enumerate(files) if i // BATCH % world == rank]
    for budget in BUDGETS:
        r = merges(budget, config)
        batches = -(-len(mine) // BATCH)
        found = (0.0,) * config.vision_layers
        if mine or not files:
            pictures = read_ahead(read, mine, f"{budget}, ranking")
            found = find_thresholds(tower, pictures, r, BATCH, settings, floor)

        parts = gather((batches, found))
        total = sum(n for n, _ in parts)
        thresholds = [sum(n * taus[i] for n, taus in parts) / total for i in range(len(found))]

        merging = DyMU(thresholds=tuple(thresholds), similarity=settings.similarity)
        with torch.inference_mode():
            pictures = read_ahead(read, mine, f"{budget}, counting")
            counts = [len(tower(pixels, merging)[0]) for pixels in pictures]
        counts = [n for part in gather(counts) for n in part]
        yield (
            budget,
            {
                "images": len(counts),
                "tokens_mean": statistics.fmean(counts),
                "tokens_std": statistics.pstdev(counts),
                "r": r,
                "thresholds": thresholds,
            },
        )


def calibrate_folder(a) -> None:
    """The command `demo.py --calibrate`; a: its options"""
    device = choose_device(a.device)
    folder = find(a.model, announce_download)
    processor = load_processor(folder, a.pad)
    save = Path(a.save or folder / "thresholds.json")
    files = sorted(picture_files(Path(a.calibrate)))

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    llava = load_model(folder, device, a.dtype or "float32", only="vision_tower.")
    order = {file: i for i, file in enumerate(files)}

    def read(file):
        pixels = processor.image(file)
        if isinstance(pixels, Picture):  # the whole or one of the tiles, in turn
            return pixels.crops[order[file] % len(pixels.crops)]
        return pixels

    skipped = unreadable(read, files)
    files = [file for file in files if file not in skipped]
    config = llava.config
    found = {
        "model": a.model,
        "similarity": name_of(similar_keys),
        "preprocessing": "pad" if processor.pad else "crop",
        "schedule": "constant",
        "date": datetime.date.today().isoformat(),
        "batch_size": BATCH,
        "tower": asdict(config.vision_config),
    }
    for budget, one in calibrate(llava.vision_tower, read, files, config):
        found[budget] = one
        if process()[0] == 0:
            mean = f"{one['tokens_mean']:.1f} +- {one['tokens_std']:.1f}"
            print(f"{budget}: {mean} of {config.visual_tokens} tokens")

    if process()[0] == 0:
        for why in skipped.values():
            note(f"skipped: {why}")
        with atomically(save) as part:
            part.write_text(dump(found, depth=1) + "\n")
        print(f"wrote {save}; {len(skipped)} pictures skipped")
    if dist.is_initialized():
        dist.destroy_process_group()
