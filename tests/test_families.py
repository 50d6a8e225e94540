"""Every architecture beside LLaVA-1.5's, against transformers."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import FAMILIES, QUESTION, SIGLIP, SIZES, clip, make, picture
from safetensors.torch import load_file
from test_model import decoder_by_expansion, encoder_by_sets, rename
from transformers import AutoProcessor

from dymu import DyMU
from extras.anyres import Picture, positions
from extras.families import read_config
from extras.sampled import spread
from extras.second_stage import second_stage
from extras.thresholds import find_thresholds
from extras.video import Video
from load import load
from model import KVCache, as_list


def expand(llava, ids, pixels):
    """The prompt as transformers wants it.

    It has as many placeholders as there are visual tokens, newlines included.
    """
    counts = iter([positions(one, llava.config) for one in as_list(pixels)])
    expanded = []
    for i in ids.tolist():
        expanded += [i] * (next(counts) if i in llava.config.placeholders else 1)
    return torch.tensor([expanded])


def their_inputs(pixels):
    """What transformers' models take, from what our processor made.

    Other tests hold that equal to theirs.
    """
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
    answer = reference.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    answer = answer[inputs["input_ids"].shape[1] :]
    assert list(llava.generate(ids, pixels, max_new_tokens=8)) == answer.tolist()


def thresholds_of(llava, processor, share=0.2):
    """What merges about that share of a crop's tokens in each layer.

    It is another number in each crop.
    """
    shown = [processor.image(picture((120, 90), seed)) for seed in range(3)]
    crops = [crop for pixels in shown for crop in as_crops(pixels)]
    n = int(share * llava.config.visual_tokens)
    return find_thresholds(llava.vision_tower, crops, (n,) * llava.config.vision_layers, len(crops))


def as_crops(pixels):
    return pixels.crops if isinstance(pixels, Picture) else [pixels]


# ---- full mode equals transformers ----


@pytest.mark.parametrize("shape", SIZES)
def test_parity_picture(family, shape):
    _, llava, processor, reference = family
    assert_parity(llava, processor, reference, processor.image(picture(SIZES[shape])))


def test_parity_two_pictures(family):
    _, llava, processor, reference = family
    pixels = processor.image([picture((80, 61)), picture((40, 120), seed=4)])
    assert_parity(llava, processor, reference, pixels)


# transformers has no such mode of LLaVA-NeXT
@pytest.mark.parametrize("name", [name for name in FAMILIES if "llava_next" not in name])
def test_parity_video(checkpoint, name):
    _, llava, processor, reference = checkpoint(name)
    pixels = processor.video([picture((80, 61), seed) for seed in range(3)])
    assert_parity(llava, processor, reference, pixels)


def test_a_frame_of_llava_next_is_a_picture_without_tiles(checkpoint):
    _, llava, processor, reference = checkpoint("llava_next, Llama")
    frames = [picture((80, 61), seed) for seed in range(3)]
    pixels = processor.video(frames)
    visual = llava.encode(pixels)
    for frame, one, (x, at) in zip(frames, pixels, visual):
        assert torch.equal(one.crops[0], processor.image(frame).crops[0])
        theirs = reference.model
        with torch.no_grad():
            hidden = theirs.vision_tower(one.crops, output_hidden_states=True).hidden_states
            features = [theirs.multi_modal_projector(hidden[-2][:, 1:])]
            packed = theirs.pack_image_features(features, None, "default", theirs.image_newline)
        torch.testing.assert_close(x[at], packed[0][0])


@pytest.mark.parametrize("layout", ["2023", "2025"])
@pytest.mark.parametrize("name", FAMILIES)
def test_parity_key_layouts(tmp_path, checkpoint, name, layout):
    renamed = make(tmp_path, **FAMILIES[name])
    before = set(load_file(renamed / "model.safetensors"))
    assert rename(renamed, layout).keys() != before
    llava, processor = load(renamed, "cpu")
    assert_parity(llava, processor, checkpoint(name)[3], processor.image(picture((90, 61))))


def test_the_vision_tower_is_read_before_its_final_norm(checkpoint):
    """It is not so in some releases of transformers 4.

    They put SigLIP's post_layernorm on the last layer that is counted.
    """
    _, llava, processor, reference = checkpoint("llava, SigLIP, Qwen2")
    pixels = processor.image(picture())
    with torch.no_grad():
        found = reference.model.vision_tower(pixels[None], output_hidden_states=True)
    x = llava.vision_tower(pixels)[0]
    torch.testing.assert_close(x, found.hidden_states[-1][0], rtol=1e-5, atol=1e-5)
    assert (x - found.last_hidden_state[0]).abs().max() > 0.1


# ---- pixels and prompts ----


@pytest.mark.parametrize(
    "name", ["llava, SigLIP, Qwen2", "llava_next, Llama", "llava_next, Mistral"]
)
def test_ids_equal_transformers(checkpoint, name):
    folder, llava, processor, _ = checkpoint(name)
    theirs = AutoProcessor.from_pretrained(folder, backend="pil")
    images = [picture((90, 61)), picture((50, 120))]
    for shown in (images[:1], images):
        content = [{"type": "image"}] * len(shown) + [{"type": "text", "text": QUESTION}]
        text = theirs.apply_chat_template(
            [dict(role="user", content=content)], add_generation_prompt=True
        )
        expected = theirs(images=shown, text=text, return_tensors="pt")
        pixels = processor.image(shown)
        ids = processor.prompt(QUESTION, pixels)
        assert expand(llava, ids, pixels).tolist() == expected["input_ids"].tolist()
        assert processor.prompt(QUESTION, len(shown)).tolist() == ids.tolist()


def test_a_video_has_one_placeholder_where_there_is_one(checkpoint):
    _, llava, processor, _ = checkpoint("llava_onevision")
    frames = [picture(seed=seed) for seed in range(2)]
    ids = processor.prompt(QUESTION, [processor.video(frames), processor.image(frames[0])]).tolist()
    assert [i for i in ids if i in llava.config.placeholders] == [260, 259]
    said = f"<|im_start|>user \n{QUESTION}<|im_end|><|im_start|>assistant\n"
    assert processor.decode(ids) == said
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
        with pytest.raises(
            ValueError, match=r"the placeholders in the prompt are \[.*\], those of the pictures"
        ):
            wrong()


def test_no_pictures_at_all(family):
    _, llava, processor, _ = family
    ids = processor.prompt(QUESTION, processor.image([]))
    assert torch.equal(llava(ids, []), llava(ids))
    with pytest.raises(ValueError, match="1 image placeholders in the prompt, 0 pictures given"):
        llava(processor.prompt(QUESTION), [])


def test_prompts_end_where_a_sliding_window_would_matter(tmp_path):
    for text, limit in (
        (dict(model_type="mistral"), 4096),
        (dict(model_type="mistral", sliding_window=None), 131072),
        (dict(model_type="mistral", sliding_window=99), 99),
        (dict(model_type="qwen2", sliding_window=99), 32768),
        (dict(model_type="qwen2", sliding_window=99, use_sliding_window=True), 99),
    ):
        config = dict(model_type="llava", text_config=text)
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_config(tmp_path).text_config.max_position_embeddings == limit


# ---- merging without a class token ----


def test_eq1_to_eq5_encoder_without_a_class_token_equals_token_by_token(checkpoint):
    _, llava, processor, reference = checkpoint("llava, SigLIP, Qwen2")
    crops = [processor.image(picture(seed=seed)) for seed in range(4)]
    for budget in ((4, 4, 4, 4), (20, 10, 5, 2)):
        thresholds = tuple(
            tau + 1e-4 for tau in find_thresholds(llava.vision_tower, crops, budget, 4)
        )
        for pixels in crops:
            x, token_at = llava.vision_tower(pixels, DyMU(thresholds=thresholds))
            expected, sets = encoder_by_sets(reference.model.vision_tower, pixels, thresholds)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
            found = [set((token_at == t).nonzero().flatten().tolist()) for t in range(len(x))]
            assert found == sets


def test_all_tokens_may_merge_into_one(tmp_path):
    small = FAMILIES["llava, SigLIP, Qwen2"] | dict(vision=SIGLIP | dict(image_size=24))
    llava, processor = load(make(tmp_path, **small))
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
    settings = DyMU(thresholds=thresholds_of(llava, processor), queries=queries and spread(queries))
    images = [picture((80, 61)), picture((40, 120), seed=4)]
    pixels = dict(zip(("a picture", "two pictures", "a video"), (images[0], images, None)))[shown]
    pixels = processor.video(images) if pixels is None else processor.image(pixels)
    ids, visual = processor.prompt(QUESTION, pixels), llava.encode(pixels, settings)
    rows, token_at = llava.splice(ids, visual)
    text = len(ids) - len(as_list(pixels))
    assert len(token_at) == text + positions(pixels, llava.config)
    assert len(rows) == text + sum(len(x) for x, _ in visual)
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


# ---- half precision ----


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_stays_near(family, dtype):
    folder, whole, processor, _ = family
    half = load(folder, "cpu", dtype)[0]
    settings = DyMU(thresholds=thresholds_of(whole, processor))
    for pixels in (processor.image(picture(SIZES["large"])), processor.video(clip())):
        ids = processor.prompt(QUESTION, pixels)
        full, expected = half(ids, pixels), whole(ids, pixels)
        assert full.dtype == getattr(torch, dtype)
        both = torch.stack((full.float().flatten(), expected.flatten()))
        assert torch.corrcoef(both)[0, 1] > 0.999
        assert half(ids, pixels, settings).isfinite().all()
        after = replace(settings, after=second_stage(0.9))
        rows, token_at = half.splice(ids, half.encode(pixels, after))
        answer = half.decode(rows, token_at, KVCache(), max_new_tokens=3, eos=())
        assert len(list(answer)) == 3
