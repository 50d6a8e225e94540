"""lab.second merges where it says, finds taus elsewhere, and its tables tell what it counted."""

import argparse
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from test_lab import EASY, as_if_measured

from dymu import DyMU
from lab import ablate, second
from lab.scenes import HELD_OUT, scene
from load import load

SEEDS = range(1_000_000, 1_000_006)  # as lab.second has them, but fewer
TINY = Path(__file__).parent.parent / "tiny"


class OneProcess:
    map = staticmethod(map)


@pytest.fixture(scope="module")
def llava():
    return ablate.loaded(TINY, "cpu", "float32")[0]


@pytest.fixture(scope="module")
def ways():
    """With fewer scenes for the thresholds, so that it takes seconds"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "THRESHOLD_SCENES", 8)
        patch.setattr(second, "TAU_SEEDS", SEEDS)
        return second.all_ways(TINY, OneProcess)


@functools.cache
def pixels_of(seed):
    return ablate.loaded(TINY, "cpu", "float32")[1].image(scene(seed).image)


@torch.no_grad()
def test_the_same_groups_are_averaged_from_what_the_encoder_makes_without_merging(llava):
    pixels = pixels_of(HELD_OUT)
    r = ablate.merges(llava.config, "10 %", "linear")
    merged, token_at = llava.vision_tower(pixels, DyMU(r=r))
    x, _ = llava.vision_tower(pixels)
    groups = [(token_at == t).nonzero().flatten() for t in range(26)]

    rows, at = second.encode(llava, pixels, second.Regrouped(r=r))[0]
    projected = llava.multi_modal_projector(x)
    torch.testing.assert_close(rows, torch.stack([projected[g].mean(0) for g in groups]))
    assert torch.equal(at, token_at) and len(merged) == 26

    rows, at = second.encode(llava, pixels, second.Regrouped(r=r, projected=False))[0]
    means = torch.stack([x[g].mean(0) for g in groups])
    torch.testing.assert_close(rows, llava.multi_modal_projector(means))
    assert torch.equal(at, token_at)


@torch.no_grad()
def test_expanded_rows_differ_from_vtu_by_the_re_merge_alone():
    llava = load(TINY, "cpu", "float32")[0]
    pixels = pixels_of(HELD_OUT)
    r = ablate.merges(llava.config, "5 %", "linear")
    x, token_at = second.encode(llava, pixels, DyMU(r=r))[0]
    rows, at = second.encode(llava, pixels, DyMU(r=r, after=second.expanded))[0]
    assert len(x) == 13 and len(rows) == 256 and torch.equal(at, torch.arange(256))
    assert torch.equal(rows, x[token_at])

    ids = torch.tensor([5, llava.config.image_token_index, 6, 7])
    vtu = llava(ids, pixels, DyMU(r=r))[-1]
    plain = llava(ids, pixels, DyMU(r=r, after=second.expanded))[-1]
    assert not torch.allclose(vtu, plain)

    # in a decoder of one layer the text, behind the picture, never sees what is averaged
    del llava.language_model.layers[1:]
    vtu = llava(ids, pixels, DyMU(r=r))[-1]
    plain = llava(ids, pixels, DyMU(r=r, after=second.expanded))[-1]
    torch.testing.assert_close(vtu, plain)


def test_each_way_leaves_its_share_and_low_is_not_followed_by_as_much(ways, llava):
    few = {"16 %": 41, "10 %": 26, "5 %": 13}
    stages = [f"{stage}, then {share}" for stage in second.STAGES for share in few]
    stages.remove("low, then 16 %")
    in_encoder = [f"{method} {share}" for method in ("ToMe", "DToMe") for share in few]
    assert list(ways) == [*in_encoder, *stages, "tight", "tightest"]

    with torch.no_grad():
        for way in stages:
            encoded = [llava.encode(pixels_of(seed), ways[way]) for seed in SEEDS]
            counts = [len(x) for ((x, _),) in encoded]
            assert sum(counts) / 6 == pytest.approx(few[second.share_of(way)], rel=0.06), way

    shipped = json.loads((TINY / "thresholds.json").read_text())
    for name in ("tight", "tightest"):
        assert list(ways[name].thresholds) == shipped[name]["thresholds"]
        assert ways[name].after.tau == shipped[name]["after"]
    assert list(ways["DToMe 16 %"].thresholds) == shipped["low"]["thresholds"]
    assert ways["mid, then 5 %"].thresholds == ways["tight"].thresholds
    assert ways["none, then 5 %"].thresholds is None


def test_nothing_was_found_on_the_pictures_that_are_measured():
    parser = ablate.arguments("second", "", second.SEED)
    mine = ablate.held_out(parser.parse_args(["--full"]))
    drawn = {seed for which, seeds in mine.items() if which != "easy-VQA" for seed in seeds}
    others = ablate.held_out(argparse.Namespace(seed=0, full=True))
    del others["easy-VQA"]  # it has these pictures and no others
    found = [range(ablate.THRESHOLD_SCENES), second.TAU_SEEDS, range(HELD_OUT, HELD_OUT + 1000)]
    for seeds in (*others.values(), *found):
        assert drawn.isdisjoint(seeds)
    assert len(drawn) == 2000 and min(drawn) >= HELD_OUT


def test_tables_tell_what_was_counted(ways, monkeypatch):
    monkeypatch.setattr(ablate, "BLIND_SCENES", 20)
    monkeypatch.setattr("lab.tables.RESAMPLES", 10)
    monkeypatch.setattr(ablate, "easy_list", lambda split: EASY)
    rows = second.all_rows(ways)

    def right(name):
        return not name.startswith("ToMe") and "no VTU" not in name and "before" not in name

    found = as_if_measured(rows, right, lambda i: -i)
    results = second.summarise(found, list(ways), list(rows))
    assert results["spearman"]["tightest"] == -1
    for of in results["sets"].values():
        tight = of["ways"]["tight"]
        assert tight["VTU"] == [100] * 3 and tight["no VTU"] == [0] * 3
        assert tight["minus full"] == [0] * 3 and tight["minus ToMe"] == [100] * 3
        assert tight["minus DToMe"] == [0] * 3 and tight["VTU minus no VTU"] == [100] * 3
        assert of["loss"]["5 %"]["VTU minus full"] == [-100] * 3
        assert of["loss"]["5 %"]["averaged behind it, minus VTU"] == [100] * 3
        assert of["loss"]["5 %"]["averaged before the projector, minus full"] == [-100] * 3
        assert of["loss"]["5 %"]["averaged behind it, minus full"] == [0] * 3

    results["pictures"] = {which: len(pictures) for which, pictures in found.items()}
    tables = re.findall(r"(?:^\|.*\|\n)+", second.table(results) + "\n", re.M)
    widths = [{row.count("|") - 2 for row in one.splitlines()} for one in tables]
    assert widths == [{8}] * 4 + [{6}]
    for one in tables[:4]:
        named = [row.split(" | ")[0].removeprefix("| ") for row in one.splitlines()[2:]]
        assert sorted(named) == sorted(ways)
        shares = [second.share_of(way) for way in named]
        assert shares == sorted(shares, key=["16 %", "10 %", "5 %"].index)
        assert all("| 12 ± 1 |" in row for row in one.splitlines()[2:])
    assert "| tightest, 5 % | 12 ± 1 | 100.0 " in second.small_table(results)


@pytest.mark.parametrize(
    "options, wrong",
    [
        ("--n 11", "--n must be at least 12"),
        ("--seed -1", "--seed 0"),
        ("--save nowhere/s.json", "--save: there is no nowhere"),
        ("--render", "--save: there is no lab/second.json"),
    ],
)
def test_what_is_wrong_with_the_options_is_said_at_once(
    options, wrong, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["second", *options.split()])
    with pytest.raises(SystemExit) as stop:
        ablate.run(ablate.arguments("second", ""), second.measure, second.table)
    assert stop.value.code == 2 and wrong in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
