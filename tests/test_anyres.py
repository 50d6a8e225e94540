"""AnyRes against transformers: crops, grids, the order of positions, with merging and without."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from checkpoints import CHATML, FAMILIES, GRIDS, MANY, SIGLIP, SIZES, make, picture, reference_of
from test_families import assert_parity, thresholds_of
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next import image_processing_pil_llava_next as hf_next
from transformers.models.llava_onevision import image_processing_pil_llava_onevision as hf_onevision

from dymu import DyMU
from extras.anyres import AnyResConfig, Picture, cut, positions, resample
from extras.families import read_config
from extras.video import OneVisionConfig, Video
from load import load, load_processor
from model import VisionConfig

# ---- pixels ----


@pytest.mark.parametrize("shape", SIZES)
def test_crops_equal_transformers(anyres, shape):
    folder, llava, processor, _ = anyres
    image, side = picture(SIZES[shape]), llava.config.vision_config.image_size
    grids = [list(grid) for grid in llava.config.image_grid_pinpoints]
    square = {"height": side, "width": side}
    if llava.config.model_type == "llava_next":
        theirs = hf_next.LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=grids
        )
    else:
        theirs = hf_onevision.LlavaOnevisionImageProcessorPil(
            size=square, image_grid_pinpoints=grids
        )
        pair = theirs([[image, image]], return_tensors="pt")["pixel_values"]
        ours = processor.image([image, image])
        assert [one.size for one in ours] == [None, None]
        assert torch.equal(torch.stack([one.crops for one in ours]), pair)
    found = theirs(image, return_tensors="pt")
    crops, size = processor.image(image)
    assert list(size) == found["image_sizes"][0].tolist()
    assert torch.equal(crops, found["pixel_values"][0])
    video = processor.video([image, image])
    frame = video.frames[0] if isinstance(video, Video) else video[0].crops[0]
    assert torch.equal(frame, found["pixel_values"][0][0])


def test_crops_follow_preprocessor_config(tmp_path):
    folder = make(tmp_path, **FAMILIES["llava_onevision"])
    theirs = dict(
        size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.4] * 3, resample=2
    )
    theirs = hf_onevision.LlavaOnevisionImageProcessorPil(
        image_grid_pinpoints=[list(grid) for grid in MANY], **theirs
    )
    theirs.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(dict(image_std=[0.2] * 3)))
    image, processor = picture((90, 61)), load_processor(folder)
    assert torch.equal(
        processor.image(image).crops, theirs(image, return_tensors="pt")["pixel_values"][0]
    )
    assert torch.allclose(processor.video([image]).frames[0], 2 * processor.image(image).crops[0])


@pytest.mark.parametrize(
    "wrong", [dict(resample="x"), dict(size={"height": 99, "width": 99}), dict(image_mean=["x"])]
)
@pytest.mark.parametrize("name", ["llava_next, Llama", "llava_onevision"])
def test_preprocessing_that_does_not_fit(tmp_path, name, wrong):
    folder = make(tmp_path, **FAMILIES[name])
    (folder / "processor_config.json").unlink(missing_ok=True)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | wrong))
    with pytest.raises(ValueError, match="preprocessor_config.json cannot be followed"):
        load_processor(folder)


# ---- positions ----

REAL = {  # the grids, crop, patch and cap of the real checkpoints
    "llava_next": ([[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], 336, 14, None),
    "llava_onevision": ([[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)], 384, 14, 9),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", REAL)
def test_the_number_of_positions_is_that_of_transformers(kind, order):
    pinpoints, side, patch, cap = REAL[kind]
    # it decides between grids that are equally good, and nothing else
    pinpoints = pinpoints[::order]
    vision = VisionConfig(image_size=side, patch_size=patch, class_token=not cap)
    c = dict(vision_config=vision, image_grid_pinpoints=tuple(map(tuple, pinpoints)))
    strategy = "full" if cap else "default"
    kind = OneVisionConfig if cap else AnyResConfig
    c = kind(**c, vision_feature_select_strategy=strategy)
    g = side // patch
    theirs = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints), num_image_tokens=g * g
    )
    theirs.patch_size, theirs.num_additional_image_tokens = patch, 0
    theirs.vision_aspect_ratio = f"anyres_max_{cap}"
    processor = hf.LlavaOnevisionProcessor if cap else hf.LlavaNextProcessor
    theirs._get_unpadded_features = partial(processor._get_unpadded_features, theirs)
    rng, capped = np.random.default_rng(0), 0
    rounded = (55, 176), (88, 55), (328, 861)  # where a product is 17.999999999999996 or the like
    drawn = rng.integers(20, 3000, (300, 2)).tolist()
    for height, width in [(336, 336), (1, 1), (4000, 3000), *rounded, *drawn]:
        best = select_best_resolution((height, width), pinpoints)
        assert [side * n for n in cut((height, width), c)[0]] == list(best)
        expected = processor._get_number_of_features(theirs, height, width, side, side)
        assert positions(Picture(None, (height, width)), c) == expected, (height, width)
        tiles, padding, size = cut((height, width), c)
        capped += any(n * g - 2 * p != left for n, p, left in zip(tiles, padding, size))
    assert bool(capped) == bool(cap)


@pytest.mark.parametrize("kind", REAL)
def test_parity_at_the_real_grids(tmp_path, kind):
    """Of the real checkpoints all but the widths.

    Crops, patches, grids, cap, 2 x 2 pooling of 27 x 27 patches.
    """
    pinpoints, side, patch, cap = REAL[kind]
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = small | dict(
        num_key_value_heads=1, max_position_embeddings=32768, model_type="qwen2" if cap else "llama"
    )
    vision = small | (SIGLIP if cap else {}) | dict(image_size=side, patch_size=patch)
    folder = make(
        tmp_path,
        family=kind,
        vision=vision,
        text=text,
        image_grid_pinpoints=pinpoints,
        template=CHATML,
    )
    llava, processor = load(folder, "cpu")
    for size in ((1280, 960), (333, 1001)):
        assert_parity(llava, processor, reference_of(folder), processor.image(picture(size)))
    if cap:
        video = processor.video([picture((500, 300), seed) for seed in range(4)])
        assert_parity(llava, processor, reference_of(folder), video)


def packed_by_transformers(llava, reference, pixels, settings):
    """The features of every virtual position.

    Each crop's tokens at all of their positions, then their AnyRes code.
    """
    shown = pixels.frames if isinstance(pixels, Video) else pixels.crops
    visual = (llava.vision_tower(crop, settings) for crop in shown)
    features = torch.stack([x[at] for x, at in visual])
    features = llava.multi_modal_projector(features)
    if isinstance(pixels, Video):
        pooled = reference.model.apply_pooling(features)
        return torch.cat((pooled.flatten(0, 1), llava.image_newline[None]))
    cap, newline = llava.config.anyres_max, llava.image_newline
    if cap is None:
        options = dict(vision_feature_select_strategy="default")
    else:
        options = dict(vision_aspect_ratio=f"anyres_max_{cap}")
    packed, _ = reference.model.pack_image_features(
        [features], [list(pixels.size)], image_newline=newline, **options
    )
    return packed[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "name, shape",
    [
        (n, s)
        for n in ("llava_next, Llama", "llava_onevision")
        for s in ("square", "wide", "tall", "large", "thin")
    ]
    + [("llava_onevision", "video")],
)
def test_merged_positions_are_the_full_models_sequence(checkpoint, name, shape):
    _, llava, processor, reference = checkpoint(name)
    settings = DyMU(thresholds=thresholds_of(llava, processor))
    n = llava.config.vision_config.grid**2
    if shape == "video":
        pixels = processor.video([picture((80, 61), seed) for seed in range(3)])
    else:
        pixels = processor.image(picture(SIZES[shape]))
    ((x, token_at),) = llava.encode(pixels, settings)
    packed = packed_by_transformers(llava, reference, pixels, settings)
    assert len(token_at) == len(packed) == positions(pixels, llava.config)
    assert len(x) < 0.8 * len(packed)
    assert token_at.unique().tolist() == list(range(len(x)))
    newline = (packed == llava.image_newline).all(1).nonzero().flatten()
    assert len(newline) == (1 if shape == "video" else pixels.grids(llava.config)[1][0])
    # one token at all of them, and nowhere else
    assert token_at[newline].tolist() == [len(x) - 1] * len(newline)
    assert not len(newline) or (token_at == len(x) - 1).sum() == len(newline)
    expected = torch.stack([packed[token_at == t].mean(0) for t in range(len(x))])
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    if shape != "video":  # what is not resampled stands there unchanged
        whole = llava.vision_tower(pixels.crops[0], settings)[1]
        assert torch.equal(token_at[:n, None] == token_at[:n], whole[:, None] == whole)
        if shape == "square" or llava.config.anyres_max is None:
            torch.testing.assert_close(x[token_at], packed, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_resample_takes_the_tokens_of_the_nearest_positions():
    torch.manual_seed(0)
    for (h, w), size in (((7, 7), (4, 4)), ((9, 12), (5, 7)), ((6, 6), (3, 3))):
        x, grid = torch.randn(10, 3), torch.randint(10, (h, w))
        y, at = resample(x, grid, size)
        rows = [int((i + 0.5) * h / size[0]) for i in range(size[0])]
        columns = [int((j + 0.5) * w / size[1]) for j in range(size[1])]
        nearest = torch.tensor([[grid[i, j] for j in columns] for i in rows])
        found, wanted = at.flatten(), nearest.flatten()
        assert torch.equal(found[:, None] == found, wanted[:, None] == wanted)
        assert len(y) == len(nearest.unique()) and at.shape == size


def test_a_number_of_crops_that_is_not_the_pictures_is_refused(anyres):
    _, llava, processor, _ = anyres
    crops, size = processor.image(picture((150, 47)))
    with pytest.raises(ValueError, match=r"crops of a picture of \(47, 150\) \(h, w\), wanted"):
        llava.encode(Picture(crops[:-1], size))
    with pytest.raises(
        ValueError, match="pixels are a Tensor, not what this model's processor makes"
    ):
        llava.encode(crops[0])


def test_what_is_made_for_another_family_is_refused(checkpoint, llava, ids):
    pictures = {name: checkpoint(name)[2].image(picture()) for name in FAMILIES}
    video = checkpoint("llava_onevision")[2].video([picture()] * 2)
    for model, shown in (
        (llava, pictures["llava_next, Llama"]),
        (llava, video),
        (checkpoint("llava_next, Llama")[1], video),
    ):
        with pytest.raises(ValueError, match=r"pixels are a \w+, not what this model's processor"):
            model.encode(shown)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize(
    "wrong", [[], "many", [56, 112], [[56]], [[56, 100]], [[56, 0]], [["56", "56"]], [[56, 112.0]]]
)
def test_grids_that_are_missing_or_wrong(tmp_path, family, wrong):
    vision = dict(
        model_type="siglip_vision_model" if family == "llava_onevision" else "clip_vision_model",
        image_size=56,
    )
    config = dict(model_type=family, vision_config=vision, image_grid_pinpoints=wrong)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: .*image_grid_pinpoints"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "name, config, message",
    [
        (
            "llava_onevision",
            dict(vision_aspect_ratio="pad"),
            "vision_aspect_ratio 'pad' is not implemented",
        ),
        (
            "llava_onevision",
            dict(vision_feature_select_strategy="default"),
            "'default' is not implemented, only 'full'",
        ),
        (
            "llava_next, Llama",
            dict(vision_feature_select_strategy="full"),
            "'full' is not implemented, only 'default'",
        ),
        (
            "llava_onevision",
            dict(video_token_index=258),
            "the id of <video> is 260, config.json says 258",
        ),
        (
            "llava_onevision",
            dict(image_grid_pinpoints=GRIDS),
            "image_grid_pinpoints are not those of config.json",
        ),
    ],
)
def test_other_settings_that_do_not_fit(tmp_path, name, config, message):
    folder = make(tmp_path, **FAMILIES[name])
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ValueError, match=message):
        load_processor(folder)
