"""Every architecture beside LLaVA-1.5's, against transformers; AnyRes, several pictures, video, temporal merging."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from checkpoints import CHATML, CLASSES, MISTRAL, make
from PIL import Image
from safetensors.torch import load_file
from test_model import decoder_by_expansion, encoder_by_sets, rename
from transformers import AutoProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from anyres import Picture, Video, as_list, cut, grids, positions, resample
from config import LlavaConfig, VisionConfig, read_config
from dymu import DyMU, find_thresholds
from load import Processor, load

QUESTION = "What is in the picture?"
SIGLIP = dict(model_type="siglip_vision_model")
GRIDS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]  # (height, width): LLaVA-NeXT's at a sixth
MANY = [[56 * h, 56 * w] for h in range(1, 5) for w in range(1, 5)]
FAMILIES = {
    "llava, SigLIP, Llama": dict(vision=SIGLIP, vision_feature_select_strategy="full"),
    "llava, CLIP, Qwen2": dict(text=dict(model_type="qwen2")),
    "llava, SigLIP, Qwen2": dict(  # as llava-interleave-qwen
        vision=SIGLIP,
        text=dict(model_type="qwen2", tie_word_embeddings=True),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        template=CHATML,
    ),
    "llava_next, Llama": dict(family="llava_next", image_grid_pinpoints=GRIDS),
    "llava_next, Mistral": dict(
        family="llava_next",
        text=dict(model_type="mistral", sliding_window=None),
        image_grid_pinpoints=GRIDS,
        template=MISTRAL,
    ),
    "llava_onevision": dict(
        family="llava_onevision",
        vision=SIGLIP,
        text=dict(model_type="qwen2"),
        image_grid_pinpoints=MANY,
        vision_aspect_ratio="anyres_max_4",
        template=CHATML,
    ),
}
SIZES = dict(
    square=(80, 80), wide=(150, 47), tall=(61, 173), one_tile=(56, 56), large=(301, 283), thin=(400, 7), dot=(1, 1)
)


def picture(size=(80, 80), seed=3):
    """Coarse noise: plain and busy parts."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size[1] // 9 + 1, size[0] // 9 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder, model and processor of a family, and transformers' model; each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = make(tmp_path_factory.mktemp("family"), **FAMILIES[name])
            made[name] = folder, *load(folder, "cpu"), reference_of(folder)
        return made[name]

    return get


@pytest.fixture(params=FAMILIES)
def family(request, checkpoint):
    return checkpoint(request.param)


@pytest.fixture(params=["llava_next, Llama", "llava_onevision"])
def anyres(request, checkpoint):
    return checkpoint(request.param)


def reference_of(folder):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return CLASSES[kind][1].from_pretrained(folder, dtype=torch.float32).eval()


def expand(llava, ids, pixels):
    """The prompt as transformers wants it: as many placeholders as there are visual tokens, newlines included."""
    counts = iter([positions(one, llava.config) for one in as_list(pixels)])
    return torch.tensor(
        [[i for i in ids.tolist() for _ in range(next(counts) if i in llava.config.placeholders else 1)]]
    )


def their_inputs(pixels):
    """What transformers' models take, from what our processor made: other tests hold that equal to theirs."""
    shown = as_list(pixels)
    if isinstance(shown[0], Video):
        return dict(pixel_values_videos=shown[0].frames[None])
    if not isinstance(shown[0], Picture):
        return dict(pixel_values=torch.stack(shown))
    crops = torch.nn.utils.rnn.pad_sequence([one.crops for one in shown], batch_first=True)
    sizes = torch.tensor([one.size or (9, 9) for one in shown])
    whole = dict(batch_num_images=torch.tensor([len(shown)])) if shown[0].size is None else {}
    return dict(pixel_values=crops, image_sizes=sizes, **whole)


def assert_parity(llava, processor, reference, pixels):
    """Full mode: logits to 1e-5 relative and 8 greedy ids."""
    ids = processor.prompt(QUESTION, pixels)
    inputs = dict(input_ids=expand(llava, ids, pixels), **their_inputs(pixels))
    with torch.no_grad():
        expected, logits = reference(**inputs).logits[0], llava(ids, pixels)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    answer = reference.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert list(llava.generate(ids, pixels, max_new_tokens=8)) == answer.tolist()


# ---- full mode equals transformers ----


@pytest.mark.parametrize("shape", SIZES)
def test_parity_picture(family, shape):
    _, llava, processor, reference = family
    assert_parity(llava, processor, reference, processor.image(picture(SIZES[shape])))


