"""Where merging loses answers, and what a second stage behind the projector keeps, on tiny/.

    python -m lab.second              # 42 minutes in one process on a busy machine; writes
                                      # lab/second.json and prints its tables
    python -m lab.second --render     # only prints the tables of lab/second.json

The sets of pictures, what counts as right and the intervals are those of lab/ablate.py, but the
drawn pictures are others: nothing was chosen or found on them.
"""

import argparse
import functools
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dymu import DyMU, remerge
from extras.calibrate import calibrate_behind
from extras.door import find
from extras.families import read_config
from extras.thresholds import read_thresholds, second
from lab import ablate
from lab.scenes import scene
from lab.tables import bracket, head, interval, line, mean_and_std, mean_std
from model import Llava

SEED = 70  # of the drawn pictures
TAU_SEEDS = range(1_000_000, 1_000_256)  # of scenes that neither training nor a measurement draws

# share of the tokens -> what lab/ablate.py calls it, whose schedules are used here, too
SHARES = {"16 %": "low", "10 %": "10 %", "5 %": "5 %"}
STAGES = ("none", "high", "mid", "low")  # in the encoder, before a second one
SHIPPED = {"tight": "10 %", "tightest": "5 %"}


# ---- the ways to merge ----


def all_ways(folder: Path, pool: ProcessPoolExecutor) -> dict[str, DyMU]:
    second_stages = pool.map(behind, [folder] * len(STAGES), STAGES)
    in_encoder = ablate.in_encoder(folder, pool, SHARES.values())
    ways = {way.replace("low", "16 %"): settings for way, settings in in_encoder.items()}
    for found in second_stages:
        ways |= found
    return ways | {name: preset(name, folder) for name in SHIPPED}


def preset(name: str, folder: Path) -> DyMU:
    """The checkpoint's own"""
    thresholds, about = read_thresholds(name, folder, read_config(folder))
    return DyMU(thresholds=thresholds, **second(about["after"]))


def behind(folder: Path, stage: str) -> dict[str, DyMU]:
    """With a tau for each share of the tokens that is smaller than what this stage leaves"""
    llava, processor = ablate.loaded(folder, "cpu", "float32")
    first = DyMU() if stage == "none" else preset(stage, folder)
    N = llava.config.visual_tokens
    shares = {s: ablate.tokens_left(llava.config, b) / N for s, b in SHARES.items() if b != stage}

    def read(seed):
        return processor.image(scene(seed).image)

    found = calibrate_behind(llava, read, TAU_SEEDS, first, shares)
    return {f"{stage}, then {s}": replace(first, **second(one["after"])) for s, one in found}


@dataclass(frozen=True)
class Regrouped(DyMU):
    """The encoder merges nothing. Its rows are averaged by the groups that ToMe makes in it."""

    projected: bool = True  # the rows that are averaged


