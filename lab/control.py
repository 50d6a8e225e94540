"""Does a second stage of merging work only where dense labels made the tokens of one object alike?

In training tiny/, linear heads with dense labels read the tower's last rows and the tokens that the
projector makes of them. Here the same rows are measured on tiny/ and on models without such labels:

    python -m lab.train_tiny OUT/projector --control projector
    python -m lab.train_tiny OUT/tower --control tower
    python -m lab.control --control OUT/projector OUT/tower    # writes lab/control.json and prints
                                                               # its table; some minutes on 2 cores
    python -m lab.control --render                             # only prints the table

All models answer the same questions, on scenes that none was trained, calibrated or chosen on, and
each is compared with its own full length. Thresholds and taus are found for each, on other scenes.
Right answers and intervals are those of lab/ablate.py.
"""

import argparse
import functools
import hashlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from dymu import DyMU
from extras.calibrate import calibrate_behind
from extras.door import check_writable, find, one_line, read_json
from extras.families import read_config
from extras.sampled import spread
from extras.second_stage import second_stage
from lab import ablate
from lab.scenes import HELD_OUT, KINDS, scene
from lab.tables import bracket, head, interval, line, mean_std, save

FIRST_SEED = HELD_OUT + 60_000_000
TAU_SEEDS = range(1000, 1128)  # of scenes such as training draws, and others than Eq. 4's
FULL = "full length"
FEW = ("10 %", "5 %")  # BEHIND's
STAGES = ("high", "mid")  # what goes before it, in the encoder


def taus_behind(folder: Path, first: DyMU) -> list[float]:
    """With which taus the second stage behind `first` leaves BEHIND's shares of the tokens"""
    llava, processor = ablate.loaded(folder, "cpu", "float32")

    def read(seed):
        return processor.image(scene(seed).image)

    found = calibrate_behind(llava, read, TAU_SEEDS, first)
    return [one["after"] for _, one in found]


def all_settings(folder: Path, pool: ProcessPoolExecutor) -> dict[str, DyMU]:
    """The rows of the table"""
    config = read_config(folder)
    r = {budget: ablate.merges(config, budget, of) for budget, of in ablate.SCHEDULES.items()}
    find_thresholds = functools.partial(ablate.thresholds_on, folder, level=None)
    found = pool.map(find_thresholds, r.values())
    dtome = {budget: DyMU(thresholds=thresholds) for budget, thresholds in zip(r, found)}

    rows = {FULL: DyMU(), "DToMe low": dtome["low"]}
    for budget in FEW:
        rows[f"ToMe {budget}"] = DyMU(r=r[budget])
        rows[f"DToMe {budget}"] = dtome[budget]

    find_taus = functools.partial(taus_behind, folder)
    taus = pool.map(find_taus, [dtome[stage] for stage in STAGES])
    for stage, found in zip(STAGES, taus):
        for budget, tau in zip(FEW, found):
            rows[f"{stage}, then {budget}"] = replace(dtome[stage], after=second_stage(tau))

    fewest = rows["mid, then 5 %"]
    rows["mid, then 5 %, no VTU"] = replace(fewest, vtu=False)
    rows["mid, then 5 %, one query per token"] = replace(fewest, queries=spread(1))
    return rows


def summarise(pictures: list[dict], names: list[str]) -> dict:
    """pictures: as `ablate.examine` gives them"""
    share = dict(zip(names, ablate.accuracy(pictures, KINDS, names).T))
    rows = {}
    for name in names:
        rows[name] = dict(
            tokens=mean_std(ablate.tokens_of(pictures, name)),
            accuracy=interval(share[name]),
            minus_full=interval(share[name] - share[FULL]),
        )
    return rows


def measure(folder: Path, seeds: range, pool: ProcessPoolExecutor) -> dict:
    print(f"measuring {folder}", file=sys.stderr)
    rows = all_settings(folder, pool)
    pictures = list(pool.map(functools.partial(ablate.examine, folder, rows, "scenes"), seeds))
    return dict(
        training=read_json(folder / "training.json").get("command"),
        weights_sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        questions=sum(len(picture["questions"]) for picture in pictures),
        thresholds={name: one.thresholds for name, one in rows.items() if one.thresholds},
        taus={name: one.after.tau for name, one in rows.items() if one.after},
        rows=summarise(pictures, list(rows)),
    )


def measure_all(names: list[str], n: int) -> dict:
    """names: of the models' folders; n: scenes"""
    folders = [find(name) for name in names]
    seeds = range(FIRST_SEED, FIRST_SEED + n)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, torch.set_num_threads, (1,)) as pool:
        models = {folder.resolve().name: measure(folder, seeds, pool) for folder in folders}
    return dict(scenes=n, first_seed=FIRST_SEED, models=models)


def table(results: dict) -> str:
    """From the content of the JSON file alone"""
    models = results["models"]
    first, *_ = models.values()
    full = [f"{name} {bracket(of['rows'][FULL]['accuracy'])}" for name, of in models.items()]
    out = [
        f"{results['scenes']} held-out scenes, {first['questions']} questions, greedy answers. "
        f"Right at full length, in %: {', '.join(full)}. All else as differences to the model's "
        "own full length, in points, with 95 % bootstrap intervals over pictures. Tokens: mean ± "
        "standard deviation over pictures.",
        "",
        *head("", *(column for name in models for column in (f"{name}: tokens", "minus full"))),
    ]
    for name in first["rows"]:
        cells = []
        for model in models.values():
            row = model["rows"][name]
            cells.append("{:.1f} ± {:.1f}".format(*row["tokens"]))
            cells.append("" if name == FULL else bracket(row["minus_full"], "+"))
        out.append(line(name, *cells))
    return "\n".join(out)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m lab.control")
    p.add_argument("--control", nargs="+", default=[], metavar="FOLDER", help="beside tiny/")
    p.add_argument("--n", type=int, default=100, help="scenes (%(default)s)")
    beside = Path(__file__).with_name("control.json")
    p.add_argument("--save", type=Path, default=beside, metavar="FILE", help="the JSON file")
    p.add_argument("--render", action="store_true", help="only print the table of the JSON file")
    a = p.parse_args()
    try:
        if a.n < 1:
            raise ValueError("--n must be at least 1")
        if a.render and not a.save.is_file():
            raise ValueError(f"--save: there is no {a.save}")
        if not a.render:
            check_writable(a.save)
            save(measure_all(["tiny", *a.control], a.n), a.save, depth=4)
        print(table(read_json(a.save)))
    except (ValueError, OSError) as e:
        p.error(one_line(e))


if __name__ == "__main__":
    main()
