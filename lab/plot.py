"""The course of a training as a picture, from its log.

    python -m lab.plot tiny/training.json training.svg

Losses are running means of the training's own batches; answers are of pictures that it never sees.
"""

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from extras.door import read_json

LOSSES = ("dense", "named", "apart", "next", "reading", "description", "counting", "relation")


def plot(log):
    """Left the losses, right the held-out answers of each sort of picture, over pictures seen."""
    matplotlib.rcParams["svg.hashsalt"] = "dymu"  # the same log gives the same file
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


def main():
    parser = argparse.ArgumentParser(description="Draws the course of a training.")
    parser.add_argument("log", type=Path, help="training.json")
    parser.add_argument("file", type=Path, help="the picture, .svg or .png")
    args = parser.parse_args()
    without_date = {"Date": None} if args.file.suffix == ".svg" else None
    plot(read_json(args.log)).savefig(args.file, metadata=without_date)


if __name__ == "__main__":
    main()
