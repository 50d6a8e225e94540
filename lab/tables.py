"""What the experiments' tables have in common.

Rows of Markdown, bootstrap intervals over pictures, and JSON files that appear whole or not at all.
"""

import statistics
from pathlib import Path

import torch
from torch import Tensor

from extras.door import atomically, dump

RESAMPLES = 2000

# ---- Markdown and JSON ----


def line(*cells) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells) -> list[str]:
    return [line(*cells), "|---" + "|---:" * (len(cells) - 1) + "|"]


def save(results: dict, path: Path, depth: int) -> None:
    with atomically(path) as part:
        part.write_text(dump(results, depth) + "\n")


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def spread(values, scale: float = 1) -> str:
    """Median [least, most]"""
    if len(values) == 1:
        return number(scale * values[0])
    return "{} [{}, {}]".format(*(number(scale * f(values)) for f in (statistics.median, min, max)))


def bracket(values, sign="") -> str:
    return "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*values, s=sign)


def mean_and_std(values) -> str:
    mean, std = values
    return f"{mean:.0f} ± {std:.0f}"


# ---- statistics ----


def resample(right: Tensor, asked: Tensor) -> Tensor:
    """Right answers in %, where whole pictures are drawn again and again.

    right (pictures, rows): how many answers about each are right; asked (pictures,): of how many
    -> (1 + RESAMPLES, rows): of the pictures, then of resamples
    """
    n = len(asked)
    generator = torch.Generator().manual_seed(0)
    times = [torch.ones(n)]  # how often each picture is drawn
    for _ in range(RESAMPLES):
        draw = torch.randint(n, (n,), generator=generator)
        times.append(torch.bincount(draw, minlength=n).float())

    of = [100 * (one @ right) / (one @ asked) for one in times]
    return torch.stack(of)


def interval(values: Tensor) -> list[float]:
    """(1 + RESAMPLES,) -> the value and its 95 % interval"""
    # nan: a resample without such questions
    ends = values[1:].nanquantile(torch.tensor([0.025, 0.975]))
    return [round(v, 2) for v in (values[0].item(), *ends.tolist())]


def mean_std(counts: list[int]) -> list[float]:
    return [round(statistics.fmean(counts), 1), round(statistics.pstdev(counts), 1)]