def expanded(x: Tensor, token_at: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 8 without Eq. 11: each position has a row, so that nothing is averaged in the decoder."""
    return x[token_at], torch.arange(len(token_at))


def encode(llava: Llava, pixels: Tensor, settings: DyMU) -> list[tuple[Tensor, Tensor]]:
    """As `Llava.encode`, and knows `Regrouped`"""
    if not isinstance(settings, Regrouped):
        return llava.encode(pixels, settings)

    merged, token_at = llava.vision_tower(pixels, settings)
    x, _ = llava.vision_tower(pixels)
    if settings.projected:
        x = remerge(llava.multi_modal_projector(x), token_at, len(merged))
    else:
        x = llava.multi_modal_projector(remerge(x, token_at, len(merged)))
    return [(x, token_at)]


def all_rows(ways: dict[str, DyMU]) -> dict[str, DyMU]:
    rows = {"full": DyMU()} | ablate.unmerged(ways)
    for share in SHARES:
        tome = ways[f"ToMe {share}"]
        rows[f"{share}, expanded"] = replace(tome, after=expanded)
        rows[f"{share}, before"] = Regrouped(r=tome.r, projected=False)
        rows[f"{share}, behind"] = Regrouped(r=tome.r)
    return rows


# ---- results: label -> a row, and the one to be taken from it ----

WAYS = {
    "VTU": ("{way}, VTU", None),
    "minus full": ("{way}, VTU", "full"),
    "minus ToMe": ("{way}, VTU", "ToMe {share}, VTU"),
    "minus DToMe": ("{way}, VTU", "DToMe {share}, VTU"),
    "1 query minus all": ("{way}, VTU with 1 query", "{way}, VTU"),
    "no VTU": ("{way}, no VTU", None),
    "VTU minus no VTU": ("{way}, VTU", "{way}, no VTU"),
}
LOSS = {
    "VTU minus full": ("ToMe {share}, VTU", "full"),
    "VTU minus 1 query": ("ToMe {share}, VTU", "ToMe {share}, VTU with 1 query"),
    "VTU minus expanded": ("ToMe {share}, VTU", "{share}, expanded"),
    "averaged before the projector, minus full": ("{share}, before", "full"),
    "averaged behind it, minus full": ("{share}, behind", "full"),
    "averaged behind it, minus VTU": ("{share}, behind", "ToMe {share}, VTU"),
}


def share_of(way: str) -> str:
    return SHIPPED.get(way) or re.search(r"\d+ %", way)[0]


def summarise(found: dict[str, list[dict]], ways: list[str], names: list[str]) -> dict:
    """found: of each set its pictures, as `ablate.examine` gives them; names: of the rows"""
    sets = {}
    for which, pictures in found.items():
        accuracy = ablate.accuracy(pictures, ablate.COLUMNS[which][1], names)
        right = dict(zip(names, accuracy.T))
        tokens = {way: mean_std(ablate.tokens_of(pictures, f"{way}, VTU")) for way in ways}
        sets[which] = dict(
            full=interval(right["full"]),
            tokens=tokens,
            ways={way: values(right, WAYS, share_of(way), way) for way in ways},
            loss={share: values(right, LOSS, share) for share in SHARES},
        )

    complexity = [picture["bytes_per_pixel"] for picture in found["scenes"]]
    correlation = {}
    for way in ("DToMe 10 %", "DToMe 5 %", *SHIPPED):
        tokens = ablate.tokens_of(found["scenes"], f"{way}, VTU")
        correlation[way] = ablate.spearman(complexity, tokens)
    asked, blind = ablate.without_pictures(found)
    return dict(asked=asked, blind=blind, sets=sets, spearman=correlation)


def values(right: dict[str, Tensor], labels: dict, share: str, way: str = "") -> dict:
    out = {}
    for label, (a, b) in labels.items():
        value = right[a.format(way=way, share=share)]
        out[label] = interval(value - right[b.format(way=way, share=share)] if b else value)
    return out


# ---- showing, from the content of the JSON file alone ----


def table(results: dict) -> str:
    out = []
    for which, of in results["sets"].items():
        asked = f"{results['pictures'][which]} pictures, {results['asked'][which]} questions"
        full = f"full length {bracket(of['full'])}, best blind guess {results['blind'][which]:.1f}"
        out += [f"**{which}**: {asked}, {full}", "", *head("", "tokens", *WAYS)]
        for way in sorted(of["ways"], key=lambda way: list(SHARES).index(share_of(way))):
            out.append(line(way, mean_and_std(of["tokens"][way]), *cells(of["ways"][way])))
        out.append("")

    out += head("ToMe's groups", *LOSS)
    for which, of in results["sets"].items():
        for share, found in of["loss"].items():
            out.append(line(f"{which}, {share}", *cells(found)))

    told = ", ".join(f"{value:.2f} ({way})" for way, value in results["spearman"].items())
    out += ["", f"Spearman correlation of tokens with JPEG bytes per pixel, scenes: {told}."]
    return "\n".join(out)


def cells(found: dict) -> list[str]:
    return [bracket(v, "+" if "minus" in label else "") for label, v in found.items()]


def small_table(results: dict) -> str:
    """The README's"""
    of = results["sets"]["scenes"]
    out = head("right answers in %", "tokens", "with VTU", "without")
    out.append(line("full length", "256", bracket(of["full"]), ""))
    for way in ("ToMe 16 %", "DToMe 16 %", "ToMe 5 %", "DToMe 5 %", *SHIPPED):
        name = f"{way}, {SHIPPED[way]}" if way in SHIPPED else way
        found = of["ways"][way]
        right = bracket(found["VTU"]), bracket(found["no VTU"])
        out.append(line(name, mean_and_std(of["tokens"][way]), *right))
    return "\n".join(out)


# ---- the command ----


def measure(a: argparse.Namespace) -> dict:
    folder = find(a.model)
    with ablate.processes(a.processes) as pool:
        ways = all_ways(folder, pool)
        rows = all_rows(ways)
        examine = functools.partial(ablate.examine, folder, rows, encode=encode)
        found = ablate.examine_all(pool, ablate.held_out(a), examine)

    settings = {name: ablate.written(one) for name, one in rows.items()}
    about = dict(tau_scenes=len(TAU_SEEDS), settings=settings)
    return ablate.provenance(a, folder) | about | summarise(found, list(ways), list(rows))


if __name__ == "__main__":
    parser = ablate.arguments("second", "Measures the second stage of RESULTS.md.", SEED)
    ablate.run(parser, measure, small_table, table)