def test_parity_two_pictures(family):
    _, llava, processor, reference = family
    assert_parity(llava, processor, reference, processor.image([picture((80, 61)), picture((40, 120), seed=4)]))


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if "llava_next" not in name]
)  # transformers has no such mode
def test_parity_video(checkpoint, name):
    _, llava, processor, reference = checkpoint(name)
    assert_parity(llava, processor, reference, processor.video([picture((80, 61), seed) for seed in range(3)]))


def test_a_frame_of_llava_next_is_a_picture_without_tiles(checkpoint):
    _, llava, processor, reference = checkpoint("llava_next, Llama")
    frames = [picture((80, 61), seed) for seed in range(3)]
    pixels = processor.video(frames)
    visual = llava.encode(pixels)
    for frame, one, (x, at) in zip(frames, pixels, visual):
        assert torch.equal(one.crops[0], processor.image(frame).crops[0])
        with torch.no_grad():
            features = reference.model.vision_tower(one.crops, output_hidden_states=True).hidden_states[-2][:, 1:]
            packed = reference.model.pack_image_features(
                [reference.model.multi_modal_projector(features)], None, "default", reference.model.image_newline
            )[0][0]
        torch.testing.assert_close(torch.cat([x for x, _ in visual])[at], packed)


@pytest.mark.parametrize("layout", ["2023", "2025"])
@pytest.mark.parametrize("name", FAMILIES)
def test_parity_key_layouts(tmp_path, checkpoint, name, layout):
    renamed = make(tmp_path, **FAMILIES[name])
    before = set(load_file(renamed / "model.safetensors"))
    assert rename(renamed, layout).keys() != before
    llava, processor = load(renamed, "cpu")
    assert_parity(llava, processor, checkpoint(name)[3], processor.image(picture((90, 61))))


def test_the_vision_tower_is_read_before_its_final_norm(checkpoint):
    """Some releases of transformers 4 put SigLIP's post_layernorm on the last layer that is counted."""
    _, llava, processor, reference = checkpoint("llava, SigLIP, Qwen2")
    pixels = processor.image(picture())
    with torch.no_grad():
        found = reference.model.vision_tower(pixels[None], output_hidden_states=True)
    x = llava.vision_tower(pixels)[0]
    torch.testing.assert_close(x, found.hidden_states[-1][0], rtol=1e-5, atol=1e-5)
    assert (x - found.last_hidden_state[0]).abs().max() > 0.1


# ---- pixels and prompts ----


@pytest.mark.parametrize("shape", SIZES)
def test_crops_equal_transformers(anyres, shape):
    folder, llava, processor, _ = anyres
    image, side = picture(SIZES[shape]), llava.config.vision_config.image_size
    grids, square = [list(grid) for grid in llava.config.image_grid_pinpoints], {"height": side, "width": side}
    if llava.config.video_token_index is None:
        theirs = LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=grids)
    else:
        theirs = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=grids)
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
    theirs = dict(size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.4] * 3, resample=2)
    theirs = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=[list(grid) for grid in MANY], **theirs)
    theirs.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(dict(image_std=[0.2] * 3)))
    image, processor = picture((90, 61)), Processor(folder)
    assert torch.equal(processor.image(image).crops, theirs(image, return_tensors="pt")["pixel_values"][0])
    assert torch.allclose(processor.video([image]).frames[0], 2 * processor.image(image).crops[0])


@pytest.mark.parametrize("name", ["llava, SigLIP, Qwen2", "llava_next, Llama", "llava_next, Mistral"])
def test_ids_equal_transformers(checkpoint, name):
    folder, llava, processor, _ = checkpoint(name)
    theirs, images = AutoProcessor.from_pretrained(folder, backend="pil"), [picture((90, 61)), picture((50, 120))]
    for shown in (images[:1], images):
        content = [{"type": "image"}] * len(shown) + [{"type": "text", "text": QUESTION}]
        text = theirs.apply_chat_template([dict(role="user", content=content)], add_generation_prompt=True)
        expected = theirs(images=shown, text=text, return_tensors="pt")
        pixels = processor.image(shown)
        assert expand(llava, processor.prompt(QUESTION, pixels), pixels).tolist() == expected["input_ids"].tolist()
        assert processor.prompt(QUESTION, len(shown)).tolist() == processor.prompt(QUESTION, pixels).tolist()


