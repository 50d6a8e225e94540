"""Videos: what is one, which frames are taken, what is wrong with it; joining its frames."""

import math
import struct
import sys

import av
import numpy as np
import pytest
import torch
from checkpoints import QUESTION, clip, picture
from PIL import Image
from test_dymu import random_map
from test_families import thresholds_of
from test_model import decoder_by_expansion

from dymu import DyMU
from extras.anyres import chain, positions
from extras.video import encode, is_video, join, read_frames
from model import KVCache

SHADES = [20 * i for i in range(11)]


def shades(frames):
    return [frame.getpixel((5, 5))[0] for frame in frames]


def frames(n=11, size=(64, 48)):
    return [Image.new("RGB", size, (shade,) * 3) for shade in SHADES[:n]]


def write(path, n=11):
    first, *rest = frames(n)
    if path.suffix == "":
        path.mkdir()
        (path / "notes.txt").write_text("no picture")
        for i, frame in enumerate([first, *rest]):
            frame.save(path / f"frame{i}.png")
    elif path.suffix == ".mp4":
        with av.open(str(path), "w") as film:
            stream = film.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = *first.size, "yuv420p"
            for frame in [first, *rest]:
                film.mux(stream.encode(av.VideoFrame.from_image(frame)))
            film.mux(stream.encode())
    else:
        lossless = {} if path.suffix == ".gif" else dict(lossless=True)
        first.save(path, save_all=True, append_images=rest, duration=100, **lossless)
    return path


NAMES = ["folder", "clip.gif", "clip.webp", "clip.png", "clip.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_spread_evenly_from_the_first_to_the_last(tmp_path, name):
    path = write(tmp_path / name)
    assert is_video(path)
    for count, expected in (
        (8, [0, 1, 2, 4, 5, 7, 8, 10]),
        (2, [0, 10]),
        (1, [0]),
        (11, range(11)),
        (99, range(11)),
    ):
        found = read_frames(path, count)
        assert [frame.mode for frame in found] == ["RGB"] * len(found) and found[0].size == (64, 48)
        expected = [SHADES[i] for i in expected]
        assert shades(found) == pytest.approx(expected, abs=3)  # a film is coded with loss


@pytest.mark.parametrize("name", ["clip", "clip.jpg"])
def test_a_gif_is_known_by_its_content_too(tmp_path, name):
    write(tmp_path / "clip.gif").rename(tmp_path / name)
    assert is_video(tmp_path / name) and len(read_frames(tmp_path / name)) == 8


def test_a_film_without_pictures(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as film:
        stream = film.add_stream("aac", rate=48000)
        silence = np.zeros((2, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
        frame.rate = 48000
        film.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(ValueError, match="sound.mp4' cannot be read: it has no pictures"):
        read_frames(tmp_path / "sound.mp4")


@pytest.mark.parametrize("name", ["still.webp", "still.png", "photo.jpg"])
def test_a_picture_that_does_not_move_is_no_video(tmp_path, name):
    frames(1)[0].save(tmp_path / name)
    assert not is_video(tmp_path / name)
    assert not is_video(tmp_path / "missing.webp")


def test_pages_are_no_frames(tmp_path):
    first, *rest = frames(3)
    first.save(tmp_path / "pages.tiff", save_all=True, append_images=rest)
    assert not is_video(tmp_path / "pages.tiff")


@pytest.mark.parametrize("name", ["one.gif", "one", "one.mp4"])
def test_one_frame_is_refused(tmp_path, name):
    path = write(tmp_path / name, n=1)
    assert is_video(path)
    with pytest.raises(ValueError, match="it has 1 frame, a video has two or more"):
        read_frames(path)


@pytest.mark.parametrize("name", ["broken.gif", "broken.mp4"])
def test_a_broken_video_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no video")
    with pytest.raises(ValueError, match=rf"video '.*{name}' cannot be read"):
        read_frames(tmp_path / name)
    content = write(tmp_path / f"whole{name[-4:]}").read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 3])
    with pytest.raises(ValueError, match=rf"video '.*{name}' cannot be read"):
        read_frames(tmp_path / name)


def test_a_film_without_pyav_says_which_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"needs PyAV: pip install -e '\.\[video\]'"):
        read_frames(path)


def test_a_film_is_turned_as_it_says(tmp_path):
    path = write(tmp_path / "clip.mp4")
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # of the track: 16.16 numbers, row by row; a quarter turn
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    with av.open(str(path)) as film:
        assert abs(next(film.decode(video=0)).rotation) == 90
    assert [frame.size for frame in read_frames(path, 2)] == [(48, 64)] * 2


# ---- joining ----


def joined_by_lists(frames, threshold):
    """One token at a time.

    -> the members (frame, token) of each token, its average, the tokens at the positions
    """
    members, average, maps = [], [], []
    for f, (x, at) in enumerate(frames):
        before, old, place = sorted(set(maps[-1])) if maps else [], [a.clone() for a in average], {}
        for t in range(len(x)):
            cosines = [float(torch.cosine_similarity(x[t], old[b], dim=0)) for b in before]
            best = max(range(len(before)), key=cosines.__getitem__, default=None)
            if best is not None and cosines[best] > threshold:
                place[t] = before[best]
                members[before[best]].append((f, t))
            else:
                place[t] = len(members)
                members.append([(f, t)])
                average.append(x[t])
        for i, who in enumerate(members):  # every virtual position counts the same
            sizes = [float((frames[g][1] == t).sum()) for g, t in who]
            sizes = torch.tensor(sizes, dtype=torch.float64)
            rows = torch.stack([frames[g][0][t] for g, t in who])
            average[i] = (rows * sizes[:, None]).sum(0) / sizes.sum()
        maps.append([place[int(t)] for t in at])
    return members, average, maps


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.7, 1.0])
def test_join_frames_equals_one_token_at_a_time(threshold):
    base = torch.randn(8, 4, dtype=torch.float64)
    frames = []
    for n in (8, 6, 7, 6):  # tokens of each frame, on 12 positions
        x = base[torch.randperm(8)[:n]] + 0.4 * torch.randn(n, 4, dtype=torch.float64)
        frames.append((x, random_map(12, n)))
    members, average, maps = joined_by_lists(frames, threshold)
    found = join(frames, threshold)
    new, at = chain(found)
    assert [a.tolist() for a in at] == maps
    at = torch.cat(at)
    torch.testing.assert_close(new, torch.stack(average))
    assert [len(x) for x, _ in found] == [sum(who[0][0] == f for who in members) for f in range(4)]
    size = at.bincount()
    assert size.sum() == 48 and len(size) == len(new) and size.min() >= 1
    if threshold == 1.0:
        assert len(new) == 27 and torch.equal(new, torch.cat([x for x, _ in frames]))
    if threshold == -1.0:
        assert len(new) == 8


