"""The whole model against transformers, and its merged mode against slow references.

Those are built on transformers' modules.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import IMAGE, QUESTION, make
from PIL import Image
from safetensors.torch import load_file, save_file
from test_dymu import evenly, merged_by_sets
from transformers import LlavaForConditionalGeneration

from dymu import DyMU, cosine, match, rotate
from extras.decoding import prefill_expanded, sampler
from extras.sampled import spread
from extras.thresholds import find_thresholds
from load import load
from model import KVCache, TextConfig, rope_table


@pytest.fixture
def pixels(images):
    return images[3]


def expand(ids, N):
    """The prompt as transformers wants it: N image tokens."""
    place = ids.tolist().index(IMAGE)
    return torch.cat((ids[:place], torch.full((N,), IMAGE), ids[place + 1 :]))[None]


def assert_parity(folder, pixels, reference=None):
    """Full mode: logits to 1e-5 relative and 12 greedy ids.

    Against transformers on the same folder or its twin.
    """
    reference = LlavaForConditionalGeneration.from_pretrained(
        reference or folder, dtype=torch.float32
    ).eval()
    llava, processor = load(folder, "cpu")
    ids = processor.prompt(QUESTION)
    inputs = dict(input_ids=expand(ids, llava.config.visual_tokens), pixel_values=pixels[None])
    with torch.no_grad():
        expected = reference(**inputs).logits[0]
        logits = llava(ids, pixels)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    answer = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    answer = answer[inputs["input_ids"].shape[1] :]
    assert list(llava.generate(ids, pixels, max_new_tokens=12)) == answer.tolist()
    text = processor.prompt(QUESTION, image=False)
    with torch.no_grad():
        torch.testing.assert_close(
            llava(text), reference(input_ids=text[None]).logits[0], rtol=1e-4, atol=1e-5
        )


# ---- full mode equals transformers ----


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-1, -2, -3, 2])
def test_parity_vision_feature_layer(tmp_path, pixels, layer, strategy):
    assert_parity(
        make(tmp_path, vision_feature_layer=layer, vision_feature_select_strategy=strategy), pixels
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_parity_heads_and_tied_embeddings(tmp_path, pixels, kv_heads, tied):
    text = dict(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    assert_parity(make(tmp_path, text=text, tie_word_embeddings=tied), pixels)


def test_parity_unusual_numbers(tmp_path, pixels):
    text = dict(head_dim=24, rms_norm_eps=1e-3, attention_bias=True, mlp_bias=True)
    text |= dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    vision = dict(hidden_act="gelu", layer_norm_eps=1e-3)
    options = dict(projector_hidden_act="silu", multimodal_projector_bias=False)
    assert_parity(make(tmp_path, text=text, vision=vision, **options), pixels)


LAYOUTS = {  # how to get from the keys that transformers 5 writes to others that are on the Hub
    "2023": [(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.")],
    "2025": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model\.", "language_model."),
        (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
        (r"^(?!lm_head)", "model."),
    ],
    "2026": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model\.", "language_model."),
        (r"^vision_tower\.vision_model\.", "vision_tower."),
        (r"^(?!lm_head)", "model."),
    ],
    "2023 behind model.": [(r"^", "model.")],
}


def rename(folder, layout):
    tensors = load_file(folder / "model.safetensors")
    for pattern, replacement in LAYOUTS[layout]:
        tensors = {re.sub(pattern, replacement, key): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_key_layouts(tmp_path, pixels, layout):
    saved, renamed = make(tmp_path / "saved"), make(tmp_path / "renamed")
    tensors = load_file(saved / "model.safetensors")
    assert rename(renamed, layout).keys() != tensors.keys()
    assert_parity(renamed, pixels, reference=saved)


def test_parity_shards(tmp_path, pixels):
    folder = make(tmp_path)
    LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(
        folder, max_shard_size="100KB"
    )
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert_parity(folder, pixels)


def test_parity_of_a_config_with_its_defaults_left_out(tmp_path, pixels):
    folder = make(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for part, names in (
        (
            config,
            "vision_feature_layer vision_feature_select_strategy projector_hidden_act "
            "multimodal_projector_bias",
        ),
        (config["vision_config"], "hidden_act layer_norm_eps num_channels"),
        (
            config["text_config"],
            "hidden_act rms_norm_eps rope_parameters head_dim max_position_embeddings mlp_bias",
        ),
    ):
        for name in names.split():
            del part[name]
    config["image_token_id"] = config.pop("image_token_index")
    (folder / "config.json").write_text(json.dumps(config))
    assert_parity(folder, pixels)


# ---- merging in the encoder ----


def encoder_by_sets(tower, pixels, thresholds):
    """DToMe around transformers' CLIP or SigLIP, one image, token by token.

    -> x, the set of positions of each
    """
    heads, clip = tower.config.num_attention_heads, hasattr(tower, "pre_layrnorm")
    with torch.no_grad():
        x = tower.embeddings(pixels[None])[0]
        x = tower.pre_layrnorm(x) if clip else x
        positions = [{i} for i in range(len(x))]
        for layer, tau in zip(tower.encoder.layers, thresholds):
            h, a = layer.layer_norm1(x), layer.self_attn
            q, k, v = (
                p(h).view(len(x), heads, -1).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj)
            )
            scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            size = torch.tensor([float(len(p)) for p in positions])
            weight = scores.exp() * size  # Eq. 5 without a logarithm: |P| times the exponential
            out = weight / weight.sum(-1, keepdim=True) @ v
            x = x + a.out_proj(out.transpose(0, 1).flatten(1))
            score, partner = match(cosine(k.mean(0)), clip)
            keep = (score > tau).tolist()
            if any(keep):
                x, positions = merged_by_sets(x, positions, partner.tolist(), keep)
            x = x + layer.mlp(layer.layer_norm2(x))
    return x, positions


@pytest.mark.parametrize("budget", [(2, 2, 2), (4, 3, 2), (6, 3, 1)])
def test_eq1_to_eq5_encoder_equals_token_by_token(saved, llava, images, budget):
    found = find_thresholds(llava.vision_tower, images, budget, 6)
    # off the score of the edge that each was read from
    thresholds = tuple(tau + 1e-4 for tau in found)
    reference = LlavaForConditionalGeneration.from_pretrained(saved, dtype=torch.float32).eval()
    tower = reference.model.vision_tower
    for image in images:
        x, token_at = llava.vision_tower(image, DyMU(thresholds=thresholds))
        expected, positions = encoder_by_sets(tower, image, thresholds)
        torch.testing.assert_close(x, expected[1:], rtol=1e-4, atol=1e-5)
        sets = [set(((token_at == t).nonzero().flatten() + 1).tolist()) for t in range(len(x))]
        assert sets == positions[1:]
        assert positions[0] == {0}


def test_tome_leaves_the_same_number_for_every_image(llava, images):
    for image in images:
        x, token_at = llava.vision_tower(image, DyMU(r=(3, 2, 4)))
        assert len(x) == 16 - 9 and len(token_at) == 16


def test_an_unreachable_threshold_is_the_plain_model_bit_for_bit(llava, ids, images):
    never = DyMU(thresholds=(1.0,) * 3)
    for image in images:
        plain, merged = llava.vision_tower(image), llava.vision_tower(image, never)
        assert all(torch.equal(a, b) for a, b in zip(plain, merged))
        assert torch.equal(llava(ids, image), llava(ids, image, never))


def test_thresholds_for_the_whole_tower_are_taken_and_other_lengths_refused(llava, pixels):
    run = llava.vision_tower(pixels, DyMU(thresholds=(0.9, 0.8, 0.7)))[0]
    assert torch.equal(run, llava.vision_tower(pixels, DyMU(thresholds=(0.9, 0.8, 0.7, -1.0)))[0])
    for wrong in (DyMU(thresholds=(0.9,) * 2), DyMU(r=(1,) * 5)):
        with pytest.raises(ValueError, match="runs 3 of its 4 layers"):
            llava.vision_tower(pixels, wrong)


def test_full_strategy_keeps_the_class_token_alone(tmp_path, images):
    tower = load(make(tmp_path, vision_feature_select_strategy="full"), "cpu")[0].vision_tower
    x, token_at = tower(images[0], DyMU(r=(5, 3, 2)))
    assert (len(x), len(token_at), int(token_at[0])) == (17 - 10, 17, 0)
    assert token_at.tolist().count(0) == 1


# ---- unmerging in the decoder ----

MERGED = DyMU(r=(4, 3, 2))


def decoder_by_expansion(llava, rows, token_at, queries):
    """Layer by layer, and plain.

    Expand every row, rotate, attend with an explicit N x N mask, average over positions.
    """
    c, x = llava.config.text_config, rows
    N, (cos, sin) = len(token_at), rope_table(len(token_at), c, rows.device)
    lists = [(token_at == t).nonzero().flatten().tolist() for t in range(len(rows))]
    if isinstance(queries, list):  # the positions themselves
        lists = queries
    elif queries is not None:
        lists = [evenly(p, queries) for p in lists]
    future = torch.ones(N, N).triu(1).bool()
    for layer in llava.language_model.layers:
        h = layer.input_layernorm(x)[token_at]
        q, k, v = (
            p(h).view(N, -1, c.head_dim).transpose(0, 1)
            for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(1, 2) / math.sqrt(c.head_dim)
        out = (scores.masked_fill(future, -math.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + layer.o_proj(torch.stack([out[p].mean(0) for p in lists]))
        h = layer.post_attention_layernorm(x)
        x = x + layer.down_proj(F.silu(layer.gate_proj(h)) * layer.up_proj(h))
    return llava.logits(llava.language_model.norm(x))


@pytest.mark.parametrize("queries", [None, 1, 3])
def test_eq10_eq11_merged_logits_equal_expand_rotate_attend_average(llava, ids, images, queries):
    settings = DyMU(r=MERGED.r, queries=queries and spread(queries))
    for image in images[::2]:
        rows, token_at = llava.splice(ids, llava.encode(image, settings))
        assert len(token_at) == 15 + len(ids) and len(rows) == 6 + len(ids)
        expected = decoder_by_expansion(llava, rows, token_at, queries)
        torch.testing.assert_close(llava(ids, image, settings), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [DyMU(), MERGED, DyMU(r=MERGED.r, queries=spread(1)), DyMU(r=MERGED.r, queries=spread(3))],
)
def test_cached_decoding_equals_one_pass(llava, ids, pixels, settings):
    visual = llava.encode(pixels, settings)
    rows, token_at = llava.splice(ids, visual)
    more = torch.tensor([7, 100, 42, 8])
    cache = KVCache()
    stepped = []
    for i, new in enumerate([rows, *llava.language_model.embed_tokens(more)[:, None]]):
        at = torch.cat((token_at, torch.arange(len(rows), len(rows) + i)))
        stepped.append(llava.language_model(new, at, cache, settings.queries))
    assert cache.rows == len(rows) + len(more)
    whole = llava(torch.cat((ids, more)), pixels, settings)
    torch.testing.assert_close(llava.logits(torch.cat(stepped)), whole, rtol=1e-5, atol=1e-5)


def test_vtu_is_closer_to_the_full_model_than_fewer_tokens_alone(llava, ids):
    flat = torch.zeros(3, 56, 56)
    full = llava(ids, flat)[-1]
    with_vtu, without = (llava(ids, flat, DyMU(r=MERGED.r, vtu=vtu))[-1] for vtu in (True, False))
    assert (with_vtu - full).norm() < 0.5 * (without - full).norm()


def test_vtu_off_is_the_plain_decoder_on_fewer_rows(llava, ids, pixels):
    settings = DyMU(r=MERGED.r, vtu=False)
    rows, token_at = llava.splice(ids, llava.encode(pixels, settings), vtu=False)
    assert token_at.tolist() == list(range(len(rows)))
    expected = decoder_by_expansion(llava, rows, torch.arange(len(rows)), None)
    torch.testing.assert_close(llava(ids, pixels, settings), expected, rtol=1e-5, atol=1e-5)


# ---- cache and generation ----


def test_cache_holds_unique_rows_only():
    c = TextConfig()  # the shape of LLaVA-1.5-7B's decoder
    for tokens, mib in ((89, 44.5), (93, 46.5), (576, 288)):
        cache = KVCache()
        for layer in range(c.num_hidden_layers):
            shape = (c.num_key_value_heads, tokens, c.head_dim)
            k = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            cache.append(layer, k, k)
        cache.rows = tokens
        assert cache.bytes == mib * 2**20


def test_cache_of_a_merged_prompt(llava, ids, pixels):
    sizes = []
    for settings in (DyMU(), MERGED):
        rows, token_at = llava.splice(ids, llava.encode(pixels, settings))
        cache = KVCache()
        list(llava.decode(rows, token_at, cache, max_new_tokens=3, eos=()))
        # rows, layers, k and v, kv heads, head_dim, bytes
        assert cache.bytes == (len(rows) + 2) * 3 * 2 * 2 * 16 * 4
        sizes.append(cache.rows)
    assert sizes[0] - sizes[1] == sum(MERGED.r)


def test_an_expanded_cache_gives_the_same_answer_from_more_memory(llava, ids, pixels):
    rows, token_at = llava.splice(ids, llava.encode(pixels, MERGED))
    caches = [KVCache(), KVCache()]
    unique = list(llava.decode(rows, token_at, caches[0], max_new_tokens=8, eos=()))
    last = prefill_expanded(llava, rows, token_at, caches[1])
    expanded = list(llava.decode(*last, caches[1], max_new_tokens=8, eos=()))
    assert unique == expanded
    assert (caches[0].rows, caches[1].rows) == (len(rows) + 7, len(token_at) + 7)
    assert caches[1].bytes == caches[0].bytes // caches[0].rows * caches[1].rows


def test_generation_ends_with_an_eos_which_it_yields(llava, ids, pixels):
    free = list(llava.generate(ids, pixels, max_new_tokens=8, eos=()))
    stop = free[3]
    for eos in (stop, (stop, 1)):
        stopped = list(llava.generate(ids, pixels, max_new_tokens=8, eos=eos))
        assert stopped == free[: free.index(stop) + 1]
    assert list(llava.generate(ids, pixels, max_new_tokens=2, eos=())) == free[:2]


def test_sampling_repeats_with_its_seed(llava, ids, pixels):
    def draw(seed, temperature=2.0):
        pick = sampler(temperature, seed, "cpu")
        return list(llava.generate(ids, pixels, MERGED, 12, eos=(), pick=pick))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, 1e-6) == list(llava.generate(ids, pixels, MERGED, 12, eos=()))


def test_generation_ends_where_the_positions_end(tmp_path, pixels):
    llava, processor = load(make(tmp_path, text=dict(max_position_embeddings=60)), "cpu")
    ids = processor.prompt(QUESTION)
    positions = len(ids) + 15
    assert len(list(llava.generate(ids, pixels, max_new_tokens=50, eos=()))) == 60 - positions + 1
    with pytest.raises(ValueError, match="61 positions, the model has 60"):
        llava(torch.cat((ids, torch.full((61 - positions,), 9))), pixels)


def test_prompts_that_do_not_fit_are_refused(llava, ids, pixels):
    text = ids[ids != IMAGE]
    for wrong_ids, wrong_pixels, message in (
        (text, pixels, "0 image placeholders in the prompt, 1 pictures"),
        (ids, None, "1 image placeholders in the prompt, 0 pictures"),
        (torch.cat((ids, ids)), pixels, "2 image placeholders"),
        (torch.tensor([IMAGE]), pixels, "needs text"),
        (torch.tensor([5, 260]), None, "from 0 to 259"),
        (torch.tensor([5, -1]), None, "from 0 to 259"),
        (ids, torch.zeros(3, 28, 56), r"pixels \(3, 28, 56\)"),
    ):
        with pytest.raises(ValueError, match=message):
            llava(wrong_ids, wrong_pixels)


def test_what_is_no_picture_is_refused(llava, ids):
    for wrong in ("photo.jpg", Path("photo.jpg"), Image.new("RGB", (56, 56)), 5, [[]]):
        with pytest.raises(ValueError, match=r"pixels are a \w+, see Processor.image"):
            llava(ids, wrong if isinstance(wrong, list) else [wrong])


def test_a_list_of_ids_and_pixels_of_another_dtype_are_taken(llava, ids, pixels):
    torch.testing.assert_close(llava(ids.tolist(), pixels.double()), llava(ids, pixels))
