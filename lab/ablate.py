"""The paper's ablations on tiny/: how well it answers with merged visual tokens.

With virtual unmerging and without.

    python -m lab.ablate              # under 5 minutes on 2 cores; writes lab/ablate.json
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
import copy
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from dymu import DyMU
from extras.door import find, one_line, read_json
from extras.families import read_config
from extras.sampled import spread
from extras.thresholds import BUDGETS, find_thresholds, read_thresholds, schedule
from lab.scenes import GRID, HELD_OUT, KINDS, ask, blind_guess, easy_pictures, place_things, scene
from lab.tables import (
    RESAMPLES,
    bracket,
    head,
    interval,
    line,
    mean_and_std,
    mean_std,
    resample,
    save,
)
from load import load
from model import KVCache, Llava, LlavaConfig

# ---- the rows: ways to merge, each with ways to unmerge ----

# of each budget, the share of the tokens that is left
SHARES = {
    "high": BUDGETS["high"],
    "mid": BUDGETS["mid"],
    "low": BUDGETS["low"],
    "10 %": 0.10,
    "5 %": 0.05,
}
FEW = ("low", "10 %", "5 %")  # those that leave room for differences

# A layer pairs half of its tokens. For few tokens a constant schedule asks the last layers for more
# pairs than they have.
SCHEDULES = {
    "high": "constant",
    "mid": "constant",
    "low": "constant",
    "10 %": "linear",
    "5 %": "linear",
}

VTU = {
    "VTU": {},
    "VTU with 1 query": dict(queries=spread(1)),
    "no VTU": dict(vtu=False),
}

# other rows -> budget, schedule, level of the scenes that gave the thresholds (None: all levels)
OTHERS = {
    "DToMe low, VTU, linear schedule": ("low", "linear", None),
    "DToMe low, VTU, reverse linear schedule": ("low", "reverse_linear", None),
    "DToMe 10 %, VTU, constant schedule": ("10 %", "constant", None),
    "DToMe 10 %, VTU, reverse linear schedule": ("10 %", "reverse_linear", None),
    "DToMe mid, VTU, thresholds of plain scenes": ("mid", "constant", 0.0),
    "DToMe mid, VTU, thresholds of cluttered scenes": ("mid", "constant", 1.0),
}

# ---- the columns: sets of pictures, and kinds of questions ----

VARIANT = {"scenes": "", "small text": "small", "crowded": "crowded"}  # of drawn sets
SETS = ("scenes", "easy-VQA", "small text", "crowded")

# column -> its set of pictures, and which kinds of questions it counts
COLUMNS = {
    "scenes": ("scenes", KINDS),
    "easy-VQA": ("easy-VQA", ("easy-VQA",)),
    "small text": ("small text", tuple(f"small {kind}" for kind in KINDS)),
    "crowded": ("crowded", tuple(f"crowded {kind}" for kind in KINDS)),
}
COLUMNS |= {kind: ("scenes", (kind,)) for kind in KINDS}
COLUMNS |= {
    "small reading": ("small text", ("small reading",)),
    "crowded counting": ("crowded", ("crowded counting",)),
    "crowded description": ("crowded", ("crowded description",)),
}

# ---- differences between rows ----

# at each budget
PAIRS = {
    "DToMe, VTU: minus full": ("DToMe {}, VTU", "full"),
    "DToMe, VTU: minus ToMe, VTU": ("DToMe {}, VTU", "ToMe {}, VTU"),
    "DToMe: VTU minus no VTU": ("DToMe {}, VTU", "DToMe {}, no VTU"),
    "DToMe, VTU: 1 query per token minus all": ("DToMe {}, VTU with 1 query", "DToMe {}, VTU"),
    "ToMe: VTU minus no VTU": ("ToMe {}, VTU", "ToMe {}, no VTU"),
}
PAIRS_OF_VARIANTS = tuple(PAIRS)[:4]

# of schedules
LOW = "DToMe low, VTU"
TENTH = "DToMe 10 %, VTU"
SCHEDULE_PAIRS = {
    "low: linear minus constant": (f"{LOW}, linear schedule", LOW),
    "low: linear minus reverse linear": (
        f"{LOW}, linear schedule",
        f"{LOW}, reverse linear schedule",
    ),
    "10 %: linear minus constant": (TENTH, f"{TENTH}, constant schedule"),
    "10 %: linear minus reverse linear": (TENTH, f"{TENTH}, reverse linear schedule"),
}

THRESHOLD_SCENES = 128
BATCH = 64
BLIND_SCENES = 5000


# ---- measuring: one picture at a time, in one process per core ----

loaded = functools.cache(load)  # once per process


def tokens_left(config: LlavaConfig, budget: str) -> int:
    return round(config.visual_tokens * SHARES[budget])


def merges(config: LlavaConfig, budget: str, kind: str) -> tuple[int, ...]:
    """The r_i of this schedule with which ToMe leaves the budget's share of the tokens.

    Where layers have fewer pairs than they should merge, all are asked for more.
    """
    wanted = tokens_left(config, budget)
    merged = config.visual_tokens - wanted
    r = schedule(merged, config.vision_layers, kind)
    while left_by(config, r) > wanted:
        merged += 1
        r = schedule(merged, config.vision_layers, kind)
    return r


def left_by(config: LlavaConfig, r: tuple[int, ...]) -> int:
    """How many of a picture's tokens ToMe leaves."""
    class_tokens = int(config.vision_config.class_token)
    n = class_tokens + config.visual_tokens
    for r_i in r:
        half = (n + 1) // 2  # A
        n -= min(r_i, half - class_tokens)
    return n - class_tokens


