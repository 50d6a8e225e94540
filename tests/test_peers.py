"""lab.peers shows and merges what its rows say, finds taus elsewhere, and its table tells that."""

import argparse
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from test_second_lab import OneProcess

from dymu import DyMU, similar_keys
from extras.second_stage import second_stage
from lab import ablate, peers, second
from lab.peers import Row
from lab.scenes import HELD_OUT, scene

TINY = Path(__file__).parent.parent / "tiny"
SEED = HELD_OUT + 12


@pytest.fixture(scope="module")
def tiny():
    return ablate.loaded(TINY, "cpu", "float32")


@pytest.fixture(scope="module")
def rows():
    """With fewer scenes for the thresholds, so that it takes seconds"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "THRESHOLD_SCENES", 2)
        patch.setattr(ablate, "BATCH", 2)
        patch.setattr(peers, "TAU_SCENES", 2)
        patch.setattr(peers, "QUESTIONS", 1)
        return peers.all_rows(TINY, OneProcess)


def test_boxes_are_those_of_the_things_that_are_asked_about():
    drawn = scene(SEED, level=0.9)
    by_kind = {}
    for kind, question, _ in drawn.questions:
        by_kind[kind] = question, peers.asked_about(drawn, kind, question)
    assert by_kind["description"][1] == drawn.things
    texts = [t for t in drawn.things if t.text]
    question, about = by_kind["reading"]
    assert len(about) == 1 and about[0] in texts and about[0].kind in question
    assert by_kind["counting"][1] == [t for t in drawn.things if not t.text]
    question, about = by_kind["place"]
    assert len(about) == 1 and about[0].kind in question
    ((x0, y0, x1, y1),) = peers.boxes(about)
    (thing,) = about
    assert (x0 + x1, y0 + y1) == pytest.approx((2 * thing.x, 2 * thing.y))
    assert x1 - x0 == pytest.approx(2 * thing.w) and y1 - y0 >= 2 * thing.h - 1e-6
    turned = dataclasses.replace(thing, kind="rectangle", text="", x=50, y=60, w=20, h=15)
    assert peers.boxes([turned]) == [(30, 40, 70, 80)]
    assert peers.boxes([dataclasses.replace(turned, text="9")]) == [(30, 45, 70, 75)]


@torch.no_grad()
def test_a_row_is_shown_as_it_says(tiny):
    llava, processor = tiny
    drawn = scene(SEED, level=0.6)
    pixels = processor.image(drawn.image)
    twice = DyMU(after=second_stage(0.9))

    def tokens(row, asked=None):
        ((x, at),) = peers.encode(llava, processor, row, drawn, pixels, asked)
        return len(x), at

    plain, _ = tokens(Row(twice))
    everything, _ = tokens(Row(twice, inside="boxes", outside=-2.0))
    (one,) = [asked for asked in drawn.questions if asked[0] == "place"][:1]
    few, at = tokens(Row(twice, inside="its boxes", outside=-2.0), one)
    assert few < min(everything, plain)
    about = peers.inside(llava, processor, "its boxes", drawn, pixels, one)
    assert len(at[~about].unique()) == 1
    assert tokens(Row(twice, cap=9))[0] <= 9 < plain
    assert tokens(Row(visionzip=(9, 3)))[0] == 12
    attended, at = tokens(Row(twice, inside="attention", outside=-2.0), one)
    assert len(at[peers.inside(llava, processor, "attention", drawn, pixels, one)].unique()) > 1
    r = DyMU(r=(30,) * 7)
    maps = [tokens(Row(r, term))[1] for term in ("", "contrast", "boxes")]
    assert not torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])
    assert Row(inside="its boxes").asks and not Row(inside="boxes").asks


def test_rows_have_their_tokens_and_are_compared_with_their_like(rows, tiny):
    for name, (row, base, table) in rows.items():
        assert base in rows and table, name
        left = {"16 %": 41, "10 %": 26, "5 %": 13}
        if name != "full":
            (share,) = re.findall(r"\d+ %", base)
            assert share in name or name.endswith(f"cap {left[share]}"), name
        if "FastV" in name:
            assert row.fastv[0] == left[share]
        if "VisionZip" in name:
            assert sum(row.visionzip) == left[share]
        assert ("no VTU" not in name) == row.settings.vtu
    values = rows["DToMe 5 % by values"][0].settings
    keys = rows["DToMe 5 % by keys"][0].settings
    assert values.thresholds != keys.thresholds and keys.similarity is similar_keys
    assert rows["low by states, then 5 %"][0].settings.similarity is peers.states
    assert rows["mid by keys, then 10 %, cap 39"][0].cap == 39
    taus = {
        name: row.settings.after.tau for name, (row, _, _) in rows.items() if row.settings.after
    }
    assert all(0 < tau < 1 or "boxes" in name for name, tau in taus.items())
    its = "mid by keys, its boxes, one token outside, then 5 %"
    assert taus[its] != taus["mid by keys, then 5 %"]


@torch.no_grad()
def test_thresholds_of_terms_are_found_with_the_terms_of_each_picture(tiny, monkeypatch):
    """On one picture Eq. 4 leaves as many as ToMe with the same term."""
    llava, processor = tiny
    monkeypatch.setattr(ablate, "THRESHOLD_SCENES", 1)
    monkeypatch.setattr(ablate, "BATCH", 1)
    drawn = scene(0)
    pixels = processor.image(drawn.image)
    for term in ("contrast", "boxes"):
        taus = peers.thresholds(TINY, "low", term)
        r = ablate.merges(llava.config, "low", "constant")
        left = []
        for settings in (DyMU(thresholds=taus), DyMU(r=r)):
            ((x, _),) = peers.encode(llava, processor, Row(settings, term), drawn, pixels)
            left.append(len(x))
        assert left[0] == pytest.approx(left[1], abs=2)


def test_each_picture_has_its_own_term_when_thresholds_are_found(monkeypatch):
    asked = []

    def similarity(processor, term, drawn, pixels):
        return lambda seen: asked.append(drawn.things) or similar_keys(seen)

    monkeypatch.setattr(peers, "similarity", similarity)
    monkeypatch.setattr(ablate, "THRESHOLD_SCENES", 2)
    monkeypatch.setattr(ablate, "BATCH", 2)
    peers.thresholds(TINY, "low", "boxes")
    assert asked == [scene(0).things, scene(1).things] * 7


def test_answers_are_those_of_ablate_and_of_fastv_that_keeps_all(tiny):
    rows = {"plain": Row(), "FastV": Row(fastv=(256, False)), "few": Row(fastv=(2, False))}
    rows["asked"] = Row(DyMU(after=second_stage(0.9)), inside="attention", outside=0.99)
    found = peers.examine(TINY, rows, "scenes", SEED)
    expected = ablate.examine(TINY, {"plain": DyMU()}, "scenes", SEED)
    assert found["right"]["plain"] == found["right"]["FastV"] == expected["right"]["plain"]
    assert found["questions"] == expected["questions"]
    assert found["right"]["few"] != found["right"]["FastV"]
    assert found["tokens"]["FastV"] == 256 and found["tokens"]["few"] == 2
    assert (
        len(found["right"]["asked"]) == len(found["questions"]) and found["tokens"]["asked"] < 256
    )


def test_nothing_was_found_or_chosen_on_the_pictures_that_are_measured():
    parser = ablate.arguments("peers", "", peers.SEED)
    mine = peers.held_out(parser.parse_args(["--full"]))
    assert list(mine) == list(peers.SETS)
    drawn = {seed for seeds in mine.values() for seed in seeds}
    others = [range(ablate.THRESHOLD_SCENES), second.TAU_SEEDS, range(HELD_OUT, HELD_OUT + 1000)]
    for seed in (0, second.SEED, peers.SEED + 1):
        their = ablate.held_out(argparse.Namespace(seed=seed, full=True))
        others += [seeds for which, seeds in their.items() if which != "easy-VQA"]
    for seeds in others:
        assert drawn.isdisjoint(seeds)
    assert min(drawn) >= HELD_OUT


def test_choosing_leaves_the_measured_scenes_and_their_file_alone():
    chosen, measured = (peers.arguments(argv).parse_args(argv) for argv in (["--choose"], []))
    assert chosen.seed == peers.SEED + 1 and chosen.save == Path("lab/outside.json")
    assert measured.seed == peers.SEED and measured.save == Path("lab/peers.json")
    argv = ["--choose", "--seed", "7", "--save", "x.json"]
    said = peers.arguments(argv).parse_args(argv)
    assert said.choose and said.seed == 7 and said.save == Path("x.json")
    of = [peers.held_out(a) for a in (chosen, measured)]
    assert all(set(of[0][which]).isdisjoint(of[1][which]) for which in peers.SETS)


def test_the_table_tells_what_was_counted(rows, monkeypatch):
    monkeypatch.setattr("lab.tables.RESAMPLES", 10)
    found = {}
    for which in peers.SETS:
        kinds = ablate.COLUMNS[which][1]
        questions = [(kind, "?", "!") for kind in kinds]
        right = {name: [not name.startswith("ToMe")] * len(kinds) for name in rows}
        tokens = {name: 13.0 for name in rows}
        one = dict(questions=questions, tokens=tokens, right=right)
        found[which] = [one] * 3
    results = peers.summarise(found, rows)
    of = results["rows"]["ToMe 5 % by values"]
    assert of["minus"]["scenes"] == [0] * 3 and of["right"]["reading"] == [0] * 3
    assert results["rows"]["VisionZip 5 %"]["minus"]["small reading"] == [0] * 3
    assert results["asked"]["small reading"] == 3
    results["pictures"] = {which: 3 for which in peers.SETS}
    shown = peers.table(results)
    lines = [line for line in shown.splitlines() if line.startswith("| ") and "%" in line]
    assert len(lines) == len(rows) - 1 and {line.count("|") for line in lines} == {10}
    assert "| ToMe 5 % by values | 13.0 ± 0.0 | 0.0 [0.0, 0.0] | ToMe 5 % by keys | +0.0" in shown
    assert "| ToMe 5 % by keys |  |  |  |  |  |" in shown  # itself
    assert (
        "**Other methods**" in shown
        and shown.count("that the last 2 of the decoder's 4 layers") == 1
    )
    results["rows"] = {"full": results["rows"]["full"]}
    assert "FastV" not in peers.table(results)


def test_the_measured_table_is_that_of_the_scenes_that_nothing_was_chosen_on():
    results = json.loads((TINY.parent / "lab" / "peers.json").read_text())
    weights = (TINY / "model.safetensors").read_bytes()
    assert results["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    numbers = peers.held_out(argparse.Namespace(seed=peers.SEED, full=False, n=80))
    assert results["first_seed"] == numbers["scenes"][0] and results["pictures"]["scenes"] == 80
    shown = peers.table(results)
    tables = [peers.FEATURE, peers.REGION, peers.CAP, peers.PEER]
    assert re.findall(r"^\*\*(.+)\*\*$", shown, re.M) == tables
    assert all(f"| {name} |" in shown for name in results["rows"] if name != "full")
