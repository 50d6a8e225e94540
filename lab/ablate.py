"""The paper's ablations on tiny/: how well it answers with merged visual tokens.

With virtual unmerging and without.

    python -m lab.ablate              # under 3 minutes on 2 cores; writes lab/ablate.json
                                      # and prints its tables
    python -m lab.ablate --full       # 1000 scenes and all of easy-VQA's test split: half an hour
    python -m lab.ablate --render     # only prints the tables of lab/ablate.json

An answer is right if each of its tokens, the end included, is the likeliest after the right ones
before it: then, and only then, greedy decoding gives it, and one forward pass tells. A description
is one answer, right as a whole or wrong.

Intervals are 95 % bootstrap intervals over pictures. Wilson's would take the questions of one
picture for independent, but they share what the model saw of it; resampling whole pictures keeps
that. All rows answer the same questions, so differences between rows are resampled in pairs. Where
every answer of a cell is right its interval has no width.
"""

import argparse
import dataclasses
import datetime
import functools
import hashlib
import io
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from dymu import DyMU
from extras.door import find, one_line, read_json
from extras.families import read_config
from extras.sampled import spread
from extras.thresholds import BUDGETS, find_thresholds, merges, read_thresholds, schedule
from lab.scenes import GRID, HELD_OUT, KINDS, ask, blind_guess, easy_pictures, place_things, scene
from lab.tables import head, line, save
from load import load
from model import KVCache

VTU = {"VTU": {}, "VTU with 1 query": dict(queries=spread(1)), "no VTU": dict(vtu=False)}
OTHERS = {  # DToMe mid with another schedule, or with thresholds found on scenes of one level only
    "linear schedule": ("linear", None),
    "reverse linear schedule": ("reverse_linear", None),
    "thresholds of plain scenes": ("constant", 0.0),
    "thresholds of cluttered scenes": ("constant", 1.0),
}
PAIRS = {  # differences between rows, at each budget
    "DToMe, VTU: minus full": ("DToMe {}, VTU", "full"),
    "DToMe, VTU: minus ToMe, VTU": ("DToMe {}, VTU", "ToMe {}, VTU"),
    "DToMe: VTU minus no VTU": ("DToMe {}, VTU", "DToMe {}, no VTU"),
    "ToMe: VTU minus no VTU": ("ToMe {}, VTU", "ToMe {}, no VTU"),
    "DToMe, VTU: 1 query per token minus all": ("DToMe {}, VTU with 1 query", "DToMe {}, VTU"),
}
COLUMNS = {"scenes": KINDS, "easy-VQA": ("easy-VQA",)} | {kind: (kind,) for kind in KINDS}
THRESHOLD_SCENES, BATCH, BLIND_SCENES, RESAMPLES = 128, 64, 5000, 2000


# ---- measuring: one picture at a time, in one process per core ----

loaded = functools.cache(load)  # once per process


def thresholds_on(folder: Path, r: tuple[int, ...], level: float | None) -> tuple[float, ...]:
    """Eq. 4 on drawn scenes, none of them held out. level: None for all levels."""
    llava, processor = loaded(folder, "cpu", "float32")
    images = (processor.image(scene(seed, level).image) for seed in range(THRESHOLD_SCENES))
    return find_thresholds(llava.vision_tower, images, r, BATCH)


def all_settings(folder: Path, pool: ProcessPoolExecutor) -> dict[str, DyMU]:
    """The rows.

    The budgets' thresholds are the checkpoint's own if it has any; all others are found here.
    """
    config, own = read_config(folder), (folder / "thresholds.json").is_file()
    r = {budget: merges(budget, config) for budget in BUDGETS}
    jobs = {} if own else {budget: (r[budget], None) for budget in BUDGETS}
    for name, (kind, level) in OTHERS.items():
        jobs[name] = schedule(sum(r["mid"]), config.vision_layers, kind), level
    find_one = functools.partial(thresholds_on, folder)
    found = dict(zip(jobs, pool.map(find_one, *zip(*jobs.values()))))
    found |= {budget: read_thresholds(budget, folder, config)[0] for budget in BUDGETS if own}
    ways = {f"ToMe {budget}": dict(r=r[budget]) for budget in BUDGETS}
    ways |= {f"DToMe {budget}": dict(thresholds=found[budget]) for budget in BUDGETS}
    rows = {
        f"{way}, {name}": DyMU(**merging, **vtu)
        for way, merging in ways.items()
        for name, vtu in VTU.items()
    }
    others = {f"DToMe mid, VTU, {name}": DyMU(thresholds=found[name]) for name in OTHERS}
    return {"full": DyMU()} | rows | others