def left_by_plain_schedules(config: LlavaConfig) -> dict[str, int]:
    """Of rows with another schedule, what it would leave if no layer were asked for more."""
    out = {}
    for name, (budget, kind, level) in OTHERS.items():
        if level is None:
            merged = config.visual_tokens - tokens_left(config, budget)
            out[name] = left_by(config, schedule(merged, config.vision_layers, kind))
    return out


def thresholds_on(folder: Path, r: tuple[int, ...], level: float | None) -> tuple[float, ...]:
    """Eq. 4 on drawn scenes, none of them held out. level: None for all levels."""
    llava, processor = loaded(folder, "cpu", "float32")
    images = (processor.image(scene(seed, level).image) for seed in range(THRESHOLD_SCENES))
    return find_thresholds(llava.vision_tower, images, r, BATCH)


def all_settings(folder: Path, pool: ProcessPoolExecutor) -> dict[str, DyMU]:
    """The rows."""
    config = read_config(folder)
    jobs = [(merges(config, budget, kind), level) for budget, kind, level in OTHERS.values()]
    found = pool.map(functools.partial(thresholds_on, folder), *zip(*jobs))
    rows = {"full": DyMU()} | unmerged(in_encoder(folder, pool, SHARES))
    return rows | {name: DyMU(thresholds=taus) for name, taus in zip(OTHERS, found)}


def in_encoder(folder: Path, pool: ProcessPoolExecutor, budgets) -> dict[str, DyMU]:
    """ToMe and DToMe at these budgets.

    The thresholds of low, mid and high are the checkpoint's own if it has any; all others are found
    here.
    """
    config = read_config(folder)
    r = {budget: merges(config, budget, SCHEDULES[budget]) for budget in budgets}

    found = {}
    if (folder / "thresholds.json").is_file():
        found = {b: read_thresholds(b, folder, config)[0] for b in BUDGETS if b in r}
    rest = [budget for budget in r if budget not in found]
    find_one = functools.partial(thresholds_on, folder, level=None)
    found |= zip(rest, pool.map(find_one, [r[budget] for budget in rest]))

    ways = {f"ToMe {budget}": DyMU(r=r[budget]) for budget in r}
    return ways | {f"DToMe {budget}": DyMU(thresholds=found[budget]) for budget in r}


def unmerged(ways: dict[str, DyMU]) -> dict[str, DyMU]:
    """Each way to merge with each of VTU"""
    rows = {}
    for way, settings in ways.items():
        for name, unmerging in VTU.items():
            rows[f"{way}, {name}"] = dataclasses.replace(settings, **unmerging)
    return rows


