"""Features, regions, a cap, and other papers' methods beside DyMU, at equal tokens, on tiny/.

    python -m lab.peers --n 80        # half an hour on 2 busy cores; writes lab/peers.json and
                                      # prints its tables
    python -m lab.peers --choose --n 24    # on other scenes: how far what is outside of boxes may
                                      # merge; writes lab/outside.json
    python -m lab.peers --render      # only prints the tables of lab/peers.json

What counts as right, the sets of pictures and the intervals are those of lab/ablate.py. The drawn
pictures are others, on which nothing was chosen or found; thresholds and taus are found on scenes
that are not held out. The boxes are an oracle's: those of the drawn things.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dymu import DyMU, similar_keys
from extras.control import Controlled, apart, find_inside, regions
from extras.door import find
from extras.families import read_config
from extras.options import NONE, OUTSIDE
from extras.second_stage import between, second_stage
from extras.thresholds import find_thresholds
from lab import ablate, second
from lab.ideas import VisionZip, attended, fastv, less_contrast_first, states, values
from lab.scenes import PATCH, Scene, pointers, scene
from lab.tables import bracket, head, interval, line, mean_std
from model import LlavaConfig

SEED = 80  # of the drawn pictures; SEED + 1: those on which --outside was chosen
SETS = ("scenes", "small text")
COLUMNS = ("scenes", "reading", "small reading", "counting", "description")
FEATURES = {"keys": similar_keys, "values": values, "states": states}
TAU_SCENES = 128  # of second.TAU_SEEDS
QUESTIONS = 2  # of a scene, for taus of what depends on the question

# the tables
FEATURE = "Another feature than keys"
REGION = "Regions of interest"
CAP = "A cap"
PEER = "Other methods"
FASTV_READS = (
    "FastV's tokens are those that the last 2 of the decoder's 4 layers read; the first 2 read all."
)

TAUS = {"none": NONE, "0.4": 0.4, "0.6": 0.6, "0.7": 0.7, "0.8": 0.8}  # from which to choose


# ---- the rows ----


@dataclass(frozen=True)
class Row:
    """A way to show a picture and to answer"""

    settings: DyMU = DyMU()
    term: str = ""  # of the encoder's similarity: "contrast" or "boxes"
    inside: str = ""  # for the second stage: "boxes", of all things, "its boxes", "attention"
    outside: float = OUTSIDE
    cap: int | None = None
    visionzip: tuple[int, int] | None = None  # dominant, contextual
    fastv: tuple[int, bool] | None = None  # keep, merged

    @property
    def asks(self) -> bool:
        """Whether what is shown depends on the question"""
        return self.inside in ("its boxes", "attention")


def boxes(things: list) -> list[tuple]:
    """In pixels, and large enough for what is turned"""
    around = [(t.x, t.y, t.w, t.h if t.text else max(t.w, t.h)) for t in things]
    return [(x - w, y - h, x + w, y + h) for x, y, w, h in around]


def asked_about(drawn: Scene, kind: str, question: str) -> list:
    """The things that a question is about: those that it names, or all shapes, texts or things"""
    named = [thing for _, thing in pointers(question, drawn.things)]
    if "reading" in kind:
        named = [t for t in drawn.things if t.text and t.kind in question]
    elif "description" not in kind and not named:
        named = [t for t in drawn.things if not t.text]
    return named or drawn.things


def inside(llava, processor, where: str, drawn: Scene, pixels: Tensor, asked) -> Tensor | None:
    """asked: kind, question and answer"""
    if where == "attention":
        return attended(llava, processor.prompt(asked[1]), pixels)
    things = drawn.things if where == "boxes" else asked_about(drawn, *asked[:2])
    return find_inside(processor, [drawn.image], 0, boxes(things))[0]


def similarity(processor, term: str, drawn: Scene, pixels: Tensor) -> Callable:
    """With a term that each picture has for itself"""
    if term == "contrast":
        return less_contrast_first(pixels, PATCH)
    return regions(inside(None, processor, "boxes", drawn, pixels, None))


def encode(llava, processor, row: Row, drawn: Scene, pixels: Tensor, asked=None) -> list:
    settings = row.settings
    if row.term:
        settings = replace(settings, similarity=similarity(processor, row.term, drawn, pixels))

    picture = pixels
    if row.visionzip:
        picture = VisionZip(pixels, *row.visionzip)
    elif row.inside or row.cap:
        where = None
        if row.inside:
            where = inside(llava, processor, row.inside, drawn, pixels, asked)
        picture = Controlled(pixels, where, row.outside, row.cap)
    return llava.encode(picture, settings)


# ---- thresholds and taus, on scenes that are not held out ----


def thresholds(folder: Path, budget: str, feature: str) -> tuple[float, ...]:
    """Eq. 4 by a feature, or by keys and a term"""
    llava, processor = ablate.loaded(folder, "cpu", "float32")
    r = ablate.merges(llava.config, budget, ablate.SCHEDULES[budget])
    found = []
    for start in range(0, ablate.THRESHOLD_SCENES, ablate.BATCH):
        drawn = [scene(seed) for seed in range(start, start + ablate.BATCH)]
        pictures = [processor.image(one.image) for one in drawn]
        if feature in FEATURES:
            settings = DyMU(similarity=FEATURES[feature])
        else:
            terms = [similarity(processor, feature, *one) for one in zip(drawn, pictures)]
            in_turn = itertools.cycle(terms)  # a layer sees the pictures in this order
            settings = DyMU(similarity=lambda seen, in_turn=in_turn: next(in_turn)(seen))
        floor = 0.0 if feature in FEATURES else -torch.inf
        found.append(
            find_thresholds(llava.vision_tower, pictures, r, ablate.BATCH, settings, floor)
        )
    return tuple(map(statistics.fmean, zip(*found)))


@torch.inference_mode()
def taus(folder: Path, row: Row, shares: list[str]) -> dict[str, float]:
    """Of the second stage that leaves these shares of the tokens, inside `row.inside`"""
    llava, processor = ablate.loaded(folder, "cpu", "float32")
    held = []
    for seed in second.TAU_SEEDS[:TAU_SCENES]:
        drawn = scene(seed)
        pixels = processor.image(drawn.image)
        ((x, at),) = llava.encode(pixels, row.settings)
        for asked in drawn.questions[:QUESTIONS] if row.asks else [None]:
            where = torch.ones_like(at, dtype=torch.bool)
            if row.inside:
                where = inside(llava, processor, row.inside, drawn, pixels, asked)
            held.append((x, at, where))

    def tokens(tau):
        stages = second_stage(tau), second_stage(row.outside)
        return statistics.fmean(len(apart(*one, *stages)[0]) for one in held)

    found = {}
    for share in shares:
        left = ablate.tokens_left(llava.config, second.SHARES[share])
        _, found[share] = between(lambda tau, left=left: tokens(tau) < left, 0.0, 1.0, halvings=12)
    return found


class Rows(dict):
    """name -> a row, the name of that with which it is compared, and which table it is in"""

    def put(self, table: str, name: str, row: Row, base: str) -> None:
        self[name] = row, base, table


def all_rows(folder: Path, pool: ProcessPoolExecutor) -> Rows:
    config = read_config(folder)
    left = {s: ablate.tokens_left(config, budget) for s, budget in second.SHARES.items()}
    jobs = [(b, f) for f in FEATURES for b in ("mid", *second.SHARES.values())]
    jobs += [(b, term) for term in ("contrast", "boxes") for b in second.SHARES.values()]
    found = dict(zip(jobs, pool.map(thresholds, itertools.repeat(folder), *zip(*jobs))))

    rows = Rows(full=(Row(), "full", "Full length"))
    in_encoder(rows, config, found)
    mid = Row(DyMU(thresholds=found["mid", "keys"]))
    behind(rows, folder, pool, found, mid, list(left))
    for share, K in left.items():
        best = f"mid by keys, then {share}"
        then = rows[best][0]
        rows.put(CAP, f"{best}, cap {3 * K // 2}", replace(then, cap=3 * K // 2), best)
        rows.put(CAP, f"mid by keys, cap {K}", replace(mid, cap=K), best)
        peers(rows, share, K, then, mid)
    return rows


def in_encoder(rows: Rows, config: LlavaConfig, found: dict) -> None:
    for share, budget in second.SHARES.items():
        r = ablate.merges(config, budget, ablate.SCHEDULES[budget])
        for name, feature in FEATURES.items():
            tome = Row(DyMU(r=r, similarity=feature))
            rows.put(FEATURE, f"ToMe {share} by {name}", tome, f"ToMe {share} by keys")
        for name, feature in FEATURES.items():
            dtome = Row(DyMU(thresholds=found[budget, name], similarity=feature))
            rows.put(FEATURE, f"DToMe {share} by {name}", dtome, f"DToMe {share} by keys")
        for table, term in ((PEER, "contrast"), (REGION, "boxes")):
            row = Row(DyMU(thresholds=found[budget, term]), term)
            rows.put(table, f"DToMe {share} by keys, {term}", row, f"DToMe {share} by keys")


def behind(rows: Rows, folder: Path, pool, found: dict, mid: Row, shares: list[str]) -> None:
    """The second stage, with taus that are found here"""
    few = shares[1:]
    stages = []
    for feature, of in FEATURES.items():
        for budget in ("mid", "low"):
            first = Row(DyMU(thresholds=found[budget, feature], similarity=of))
            wanted = shares if (budget, feature) == ("mid", "keys") else few
            stages.append((FEATURE, f"{budget} by {feature}", first, wanted))
    stages.append((REGION, "mid by keys, boxes", replace(mid, inside="boxes"), shares))
    stages.append((REGION, "mid by keys, its boxes", replace(mid, inside="its boxes"), few))
    dropped = replace(mid, inside="its boxes", outside=NONE)
    stages.append((REGION, "mid by keys, its boxes, one token outside", dropped, few))
    stages.append((PEER, "mid by keys, attended", replace(mid, inside="attention"), few))

    _, _, first, wanted = zip(*stages)
    for (table, name, row, _), of in zip(
        stages, pool.map(taus, [folder] * len(stages), first, wanted)
    ):
        for share, tau in of.items():
            then = replace(row, settings=replace(row.settings, after=second_stage(tau)))
            rows.put(table, f"{name}, then {share}", then, f"mid by keys, then {share}")


def peers(rows: Rows, share: str, K: int, best: Row, mid: Row) -> None:
    name = f"mid by keys, then {share}"
    plain = DyMU(vtu=False)
    rows.put(
        PEER, f"{name}, no VTU", replace(best, settings=replace(best.settings, vtu=False)), name
    )
    for told, contextual in (("", K // 6), (", half of it contextual", K // 2)):
        row = Row(visionzip=(K - contextual, contextual))
        rows.put(PEER, f"VisionZip {share}{told}", row, name)
        rows.put(PEER, f"VisionZip {share}{told}, no VTU", replace(row, settings=plain), name)
    rows.put(PEER, f"FastV {share}", Row(fastv=(K, False)), name)
    rows.put(PEER, f"FastV {share}, merged", Row(fastv=(K, True)), name)
    rows.put(PEER, f"mid by keys, then FastV {share}", Row(mid.settings, fastv=(K, False)), name)


def rows_outside(folder: Path, pool: ProcessPoolExecutor) -> Rows:
    """For --choose: taus for what is outside, below the shipped tight and tightest"""
    rows = Rows(full=(Row(), "full", "Full length"))
    for name in second.SHIPPED:
        plain = Row(second.preset(name, folder))
        rows.put(REGION, name, plain, "full")
        for where in ("boxes", "its boxes"):
            for told, tau in TAUS.items():
                row = replace(plain, inside=where, outside=tau)
                rows.put(REGION, f"{name}, {where}, outside {told}", row, name)
    return rows


# ---- measuring ----


@torch.inference_mode()
def examine(folder: Path, rows: dict[str, Row], name: str, seed: int) -> dict:
    """As `ablate.examine`"""
    llava, processor = ablate.loaded(folder, "cpu", "float32")
    drawn = scene(seed, variant=ablate.VARIANT[name])
    pixels = processor.image(drawn.image)
    asked = ablate.with_answers(processor, drawn.questions)

    tokens = {}
    right = {}
    for label, row in rows.items():
        if row.asks:
            visual = [encode(llava, processor, row, drawn, pixels, one) for one in drawn.questions]
            each = [answers(llava, one, row, [ask])[0] for one, ask in zip(visual, asked)]
        else:
            visual = [encode(llava, processor, row, drawn, pixels)]
            each = answers(llava, visual[0], row, asked)
        right[label] = each
        most = row.fastv[0] if row.fastv else llava.config.visual_tokens
        tokens[label] = statistics.fmean(min(len(x), most) for ((x, _),) in visual)
    return dict(questions=drawn.questions, tokens=tokens, right=right)


def answers(llava, visual: list, row: Row, asked: list) -> list[bool]:
    """As `ablate.right_answers`"""
    if row.fastv is None:
        return ablate.right_answers(llava, visual, row.settings, asked)
    keep, merged = row.fastv
    right = []
    for ids, told in asked:
        ends = -len(told)  # the last row of the question
        logits = fastv(llava, ids, visual, keep, row.settings, merged=merged, row=ends)
        right.append(logits[ends:].argmax(-1).tolist() == told)
    return right


def summarise(found: dict[str, list[dict]], rows: Rows) -> dict:
    """found: of each set its pictures, as `examine` gives them"""
    share = {}
    for column in COLUMNS:
        which, kinds = ablate.COLUMNS[column]
        share[column] = dict(zip(rows, ablate.accuracy(found[which], kinds, list(rows)).T))

    out = {}
    for name, (row, base, table) in rows.items():
        minus = {column: interval(of[name] - of[base]) for column, of in share.items()}
        out[name] = dict(
            table=table,
            base=base,
            tokens=mean_std(ablate.tokens_of(found["scenes"], name)),
            right={column: interval(of[name]) for column, of in share.items()},
            minus=minus,
            tau=getattr(row.settings.after, "tau", None),
            thresholds=row.settings.thresholds,
        )
    asked = {}
    for column in COLUMNS:
        which, kinds = ablate.COLUMNS[column]
        asked[column] = sum(kind in kinds for p in found[which] for kind, _, _ in p["questions"])
    return dict(asked=asked, rows=out)


# ---- showing, from the content of the JSON file alone ----


def table(results: dict) -> str:
    asked = results["asked"]
    pictures = results["pictures"]
    full = results["rows"]["full"]["right"]
    told = ", ".join(f"{column} {bracket(full[column])}" for column in COLUMNS)
    out = [
        f"{pictures['scenes']} held-out scenes, {asked['scenes']} questions; and "
        f"{pictures['small text']} with small text, {asked['small reading']} questions to read it. "
        f"Right at full length, in %: {told}. The other columns are differences to the row that is "
        "named, in points, with paired 95 % bootstrap intervals over pictures. Tokens: mean ± "
        "standard deviation over the scenes.",
    ]
    used = {row["table"] for row in results["rows"].values()}
    for name in filter(used.__contains__, (FEATURE, REGION, CAP, PEER)):
        out += ["", f"**{name}**", ""]
        if name == PEER:
            out += [FASTV_READS, ""]
        out += head("", "tokens", "right", "minus", *COLUMNS)
        for label, row in results["rows"].items():
            if row["table"] == name:
                cells = [bracket(row["minus"][column], "+") for column in COLUMNS]
                if row["base"] == label:
                    cells = [""] * len(cells)
                tokens = "{:.1f} ± {:.1f}".format(*row["tokens"])
                right = bracket(row["right"]["scenes"])
                out.append(line(label, tokens, right, row["base"], *cells))
    return "\n".join(out)


# ---- the command ----


def arguments(argv: list[str] | None = None) -> argparse.ArgumentParser:
    parser = ablate.arguments("peers", "Measures control over tokens, and peers.", SEED)
    other = f"chooses --outside: by default --seed {SEED + 1} --save lab/outside.json"
    parser.add_argument("--choose", action="store_true", help=other)
    if parser.parse_known_args(argv)[0].choose:
        parser.set_defaults(seed=SEED + 1, save=Path("lab/outside.json"))
    return parser


def held_out(a: argparse.Namespace) -> dict[str, range]:
    return {which: of for which, of in ablate.held_out(a).items() if which in SETS}


def measure(a: argparse.Namespace) -> dict:
    folder = find(a.model)
    with ablate.processes(a.processes) as pool:
        rows = (rows_outside if a.choose else all_rows)(folder, pool)
        ways = {name: row for name, (row, _, _) in rows.items()}
        found = ablate.examine_all(pool, held_out(a), functools.partial(examine, folder, ways))
    return ablate.provenance(a, folder) | summarise(found, rows)


if __name__ == "__main__":
    ablate.run(arguments(), measure, table)