def easy_list(split: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """easy-VQA's pictures as files, each with its (kind, question, answer)s, by their number."""
    return [one for _, one in sorted(easy_pictures(split, "easy-VQA").items())]


@torch.inference_mode()
def examine(folder: Path, rows: dict[str, DyMU], picture) -> dict:
    """picture: the seed of a scene, or a file and its questions.

    It is encoded once for each way of merging.
    """
    llava, processor = loaded(folder, "cpu", "float32")
    if isinstance(picture, int):
        drawn = scene(picture)
        picture = drawn.image, drawn.questions
    image, questions = picture
    pixels, jpeg = processor.image(image), io.BytesIO()
    processor.view(image).save(jpeg, "JPEG")  # at Pillow's quality 75
    asked = []
    for _, question, answer in questions:
        told = processor.tokenizer.encode(f" {answer}", add_special_tokens=False).ids
        told = [*told, llava.config.eos_token_id[0]]
        asked.append((torch.cat((processor.prompt(question), torch.tensor(told[:-1]))), told))
    encode = functools.cache(lambda merging: llava.encode(pixels, merging))
    complexity = jpeg.tell() / pixels[0].numel()
    found = dict(questions=questions, bytes_per_pixel=complexity, tokens={}, right={})
    for name, settings in rows.items():
        visual = encode(dataclasses.replace(settings, vtu=True, queries=None))
        found["tokens"][name], found["right"][name] = len(visual[0][0]), []
        for ids, told in asked:
            x, token_at = llava.splice(ids, visual, settings.vtu)
            x = llava.language_model(x, token_at, KVCache(), settings.queries)[-len(told) :]
            found["right"][name].append(llava.logits(x).argmax(-1).tolist() == told)
    return found


# ---- from single answers to results ----


def accuracy(pictures: list[dict], kinds, names: list[str]) -> Tensor:
    """Right answers in % to questions of these kinds.

    -> (1 + RESAMPLES, rows): of the pictures, then of resamples
    """
    chosen = [
        [i for i, (kind, _, _) in enumerate(p["questions"]) if kind in kinds] for p in pictures
    ]
    asked = torch.tensor([float(len(c)) for c in chosen])
    right = torch.tensor(
        [[float(sum(p["right"][n][i] for i in c)) for n in names] for p, c in zip(pictures, chosen)]
    )
    n, generator = len(pictures), torch.Generator().manual_seed(0)
    draw = torch.randint(n, (RESAMPLES, n), generator=generator)
    # how often each picture is drawn
    times = torch.zeros(draw.shape).scatter_add_(1, draw, torch.ones(draw.shape))
    times = torch.cat((torch.ones_like(times[:1]), times))
    return 100 * times @ right / (times @ asked)[:, None]


def interval(values: Tensor) -> list[float]:
    """(1 + RESAMPLES,) -> the value and its 95 % interval"""
    # nan: a resample without such questions
    ends = values[1:].nanquantile(torch.tensor([0.025, 0.975]))
    return [round(v, 2) for v in (values[0].item(), *ends.tolist())]


def mean_std(pictures: list[dict], name: str) -> list[float]:
    counts = [p["tokens"][name] for p in pictures]
    return [round(statistics.fmean(counts), 1), round(statistics.pstdev(counts), 1)]


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of the ranks, where equal values share their mean rank."""
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
    ranks = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (a, b)]
    return round(torch.corrcoef(torch.stack(ranks))[0, 1].item(), 3)


def summarise(scenes: list[dict], easy: list[dict], names: list[str]) -> dict:
    share = {
        c: accuracy(easy if c == "easy-VQA" else scenes, kinds, names)
        for c, kinds in COLUMNS.items()
    }
    rows = {}
    for i, name in enumerate(names):
        cells = {column: interval(values[:, i]) for column, values in share.items()}
        rows[name] = dict(
            tokens=mean_std(scenes, name), tokens_easy=mean_std(easy, name), accuracy=cells
        )
    of = dict(zip(names, share["scenes"].T))
    pairs = {
        label: {budget: interval(of[a.format(budget)] - of[b.format(budget)]) for budget in BUDGETS}
        for label, (a, b) in PAIRS.items()
    }
    # Fig. 3: complexity as JPEG bytes per pixel
    complexity = [p["bytes_per_pixel"] for p in scenes]
    correlation = {
        b: spearman(complexity, [p["tokens"][f"DToMe {b}, VTU"] for p in scenes]) for b in BUDGETS
    }
    order, n, thirds = sorted(scenes, key=lambda p: p["bytes_per_pixel"]), len(scenes), {}
    for third in (order[: n // 3], order[n // 3 : n - n // 3], order[n - n // 3 :]):
        values = dict(zip(names, accuracy(third, KINDS, names).T))
        label = f"{third[0]['bytes_per_pixel']:.3f} to {third[-1]['bytes_per_pixel']:.3f}"
        shown = (
            "full",
            *(f"{method} {budget}, VTU" for budget in BUDGETS for method in ("ToMe", "DToMe")),
        )
        thirds[label] = {
            name: dict(tokens=mean_std(third, name), accuracy=interval(values[name]))
            for name in shown
        }
    # what one would get right without the picture
    seen = [item for _, questions in easy_list("train") for item in questions]
    for seed in range(BLIND_SCENES):
        rng = random.Random(seed)
        seen += ask(rng, place_things(rng, rng.random(), GRID, (0, 0)), 10)
    items = [item for p in scenes + easy for item in p["questions"]]
    asked = {
        column: sum(kind in kinds for kind, _, _ in items) for column, kinds in COLUMNS.items()
    }
    guess = blind_guess(seen, items)
    blind = {
        c: 100 * sum(guess[k] * asked[k] for k in kinds) / asked[c] for c, kinds in COLUMNS.items()
    }
    blind = {column: round(percent, 2) for column, percent in blind.items()}
    return dict(
        asked=asked, blind=blind, rows=rows, pairs=pairs, spearman=correlation, thirds=thirds
    )


def written(settings: DyMU) -> dict:
    """Settings as JSON has them."""
    queries = None if settings.queries is None else settings.queries.keywords["queries"]
    merging = dict(thresholds=settings.thresholds, r=settings.r)
    return merging | dict(vtu=settings.vtu, queries=queries)


# ---- showing ----


def table(results: dict) -> str:
    """The tables of RESULTS.md, from the content of the JSON file alone."""

    def bracket(values, sign=""):
        return "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*values, s=sign)

    def tokens(mean, std):
        return f"{mean:.0f} ± {std:.0f}"

    pictures, asked, blind = results["pictures"], results["asked"], results["blind"]
    wide = ("scenes", "easy-VQA")
    out = [
        f"Right answers in %, on {pictures['scenes']} held-out scenes and {pictures['easy-VQA']} "
        "test pictures of easy-VQA, with 95 % bootstrap intervals over pictures. Tokens: mean ± "
        "standard deviation over pictures. Unless a row says otherwise, its schedule is constant "
        "and its thresholds are from scenes of all levels.",
        "",
        *head("", "tokens, scenes", "tokens, easy-VQA", *COLUMNS),
        line("questions", "", "", *(str(asked[c]) for c in COLUMNS)),
        line("best blind guess", "", "", *(f"{blind[c]:.{int(c in wide)}f}" for c in COLUMNS)),
    ]
    for name, row in results["rows"].items():
        cells = (bracket(v) if c in wide else f"{v[0]:.0f}" for c, v in row["accuracy"].items())
        out.append(line(name, tokens(*row["tokens"]), tokens(*row["tokens_easy"]), *cells))
    out += ["", "Differences on the scenes, in points:", "", *head("", *BUDGETS)]
    out += [
        line(label, *(bracket(v, "+") for v in pair.values()))
        for label, pair in results["pairs"].items()
    ]
    thirds = results["thirds"]
    out += [
        "",
        "Scenes in thirds by JPEG bytes per pixel, tokens and right answers in %:",
        "",
        *head("", *thirds),
    ]
    for name in next(iter(thirds.values())):
        cells = (third[name] for third in thirds.values())
        out.append(
            line(name, *(f"{tokens(*c['tokens'])}: {bracket(c['accuracy'])}" for c in cells))
        )
    found = ", ".join(f"{value:.2f} at {budget}" for budget, value in results["spearman"].items())
    return "\n".join(
        [*out, "", f"Spearman correlation of DToMe's tokens with JPEG bytes per pixel: {found}."]
    )


def small_table(results: dict) -> str:
    """The README's: with VTU and without, at low."""

    def cell(name):
        return "{:.1f} [{:.1f}, {:.1f}]".format(*results["rows"][name]["accuracy"]["scenes"])

    out = head("right answers in %, at *low*", "tokens", "with VTU", "without")
    out.append(line("full length", "256", cell("full"), ""))
    for method in ("ToMe", "DToMe"):
        mean, std = results["rows"][f"{method} low, VTU"]["tokens"]
        cells = (cell(f"{method} low, {vtu}") for vtu in ("VTU", "no VTU"))
        out.append(line(method, f"{mean:.0f} ± {std:.0f}", *cells))
    return "\n".join(out)


# ---- the command ----


def measure(a: argparse.Namespace) -> dict:
    start, folder, first = time.perf_counter(), find(a.model), HELD_OUT + 1_000_000 * (1 + a.seed)
    scenes = range(first, first + (1000 if a.full else a.n))
    easy = easy_list("test")[: 1000 if a.full else a.n // 2]
    found, context = [], multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(a.processes, context, torch.set_num_threads, (1,)) as pool:
        print("finding thresholds", file=sys.stderr)
        rows = all_settings(folder, pool)
        for picture in pool.map(functools.partial(examine, folder, rows), [*scenes, *easy]):
            found.append(picture)
            done = f"\r{len(found)} of {len(scenes) + len(easy)} pictures"
            print(done, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    today, sha256 = datetime.date.today().isoformat(), hashlib.sha256()
    sha256.update((folder / "model.safetensors").read_bytes())
    results = dict(date=today, model=folder.resolve().name, first_seed=first)
    results |= dict(weights_sha256=sha256.hexdigest())
    results |= dict(pictures={"scenes": len(scenes), "easy-VQA": len(easy)})
    results |= dict(
        threshold_scenes=THRESHOLD_SCENES, blind_scenes=BLIND_SCENES, resamples=RESAMPLES
    )
    cpu = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
    cpu += torch.backends.cpu.get_cpu_capability()
    results |= dict(
        machine=cpu, processes=a.processes, threads_per_process=1, python=platform.python_version()
    )
    results |= {package: version(package) for package in ("torch", "pillow", "easy-vqa")}
    results |= dict(settings={name: written(settings) for name, settings in rows.items()})
    results |= summarise(found[: len(scenes)], found[len(scenes) :], list(rows))
    return results | dict(seconds=round(time.perf_counter() - start))


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m lab.ablate", description="Measures the ablations of the README."
    )
    p.add_argument("--model", default="tiny", help="folder of the checkpoint (%(default)s)")
    p.add_argument(
        "--n",
        type=int,
        default=100,
        help="scenes, and half as many easy-VQA pictures (%(default)s)",
    )
    p.add_argument(
        "--full", action="store_true", help="1000 scenes and all 1000 easy-VQA test pictures"
    )
    p.add_argument("--seed", type=int, default=0, help="of the held-out scenes (%(default)s)")
    p.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="of one thread each (%(default)s)"
    )
    p.add_argument(
        "--save", type=Path, default=Path("lab/ablate.json"), help="the JSON file (%(default)s)"
    )
    p.add_argument(
        "--render", action="store_true", help="measure nothing, print the tables of the JSON file"
    )
    a = p.parse_args()
    try:
        if a.n < 12 or a.processes < 1 or a.seed < 0:
            raise ValueError("--n must be at least 12, --processes 1, --seed 0")
        if not (a.save.is_file() if a.render else a.save.parent.is_dir()):
            raise ValueError(f"--save: there is no {a.save if a.render else a.save.parent}")
        if not a.render:
            save(measure(a), a.save, depth=2)
        print(small_table(read_json(a.save)), table(read_json(a.save)), sep="\n\n")
    except (ValueError, OSError) as e:
        p.error(one_line(e))


if __name__ == "__main__":
    main()