@functools.cache
def easy_list(split: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """easy-VQA's pictures as files, each with its (kind, question, answer)s, by their number."""
    return [one for _, one in sorted(easy_pictures(split, "easy-VQA").items())]


@torch.inference_mode()
def examine(
    folder: Path, rows: dict[str, DyMU], name: str, number: int, encode: Callable = Llava.encode
) -> dict:
    """One picture of a set: what each row leaves of its tokens, and answers rightly.

    name: of the set; number: the scene's seed, or that of easy-VQA's picture. A picture is encoded
    once for each way of merging, by what takes and gives the same as `Llava.encode`.
    """
    llava, processor = loaded(folder, "cpu", "float32")
    if name == "easy-VQA":
        image, questions = easy_list("test")[number]
    else:
        drawn = scene(number, variant=VARIANT[name])
        image = drawn.image
        questions = drawn.questions

    pixels = processor.image(image)
    jpeg = io.BytesIO()
    processor.view(image).save(jpeg, "JPEG")  # at Pillow's quality 75

    asked = with_answers(processor, questions)

    once = functools.cache(lambda merging: encode(llava, pixels, merging))
    tokens = {}
    right = {}
    for row, settings in rows.items():
        visual = once(dataclasses.replace(settings, vtu=True, queries=None))
        tokens[row] = len(visual[0][0])
        right[row] = right_answers(llava, visual, settings, asked)

    return dict(
        questions=questions,
        bytes_per_pixel=jpeg.tell() / pixels[0].numel(),
        tokens=tokens,
        right=right,
    )


def with_answers(processor, questions: list[tuple]) -> list[tuple[Tensor, list[int]]]:
    """questions: (kind, question, right answer) -> what `right_answers` asks"""
    asked = []
    for _, question, answer in questions:
        told = processor.tokenizer.encode(f" {answer}", add_special_tokens=False).ids
        told.append(processor.config.eos_token_id[0])
        ids = torch.cat((processor.prompt(question), torch.tensor(told[:-1])))
        asked.append((ids, told))
    return asked


def right_answers(llava: Llava, visual: list, settings: DyMU, asked: list) -> list[bool]:
    """Which of the questions about a picture are answered rightly.

    asked: (ids, told) of each: the prompt with the right answer, and the ids to be foretold. The
    prompts are alike up to the picture, so that part is read once.
    """
    (placeholder,) = llava.find_placeholders(asked[0][0], 1)
    seen = KVCache()
    right = []
    for ids, told in asked:
        rows, token_at = llava.splice(ids, visual, settings.vtu)
        text = len(ids) - 1 - placeholder
        if not right:
            llava.language_model(rows[:-text], token_at[:-text], seen, settings.queries)

        cache = copy.copy(seen)
        cache.kv = dict(seen.kv)
        x = llava.language_model(rows[-text:], token_at, cache, settings.queries)
        foretold = llava.logits(x[-len(told) :]).argmax(-1)
        right.append(foretold.tolist() == told)
    return right


# ---- from single answers to results ----


def accuracy(pictures: list[dict], kinds, names: list[str]) -> Tensor:
    """Right answers in % to questions of these kinds.

    -> (1 + RESAMPLES, rows): of the pictures, then of resamples
    """
    asked = []
    right = []
    for p in pictures:
        chosen = [i for i, (kind, _, _) in enumerate(p["questions"]) if kind in kinds]
        asked.append(float(len(chosen)))
        right.append([float(sum(p["right"][name][i] for i in chosen)) for name in names])

    return resample(torch.tensor(right), torch.tensor(asked))


def tokens_of(pictures: list[dict], name: str) -> list[int]:
    return [p["tokens"][name] for p in pictures]


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of the ranks, where equal values share their mean rank."""
    ranks = []
    for values in (a, b):
        v = torch.tensor(values, dtype=torch.float64)
        ranks.append((v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2)
    return round(torch.corrcoef(torch.stack(ranks))[0, 1].item(), 3)


def summarise(found: dict[str, list[dict]], names: list[str]) -> dict:
    """found: of each set its pictures, as `examine` gives them; names: of the rows"""
    share = {}
    for column, (which, kinds) in COLUMNS.items():
        values = accuracy(found[which], kinds, names)
        share[column] = dict(zip(names, values.T))

    rows = {}
    for name in names:
        rows[name] = dict(
            tokens={which: mean_std(tokens_of(found[which], name)) for which in SETS},
            accuracy={column: interval(of[name]) for column, of in share.items()},
        )

    complexity = [p["bytes_per_pixel"] for p in found["scenes"]]
    correlation = {}
    for budget in FEW:
        tokens = tokens_of(found["scenes"], f"DToMe {budget}, VTU")
        correlation[budget] = spearman(complexity, tokens)

    asked, blind = without_pictures(found)
    return dict(
        asked=asked,
        blind=blind,
        rows=rows,
        pairs={which: differences(which, share[which]) for which in VARIANT},
        schedules=differences_of_schedules(share),
        spearman=correlation,
        thirds=in_thirds(found["scenes"], names),
    )


def differences(which: str, share: dict[str, Tensor]) -> dict:
    """Of rows on one set of pictures, at each budget."""
    labels = PAIRS if which == "scenes" else PAIRS_OF_VARIANTS
    out = {}
    for label in labels:
        a, b = PAIRS[label]
        out[label] = {}
        for budget in SHARES:
            difference = share[a.format(budget)] - share[b.format(budget)]
            out[label][budget] = interval(difference)
    return out


def differences_of_schedules(share: dict[str, dict[str, Tensor]]) -> dict:
    out = {}
    for label, (a, b) in SCHEDULE_PAIRS.items():
        out[label] = {which: interval(share[which][a] - share[which][b]) for which in VARIANT}
    return out


def in_thirds(scenes: list[dict], names: list[str]) -> dict:
    """Fig. 3: complexity as JPEG bytes per pixel"""
    shown = ["full"]
    for budget in FEW:
        shown += [f"ToMe {budget}, VTU", f"DToMe {budget}, VTU"]

    order = sorted(scenes, key=lambda p: p["bytes_per_pixel"])
    n = len(order)
    thirds = {}
    for third in (order[: n // 3], order[n // 3 : n - n // 3], order[n - n // 3 :]):
        label = f"{third[0]['bytes_per_pixel']:.3f} to {third[-1]['bytes_per_pixel']:.3f}"
        of = dict(zip(names, accuracy(third, KINDS, names).T))
        thirds[label] = {
            name: dict(tokens=mean_std(tokens_of(third, name)), accuracy=interval(of[name]))
            for name in shown
        }
    return thirds


def without_pictures(found: dict[str, list[dict]]) -> tuple[dict, dict]:
    """Of each column the number of questions, and what one would get right without the picture."""
    items = {}
    guess = {}
    for which, pictures in found.items():
        items[which] = [item for p in pictures for item in p["questions"]]
        guess |= blind_guess(questions_of_training(which), items[which])

    asked = {}
    blind = {}
    for column, (which, kinds) in COLUMNS.items():
        counted = [kind for kind, _, _ in items[which] if kind in kinds]
        asked[column] = len(counted)
        blind[column] = round(100 * statistics.fmean(guess[kind] for kind in counted), 2)
    return asked, blind


def questions_of_training(which: str) -> list[tuple[str, str, str]]:
    """Like those of this set, about pictures that are not held out."""
    if which == "easy-VQA":
        return [item for _, questions in easy_list("train") for item in questions]

    variant = VARIANT[which]
    out = []
    for seed in range(BLIND_SCENES):
        rng = random.Random(seed)
        things = place_things(rng, rng.random(), GRID, (0, 0), variant)
        for kind, question, answer in ask(rng, things, 10):
            out.append((f"{variant} {kind}".strip(), question, answer))
    return out


def written(settings: DyMU) -> dict:
    """Settings as JSON has them."""
    queries = None if settings.queries is None else settings.queries.keywords["queries"]
    return dict(
        thresholds=settings.thresholds,
        r=settings.r,
        vtu=settings.vtu,
        queries=queries,
        after=getattr(settings.after, "tau", None),
    )


# ---- showing ----


def table(results: dict) -> str:
    """The tables of RESULTS.md, from the content of the JSON file alone."""
    pictures = results["pictures"]
    left = results["tokens_left"]
    budgets = ", ".join(f"{budget} {n}" for budget, n in left.items())

    out = [
        f"Right answers in %, on {pictures['scenes']} held-out scenes, {pictures['easy-VQA']} test "
        f"pictures of easy-VQA, {pictures['small text']} scenes with small text (12 to 20 pixels "
        f"high in the place of 28) and {pictures['crowded']} crowded ones (nine or ten objects), "
        "with 95 % bootstrap intervals over pictures. Tokens: mean ± standard deviation over "
        f"pictures; the budgets are {budgets} of 256. Unless a row says otherwise, the schedule is "
        "constant, at 10 % and 5 % linear, and thresholds are from scenes of all levels, neither "
        "with small text nor crowded: on other pictures DToMe leaves other numbers of tokens.",
        "",
        *table_of_sets(results),
        "",
        schedule_note(results),
        "",
        "The same by kind of question, the first eight on the scenes:",
        "",
        *table_of_kinds(results),
    ]

    names = {
        "scenes": "the scenes",
        "small text": "the scenes with small text",
        "crowded": "the crowded scenes",
    }
    for which, pairs in results["pairs"].items():
        out += ["", f"Differences on {names[which]}, in points:", "", *head("", *left)]
        for label, pair in pairs.items():
            out.append(line(label, *(bracket(v, "+") for v in pair.values())))

    out += ["", "Differences between schedules (DToMe, VTU), in points:", "", *head("", *VARIANT)]
    for label, pair in results["schedules"].items():
        out.append(line(label, *(bracket(v, "+") for v in pair.values())))

    thirds = results["thirds"]
    title = "Scenes in thirds by JPEG bytes per pixel, tokens and right answers in %:"
    out += ["", title, "", *head("", *thirds)]
    for name in next(iter(thirds.values())):
        cells = []
        for third in thirds.values():
            cell = third[name]
            cells.append(f"{mean_and_std(cell['tokens'])}: {bracket(cell['accuracy'])}")
        out.append(line(name, *cells))

    found = ", ".join(f"{value:.2f} at {budget}" for budget, value in results["spearman"].items())
    out += ["", f"Spearman correlation of DToMe's tokens with JPEG bytes per pixel: {found}."]
    return "\n".join(out)


def table_of_sets(results: dict) -> list[str]:
    asked = results["asked"]
    blind = results["blind"]
    nothing = [""] * len(SETS)
    out = head("", *(f"tokens, {which}" for which in SETS), *SETS)
    out.append(line("questions", *nothing, *(str(asked[which]) for which in SETS)))
    out.append(line("best blind guess", *nothing, *(f"{blind[which]:.1f}" for which in SETS)))
    for name, row in results["rows"].items():
        tokens = [mean_and_std(row["tokens"][which]) for which in SETS]
        cells = [bracket(row["accuracy"][which]) for which in SETS]
        out.append(line(name, *tokens, *cells))
    return out


def table_of_kinds(results: dict) -> list[str]:
    kinds = [column for column in COLUMNS if column not in SETS]
    asked = results["asked"]
    blind = results["blind"]
    out = head("", *kinds)
    out.append(line("questions", *(str(asked[kind]) for kind in kinds)))
    out.append(line("best blind guess", *(f"{blind[kind]:.0f}" for kind in kinds)))
    for name, row in results["rows"].items():
        out.append(line(name, *(f"{row['accuracy'][kind][0]:.0f}" for kind in kinds)))
    return out


def schedule_note(results: dict) -> str:
    """What the schedules leave, and would leave."""
    wanted = results["tokens_left"]
    told = []
    for name, plain in results["left_by_plain_schedules"].items():
        budget = OTHERS[name][0]
        if plain > wanted[budget]:
            left = mean_and_std(results["rows"][name]["tokens"]["scenes"])
            told.append(f"{name}: {left} in the place of {plain}")
    return (
        "A layer can merge half of its tokens and no more, so a schedule that merges much in the "
        "last layers does not get down to few tokens. Where one would not, all layers are asked "
        f"for more merges, until it does ({'; '.join(told)})."
    )


def small_table(results: dict) -> str:
    """The README's: with VTU and without, at low and at 5 %."""
    rows = results["rows"]

    def cell(name):
        return bracket(rows[name]["accuracy"]["scenes"])

    out = head("right answers in %", "tokens", "with VTU", "without")
    out.append(line("full length", "256", cell("full"), ""))
    for budget in ("low", "5 %"):
        for method in ("ToMe", "DToMe"):
            way = f"{method} {budget}"
            tokens = mean_and_std(rows[f"{way}, VTU"]["tokens"]["scenes"])
            out.append(line(way, tokens, cell(f"{way}, VTU"), cell(f"{way}, no VTU")))
    return "\n".join(out)


# ---- the command ----


def held_out(a: argparse.Namespace) -> dict[str, range]:
    """Of each set the numbers of its pictures: seeds of scenes, or places in easy-VQA's list."""
    first = HELD_OUT + 1_000_000 * (1 + a.seed)
    n = 1000 if a.full else a.n
    return {
        "scenes": range(first, first + n),
        "easy-VQA": range(1000 if a.full else n // 2),
        "small text": range(first + 250_000, first + 250_000 + n // 2),
        "crowded": range(first + 500_000, first + 500_000 + n // 2),
    }


def examine_all(
    pool: ProcessPoolExecutor, numbers: dict[str, range], examine_one: Callable
) -> dict[str, list[dict]]:
    """Of each set its pictures, as `examine` gives them.

    numbers: see `held_out`; examine_one: `examine` with all but its name and number
    """
    todo = [(which, number) for which, of in numbers.items() for number in of]
    found = {which: [] for which in numbers}
    examined = pool.map(examine_one, *zip(*todo))
    for i, ((which, _), picture) in enumerate(zip(todo, examined), 1):
        found[which].append(picture)
        print(f"\r{i} of {len(todo)} pictures", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def processes(n: int) -> ProcessPoolExecutor:
    """Of one thread each"""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(n, context, torch.set_num_threads, (1,))


def provenance(a: argparse.Namespace, folder: Path) -> dict:
    numbers = held_out(a)
    weights = (folder / "model.safetensors").read_bytes()
    cpu = torch.backends.cpu.get_cpu_capability()
    about = dict(
        date=datetime.date.today().isoformat(),
        model=folder.resolve().name,
        first_seed=numbers["scenes"][0],
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        pictures={which: len(of) for which, of in numbers.items()},
        threshold_scenes=THRESHOLD_SCENES,
        blind_scenes=BLIND_SCENES,
        resamples=RESAMPLES,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {cpu}",
        processes=a.processes,
        threads_per_process=1,
        python=platform.python_version(),
    )
    return about | {package: version(package) for package in ("torch", "pillow", "easy-vqa")}


def measure(a: argparse.Namespace) -> dict:
    folder = find(a.model)
    config = read_config(folder)
    with processes(a.processes) as pool:
        rows = all_settings(folder, pool)
        found = examine_all(pool, held_out(a), functools.partial(examine, folder, rows))

    about = provenance(a, folder) | dict(
        tokens_left={budget: tokens_left(config, budget) for budget in SHARES},
        left_by_plain_schedules=left_by_plain_schedules(config),
        settings={name: written(settings) for name, settings in rows.items()},
    )
    return about | summarise(found, list(rows))


def arguments(name: str, description: str, seed: int = 0) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=f"python -m lab.{name}", description=description)
    p.add_argument("--model", default="tiny", help="folder of the checkpoint (%(default)s)")
    p.add_argument(
        "--n",
        type=int,
        default=100,
        help="scenes, and half as many pictures of each other set (%(default)s)",
    )
    p.add_argument(
        "--full",
        action="store_true",
        help="1000 scenes, 500 of each variant and all 1000 easy-VQA test pictures",
    )
    p.add_argument("--seed", type=int, default=seed, help="of the held-out scenes (%(default)s)")
    p.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="of one thread each (%(default)s)"
    )
    p.add_argument(
        "--save", type=Path, default=Path(f"lab/{name}.json"), help="the JSON file (%(default)s)"
    )
    p.add_argument(
        "--render", action="store_true", help="measure nothing, print the tables of the JSON file"
    )
    return p


def run(p: argparse.ArgumentParser, measure: Callable, *tables: Callable) -> None:
    """Measures what the options ask for, and prints the tables of the JSON file."""
    a = p.parse_args()
    try:
        if a.n < 12 or a.processes < 1 or a.seed < 0:
            raise ValueError("--n must be at least 12, --processes 1, --seed 0")
        if not (a.save.is_file() if a.render else a.save.parent.is_dir()):
            raise ValueError(f"--save: there is no {a.save if a.render else a.save.parent}")
        if not a.render:
            start = time.perf_counter()
            print("finding thresholds", file=sys.stderr)
            results = measure(a)
            results["seconds"] = round(time.perf_counter() - start)
            save(results, a.save, depth=2)
        print(*(show(read_json(a.save)) for show in tables), sep="\n\n")
    except (ValueError, OSError) as e:
        p.error(one_line(e))


if __name__ == "__main__":
    run(arguments("ablate", "Measures the ablations of RESULTS.md."), measure, small_table, table)
