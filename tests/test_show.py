"""The picture of the tokens: which token is drawn where, and how."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, SIZES, clip, make, picture
from PIL import Image

from extras import show
from extras.anyres import cut
from load import load


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


def test_tall_pictures_stay_on_a_screen():
    report = SimpleNamespace(answer="yes", visual_tokens=9, virtual_tokens=900)
    grids = [torch.arange(300).view(150, 2)]
    drawn = show.draw([picture((20, 900))], [("low", grids, report)], "what?")
    assert drawn.height < 1400


@pytest.mark.parametrize("n, columns", [(1, 1), (2, 2), (4, 4), (5, 3), (8, 4), (9, 3)])
def test_views_fill_the_width_four_in_a_row_at_most(n, columns):
    views = [Image.new("RGB", (64, 64), "red")] * n
    grids = [torch.arange(64).view(8, 8) + 64 * i for i in range(n)]
    report = SimpleNamespace(answer="yes", visual_tokens=64 * n, virtual_tokens=64 * n)
    drawn = show.draw(views, [("full", grids, report)], "what?")
    red = (numbers(drawn) == torch.tensor([255, 0, 0])).all(-1)
    row = red[red.any(1).nonzero()[3, 0]]  # the input's first row of views
    assert drawn.width == show.WIDTH
    side = int(row.sum()) // (columns if n > 1 else 1)
    if n > 1:
        assert side * columns > 0.9 * (show.WIDTH - 2 * show.MARGIN - columns * show.GAP)
