"""The picture of the tokens: which token is drawn where, and how."""

from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, SIZES, clip, make, picture
from PIL import Image

from extras import show
from extras.anyres import cut
from load import load, load_processor

COUNTS = dict(visual_tokens=4, virtual_tokens=12)


def numbers(image):
    return torch.tensor(np.asarray(image)).int()


def square_numbers(start, h, w, step):
    return torch.arange(h)[:, None] * step + torch.arange(w) + start


def test_each_patch_has_its_own_token_at_full_length(tmp_path):
    for i, name in enumerate(("llava, SigLIP, Qwen2", "llava_next, Llama", "llava_onevision")):
        llava, processor = load(make(tmp_path / str(i), **FAMILIES[name]), "cpu")
        c, g = llava.config, llava.config.vision_config.grid
        shown = [processor.image(picture(SIZES["wide"]))]
        (drawn,) = show.patches(c, shown, llava.encode(shown))
        if "llava," in name:
            assert torch.equal(drawn, square_numbers(0, g, g, g))
        else:  # the tiles, behind the whole, with a newline at the end of each row
            h, w = cut(shown[0].size, c)[2]
            assert torch.equal(drawn, square_numbers(g * g, h, w, w + 1))
        video = processor.video(clip())
        video = video if isinstance(video, list) else [video]
        drawn = show.patches(c, video, llava.encode(video))
        p = drawn[0].shape[0]
        step = p * p + ("llava_next" in name)
        assert [d.tolist() for d in drawn] == [
            square_numbers(f * step, p, p, p).tolist() for f in range(3)
        ]
        assert p == (4 if name == "llava_onevision" else g)


def test_the_class_token_is_not_drawn(tmp_path):
    llava, processor = load(make(tmp_path, vision_feature_select_strategy="full"), "cpu")
    shown = [processor.image(picture())]
    (drawn,) = show.patches(llava.config, shown, llava.encode(shown))
    assert torch.equal(drawn, square_numbers(1, 4, 4, 4))


def test_what_stood_before_is_faded_and_what_merged_is_flat():
    view = picture((40, 40))
    first = torch.tensor([[0, 0], [1, 2]])
    same = torch.tensor([[0, 3], [1, 2]])
    other = torch.tensor([[4, 5], [6, 7]])
    a, b, c = map(numbers, show.merged([view] * 3, [first, same, other]))
    original = numbers(view)
    inside = slice(2, 18), slice(22, 38)  # of a patch, away from lines
    own = slice(22, 38), slice(2, 18)
    assert torch.equal(a[own], original[own])  # a patch that kept a token of its own
    mean = original[:20].float().mean((0, 1)).round()
    assert torch.equal(a[inside], mean.int().expand(16, 16, 3).to(a))  # a merged one
    faded = 0.2 * original[own] + 0.8 * 255
    assert (b[own] - faded).abs().max() <= 1  # it stood there before
    assert torch.equal(b[inside], original[inside])  # new in the second picture
    assert torch.equal(c[2:18, 2:18], original[2:18, 2:18])
    assert torch.equal(c[inside], original[inside])


def test_a_legend_says_faded_only_where_something_is():
    report = SimpleNamespace(answer="yes", visual_tokens=9, virtual_tokens=8)
    first = torch.tensor([[-1, 0], [1, 2]])  # a patch without a token is none that stood before
    for second, faded in (([[-1, 3], [4, 5]], False), ([[-1, 0], [4, 5]], True)):
        panels = [("mid", [first, torch.tensor(second)], report)]
        assert (show.FADED in show.words(panels, 0, "")[1][0]) == faded


# ---- The page ----


def page(shapes, panels, answer="yes", frames=0):
    """A page of red views of these patches (h, w), each patch with a token of its own."""
    tokens = sum(h * w for h, w in shapes)
    report = SimpleNamespace(answer=answer, visual_tokens=tokens, virtual_tokens=tokens)
    grids = [square_numbers(0, h, w, w) for h, w in shapes]
    views = [Image.new("RGB", (64, 64), "red")] * len(shapes)
    return show.draw(views, [("full", grids, report)] * panels, "what?", frames)


def test_tall_pictures_stay_on_a_screen():
    drawn = page([(150, 2)], 1)
    assert drawn.height < 1400
    white = (numbers(drawn) == 255).all(-1)
    assert white[:, -show.MARGIN :].all()  # no text runs out


