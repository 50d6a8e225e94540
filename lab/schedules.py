"""What the schedule does to the encoder's time: merges early leave fewer tokens on average.

    python -m lab.schedules            # both towers, a minute on 2 cores; writes
                                       # lab/schedules.json and prints its table
    python -m lab.schedules --render   # only prints the table

Towers have random weights at real shapes, and ToMe's r gives the token counts, as in lab/bench.py.
All ways take turns on one crop. Beside each time is what lab.ablate found of DToMe on tiny/ with
the same schedule at the same share of the tokens.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from dymu import DyMU
from extras.door import read_json
from extras.options import SCHEDULES, number
from lab.ablate import merges
from lab.bench_tables import by
from lab.shapes import build, find_shape, photo
from lab.tables import bracket, head, line, spread
from lab.timing import command, timed

TOWERS = {"CLIP ViT-L/14-336": "tiny-llava", "SigLIP so400m/14-384": "onevision-0.5b"}
USUAL = {"low": "constant", "10 %": "linear"}  # of lab.ablate's rows, where none is named


@torch.inference_mode()
def measure(a, device, dtype) -> dict:
    """Of each tower the seconds of each way, round by round"""
    found = {}
    for tower, shape in TOWERS.items():
        llava, theirs, processor = build(find_shape(shape, layers=1), device, dtype)
        del theirs
        pixels = processor.image(photo())
        pixels = getattr(pixels, "crops", [pixels])[0]
        ways = {"full": DyMU()}
        for budget in USUAL:
            for kind in SCHEDULES:
                ways[f"{budget}, {kind}"] = DyMU(r=merges(llava.config, budget, kind))

        runs = {name: [] for name in ways}
        for i in range(-1, a.repeats):  # the first round warms up
            print(f"\r{tower}, round {i + 1} of {a.repeats}", end="", file=sys.stderr, flush=True)
            for name, settings in ways.items():
                _, seconds = timed(partial(llava.vision_tower, pixels, settings))
                if i >= 0:
                    runs[name].append(seconds)
        print(file=sys.stderr)
        found[tower] = runs
    return dict(runs=found)


def table(r: dict) -> str:
    """From the content of the JSON file, and of lab.ablate's"""
    rows = read_json(Path(__file__).with_name("ablate.json"))["rows"]
    columns = [name for tower in TOWERS for name in (tower, "full / this")]
    out = [
        f"The encoder's milliseconds for one crop, median [least, most] of {r['repeats']}, and how "
        f"many times as fast as at full length, round by round; {by(r)}. Right answers: tiny/, "
        "DToMe, in % (lab.ablate).",
        "",
        *head("tokens, schedule", *columns, "right answers"),
    ]
    for name in r["runs"][next(iter(TOWERS))]:
        cells = []
        for tower in TOWERS:
            times = r["runs"][tower]
            faster = [full / one for full, one in zip(times["full"], times[name])]
            cells += [spread(times[name], 1000), spread(faster)]
        right = rows[row_of(name)]["accuracy"]["scenes"]
        out.append(line(name.replace("_", " "), *cells, bracket(right)))
    return "\n".join(out)


def row_of(name: str) -> str:
    """lab.ablate's name of it"""
    if name == "full":
        return name
    budget, kind = name.split(", ")
    other = "" if kind == USUAL[budget] else f", {kind.replace('_', ' ')} schedule"
    return f"DToMe {budget}, VTU{other}"


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m lab.schedules")
    p.add_argument("--repeats", type=number(int, 1), default=5, help="rounds (%(default)s)")
    beside = Path(__file__).with_name("schedules.json")
    command(p, lambda *_: beside, measure, lambda r, _: table(r), argv=argv)


if __name__ == "__main__":
    main()
