"""Merging behind the projector: against a form written with lists, and in every family."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import QUESTION, clip, picture
from test_dymu import random_map
from test_model import decoder_by_expansion
from torch.utils._python_dispatch import TorchDispatchMode

from dymu import DyMU
from extras import second_stage as module
from extras.anyres import Picture, positions
from extras.calibrate import calibrate_behind
from extras.second_stage import second_stage
from extras.thresholds import read_thresholds
from extras.video import Frames
from load import load
from model import KVCache


def by_lists(x, token_at, tau):
    """Tokens as (row, positions), one pair at a time."""
    tokens = [(row, {p for p, t in enumerate(token_at) if t == i}) for i, row in enumerate(x)]
    half = (len(tokens) + 1) // 2
    A, B = tokens[::2], tokens[1::2]
    tried = 0
    while tried < 2:
        joined = {}
        stays = []
        for row, at in A:
            scores = [float(torch.cosine_similarity(row, b, dim=0)) for b, _ in B]
            best = max(range(len(B)), key=scores.__getitem__, default=None)
            if best is not None and scores[best] > tau:
                joined.setdefault(best, []).append((row, at))
            else:
                stays.append((row, at))
        if not joined:
            A, B = tokens[:half], tokens[half:]
            tried += 1
            continue
        grown = []
        for i, one in enumerate(B):
            group = [one, *joined.get(i, [])]
            size = sum(len(at) for _, at in group)
            row = sum(row * len(at) for row, at in group) / size
            grown.append((row, set().union(*(at for _, at in group))))
        tokens = stays + grown
        half = (len(tokens) + 1) // 2
        A, B = tokens[::2], tokens[1::2]
        tried = 0
    return tokens


def alike(rows=24, width=6):
    """Rows in a few directions, which stand at twice as many positions"""
    base = torch.randn(5, width, dtype=torch.float64)
    x = base[torch.randint(5, (rows,))] + 0.3 * torch.randn(rows, width, dtype=torch.float64)
    return x, random_map(2 * rows, rows)


@pytest.mark.parametrize("tau", [-1.0, 0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("block", [3, 1024])
def test_it_equals_one_pair_at_a_time(tau, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    for seed in range(4):
        torch.manual_seed(seed)
        x, token_at = alike()
        rows, at = second_stage(tau)(x, token_at)
        expected = by_lists(x, token_at.tolist(), tau)
        assert len(rows) == len(expected) and at.bincount().sum() == 48
        for i, (row, where) in enumerate(expected):
            assert {p for p, t in enumerate(at.tolist()) if t == i} == where
            torch.testing.assert_close(rows[i], row)
    assert (len(rows) == 1) == (tau == -1.0)


def test_a_tau_of_1_and_a_single_row_change_nothing():
    x, token_at = alike()
    for rows, at in ((x.repeat(2, 1), torch.arange(48)), (x, token_at), (x[:1], torch.zeros(3))):
        same = second_stage(1.0)(rows, at.long())
        assert same[0] is rows and torch.equal(same[1], at.long())


def test_matching_never_holds_all_pairs_at_once():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    R = 7309
    with Watch():
        second_stage(0.9)(torch.randn(R, 8), torch.arange(R))
    assert R * 8 <= largest <= 1024 * (R // 2)


# ---- in every family ----


def gently(llava, tau=None, **more):
    """Two merges in each layer of the encoder, and the second stage"""
    after = None if tau is None else second_stage(tau)
    return DyMU(r=(2,) * llava.config.vision_layers, after=after, **more)


@torch.no_grad()
def test_without_it_and_at_a_tau_of_1_nothing_changes(family):
    _, llava, processor, _ = family
    pixels = processor.image(picture())
    for settings in (DyMU(), gently(llava)):
        plain = llava.encode(pixels, settings)
        never = llava.encode(pixels, replace(settings, after=second_stage(1.0)))
        for (a, b), (c, d) in zip(plain, never):
            assert torch.equal(a, c) and torch.equal(b, d)


@torch.no_grad()
@pytest.mark.parametrize("tau", [0.5, 0.9])
@pytest.mark.parametrize("vtu", [True, False])
def test_logits_equal_expansion_and_cached_ones_equal_uncached(family, tau, vtu):
    _, llava, processor, _ = family
    settings = gently(llava, tau, vtu=vtu)
    shown = processor.image(picture())
    ids = processor.prompt(QUESTION, shown)
    rows, token_at = llava.splice(ids, llava.encode(shown, settings), vtu)
    assert len(rows) <= len(token_at)
    logits = llava(ids, shown, settings)
    expected = decoder_by_expansion(llava, rows, token_at, None)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    answer = list(llava.generate(ids, shown, settings, 5, eos=()))
    for i in range(1, 5):
        longer = torch.cat((ids, torch.tensor(answer[:i])))
        assert llava(longer, shown, settings)[-1].argmax() == answer[i]


@torch.no_grad()
def test_one_picture_alone_equals_the_same_in_a_list(family):
    _, llava, processor, _ = family
    settings = gently(llava, 0.7)
    one = processor.image(picture(), True)
    x, token_at = llava.encode(one, settings)[0]
    for (other_x, other_at), n in zip(llava.encode([one, one], settings), range(2)):
        assert torch.equal(x, other_x) and torch.equal(token_at, other_at), n


@torch.no_grad()
def test_newlines_never_merge(anyres):
    _, llava, processor, _ = anyres
    pixels = processor.image(picture((90, 61)))
    x, token_at = llava.encode(pixels, DyMU(after=second_stage(-1.0)))[0]
    assert len(x) == 2  # one token is all of the picture, one is newline
    torch.testing.assert_close(x[1], llava.image_newline)
    _, (h, w) = pixels.grids(llava.config)
    assert token_at[-h * w :].view(h, w)[:, -1].eq(1).all() and token_at.sum() == h
    assert len(token_at) == positions(pixels, llava.config)


@torch.no_grad()
def test_frames_join_and_pictures_do_not(family):
    _, llava, processor, _ = family
    frame = picture((84, 84))
    settings = gently(llava, 0.999)
    frames = processor.video([frame] * 3)
    video = Frames(frames) if isinstance(frames, list) else frames
    once = Frames(frames[:1]) if isinstance(frames, list) else processor.video([frame])
    rows = sum(len(x) for x, _ in llava.encode(once, settings))
    newlines = 2 if isinstance(frames, list) and isinstance(frames[0], Picture) else 0
    visual = llava.encode(video, settings)
    assert sum(len(x) for x, _ in visual) <= rows + newlines
    assert sum(len(at) for _, at in visual) == positions(video, llava.config)

    alone = processor.image(frame, True)
    pictures = llava.encode([alone] * 3, settings)
    assert [len(x) for x, _ in pictures] == [len(pictures[0][0])] * 3
    assert all(at.min() >= 0 for _, at in pictures)


@torch.no_grad()
def test_frames_of_a_model_without_a_video_token(checkpoint):
    for name in ("llava, CLIP, Qwen2", "llava_next, Llama"):
        _, llava, processor, _ = checkpoint(name)
        frames = processor.video(clip())
        ids = processor.prompt(QUESTION, Frames(frames))
        assert ids.tolist() == processor.prompt(QUESTION, frames).tolist()
        for settings in (DyMU(), gently(llava)):
            plain = llava.encode(frames, settings)
            same = llava.encode(Frames(frames), settings)
            for (a, b), (c, d) in zip(plain, same):
                assert torch.equal(a, c) and torch.equal(b, d)

        settings = gently(llava, 0.9)
        visual = llava.encode(Frames(frames), settings)
        assert len(visual) == 3 and min(at.min() for _, at in visual[1:]) < 0
        rows, token_at = llava.splice(ids, visual)
        logits = llava(ids, Frames(frames), settings)
        expected = decoder_by_expansion(llava, rows, token_at, None)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

        # each position holds what the stage gave it, in the frames' order
        plain = llava.encode(frames, gently(llava))
        end = 1 if isinstance(frames[0], Picture) else 0
        x = torch.cat([x[: len(x) - end] for x, _ in plain])
        starts = torch.tensor([len(x) - end for x, _ in plain]).cumsum(0).tolist()
        at = torch.cat([at[: len(at) - end] + n for (_, at), n in zip(plain, [0, *starts])])
        merged, where = settings.after(x, at)
        before = 0
        found = []
        numbered = torch.cat([x for x, _ in visual])
        for x, at in visual:
            found.append(numbered[at + before][: len(at) - end])
            before += len(x)
        torch.testing.assert_close(torch.cat(found), merged[where])


# ---- its thresholds ----


@torch.no_grad()
def test_calibration_finds_the_share_of_the_positions(anyres, tmp_path):
    folder, llava, processor, _ = anyres
    for i in range(4):
        picture((60 + 9 * i, 80), seed=i).save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.glob("*.png"))
    taus = (0.9,) * llava.config.vision_layers
    mid = DyMU(thresholds=taus)
    found = dict(calibrate_behind(llava, processor.image, files, mid))
    pixels = [processor.image(file) for file in files]
    N = sum(positions(one, llava.config) for one in pixels)
    for budget, share in (("tight", 0.10), ("tightest", 0.05)):
        one = found[budget]
        settings = DyMU(thresholds=taus, after=second_stage(one["after"]))
        counts = [len(llava.encode(p, settings)[0][0]) - 1 for p in pixels]  # without newline
        assert one["tokens_mean"] == sum(counts) / 4 and one["images"] == 4
        assert sum(counts) == pytest.approx(share * N, rel=0.15)
    assert found["tightest"]["after"] < found["tight"]["after"]

    (tmp_path / "t.json").write_text(json.dumps(found))
    same, provenance = read_thresholds(f"{tmp_path}/t.json:tight", folder, llava.config)
    assert same == taus and provenance["after"] == found["tight"]["after"]
    (tmp_path / "t.json").write_text(json.dumps({"tight": {"thresholds": taus, "after": 2}}))
    with pytest.raises(ValueError, match="after is 2, not a number from -1 to 1"):
        read_thresholds(f"{tmp_path}/t.json:tight", folder, llava.config)


def test_calibration_encodes_what_there_is_room_for(llava, saved, tmp_path, monkeypatch):
    processor = load(saved, "cpu")[1]
    for i in range(5):
        picture(seed=i).save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.glob("*.png"))
    monkeypatch.setattr("extras.calibrate.ROOM", 3 * 16 * 48 * 4 - 1)
    found = dict(calibrate_behind(llava, processor.image, files, DyMU()))
    assert found["tight"]["images"] == 3


@torch.no_grad()
def test_behind_a_cache_too(llava, ids, images):
    settings = gently(llava, 0.8)
    rows, token_at = llava.splice(ids, llava.encode(images[3], settings))
    whole = llava.logits(llava.language_model(rows, token_at, KVCache()))
    cache = KVCache()
    cut = len(rows) - 4
    llava.language_model(rows[:cut], token_at[: len(token_at) - 4], cache)
    rest = llava.logits(llava.language_model(rows[cut:], token_at, cache))
    torch.testing.assert_close(rest, whole[cut:], rtol=1e-5, atol=1e-5)
