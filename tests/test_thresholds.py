"""Thresholds: schedules, Eq. 4, files, and other similarities than the keys'."""

import json
import re

import pytest
import torch
from test_load import config_of

from dymu import DyMU, cosine, match
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
    assert (
        min(counts) < 16 - sum(r) < max(counts)
    )  # plain pictures give up more tokens, busy ones fewer


def test_eq4_is_the_first_edge_left_out_averaged_over_batches(llava, images):
    tower, r = llava.vision_tower, (3, 0, 0)
    scores = []
    for image in images:
        _, _, k, _ = tower.layers[0].attend(tower.embed(image), None)
        scores.append(match(cosine(k.mean(0)))[0])
    expected = [
        torch.cat(scores[i : i + 2]).sort(descending=True).values[6].item() for i in (0, 2, 4)
    ]
    found = find_thresholds(tower, iter(images), r, 2)
    assert found == (pytest.approx(sum(expected) / 3), 1.0, 1.0)
    assert (
        find_thresholds(tower, images, (99, 0, 0), 6)[0] == 0.0
    )  # more than there are edges: floored
    with pytest.raises(ValueError, match="no images"):
        find_thresholds(tower, [], r, 2)
    with pytest.raises(ValueError, match="2 r given"):
        find_thresholds(tower, images, (1, 1), 2)


def test_presets_of_clip_l_are_those_of_the_paper():
    for r, left in ((21, 93), (16, 208), (8, 392)):
        assert schedule(576 - left, 23) == (r,) * 23


# ---- files ----


def test_thresholds_are_found_next_to_the_checkpoint(folder):
    config = read_config(folder)
    (folder / "thresholds.json").write_text(
        json.dumps({"low": {"thresholds": [0.9, 0.8, 0.7], "r": [4, 4, 4]}})
    )
    assert read_thresholds("low", folder, config)[0] == (0.9, 0.8, 0.7)
    with pytest.raises(
        ValueError, match=re.escape(f"python demo.py --calibrate IMAGES_FOLDER --model {folder}")
    ):
        read_thresholds("mid", folder, config)


def test_the_published_sample_is_shipped_for_its_tower_alone(tmp_path):
    config = config_of(tmp_path)  # LLaVA-1.5
    taus, provenance = read_thresholds("low", tmp_path, config)
    assert (len(taus), taus[0], taus[-1]) == (24, 0.99609375, 0.81640625)
    assert "bfloat16" in provenance["doubt"] and provenance["low"]["r"] == [21] * 24
    check_layers(DyMU(thresholds=taus), config.vision_layers, 24)
    with pytest.raises(ValueError, match="calibrate"):
        read_thresholds(
            "low",
            tmp_path,
            config_of(tmp_path, vision_config=dict(hidden_size=1024, num_attention_heads=16)),
        )


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
    assert (
        read_thresholds(str(tmp_path / "budgets.json") + ":high", folder, config)[0] == (0.0,) * 4
    )


def test_thresholds_from_the_authors_checkpoint(folder, tmp_path):
    state = {
        f"visual.transformer.resblocks.{i}.threshold": torch.tensor(0.9 - i / 10)
        for i in (2, 0, 3, 1)
    }
    torch.save(
        {"state_dict": state | {"visual.proj": torch.ones(3)}, "epoch": 1}, tmp_path / "tome.pth"
    )
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
