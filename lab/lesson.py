"""What walkthrough.ipynb draws and measures with, so that its cells show the method alone.

python -m lab.lesson      # runs it, and stores its outputs
"""

import inspect
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from nbclient import NotebookClient
from PIL import Image
from torch import Tensor

from dymu import DyMU, rope_scores
from extras.show import ACCENT, INK, SOFT, TRACK, merged
from lab.ablate import right_answers, with_answers
from lab.scenes import GRID, scene
from lab.tables import bracket, interval, resample
from model import KVCache, rope_table

FILE = Path(__file__).parent.parent / "walkthrough.ipynb"
WIDTH = 6.4  # inches of every figure: on a phone, at half the size, its text is still read
HEAT = LinearSegmentedColormap.from_list("heat", ["white", ACCENT])
ORDER = LinearSegmentedColormap.from_list("order", ["white", TRACK, SOFT, INK])
STYLE = {
    "figure.dpi": 110,
    "font.size": 12,
    "axes.titlesize": 12,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": TRACK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def lines_of(function, *parts: str) -> None:
    """Prints the lines of a function of ours that hold these parts, each of which is in one."""
    lines = inspect.getsource(function).splitlines()
    print(f"{function.__module__}.{function.__qualname__}:")
    for part in parts:
        (found,) = [line for line in lines if part in line]
        print(f"    {found.strip()}")


# ---- drawing ----


def panels(columns: int, rows: int = 1, height: float | None = None, **options):
    """-> the axes of a figure; height in inches, by default for squares"""
    plt.rcParams.update(STYLE)
    height = height or rows * (WIDTH / columns + 0.35)
    options = {"layout": "constrained", "squeeze": False} | options
    return plt.subplots(rows, columns, figsize=(WIDTH, height), **options)[1].flatten()


def picture(axes: Axes, image, title: str = "", **options) -> None:
    """A picture, or a number for each patch (256,), which HEAT colours unless options have a cmap

    The axes count in patches.
    """
    if isinstance(image, Tensor) and image.ndim == 1:
        image = image.view(GRID, GRID)
        options = {"cmap": HEAT, "vmin": 0} | options
    axes.imshow(image, extent=(0, GRID, GRID, 0), **options)
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(True)


def groups(axes: Axes, image: Image.Image, token_at: Tensor, title: str = "") -> None:
    """The picture with its tokens outlined, as --show draws it; token_at (256,)"""
    picture(axes, merged([image], [token_at.view(GRID, GRID)])[0], title)


def grid(axes: Axes) -> None:
    """The borders of the patches"""
    for i in range(1, GRID):
        axes.axhline(i, color=INK, linewidth=0.4, alpha=0.4)
        axes.axvline(i, color=INK, linewidth=0.4, alpha=0.4)


def centre(patch):
    """The number of a patch, or a tensor of these -> x and y of its middle"""
    return patch % GRID + 0.5, patch // GRID + 0.5


def mark(axes: Axes, patch: int) -> None:
    axes.plot(*centre(patch), "s", markersize=9, markerfacecolor="none", mec=INK, mew=2)


def matrix(axes: Axes, values: Tensor, title: str, names: list[str]) -> None:
    """Squares with a number in each; names: of the rows, and of the columns"""
    axes.imshow(values, cmap=HEAT, vmin=values.min() - 1, vmax=values.max() + 4)
    for row, column in torch.cartesian_prod(*map(torch.arange, values.shape)):
        axes.text(column, row, f"{values[row, column]:.1f}", ha="center", va="center")
    axes.set(title=title, xticks=range(len(names)), yticks=range(len(names)))
    axes.set(xticklabels=names, yticklabels=names)
    axes.tick_params(length=0)


def dots(axes: Axes, values: dict[str, list[float]], xlabel: str) -> None:
    """A dot and its interval for each name, [value, least, most], the first on top"""
    for y, (value, least, most) in enumerate(values.values()):
        axes.plot([least, most], [-y, -y], color=ACCENT, linewidth=2, alpha=0.5)
        axes.plot(value, -y, "o", color=ACCENT)
    axes.set(yticks=range(0, -len(values), -1), yticklabels=values, xlabel=xlabel)
    axes.set_ylim(0.5 - len(values), 0.5)
    axes.locator_params("x", integer=True)
    axes.tick_params("y", length=0, labelcolor=INK)
    axes.grid(axis="x", color=TRACK)


# ---- looking in, and measuring ----


def attention_of(llava, ids: Tensor, visual: list, settings: DyMU) -> Tensor:
    """What the last token of a prompt attends to -> (layers, H, positions)

    The scores are those of Eq. 10 term by term, from the queries and keys of each layer.
    """
    rows, token_at = llava.splice(ids, visual, settings.vtu)
    kept = []
    hooks = []
    for layer in llava.language_model.layers:
        for part in (layer.q_proj, layer.k_proj):
            hooks.append(part.register_forward_hook(lambda _, __, out: kept.append(out)))
    llava.language_model(rows, token_at, KVCache())
    for hook in hooks:
        hook.remove()

    c = llava.config.text_config
    cos, sin = rope_table(len(token_at), c, rows.device)
    heads = [out.unflatten(-1, (-1, c.head_dim)).transpose(0, 1) for out in kept]
    scores = [rope_scores(q, k, token_at, cos, sin)[:, -1] for q, k in zip(heads[::2], heads[1::2])]
    return (torch.stack(scores) / c.head_dim**0.5).softmax(-1)


class Quiz:
    """Held-out scenes with their questions, and how many of these each way answers rightly."""

    def __init__(self, llava, processor, seeds):
        self.llava = llava
        self.scenes = [scene(seed) for seed in seeds]
        self.pixels = [processor.image(one.image) for one in self.scenes]
        self.asked = [with_answers(processor, one.questions) for one in self.scenes]
        self.found = {}

    def ask(self, name: str, encode, decoder: DyMU = DyMU()) -> None:
        """Prints how it answers. encode: (pixels, scene) -> rows, token_at"""
        right = []
        tokens = []
        for pixels, one, asked in zip(self.pixels, self.scenes, self.asked):
            visual = [encode(pixels, one)]
            tokens.append(len(visual[0][0]))
            right.append(float(sum(right_answers(self.llava, visual, decoder, asked))))
        self.found[name] = right
        mean = sum(tokens) / len(tokens)
        print(f"{name:24} {mean:5.1f} tokens  {bracket(self.share(name))}")

    def share(self, name: str, minus: str | None = None) -> list[float]:
        """Right answers in %, or the difference to those of another way, with its interval"""
        right = torch.tensor([self.found[name], self.found[minus or name]]).T
        asked = torch.tensor([float(len(asked)) for asked in self.asked])
        values = resample(right, asked)
        return interval(values[:, 0] - values[:, 1] if minus else values[:, 0])


def executed() -> nbformat.NotebookNode:
    """The notebook, run in a fresh kernel"""
    notebook = nbformat.read(FILE, as_version=4)
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(FILE.parent)}},
        coalesce_streams=True,
        record_timing=False,  # or every run would change every cell
    ).execute()
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), FILE)
