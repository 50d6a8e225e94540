"""`demo.py --calibrate`: Eq. 4 over a folder of pictures, by one process or by torchrun's.

For who needs budgets, from high to tightest, for a checkpoint that has no thresholds.
"""

import datetime
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.utils import tqdm

from dymu import DyMU, similar_keys
from extras.anyres import Picture
from extras.devices import choose_device
from extras.door import announce_download, atomically, check_writable, dump, find
from extras.options import note
from extras.second_stage import between, second_stage
from extras.thresholds import BEHIND, BUDGETS, find_thresholds, merges, name_of
from extras.video import picture_files
from load import load_model, load_processor
from model import Llava, LlavaConfig, VisionTower

BATCH = 64  # pictures that share one ranking of their pairs
FEW = 100  # pictures; thresholds of fewer are not to be relied on
ENCODER = ("vision_tower.", "multi_modal_projector.", "image_newline")
ROOM = 2**31  # bytes for the rows of pictures, of all processes
MOVES = 0.01  # thresholds have settled when a batch moves none of them by more


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


# ---- Eq. 4 over all pictures ----


def mean(taus: list[tuple[float, ...]]) -> tuple[float, ...]:
    """Of each layer, over batches"""
    return tuple(sum(of_layer) / len(taus) for of_layer in zip(*taus))


def moved(taus: list[tuple[float, ...]]) -> float:
    """By which part of itself the last batch moved the mean of a layer, at most"""
    pairs = zip(mean(taus[:-1]), mean(taus))
    return max(abs(new - old) / max(abs(new), 1e-6) for old, new in pairs)


def calibrate(
    tower: VisionTower,
    read: Callable,
    files: list[Path],
    config: LlavaConfig,
    settings: DyMU = DyMU(),
    floor: float = 0.0,
    enough: bool = False,
    kind: str = "constant",
) -> Iterator[tuple[str, dict]]:
    """Eq. 4 for low, mid and high over pictures: what a file of thresholds says of each.

    read(file) -> pixels (3, H, W). settings, floor: as in `find_thresholds`; enough: stop where the
    thresholds have settled; kind: of schedule. Under torchrun each process takes every K-th batch,
    and all yield the same. Raises ValueError for no pictures.
    """
    if not files:
        raise ValueError("no images to find thresholds with")
    for budget in BUDGETS:
        r = merges(budget, config, kind)
        missed = without_pairs(r, config.visual_tokens)
        if missed and process()[0] == 0:
            note(
                f"note: {budget} will leave about {missed} tokens more than its share: the "
                f"schedule {kind} asks for more merges than a layer has pairs"
            )
        taus, settled = of_batches(tower, read, files, r, budget, settings, floor, enough)
        thresholds = mean(taus)
        used = files[: len(taus) * BATCH]

        merging = DyMU(thresholds=thresholds, similarity=settings.similarity)
        rank, world = process()
        with torch.inference_mode():
            pictures = read_ahead(read, used[rank::world], f"{budget}, counting")
            counts = [len(tower(pixels, merging)[0]) for pixels in pictures]
        counts = [n for part in gather(counts) for n in part]
        yield (
            budget,
            {
                "images": len(counts),
                "settled": settled,  # on so many of them; None: it has not
                "tokens_mean": statistics.fmean(counts),
                "tokens_std": statistics.pstdev(counts),
                "r": r,
                "thresholds": thresholds,
            },
        )