def test_a_video_has_one_placeholder_where_there_is_one(checkpoint):
    _, llava, processor, _ = checkpoint("llava_onevision")
    frames = [picture(seed=seed) for seed in range(2)]
    ids = processor.prompt(QUESTION, [processor.video(frames), processor.image(frames[0])]).tolist()
    assert [i for i in ids if i in llava.config.placeholders] == [260, 259]
    assert processor.decode(ids) == f"<|im_start|>user \n{QUESTION}<|im_end|><|im_start|>assistant\n"
    with pytest.raises(ValueError, match="must not hold"):
        processor.prompt("what is <video>?")


def test_placeholders_are_filled_with_their_own_kind(checkpoint):
    _, llava, processor, _ = checkpoint("llava_onevision")
    shown = [processor.video(clip()), processor.image([picture(), picture()])[0]]
    assert llava(processor.prompt("Q", shown), shown).isfinite().all()
    for wrong in (
        lambda: llava(processor.prompt("Q", shown), shown[::-1]),
        lambda: llava(processor.prompt("Q"), shown[0]),
    ):
        with pytest.raises(ValueError, match=r"the placeholders in the prompt are \[.*\], those of the pictures"):
            wrong()


def test_no_pictures_at_all(family):
    _, llava, processor, _ = family
    ids = processor.prompt(QUESTION, processor.image([]))
    assert torch.equal(llava(ids, []), llava(ids))
    with pytest.raises(ValueError, match="1 image placeholders in the prompt, 0 pictures given"):
        llava(processor.prompt(QUESTION), [])


@pytest.mark.parametrize("wrong", [dict(resample="x"), dict(size={"height": 99, "width": 99}), dict(image_mean=["x"])])
@pytest.mark.parametrize("name", ["llava_next, Llama", "llava_onevision"])
def test_preprocessing_that_does_not_fit(tmp_path, name, wrong):
    folder = make(tmp_path, **FAMILIES[name])
    (folder / "processor_config.json").unlink(missing_ok=True)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | wrong))
    with pytest.raises(ValueError, match="preprocessor_config.json cannot be followed"):
        Processor(folder)


# ---- AnyRes ----

