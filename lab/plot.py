"""The course of a training as a picture, from its log; and the curve of lab/bench.py.

    python -m lab.plot tiny/training.json training.svg

Losses are running means of the training's own batches; answers are of pictures that it never sees.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from extras.door import atomically, read_json

matplotlib.rcParams["svg.hashsalt"] = "dymu"  # the same numbers give the same file
LOSSES = ("dense", "named", "apart", "next", "reading", "description", "counting", "relation")


def plot(log):
    """Left the losses, right the held-out answers of each sort of picture, over pictures seen."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    history = list(log["history"].values())

    for name in LOSSES:
        known = [h for h in history if name in h["losses"]]
        seen = [h["pictures"] for h in known]
        left.plot(seen, [h["losses"][name] for h in known], label=name)
    left.set(title="training losses", yscale="log")

    seen = [h["pictures"] for h in history]
    for sort in history[-1]["accuracy"]:
        right.plot(seen, [h["accuracy"][sort]["all"] for h in history], label=sort)
    right.set(title="right held-out answers in %", ylim=(0, 101))

    for axes in (left, right):
        axes.set_xlabel("pictures seen")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def curve(seconds: dict[str, dict[int, list[float]]]):
    """Left the seconds to the first token over visual tokens, right how many times as fast.

    seconds: of transformers and others, by visual tokens, those of each run
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    medians = {
        name: {N: statistics.median(times) for N, times in of.items()}
        for name, of in seconds.items()
    }
    theirs = medians["transformers"]
    for name, of in medians.items():
        left.plot(of.keys(), of.values(), marker="o", label=name.replace("`", ""))
        faster = [theirs[N] / t for N, t in of.items()]
        right.plot(of.keys(), faster, marker="o", label=name.replace("`", ""))

    left.set(title="seconds to the first token", ylim=(0, None))
    right.set(title="times as fast as transformers", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("visual tokens")
        axes.grid(alpha=0.3)
    left.legend(fontsize="x-small")  # the right has the same lines
    return figure


def save(figure, file: Path) -> None:
    without_date = {"Date": None} if file.suffix == ".svg" else None
    with atomically(file) as part:
        figure.savefig(part, metadata=without_date)


def main():
    parser = argparse.ArgumentParser(description="Draws the course of a training.")
    parser.add_argument("log", type=Path, help="training.json")
    parser.add_argument("file", type=Path, help="the picture, .svg or .png")
    args = parser.parse_args()
    save(plot(read_json(args.log)), args.file)


if __name__ == "__main__":
    main()