def test_join_frames_takes_what_is_above_the_threshold_strictly():
    frames = [(torch.eye(3), torch.arange(3)), (torch.eye(3), torch.arange(3))]
    assert [len(x) for x, _ in join(frames, 1.0)] == [3, 3]
    assert [len(x) for x, _ in join(frames, 0.999)] == [3, 0]


def test_temporal_is_a_cosine():
    for wrong in (1.01, -2.0, math.nan):
        with pytest.raises(ValueError, match="it is a cosine"):
            join([], wrong)


@torch.no_grad()
def test_a_still_scene_costs_one_frame(family):
    _, llava, processor, _ = family
    for settings in (DyMU(), DyMU(thresholds=thresholds_of(llava, processor))):
        frame = picture((84, 84))
        one, three = (
            encode(llava, processor.video([frame] * n), settings, temporal=0.999) for n in (1, 3)
        )
        assert sum(len(x) for x, _ in three) == sum(len(x) for x, _ in one)
        once, thrice = (positions(processor.video([frame] * n), llava.config) for n in (1, 3))
        assert sum(len(at) for _, at in three) == thrice >= 3 * once - 2
        a, b = three[0][0], one[0][0]
        torch.testing.assert_close(a[: len(b)], b[: len(a)], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_moves_stays_and_positions_keep_their_order(family):
    _, llava, processor, _ = family
    pixels = processor.video(clip())
    full, joined = (encode(llava, pixels, DyMU(), tau) for tau in (None, 0.99))
    rows, at = chain(full)
    few, joined_at = chain(joined)
    at, joined_at = torch.cat(at), torch.cat(joined_at)
    assert len(at) == len(joined_at) == positions(pixels, llava.config)
    assert joined_at.bincount(minlength=len(few)).min() >= 1
    assert joined_at.bincount().sum() == len(at)
    assert len(rows) / 3 < len(few) < len(rows)
    # every position holds an average of rows that were alike, and those that joined nothing hold
    # what they held
    cosine = torch.nn.functional.cosine_similarity(rows[at], few[joined_at])
    assert cosine.min() > 0.97
    alone = joined_at.bincount()[joined_at] == at.bincount()[at]
    torch.testing.assert_close(few[joined_at][alone], rows[at][alone])
    assert 0 < alone.sum() < len(alone)


@torch.no_grad()
def test_temporal_joins_two_pictures_and_its_logits_equal_expansion(family):
    _, llava, processor, _ = family
    for shown in (processor.image(clip(2)), processor.video(clip(2))):
        ids = processor.prompt(QUESTION, shown)
        rows, token_at = llava.splice(ids, encode(llava, shown, DyMU(), 0.9))
        assert len(rows) < len(token_at)
        logits = llava.logits(llava.language_model(rows, token_at, KVCache()))
        expected = decoder_by_expansion(llava, rows, token_at, None)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert len(list(llava.decode(rows, token_at, KVCache(), max_new_tokens=3, eos=()))) == 3


@torch.no_grad()
def test_an_unreachable_temporal_threshold_changes_nothing(family):
    _, llava, processor, _ = family
    pixels = processor.video(clip())
    ids = processor.prompt(QUESTION, pixels)
    plain, joined = (llava.splice(ids, encode(llava, pixels, DyMU(), t)) for t in (None, 1.0))
    assert torch.equal(plain[0], joined[0]) and torch.equal(plain[1], joined[1])