REAL = {  # the grids, crop, patch and cap of the real checkpoints
    "llava_next": ([[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], 336, 14, None),
    "llava_onevision": ([[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)], 384, 14, 9),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", REAL)
def test_the_number_of_positions_is_that_of_transformers(kind, order):
    pinpoints, side, patch, cap = REAL[kind]
    pinpoints = pinpoints[::order]  # it decides between grids that are equally good, and nothing else
    vision = VisionConfig(image_size=side, patch_size=patch, class_token=not cap)
    c = LlavaConfig(vision_config=vision, image_grid_pinpoints=tuple(map(tuple, pinpoints)), anyres_max=cap)
    g = side // patch
    theirs = SimpleNamespace(image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints), num_image_tokens=g * g)
    theirs.patch_size, theirs.num_additional_image_tokens, theirs.vision_aspect_ratio = patch, 0, f"anyres_max_{cap}"
    processor = hf.LlavaOnevisionProcessor if cap else hf.LlavaNextProcessor
    theirs._get_unpadded_features = partial(processor._get_unpadded_features, theirs)
    rng, capped = np.random.default_rng(0), 0
    rounded = (55, 176), (88, 55), (328, 861)  # where a product is 17.999999999999996 or the like
    for height, width in [(336, 336), (1, 1), (4000, 3000), *rounded, *rng.integers(20, 3000, (300, 2)).tolist()]:
        assert [side * n for n in cut((height, width), c)[0]] == list(
            select_best_resolution((height, width), pinpoints)
        )
        expected = processor._get_number_of_features(theirs, height, width, side, side)
        assert positions(Picture(None, (height, width)), c) == expected, (height, width)
        tiles, padding, size = cut((height, width), c)
        capped += any(n * g - 2 * p != left for n, p, left in zip(tiles, padding, size))
    assert bool(capped) == bool(cap)


@pytest.mark.parametrize("kind", REAL)
def test_parity_at_the_real_grids(tmp_path, kind):
    """Of the real checkpoints all but the widths: crops, patches, grids, cap, 2 x 2 pooling of 27 x 27 patches."""
    pinpoints, side, patch, cap = REAL[kind]
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = small | dict(num_key_value_heads=1, max_position_embeddings=32768, model_type="qwen2" if cap else "llama")
    vision = small | (SIGLIP if cap else {}) | dict(image_size=side, patch_size=patch)
    folder = make(tmp_path, family=kind, vision=vision, text=text, image_grid_pinpoints=pinpoints, template=CHATML)
    llava, processor = load(folder, "cpu")
    for size in ((1280, 960), (333, 1001)):
        assert_parity(llava, processor, reference_of(folder), processor.image(picture(size)))
    if cap:
        video = processor.video([picture((500, 300), seed) for seed in range(4)])
        assert_parity(llava, processor, reference_of(folder), video)


def packed_by_transformers(llava, reference, pixels, settings):
    """The features of every virtual position: each crop's tokens at all of their positions, then their AnyRes code."""
    shown = pixels.frames if isinstance(pixels, Video) else pixels.crops
    features = torch.stack([x[at] for x, at in (llava.vision_tower(crop, settings) for crop in shown)])
    features = llava.multi_modal_projector(features)
    if isinstance(pixels, Video):
        pooled = reference.model.apply_pooling(features)
        return torch.cat((pooled.flatten(0, 1), llava.image_newline[None]))
    cap, newline = llava.config.anyres_max, llava.image_newline
    options = (
        dict(vision_feature_select_strategy="default") if cap is None else dict(vision_aspect_ratio=f"anyres_max_{cap}")
    )
    return reference.model.pack_image_features([features], [list(pixels.size)], image_newline=newline, **options)[0][0]


def thresholds_of(llava, processor, share=0.2):
    """What merges about that share of a crop's tokens in each layer, and another number in each crop."""
    crops = [crop for seed in range(3) for crop in as_crops(processor.image(picture((120, 90), seed)))]
    n = int(share * llava.config.visual_tokens)
    return find_thresholds(llava.vision_tower, crops, (n,) * llava.config.vision_layers, len(crops))


def as_crops(pixels):
    return pixels.crops if isinstance(pixels, Picture) else [pixels]


@torch.no_grad()
@pytest.mark.parametrize(
    "name, shape",
    [(n, s) for n in ("llava_next, Llama", "llava_onevision") for s in ("square", "wide", "tall", "large", "thin")]
    + [("llava_onevision", "video")],
)
def test_merged_positions_are_the_full_models_sequence(checkpoint, name, shape):
    _, llava, processor, reference = checkpoint(name)
    settings, n = DyMU(thresholds=thresholds_of(llava, processor)), llava.config.vision_config.grid**2
    if shape == "video":
        pixels = processor.video([picture((80, 61), seed) for seed in range(3)])
    else:
        pixels = processor.image(picture(SIZES[shape]))
    ((x, token_at),) = llava.encode(pixels, settings)
    packed = packed_by_transformers(llava, reference, pixels, settings)
    assert len(token_at) == len(packed) == positions(pixels, llava.config) and len(x) < 0.8 * len(packed)
    assert token_at.unique().tolist() == list(range(len(x)))
    newline = (packed == llava.image_newline).all(1).nonzero().flatten()
    assert len(newline) == (1 if shape == "video" else grids(pixels, llava.config)[1][0])
    assert token_at[newline].tolist() == [len(x) - 1] * len(newline)  # one token at all of them, and nowhere else
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
        nearest = [
            [grid[int((i + 0.5) * h / size[0]), int((j + 0.5) * w / size[1])] for j in range(size[1])]
            for i in range(size[0])
        ]
        nearest = torch.tensor(nearest)
        assert torch.equal(at.flatten()[:, None] == at.flatten(), nearest.flatten()[:, None] == nearest.flatten())
        assert len(y) == len(nearest.unique()) and at.shape == size


def test_a_number_of_crops_that_is_not_the_pictures_is_refused(anyres):
    _, llava, processor, _ = anyres
    crops, size = processor.image(picture((150, 47)))
    with pytest.raises(ValueError, match=r"crops of a picture of \(47, 150\) \(h, w\), wanted"):
        llava.encode(Picture(crops[:-1], size))
    with pytest.raises(ValueError, match="pixels are a Tensor, not what this model's processor makes"):
        llava.encode(crops[0])


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize(
    "wrong", [[], "many", [56, 112], [[56]], [[56, 100]], [[56, 0]], [["56", "56"]], [[56, 112.0]]]
)
def test_grids_that_are_missing_or_wrong(tmp_path, family, wrong):
    vision = dict(
        model_type="siglip_vision_model" if family == "llava_onevision" else "clip_vision_model", image_size=56
    )
    config = dict(model_type=family, vision_config=vision, image_grid_pinpoints=wrong)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"image_grid_pinpoints is .*, wanted a list of \[height, width\] in multiples"
    ):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("llava_onevision", dict(vision_aspect_ratio="pad"), "vision_aspect_ratio 'pad' is not implemented"),
        (
            "llava_onevision",
            dict(vision_feature_select_strategy="default"),
            "'default' is not implemented, only 'full'",
        ),
        ("llava_next, Llama", dict(vision_feature_select_strategy="full"), "'full' is not implemented, only 'default'"),
        ("llava_onevision", dict(video_token_index=258), "the id of <video> is 260, config.json says 258"),
        ("llava_onevision", dict(image_grid_pinpoints=GRIDS), "image_grid_pinpoints are not those of config.json"),
    ],
)
def test_other_settings_that_do_not_fit(tmp_path, name, config, message):
    folder = make(tmp_path, **FAMILIES[name])
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ValueError, match=message):
        Processor(folder)


