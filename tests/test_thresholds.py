"""Thresholds: schedules, Eq. 4, files, and other similarities than the keys'."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_load import config_of

from dymu import DyMU, cosine, match
from extras.calibrate import calibrate, dealt_out, without_pairs
from extras.families import read_config
from extras.thresholds import find_thresholds, read_thresholds, schedule
from model import check_layers


def test_appendix_b_schedules():
    assert schedule(504, 24) == (21,) * 24
    assert schedule(386, 24) == (17, 17) + (16,) * 22  # the remainder goes to the first layers
    for total in (0, 1, 100, 384, 483):
        linear = schedule(total, 23, "linear")
        assert sum(linear) == total and list(linear) == sorted(linear, reverse=True)
        assert schedule(total, 23, "reverse_linear") == linear[::-1]
    assert schedule(384, 24, "linear")[0] > 25
    with pytest.raises(ValueError, match="cubic"):
        schedule(10, 2, "cubic")


@pytest.mark.parametrize("r", [(2, 2, 2), (5, 2, 0)])
def test_eq4_thresholds_merge_r_per_image_on_their_own_batch(llava, images, r):
    """Also: an image alone goes through the same merges as in the batch."""
    tower = llava.vision_tower
    thresholds = find_thresholds(tower, images, r, len(images))
    for layers in range(1, 4):  # layer by layer: what r_1 ... r_i were to leave
        upto = thresholds[:layers] + (1.0,) * (3 - layers)
        left = [len(tower(image, DyMU(thresholds=upto))[0]) for image in images]
        assert sum(left) == len(images) * (16 - sum(r[:layers]))
    counts = [len(tower(image, DyMU(thresholds=thresholds))[0]) for image in images]
    # plain pictures give up more tokens, busy ones fewer
    assert min(counts) < 16 - sum(r) < max(counts)


def test_eq4_is_the_first_edge_left_out_averaged_over_batches(llava, images):
    tower, r = llava.vision_tower, (3, 0, 0)
    scores = []
    for image in images:
        _, _, k, _ = tower.layers[0].attend(tower.embed(image), None)
        scores.append(match(cosine(k.mean(0)))[0])
    pairs = (torch.cat(scores[i : i + 2]) for i in (0, 2, 4))
    expected = [pair.sort(descending=True).values[6].item() for pair in pairs]
    found = find_thresholds(tower, iter(images), r, 2)
    assert found == (pytest.approx(sum(expected) / 3), 1.0, 1.0)
    # more than there are edges: floored
    assert find_thresholds(tower, images, (99, 0, 0), 6)[0] == 0.0
    with pytest.raises(ValueError, match="no images"):
        find_thresholds(tower, [], r, 2)
    with pytest.raises(ValueError, match="2 r given"):
        find_thresholds(tower, images, (1, 1), 2)


def test_presets_of_clip_l_are_those_of_the_paper():
    for r, left in ((21, 93), (16, 208), (8, 392)):
        assert schedule(576 - left, 23) == (r,) * 23


# ---- other similarities ----


def states(seen):
    return cosine(seen.x)


def minus_distance(seen):
    """No cosine: it is never above 0."""
    return -torch.cdist(seen.x, seen.x)


@pytest.mark.parametrize("similarity, floor", [(states, 0.0), (minus_distance, -math.inf)])
def test_eq4_holds_for_any_similarity(llava, images, similarity, floor):
    tower = llava.vision_tower
    settings = DyMU(similarity=similarity)
    thresholds = find_thresholds(tower, images, (3, 2, 0), len(images), settings, floor)
    merging = DyMU(thresholds=thresholds, similarity=similarity)
    counts = [len(tower(image, merging)[0]) for image in images]
    assert sum(counts) == len(images) * (16 - 5) and min(counts) < max(counts)
    assert (thresholds[0] < 0) == (similarity is minus_distance)


def test_a_floor_of_0_is_for_cosines(llava, images):
    """With it nothing would ever merge by a similarity that is never above 0."""
    settings = DyMU(similarity=minus_distance)
    thresholds = find_thresholds(llava.vision_tower, images, (3, 2, 1), 6, settings)
    assert thresholds == (0.0, 0.0, 0.0)
    merging = DyMU(thresholds=thresholds, similarity=minus_distance)
    assert len(llava.vision_tower(images[0], merging)[0]) == 16


def test_a_calibration_names_its_similarity(llava, images, folder):
    """A file that was found with another similarity is refused by name."""
    config = read_config(folder)
    files = [Path(str(i)) for i in range(len(images))]

    def read(file):
        return images[int(file.name)]

    found = dict(
        calibrate(
            llava.vision_tower, read, files, config, DyMU(similarity=minus_distance), -math.inf
        )
    )
    assert found["high"]["tokens_mean"] == 11 and min(found["low"]["thresholds"]) < -1
    found["similarity"] = minus_distance.__name__
    (folder / "thresholds.json").write_text(json.dumps(found))
    taus, _ = read_thresholds("high", folder, config, minus_distance)
    assert list(taus) == list(found["high"]["thresholds"])
    for spec in ("high", str(folder / "thresholds.json")):
        message = "found with the similarity 'minus_distance', not 'similar_keys'"
        with pytest.raises(ValueError, match=message):
            read_thresholds(spec, folder, config)
    with pytest.raises(ValueError, match="'minus_distance', not 'states'"):
        read_thresholds("high", folder, config, states)


def test_a_budget_settles_and_calibration_may_stop_there(llava, images, folder, monkeypatch):
    monkeypatch.setattr("extras.calibrate.BATCH", 2)
    config = read_config(folder)
    order = [0, 5, 3, 2, 3, 2, 3, 2, 3, 2, 3]

    def read(file):
        return images[order[int(file.name)]]

    files = [Path(str(i)) for i in range(len(order))]
    every = dict(calibrate(llava.vision_tower, read, files, config))
    some = dict(calibrate(llava.vision_tower, read, files, config, enough=True))
    for budget in ("low", "mid", "high"):
        r = every[budget]["r"]
        taus = []
        means = []
        for start in range(0, len(order), 2):
            batch = [images[i] for i in order[start : start + 2]]
            taus.append(find_thresholds(llava.vision_tower, batch, r, 2))
            means.append(torch.tensor(taus, dtype=torch.float64).mean(0))
        moves = [((b - a) / b.clamp(min=1e-6)).abs().max() for a, b in zip(means, means[1:])]
        n = next(i for i, move in enumerate(moves, 1) if move < 0.01)
        settled = 2 * n + 2
        assert every[budget]["settled"] == settled
        assert every[budget]["thresholds"] == pytest.approx(means[-1].tolist(), abs=1e-9)
        assert every[budget]["images"] == 11
        assert settled < 11
        assert some[budget]["images"] == some[budget]["settled"] == settled
        assert some[budget]["thresholds"] == pytest.approx(means[n].tolist(), abs=1e-9)


def test_how_long_it_takes_is_told_after_the_first_batch(
    llava, images, folder, monkeypatch, capsys
):
    monkeypatch.setattr("extras.calibrate.BATCH", 2)
    clock = iter(range(0, 100_000, 60))
    monkeypatch.setattr("extras.calibrate.time.perf_counter", lambda: next(clock))
    files = [Path(str(i)) for i in range(6)]
    list(calibrate(llava.vision_tower, lambda f: images[int(f.name)], files, read_config(folder)))
    # one minute a batch, three batches, three budgets, ranked and counted
    assert capsys.readouterr().err.count("about 18 minutes for 6 pictures") == 1


def test_a_schedule_that_asks_for_more_pairs_than_there_are_is_told(llava, images, folder, capsys):
    assert without_pairs((8, 4, 2, 1), 16) == 0 and without_pairs((4, 8, 1), 16) == 2
    tower, config = llava.vision_tower, read_config(folder)
    for kind, told in (("linear", 0), ("reverse_linear", 1)):
        found = dict(
            calibrate(tower, lambda f: images[int(f.name)], [Path("0")], config, kind=kind)
        )
        r = found["low"]["r"]
        assert (without_pairs(r, 16) > 0) == told
        err = capsys.readouterr().err
        assert err.count(f"low will leave about {without_pairs(r, 16)} tokens") == told
        assert "high will" not in err


def test_neighbours_go_to_different_batches(monkeypatch):
    monkeypatch.setattr("extras.calibrate.BATCH", 3)
    assert dealt_out(list(range(7))) == [0, 3, 6, 1, 4, 2, 5]
    assert dealt_out([1, 2, 3]) == [1, 2, 3] and dealt_out([]) == []


# ---- files ----


def test_thresholds_are_found_next_to_the_checkpoint(folder):
    config = read_config(folder)
    found = {"low": {"thresholds": [0.9, 0.8, 0.7], "r": [4, 4, 4]}}
    (folder / "thresholds.json").write_text(json.dumps(found))
    assert read_thresholds("low", folder, config)[0] == (0.9, 0.8, 0.7)
    command = f"python demo.py --calibrate IMAGES_FOLDER --model {folder}"
    with pytest.raises(ValueError, match=re.escape(command)):
        read_thresholds("mid", folder, config)


def test_the_published_sample_is_shipped_for_its_tower_alone(tmp_path):
    config = config_of(tmp_path)  # LLaVA-1.5
    taus, provenance = read_thresholds("low", tmp_path, config)
    assert (len(taus), taus[0], taus[-1]) == (24, 0.99609375, 0.81640625)
    assert "bfloat16" in provenance["doubt"] and provenance["low"]["r"] == [21] * 24
    check_layers(DyMU(thresholds=taus), config.vision_layers, 24)
    other = config_of(tmp_path, vision_config=dict(hidden_size=1024, num_attention_heads=16))
    with pytest.raises(ValueError, match="calibrate"):
        read_thresholds("low", tmp_path, other)


def test_thresholds_from_files(folder, tmp_path):
    config, taus = read_config(folder), [0.9, 0.8, 1]
    cases = {
        "list": taus,
        "one": {"thresholds": taus},
        "budgets": {"mid": {"thresholds": taus}, "high": [0, 0, 0, 0]},
    }
    for name, data in cases.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        assert read_thresholds(str(tmp_path / f"{name}.json"), folder, config)[0] == (0.9, 0.8, 1.0)
    high = read_thresholds(str(tmp_path / "budgets.json") + ":high", folder, config)[0]
    assert high == (0.0,) * 4


def test_thresholds_from_the_authors_checkpoint(folder, tmp_path):
    state = {
        f"visual.transformer.resblocks.{i}.threshold": torch.tensor(0.9 - i / 10)
        for i in (2, 0, 3, 1)
    }
    whole = {"state_dict": state | {"visual.proj": torch.ones(3)}, "epoch": 1}
    torch.save(whole, tmp_path / "tome.pth")
    found = read_thresholds(str(tmp_path / "tome.pth"), folder, read_config(folder))[0]
    assert found == pytest.approx((0.9, 0.8, 0.7, 0.6))
    for wrong in (
        lambda s: s.pop("visual.transformer.resblocks.1.threshold"),
        lambda s: s.update({"b.2.threshold": 1.0}),
    ):
        changed = dict(state)
        wrong(changed)
        torch.save(changed, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match="layers that have a threshold"):
            read_thresholds(str(tmp_path / "wrong.pth"), folder, read_config(folder))


def test_thresholds_from_the_hub_are_told_fetched_and_kept(folder, tmp_path, monkeypatch, capsys):
    state = {f"blocks.{i}.threshold": torch.tensor(0.9 - i / 4) for i in range(3)}
    torch.save({"state_dict": state}, tmp_path / "tome-72out.pth")
    (tmp_path / "ours.json").write_text(json.dumps({"mid": {"thresholds": [0.5, 0.25, 0.75]}}))
    asked = []

    def hub(repo, name, dry_run=False):
        asked.append((repo, name, dry_run))
        if dry_run:
            return SimpleNamespace(file_size=1.71e9, will_download=True)
        return str(tmp_path / Path(name).name)

    def assets(library, namespace):
        kept = tmp_path / f"{library}--{namespace.replace('/', '--')}"
        kept.mkdir(exist_ok=True)
        return kept

    monkeypatch.setattr("extras.door.hf_hub_download", hub)
    monkeypatch.setattr("extras.thresholds.cached_assets_path", assets)
    config = read_config(folder)
    for _ in range(2):  # the second time from what was kept
        taus, told = read_thresholds("some/one/deep/tome-72out.pth", folder, config)
        assert taus == pytest.approx((0.9, 0.65, 0.4))
        assert told["model"] == "some/one/deep/tome-72out.pth"
    name = "deep/tome-72out.pth"
    assert asked == [("some/one", name, True), ("some/one", name, False)]
    assert "downloading 1.71 GB" in capsys.readouterr().err
    assert read_thresholds("some/one/ours.json:mid", folder, config)[0] == (0.5, 0.25, 0.75)
    assert asked[-1] == ("some/one", "ours.json", False)

    other = {name: tau / 2 for name, tau in state.items()}
    torch.save(other, tmp_path / "tome-72out.pth")  # of the same name in another folder
    taus, _ = read_thresholds("some/one/flat/tome-72out.pth", folder, config)
    assert taus == pytest.approx((0.45, 0.325, 0.2))

    def none(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("extras.door.hf_hub_download", none)
    with pytest.raises(ValueError, match="some/one/other.pth is not to be had from the Hub"):
        read_thresholds("some/one/other.pth", folder, config)
    with pytest.raises(ValueError, match="not a file, here or on the Hub"):
        read_thresholds("some/one/readme.md", folder, config)