def test_pages_of_several_pictures_are_no_longer_than_a_screen_or_two():
    square = (24, 24)
    for shapes in ([square] * 2, [square] * 8, [square] * 32, [(8, 72), (72, 24)]):
        for panels in (1, 4):
            assert page(shapes, panels, "word " * 100).height <= show.TALLEST


@pytest.mark.parametrize("n, columns", [(2, 2), (3, 3), (4, 4), (7, 4), (8, 4), (9, 5)])
def test_views_fill_the_width(n, columns):
    drawn = page([(8, 8)] * n, 1)
    red = (numbers(drawn) == torch.tensor([255, 0, 0])).all(-1)
    row = red[red.any(1).nonzero()[3, 0]]  # the input's first row of views
    assert drawn.width == show.WIDTH
    assert int(row.sum()) > 0.9 * (show.WIDTH - 2 * show.MARGIN - columns * show.GAP)
    assert int((row[1:] > row[:-1]).sum()) == columns


@pytest.mark.parametrize(
    "shapes", [[(36, 48), (48, 36)], [(24, 72), (48, 48), (48, 24)], [(8, 72), (48, 48)]]
)
@pytest.mark.parametrize("room, most", [(1136, 600), (1136, 260), (560, 900)])
def test_pictures_of_different_shapes_leave_few_holes(shapes, room, most):
    height, spots = show.gallery(shapes, room, most)
    taken = torch.zeros(height, room)
    for (h, w), (x, y, cell) in zip(shapes, spots):
        part = taken[y : y + cell * h, x : x + cell * w]
        assert part.shape == (cell * h, cell * w)  # within the room
        part += 1
    assert taken.max() == 1  # none lies on another
    assert height <= most and taken[:, taken.any(0)].mean() > 0.8


def test_frames_are_called_frames():
    for frames, said in ((0, "3 pictures"), (2, "1 picture, 2 frames"), (3, "3 frames")):
        panels = [("mid", [torch.zeros(2, 2)] * 3, SimpleNamespace(answer="", **COUNTS))]
        assert show.words(panels, frames, "")[0][0] == f"input: {said}"


def test_what_the_centre_crop_cut_off_is_told(tmp_path):
    wide, square, slightly = (Image.new("RGB", size) for size in ((400, 20), (9, 9), (110, 100)))
    shown = [wide, [square, wide, wide], slightly]
    processor = load_processor(make(tmp_path / "clip"))
    assert show.crops(processor, shown) == "Cropped from 400 x 20. "
    assert show.crops(processor, [square, slightly]) == ""
    assert show.crops(load_processor(tmp_path / "clip", pad=True), shown) == ""
    for i, name in enumerate(("llava, SigLIP, Qwen2", "llava_next, Llama")):  # squeezed, in tiles
        assert show.crops(load_processor(make(tmp_path / str(i), **FAMILIES[name])), shown) == ""


# ---- Text ----

MATPLOTLIB = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def test_text_is_drawn_in_the_first_font_that_has_its_characters(monkeypatch):
    fonts = [
        str(MATPLOTLIB / f"{name}.ttf")
        for name in ("DejaVuSansDisplay", "DejaVuSans", "DejaVuSans-Bold")
    ]
    monkeypatch.setattr(show, "FONTS", ", ".join(("no such font", *fonts)))
    for text in ("Что там — слева?", "Où est l'élève, Ωμέγα ß", "a \U0001f600\ufe0f"):
        read, font = show.readable(f" {text}\n")
        assert read == text.replace("\ufe0f", "") and font.path == fonts[1]
        assert not show.lacks(read, font)
    assert show.lacks("我 a", font) == {"我"}
    assert show.readable("plain: it's 100 %!")[1].getname()[0] == "Aileron"


def test_missing_characters_are_told_once(monkeypatch, capsys):
    monkeypatch.setattr(show, "FONTS", "no such font")
    page([(2, 2)], 3, "café – ß")
    assert show.readable("café – ß")[0] == "cafe - ss" and capsys.readouterr().err == ""
    page([(2, 2)], 3, "我 и 我")
    err = capsys.readouterr().err
    assert err == "demo.py: note: no font found for и 我, drawn as boxes\n"
