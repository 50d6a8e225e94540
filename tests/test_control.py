"""A cap on tokens, and regions of interest: that they land where they should, and merge no more."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, QUESTION, SIZES, clip, make, picture
from PIL import Image, ImageDraw
from test_demo import photo, run  # noqa: F401  fixtures
from test_second_stage import alike

from dymu import DyMU, similar_keys
from extras import control, options, show
from extras.anyres import cut, positions
from extras.control import Controlled, apart, find_inside, regions
from extras.door import read_picture
from extras.options import NONE
from extras.second_stage import second_stage
from extras.video import see
from load import load, load_processor

TINY = Path(__file__).parent.parent / "tiny"
BOX = (1400, 1900, 1800, 2600)  # in an upright picture of 3000 x 4000


@pytest.fixture(scope="module")
def phone(tmp_path_factory):
    """A photograph of 4000 x 3000, turned by its EXIF when it is read: red where BOX is"""
    path = tmp_path_factory.mktemp("phone") / "photo.jpg"
    upright = Image.new("RGB", (3000, 4000), (20, 60, 90))
    x0, y0, x1, y1 = BOX
    ImageDraw.Draw(upright).rectangle((x0, y0, x1 - 1, y1 - 1), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # it lies on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    assert Image.open(path).size == (4000, 3000)
    return read_picture(path)


def covered(box, size, patches):
    """How much of each of so many patches (rows, columns) is in the box

    size: (left, top, width, height) of them all, in pixels of the picture
    """
    left, top, w, h = size
    rows, columns = patches
    x0, y0, x1, y1 = box

    def share(n, length, start, end):
        edges = torch.arange(n + 1) * length / n
        return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0) * n / length

    return share(rows, h, y0 - top, y1 - top)[:, None] * share(columns, w, x0 - left, x1 - left)


def is_part(inside, share):
    """Beside patches of which it is a close call, where rounding and resizing decide"""
    sure = (share - control.PART).abs() > 0.02
    return torch.equal(inside[sure], (share > control.PART)[sure]) and sure.float().mean() > 0.8


def is_red(processor, shown):
    """The same found in the pixels of the photograph itself"""
    red = processor.image(shown)
    other = processor.image(Image.new("RGB", shown.size, (20, 60, 90)))
    change = torch.nn.functional.avg_pool2d((red - other).abs().sum(0)[None], 14)[0]
    return change / change.max()


@pytest.mark.parametrize(
    "pad, seen", [(False, (0, 500, 3000, 3000)), (True, (-500, 0, 4000, 4000))]
)
def test_a_box_lands_on_the_patches_of_a_phones_photograph(phone, pad, seen):
    shown = phone
    processor = load_processor(TINY, pad)
    share = covered(BOX, seen, (16, 16))
    inside, mask = find_inside(processor, [shown], 0, [BOX])
    assert is_part(inside.view(16, 16), share) and inside.any()
    assert is_part(is_red(processor, shown) > control.PART, share)
    assert mask.size == (3000, 4000) and mask.getbbox() == BOX

    shares = BOX[0] / 3000, BOX[1] / 4000, BOX[2] / 3000, BOX[3] / 4000
    assert torch.equal(find_inside(processor, [shown], 0, [shares])[0], inside)
    assert torch.equal(find_inside(processor, [shown], 0, [mask])[0], inside)


@pytest.mark.parametrize("name", ["llava_next, Llama", "llava_onevision"])
@pytest.mark.parametrize("several", [False, True])
def test_a_box_lands_on_the_patches_of_the_whole_and_of_tiles(checkpoint, phone, name, several):
    processor = checkpoint(name)[2]
    c = processor.config
    g = c.vision_config.grid
    shown = [picture((300, 90)), phone] if several else [phone]
    inside, _ = find_inside(processor, shown, len(shown) - 1, [BOX])
    whole = inside[: g * g].view(g, g)

    if several and name == "llava_onevision":  # it is padded to a square then, without tiles
        assert len(inside) == g * g
        assert is_part(whole, covered(BOX, (-500, 0, 4000, 4000), (g, g)))
        return
    assert is_part(whole, covered(BOX, (0, 0, 3000, 4000), (g, g)))
    h, w = cut((4000, 3000), c)[2]
    tiles = inside[g * g :].view(h, w)
    share = covered(BOX, (0, 0, 3000, 4000), (h, w))
    assert (tiles != (share > control.PART)).float().mean() < 0.1  # tiles end within a patch
    assert torch.equal(tiles & (share > 0.9), share > 0.9) and not tiles[share == 0].any()


def test_frames_have_the_box_of_their_video(checkpoint):
    for name in ("llava, SigLIP, Qwen2", "llava_next, Llama", "llava_onevision"):
        processor = checkpoint(name)[2]
        box = (0, 0, 50, 84)  # a part of the patches at its right edge
        inside, masks = find_inside(processor, [picture(), clip()], 1, [box])
        side = int((len(inside) / 3) ** 0.5)
        for frame in inside.view(3, side, side):
            assert is_part(frame, covered(box, (0, 0, 84, 84), (side, side)))
        assert len(masks) == 3 and masks[2].getbbox() == box


def test_what_is_cropped_away_is_told_and_what_is_small_is_not_lost():
    processor = load_processor(TINY)
    wide = [picture((800, 200))]
    inside, _ = find_inside(processor, wide, 0, [(300, 0, 301, 1), (490, 190, 500, 200)])
    assert inside.view(16, 16).nonzero().tolist() == [[0, 0], [15, 15]]
    many = [(300 + 13 * i, 0, 312 + 13 * i, 12) for i in range(5)]
    assert find_inside(processor, wide, 0, many)[0].view(16, 16)[0].sum() == 5
    with pytest.raises(ValueError, match="nothing of --box 100,0,200,200 is in what the model see"):
        find_inside(processor, wide, 0, [*many, (100, 0, 200, 200)])
    with pytest.raises(
        ValueError, match="--box 0,200,9,300 lies outside the picture, .* 800 x 200"
    ):
        find_inside(processor, wide, 0, [(0, 200, 9, 300)])
    with pytest.raises(ValueError, match="nothing of --mask black.png"):
        black = Image.new("L", (800, 200))
        black.filename = "black.png"
        find_inside(processor, wide, 0, [black])
    with pytest.raises(ValueError, match="nothing of --box"):
        find_inside(processor, [[wide[0], wide[0]]], 0, [(100, 0, 200, 200)])
    clipped = find_inside(load_processor(TINY, pad=True), wide, 0, [(-50, -50, 8, 900)])[0]
    assert clipped.view(16, 16).nonzero().tolist() == [[i, 0] for i in range(6, 10)]


def test_of_a_model_that_sees_the_whole_no_crop_is_told(checkpoint):
    for name in ("llava_next, Llama", "llava_onevision"):
        processor = checkpoint(name)[2]
        with pytest.raises(ValueError, match="sees, which is the whole picture: it is too small"):
            find_inside(processor, [picture()], 0, [Image.new("L", (9, 9))])
    with pytest.raises(ValueError, match="the whole picture"):
        find_inside(load_processor(TINY, pad=True), [picture()], 0, [Image.new("L", (9, 9))])


def test_a_mask_may_be_a_cut_out_or_of_0_and_1(tmp_path):
    inside = (10, 20, 50, 40)
    expected = control.paint(inside, (90, 60))
    flat = Image.new("RGB", (90, 60), "white")
    flat.putalpha(expected)
    flat.save(tmp_path / "cut.png")  # white on a transparent ground, as background removers write
    opaque = Image.merge("RGB", [expected] * 3)
    opaque.putalpha(255)
    ones = expected.point(lambda value: value // 255)
    palette = ones.convert("P")
    palette.putpalette([255, 255, 255, 200, 0, 0])
    palette.info["transparency"] = 0
    for mask in (tmp_path / "cut.png", opaque, ones, palette, expected.convert("1")):
        assert control.paint(mask, (90, 60)).tobytes() == expected.tobytes(), mask
    grey = expected.point(lambda value: value // 2)
    assert control.paint(grey, (90, 60)).tobytes() == grey.tobytes()
    assert control.paint((10, 20, 1e300, 40), (90, 60)).getbbox() == (10, 20, 90, 40)


def test_only_the_picture_of_the_regions_is_preprocessed(monkeypatch):
    processor = load_processor(TINY)
    seen = []
    image = type(processor).image
    monkeypatch.setattr(
        type(processor), "image", lambda *args: seen.append(args[1:]) or image(*args)
    )
    find_inside(processor, [picture()] * 4, 2, [(10, 10, 60, 60)] * 4)
    assert [several for _, several in seen] == [True, True]


def test_a_class_token_is_outside_and_a_first_patch_may_be_dropped(tmp_path):
    siglip = FAMILIES["llava, SigLIP, Llama"] | dict(vision_feature_select_strategy="default")
    for i, (more, first, side) in enumerate(
        ((dict(vision_feature_select_strategy="full"), 1, 4), (siglip, -1, 7))
    ):
        llava, processor = load(make(tmp_path / str(i), **more), "cpu")
        inside, _ = find_inside(processor, [picture()], 0, [(0.0, 0, 1, 1)])
        assert len(inside) == side**2 + first and inside[max(first, 0) :].all()
        assert inside[0] == (first < 0)
        pixels = Controlled(processor.image(picture()), inside, cap=7)
        assert len(llava.encode(pixels, DyMU(r=(3, 2, 1)))[0][0]) <= 7


# ---- merging ----


def sides(token_at, inside):
    """Of each token how many of its positions are inside, and how many it has"""
    size = token_at.bincount()
    return torch.zeros(len(size)).index_add(0, token_at, inside.float()), size


def test_each_side_merges_by_itself():
    torch.manual_seed(0)
    x, _ = alike(40)
    token_at = torch.arange(40)
    inside = torch.rand(40) < 0.4
    rows, at = apart(x, token_at, inside, second_stage(0.95), second_stage(0.5))
    for side, tau in ((inside, 0.95), (~inside, 0.5)):
        expected, expected_at = second_stage(tau)(x[side], torch.arange(int(side.sum())))
        assert torch.equal(rows[at[side]], expected[expected_at])
    shared, size = sides(at, inside)
    assert ((shared == 0) | (shared == size)).all() and size.sum() == 40

    rows, at = apart(x, token_at, inside, second_stage(1.0), second_stage(NONE))
    assert len(rows) == int(inside.sum()) + 1 and len(at[~inside].unique()) == 1
    assert torch.equal(rows[at[inside]], x[inside])
    same = apart(x, token_at, inside, second_stage(1.0), second_stage(1.0))
    assert torch.equal(same[0], x) and torch.equal(same[1], token_at)


def test_a_row_on_both_sides_is_where_most_of_it_is():
    x = torch.eye(3)
    token_at = torch.tensor([0, 0, 0, 1, 1, 2])
    inside = torch.tensor([True, False, False, True, False, False])
    _, at = apart(x, token_at, inside, second_stage(1.0), second_stage(NONE))
    assert at[3] == at[4] != at[0] == at[1] == at[2] == at[5]


def test_the_encoder_merges_what_is_outside_first_and_never_across(llava, images):
    inside = torch.arange(16) % 4 < 2
    by_regions = regions(inside, similar_keys)
    x, token_at = llava.vision_tower(images[5], DyMU(r=(4, 3, 0), similarity=by_regions))
    shared, size = sides(token_at, inside)
    assert ((shared == 0) | (shared == size)).all()
    _, first = llava.vision_tower(images[5], DyMU(r=(4, 0, 0), similarity=by_regions))
    assert len(first[inside].unique()) == 8 and len(first[~inside].unique()) == 4
    _, keys = llava.vision_tower(images[5], DyMU(r=(4, 0, 0)))
    assert len(keys[inside].unique()) < 8


@pytest.fixture(params=["llava, CLIP, Qwen2", "llava_next, Llama", "llava_onevision"])
def shown_to(request, checkpoint):
    """Model, processor and what it is shown: a picture and a video"""
    _, llava, processor, _ = checkpoint(request.param)
    return llava, see(processor, [picture(SIZES["wide"]), clip()])


def count(visual):
    return sum(len(x) for x, _ in visual)


@torch.no_grad()
@pytest.mark.parametrize("settings", [DyMU(), DyMU(r=(3, 2, 1, 1)), DyMU(after=second_stage(0.9))])
def test_below_a_cap_nothing_changes(shown_to, settings):
    llava, shown = shown_to
    for one in shown:
        plain = llava.encode(one, settings)
        capped = Controlled(one, cap=count(plain))
        for (x, at), (y, where) in zip(plain, llava.encode(capped, settings)):
            assert torch.equal(x, y) and torch.equal(at, where)
        assert capped.tau is None


@torch.no_grad()
@pytest.mark.parametrize("settings", [DyMU(), DyMU(r=(3, 2, 1, 1)), DyMU(after=second_stage(0.99))])
def test_a_cap_is_kept_with_the_encoder_run_once(shown_to, settings):
    llava, shown = shown_to
    for one in shown:
        plain = llava.encode(one, settings)
        runs = []
        kept = []
        hook = llava.vision_tower.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        least = len(plain) + 1 if len(plain) > 1 else 2  # a newline of each frame
        for cap in (count(plain) - 1, count(plain) // 2, least):
            capped = Controlled(one, cap=cap)
            visual = llava.encode(capped, settings)
            assert count(visual) <= cap and capped.tau < getattr(settings.after, "tau", 1)
            assert [len(at) for _, at in visual] == [len(at) for _, at in plain]
            kept.append((cap, count(visual), capped.tau))
        hook.remove()
        crops = len(getattr(one, "crops", getattr(one, "frames", [one])))
        assert len(runs) == 3 * crops
        assert kept == sorted(kept, reverse=True) and kept[0][1] > kept[2][1]
        cap, _, tau = kept[1]  # it falls no further than it must
        step = (getattr(settings.after, "tau", 1) + 1) / 2**12
        more = replace(settings, after=second_stage(tau + step))
        assert count(llava.encode(one, more)) > cap


def test_a_cap_that_cannot_be_kept(checkpoint):
    _, llava, processor, _ = checkpoint("llava_next, Llama")
    one, video = see(processor, [picture(), clip()])
    for capped, least in ((Controlled(one, cap=1), 2), (Controlled(video, cap=3), 4)):
        with pytest.raises(ValueError, match=f"cannot be kept: {least} tokens are left"):
            llava.encode(capped)
    inside, _ = find_inside(processor, [picture()], 0, [(0, 0, 40, 80)])
    with pytest.raises(ValueError, match="cannot be kept: 3 tokens are left"):
        llava.encode(Controlled(one, inside, cap=2), DyMU(after=second_stage(0.9)))
    assert count(llava.encode(Controlled(one, inside, cap=2))) == 2  # plain: no regions


@torch.no_grad()
def test_the_cap_lowers_tau_inside_then_outside():
    llava, processor = load(TINY, "cpu")
    shown = read_picture(TINY / "sample.png")
    inside, _ = find_inside(processor, [shown], 0, [(60, 100, 150, 220)])
    settings = DyMU(after=second_stage(0.9))
    pixels = processor.image(shown)
    ((x, token_at),) = llava.encode(pixels)
    for cap, outside, least, most in ((8, 0.6, 0.6, 0.9), (6, 0.6, 0.5, 0.6)):
        one = Controlled(pixels, inside, outside, cap)
        ((rows, at),) = llava.encode(one, settings)
        assert least < one.tau < most and len(rows) == cap
        further = second_stage(min(one.tau, outside))
        expected, where = apart(x, token_at, inside, second_stage(one.tau), further)
        assert torch.equal(rows, expected) and torch.equal(at, where)
    llava.encode(one, DyMU(after=second_stage(0.3)))
    assert one.tau is None  # it did not have to fall this time


@torch.no_grad()
def test_outside_is_merged_no_less_than_inside_and_what_was_used_is_noted():
    llava, processor = load(TINY, "cpu")
    shown = read_picture(TINY / "sample.png")
    inside, _ = find_inside(processor, [shown], 0, [(60, 100, 150, 220)])
    pixels = processor.image(shown)
    ((x, token_at),) = llava.encode(pixels)

    one = Controlled(pixels, inside)
    assert one.used is None
    ((rows, at),) = llava.encode(one, DyMU(after=second_stage(0.3)))
    expected, where = apart(x, token_at, inside, *[second_stage(0.3)] * 2)
    assert torch.equal(rows, expected) and torch.equal(at, where) and one.used == (0.3, 0.3)

    llava.encode(one, DyMU(after=second_stage(0.9)))
    assert one.used == (0.9, options.OUTSIDE)
    llava.encode(one, DyMU(r=(9,) * 7))
    assert one.used == (None, options.OUTSIDE)
    llava.encode(one)  # nothing merges: regions are not heeded
    assert one.used is None
    one.cap = 9
    llava.encode(one)
    assert one.used == (one.tau, None) and one.tau < 1
    llava.encode(one, DyMU(after=second_stage(0.9)))
    assert one.used == (one.tau, min(one.tau, options.OUTSIDE)) and one.tau < 0.9
    all_of_it = Controlled(pixels, cap=256)
    llava.encode(all_of_it, DyMU(after=second_stage(0.9)))
    assert all_of_it.used == (0.9, None) and all_of_it.tau is None


def test_a_video_of_its_own_placeholder_generates(checkpoint):
    _, llava, processor, _ = checkpoint("llava_onevision")
    (video,) = see(processor, [clip()])
    ids = processor.prompt(QUESTION, [video])
    capped = [Controlled(video, cap=5)]
    assert torch.equal(processor.prompt(QUESTION, capped), ids)
    assert len(list(llava.generate(ids, capped, max_new_tokens=3, eos=()))) == 3
    assert positions([video], llava.config) == len(llava.encode(capped)[0][1])


# ---- the command line ----


def ask(run, *argv):  # noqa: F811
    status, out, err = run(*argv, "--model", "tiny", "--json", "--max-new-tokens", 2)
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()], err


def test_a_cap_of_each_picture_and_its_tau(run, photo):  # noqa: F811
    sample = TINY / "sample.png"
    (free,), _ = ask(run, sample, photo, QUESTION, "--tokens", "tight")
    (capped,), _ = ask(run, sample, photo, QUESTION, "--tokens", "tight", "--cap", 12)
    first, second = capped["capped_tau"]
    assert free["capped_tau"] == [None, None]
    assert 0 < first < 0.9157 and (second is None or second < 0.9157)
    assert capped["visual_tokens"] <= 24 and capped["tokens_per_layer"] == free["tokens_per_layer"]
    _, _, err = run(sample, QUESTION, "--model", "tiny", "--tokens", "tight", "--cap", 12)
    assert f"capped with tau {first:.3f}, " in err
    (all_of_it,), _ = ask(run, sample, QUESTION, "--cap", 256)
    assert all_of_it["visual_tokens"] == 256 and all_of_it["capped_tau"] == [None]


def test_boxes_masks_and_what_is_outside(run, tmp_path):  # noqa: F811
    sample = TINY / "sample.png"
    mask = Image.new("L", (112, 112))
    ImageDraw.Draw(mask).rectangle((28, 28, 55, 55), 255)
    mask.save(tmp_path / "m.png")
    base = (sample, "what?", "--tokens", "low")
    (plain,), _ = ask(run, *base)
    full, *_, boxed = ask(run, *base[:2], "--tokens", "all", "--box", "56,56,112,112")[0]
    (shares,), _ = ask(run, *base, "--box", "0.25,.25,0.5,0.5")
    (masked,), err = ask(run, *base, "--mask", tmp_path / "m.png")
    (none,), _ = ask(run, *base, "--box", "56,56,112,112", "--outside", "none")
    (far,), _ = ask(run, *base, "--box", "56,56,112,112", "--outside", "1")
    counts = [one["visual_tokens"] for one in (plain, boxed, shares, masked, none, far)]
    assert counts[0] == counts[5] > counts[1] == counts[2] == counts[3] > counts[4]
    assert "m.png was resized from (112, 112) to the picture's (224, 224)" in err
    of_both = (sample, sample, "what?", "--tokens", "low", "--box", "2:56,56,112,112")
    (second,), _ = ask(run, *of_both)
    assert second["visual_tokens"] == counts[0] + counts[1]
    assert full["visual_tokens"] == 256


def test_boxes_are_drawn(run, tmp_path):  # noqa: F811
    shown = tmp_path / "shown.png"
    argv = (TINY / "sample.png", "what?", "--tokens", "low", "--show", shown)
    ask(run, *argv)
    without = Image.open(shown).convert("RGB")
    ask(run, *argv, "--box", "0,0,56,224", "--box", "168,0,224,56")
    drawn = Image.open(shown).convert("RGB")
    accent = Image.new("RGB", (1, 1), show.ACCENT).getpixel((0, 0))
    x, y = 32, 92  # the input's corner
    cell = 560 // 16
    where = [(x + 1, y + 300), (x + 4 * cell - 1, y + 300), (x + 16 * cell - 1, y + 30)]
    where += [(x + px + 576, py) for px, py in ((1, y + 300), (4 * cell - 1, y + 300))]
    for at in where:
        assert drawn.getpixel(at) == accent != without.getpixel(at)
    assert drawn.getpixel((x + 8 * cell, y + 300)) == without.getpixel((x + 8 * cell, y + 300))


def test_pictures_are_as_they_were_where_nothing_is_asked():
    pixels = [object()]
    a = options.parse([str(TINY / "sample.png"), "what?"])
    assert control.control(a, None, [None], pixels) == (pixels, None)
    a = options.parse([str(TINY / "sample.png"), "what?", "--cap", "9"])
    assert control.control(a, None, [None], pixels) == ([Controlled(pixels[0], cap=9)], None)
