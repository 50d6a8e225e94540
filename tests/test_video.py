"""Videos: what is one, which frames are taken, what is wrong with it."""

import struct
import sys

import av
import numpy as np
import pytest
from PIL import Image

from extras.video import is_video, read_frames

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
