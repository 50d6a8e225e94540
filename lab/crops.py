"""Would the tiles of a picture be encoded sooner together than one by one?

    python -m lab.crops            # some minutes on 2 cores; writes lab/crops.json and prints
                                   # its table
    python -m lab.crops --render   # only prints the table

SigLIP so400m's blocks, four of them, with random weights, on a photo's tiles: one by one as
extras/anyres.py has it, in threads of one core each, and as one batch, for which transformers'
tower stands, since ours takes one picture. After merging tiles differ in length. Their rows could
still share the linear layers, which are timed alone: the rows of each tile by themselves, and all
at once.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dymu import DyMU
from extras.options import number
from extras.thresholds import BUDGETS, merges
from lab.bench_tables import by
from lab.shapes import build, find_shape, photo
from lab.tables import head, line, spread
from lab.timing import command, timed

BLOCKS = 4
LINEAR = "linear layers of one block"


def linear(layer, x):
    """x (..., D) -> (..., D), by the layer's linear parts alone"""
    return layer.fc2(layer.fc1(layer.out_proj(layer.q_proj(x) + layer.k_proj(x) + layer.v_proj(x))))


@torch.inference_mode()
def measure(a, device, dtype) -> dict:
    """The seconds of each way, round by round, beside those of the first of its group"""
    shape = find_shape(a.shape, layers=1)
    shape = replace(shape, vision=shape.vision | dict(num_hidden_layers=BLOCKS))
    llava, theirs, processor = build(shape, device, dtype)
    tower = llava.vision_tower
    crops = processor.image(photo()).crops.to(device, dtype)
    low = DyMU(r=merges("low", llava.config))
    N = llava.config.vision_config.grid**2

    def by_one(settings):
        return [tower(crop, settings) for crop in crops]

    def in_threads(settings):
        with ThreadPoolExecutor(a.threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            found = list(pool.map(partial(tower_of, tower, settings), crops))
        torch.set_num_threads(a.threads)
        return found

    groups = {
        "full": {
            "one by one": partial(by_one, DyMU()),
            "threads": partial(in_threads, DyMU()),
            "one batch (transformers)": partial(theirs.model.vision_tower, crops),
        },
        "low": {"one by one": partial(by_one, low), "threads": partial(in_threads, low)},
    }
    layer = tower.layers[0]
    for rows in (N, round(N * BUDGETS["low"])):
        x = torch.randn(len(crops), rows, llava.config.vision_config.hidden_size)
        x = x.to(device, dtype)
        groups[f"{LINEAR}, {rows} rows of each"] = {
            "one by one": lambda x=x: [linear(layer, one) for one in x],
            "one batch": lambda x=x: linear(layer, x.flatten(0, 1)),
        }

    runs = {f"{group}: {way}": [] for group, ways in groups.items() for way in ways}
    for i in range(-1, a.repeats):  # the first round warms up
        print(f"\rround {i + 1} of {a.repeats}", end="", file=sys.stderr, flush=True)
        for group, ways in groups.items():
            for way, run in ways.items():
                _, seconds = timed(run)
                if i >= 0:
                    runs[f"{group}: {way}"].append(seconds)
    print(file=sys.stderr)
    return dict(crops=len(crops), blocks=BLOCKS, runs=runs)


def tower_of(tower, settings, crop):
    with torch.inference_mode():  # is each thread's own
        return tower(crop, settings)


def table(r: dict) -> str:
    """From the content of the JSON file alone"""
    out = [
        f"{r['crops']} tiles through {r['blocks']} blocks; {by(r)}. Milliseconds, median [least, "
        f"most] of {r['repeats']}, and how many times as fast as one by one, round by round.",
        "",
        *head("tokens: way", "time", "times as fast"),
    ]
    first = None
    for name, times in r["runs"].items():
        if name.endswith("one by one"):
            first = times
        faster = [one / other for one, other in zip(first, times)]
        out.append(line(name, spread(times, 1000), spread(faster)))
    return "\n".join(out)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m lab.crops")
    p.add_argument("--shape", default="onevision-0.5b", help="(%(default)s)")
    p.add_argument("--repeats", type=number(int, 1), default=3, help="rounds (%(default)s)")
    beside = Path(__file__).with_name("crops.json")
    command(p, lambda *_: beside, measure, lambda r, _: table(r), argv=argv)


if __name__ == "__main__":
    main()