def test_prompts_end_where_a_sliding_window_would_matter(tmp_path):
    for text, limit in (
        (dict(model_type="mistral"), 4096),
        (dict(model_type="mistral", sliding_window=None), 131072),
        (dict(model_type="mistral", sliding_window=99), 99),
        (dict(model_type="qwen2", sliding_window=99), 32768),
        (dict(model_type="qwen2", sliding_window=99, use_sliding_window=True), 99),
    ):
        (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llava", text_config=text)))
        assert read_config(tmp_path).text_config.max_position_embeddings == limit


# ---- merging without a class token ----


def test_eq1_to_eq5_encoder_without_a_class_token_equals_token_by_token(checkpoint):
    _, llava, processor, reference = checkpoint("llava, SigLIP, Qwen2")
    crops = [processor.image(picture(seed=seed)) for seed in range(4)]
    for budget in ((4, 4, 4, 4), (20, 10, 5, 2)):
        thresholds = tuple(tau + 1e-4 for tau in find_thresholds(llava.vision_tower, crops, budget, 4))
        for pixels in crops:
            x, token_at = llava.vision_tower(pixels, DyMU(thresholds=thresholds))
            expected, sets = encoder_by_sets(reference.model.vision_tower, pixels, thresholds)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
            assert [set((token_at == t).nonzero().flatten().tolist()) for t in range(len(x))] == sets


def test_all_tokens_may_merge_into_one(tmp_path):
    llava, processor = load(
        make(tmp_path, **FAMILIES["llava, SigLIP, Qwen2"] | dict(vision=SIGLIP | dict(image_size=24)))
    )
    pixels, ids = processor.image(picture()), processor.prompt(QUESTION)
    for settings in (DyMU(thresholds=(-1.0,) * 4), DyMU(r=(9,) * 4)):
        x, token_at = llava.vision_tower(pixels, settings)  # 9, 4, 2, 1, 1
        assert len(x) == 1 and token_at.tolist() == [0] * 9
        assert llava(ids, pixels, settings).isfinite().all()
    assert len(find_thresholds(llava.vision_tower, [pixels], (9,) * 4, 1)) == 4


# ---- merged mode equals expanding everything ----


@torch.no_grad()
@pytest.mark.parametrize("shown", ["a picture", "two pictures", "a video"])
@pytest.mark.parametrize("queries", [None, 1])
def test_eq10_eq11_merged_logits_equal_expand_rotate_attend_average(family, shown, queries):
    _, llava, processor, _ = family
    settings = DyMU(thresholds=thresholds_of(llava, processor), queries=queries)
    images = [picture((80, 61)), picture((40, 120), seed=4)]
    pixels = dict(zip(("a picture", "two pictures", "a video"), (images[0], images, None)))[shown]
    pixels = processor.video(images) if pixels is None else processor.image(pixels)
    ids, visual = processor.prompt(QUESTION, pixels), llava.encode(pixels, settings)
    rows, token_at = llava.splice(ids, visual)
    text = len(ids) - len(as_list(pixels))
    assert len(token_at) == text + positions(pixels, llava.config) and len(rows) == text + sum(
        len(x) for x, _ in visual
    )
    assert len(rows) < len(token_at)
    expected = decoder_by_expansion(llava, rows, token_at, queries)
    torch.testing.assert_close(llava(ids, pixels, settings), expected, rtol=1e-4, atol=1e-4)


def test_each_picture_has_its_own_map_in_order(family):
    _, llava, processor, _ = family
    images = [picture((80, 61)), picture((40, 120), seed=4)]
    settings, pixels = DyMU(thresholds=thresholds_of(llava, processor)), processor.image(images)
    ids, visual = processor.prompt(QUESTION, pixels), llava.encode(pixels, settings)
    alone = [llava.encode(one, settings)[0] for one in pixels]
    rows, token_at = llava.splice(ids, visual)
    parts, embed = [], llava.language_model.embed_tokens
    shown = iter(alone)
    for i in ids:
        x, at = next(shown) if int(i) in llava.config.placeholders else (embed(i)[None], [0])
        parts.append(x[at])
    torch.testing.assert_close(rows[token_at], torch.cat(parts))
    assert llava.splice(ids, visual, vtu=False)[1].tolist() == list(range(len(rows)))


# ---- temporal merging ----


def clip(frames=3):
    """A still background of coarse noise, on which a white square moves."""
    out = []
    for i in range(frames):
        out.append(picture((84, 84)))
        out[-1].paste((255, 255, 255), (28 * i, 28, 28 * i + 14, 42))
    return out


@torch.no_grad()
def test_a_still_scene_costs_one_frame(family):
    _, llava, processor, _ = family
    for settings in (DyMU(temporal=0.999), DyMU(thresholds=thresholds_of(llava, processor), temporal=0.999)):
        frame = picture((84, 84))
        one, three = (llava.encode(processor.video([frame] * n), settings) for n in (1, 3))
        assert sum(len(x) for x, _ in three) == sum(len(x) for x, _ in one)
        once = positions(processor.video([frame]), llava.config)
        assert sum(len(at) for _, at in three) == positions(processor.video([frame] * 3), llava.config) >= 3 * once - 2
        torch.testing.assert_close(three[0][0][: len(one[0][0])], one[0][0][: len(three[0][0])], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_moves_stays_and_positions_keep_their_order(family):
    _, llava, processor, _ = family
    pixels = processor.video(clip())
    full, joined = (llava.encode(pixels, DyMU(temporal=tau)) for tau in (None, 0.99))
    (rows, at), (few, joined_at) = ((torch.cat(part) for part in zip(*visual)) for visual in (full, joined))
    assert len(at) == len(joined_at) == positions(pixels, llava.config)
    assert joined_at.bincount(minlength=len(few)).min() >= 1 and joined_at.bincount().sum() == len(at)
    assert len(rows) / 3 < len(few) < len(rows)
    # every position holds an average of rows that were alike, and those that joined nothing hold what they held
    cosine = torch.nn.functional.cosine_similarity(rows[at], few[joined_at])
    assert cosine.min() > 0.97
    alone = joined_at.bincount()[joined_at] == at.bincount()[at]
    torch.testing.assert_close(few[joined_at][alone], rows[at][alone])
    assert 0 < alone.sum() < len(alone)


@torch.no_grad()
def test_temporal_joins_two_pictures_and_its_logits_equal_expansion(family):
    _, llava, processor, _ = family
    for shown in (processor.image(clip(2)), processor.video(clip(2))):
        ids, settings = processor.prompt(QUESTION, shown), DyMU(temporal=0.9)
        rows, token_at = llava.splice(ids, llava.encode(shown, settings))
        assert len(rows) < len(token_at)
        logits = llava(ids, shown, settings)
        torch.testing.assert_close(logits, decoder_by_expansion(llava, rows, token_at, None), rtol=1e-4, atol=1e-4)
        assert len(list(llava.generate(ids, shown, settings, max_new_tokens=3, eos=()))) == 3


@torch.no_grad()
def test_an_unreachable_temporal_threshold_changes_nothing(family):
    _, llava, processor, _ = family
    pixels = processor.video(clip())
    ids = processor.prompt(QUESTION, pixels)
    assert torch.equal(llava(ids, pixels, DyMU(temporal=1.0)), llava(ids, pixels))


# ---- half precision ----


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_stays_near(family, dtype):
    folder, whole, processor, _ = family
    half = load(folder, "cpu", dtype)[0]
    settings = DyMU(thresholds=thresholds_of(whole, processor), temporal=0.9)
    for pixels in (processor.image(picture(SIZES["large"])), processor.video(clip())):
        ids = processor.prompt(QUESTION, pixels)
        full, expected = half(ids, pixels), whole(ids, pixels)
        assert full.dtype == getattr(torch, dtype)
        assert torch.corrcoef(torch.stack((full.float().flatten(), expected.flatten())))[0, 1] > 0.999
        assert half(ids, pixels, settings).isfinite().all()
        assert len(list(half.generate(ids, pixels, settings, max_new_tokens=3, eos=()))) == 3