def without_pairs(r: tuple[int, ...], n: int) -> int:
    """How many of the r_i merges, from n tokens on, there are no pairs for: at most half merge"""
    left = n
    for r_i in r:
        left -= min(r_i, left // 2)
    return left - (n - sum(r))


def of_batches(
    tower, read, files, r, budget, settings, floor, enough
) -> tuple[list[tuple[float, ...]], int | None]:
    """Eq. 4 on each batch, and on how many pictures the mean over batches has settled"""
    rank, world = process()
    mine = [file for i, file in enumerate(files) if i // BATCH % world == rank]
    pictures = read_ahead(read, mine, f"{budget}, ranking")
    rounds = -(-len(files) // (BATCH * world))  # in each a process takes one batch, or none

    taus = []
    settled = None
    start = time.perf_counter()
    for i in range(rounds):
        left = mine[i * BATCH : (i + 1) * BATCH]
        batch = islice(pictures, BATCH)
        one = [find_thresholds(tower, batch, r, BATCH, settings, floor)] if left else []
        for found in (found for part in gather(one) for found in part):
            if settled and enough:
                break
            taus.append(found)
            if not settled and len(taus) > 1 and moved(taus) < MOVES:
                settled = min(len(taus) * BATCH, len(files))

        if i == 0 and budget == next(iter(BUDGETS)) and rank == 0:
            # each budget ranks and counts
            seconds = (time.perf_counter() - start) * rounds * 2 * len(BUDGETS)
            if seconds > 20:
                note(f"about {seconds / 60:.0f} minutes for {len(files)} pictures")
        if settled and enough:
            break
    return taus, settled


# ---- the second stage ----


@torch.inference_mode()
def calibrate_behind(
    llava: Llava, read: Callable, files: list[Path], settings: DyMU, shares: dict = BEHIND
) -> Iterator[tuple[str, dict]]:
    """The tau of each share of the tokens behind settings: of tight and tightest behind mid.

    read(file) -> what `Llava.encode` takes: all of a picture, for that is what is matched. Pictures
    are encoded once, as many as there is ROOM for.
    """
    rank, world = process()
    held = []

    def hold(x, token_at):
        held.append((x, token_at))
        return x, token_at

    for pixels in read_ahead(read, files[rank::world], "tight, encoding"):
        llava.encode(pixels, replace(settings, after=hold))
        if world * sum(x.nbytes for x, _ in held) > ROOM:
            break

    def tokens(tau):
        mine = [len(second_stage(tau)(x, token_at)[0]) for x, token_at in held]
        return [n for part in gather(mine) for n in part]

    N = [n for part in gather([len(token_at) for _, token_at in held]) for n in part]
    for budget, share in shares.items():
        left = share * sum(N)
        _, tau = between(lambda tau, left=left: sum(tokens(tau)) < left, 0.0, 1.0, halvings=16)
        counts = tokens(tau)
        yield (
            budget,
            {
                "images": len(counts),
                "tokens_mean": statistics.fmean(counts),
                "tokens_std": statistics.pstdev(counts),
                "after": tau,
                "thresholds": settings.thresholds,
            },
        )


# ---- the command ----


def calibrate_folder(a) -> None:
    """The command `demo.py --calibrate`; a: its options"""
    device = choose_device(a.device)
    folder = find(a.model, announce_download)
    processor = load_processor(folder, a.pad)
    save = where_to_save(a.save, folder)
    files = sorted(picture_files(Path(a.calibrate)))
    others = sum(f.is_file() for f in Path(a.calibrate).iterdir()) - len(files)

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    llava = load_model(folder, device, a.dtype or "float32", only=ENCODER)
    order = {file: i for i, file in enumerate(files)}

    def read_one(file):
        pixels = processor.image(file)
        if isinstance(pixels, Picture):  # the whole or one of the tiles, in turn
            return pixels.crops[order[file] % len(pixels.crops)]
        return pixels

    skipped = unreadable(processor.image, files)
    files = dealt_out([file for file in files if file not in skipped])
    first = process()[0] == 0
    if first:
        for why in skipped.values():
            note(f"skipped: {why}")
        if others:
            note(f"{others} files that are no pictures were passed over")
        if 0 < len(files) < FEW:
            note(f"note: {len(files)} pictures are few, {FEW} or more give thresholds that hold")

    config = llava.config
    found = {
        "model": a.model,
        "similarity": name_of(similar_keys),
        "preprocessing": "pad" if processor.pad else "crop",
        "schedule": a.schedule,
        "date": datetime.date.today().isoformat(),
        "batch_size": BATCH,
        "tower": asdict(config.vision_config),
    }
    tower = llava.vision_tower
    options = dict(enough=a.enough, kind=a.schedule)
    for budget, one in calibrate(tower, read_one, files, config, **options):
        found[budget] = one
        tell(budget, one, config.visual_tokens)
    mid = DyMU(thresholds=found["mid"]["thresholds"])
    for budget, one in calibrate_behind(llava, processor.image, files, mid):
        found[budget] = one
        tell(budget, one)

    if first:
        write(found, save)
        print(f"wrote {save}; {len(skipped)} pictures skipped")
    if dist.is_initialized():
        dist.destroy_process_group()


def dealt_out(files: list) -> list:
    """Neighbours, which are often alike, go to different batches."""
    batches = max(-(-len(files) // BATCH), 1)
    return [file for i in range(batches) for file in files[i::batches]]


def where_to_save(save: Path | None, folder: Path) -> Path:
    """--save, or thresholds.json beside the checkpoint."""
    beside = folder / "thresholds.json"
    if save is None and beside.exists():
        note(f"note: {beside} will be overwritten; --save FILE writes another")
    check_writable(save or beside)
    return save or beside


def tell(budget: str, one: dict, N: int | None = None) -> None:
    told = f"{budget}: {one['tokens_mean']:.1f} +- {one['tokens_std']:.1f}"
    told += f" of {N} tokens" if N else " tokens"
    told += f"; {one['images']} pictures"
    if "settled" in one:
        told += f", settled on {one['settled']}" if one["settled"] else ", not settled on these"
    if process()[0] == 0:
        print(told, flush=True)


def write(found: dict, save: Path) -> None:
    """Thresholds that cannot be written after all are printed, not lost."""
    text = dump(found, depth=1) + "\n"
    try:
        with atomically(save) as part:
            part.write_text(text)
    except ValueError:
        print(text)
        raise
