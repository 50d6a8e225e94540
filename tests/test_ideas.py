"""The worked examples of lab/ideas.py: short, and what they say they are."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from test_readme import lines_of_code

from dymu import DyMU, cosine, rotate, similar_keys
from extras.control import Controlled
from extras.options import NONE
from extras.second_stage import second_stage
from extras.thresholds import find_thresholds
from lab import ablate, ideas
from lab.ideas import VisionZip, attended, fastv
from lab.scenes import HELD_OUT, scene
from load import load
from model import rope_table

TINY = Path(__file__).parent.parent / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return ablate.loaded(TINY, "cpu", "float32")


@pytest.fixture(scope="module")
def pixels(tiny):
    return tiny[1].image(scene(HELD_OUT + 7, level=0.7).image)


@pytest.fixture(scope="module")
def prompt(tiny):
    return tiny[1].prompt("describe the image.")


def test_each_is_short_and_names_its_source(tmp_path):
    for idea in (ideas.values, ideas.states, ideas.less_contrast_first, VisionZip, fastv, attended):
        (tmp_path / "idea.py").write_text(inspect.getsource(idea))
        assert lines_of_code(tmp_path / "idea.py") <= 35, idea
    source = inspect.getsource(ideas)
    for paper in ("2210.09461", "2306.02095", "2412.04467", "2403.06764", "2410.04417"):
        assert f"(arXiv {paper})" in source


def test_features_are_compared_in_the_place_of_keys(tiny, pixels):
    tower = tiny[0].vision_tower
    seen = []
    settings = DyMU(r=(9,) * 7, similarity=lambda one: seen.append(one) or similar_keys(one))
    tower(pixels, settings)
    for one in seen:
        v = rearrange(one.v, "h n d -> n (h d)")
        torch.testing.assert_close(ideas.values(one), cosine(v))
        torch.testing.assert_close(ideas.states(one)[3, 5], cosine(one.x)[3, 5])
        assert v.shape == one.x.shape
    maps = [tower(pixels, replace(settings, similarity=s))[1] for s in (ideas.values, ideas.states)]
    assert not torch.equal(*maps)


def test_patches_of_little_contrast_merge_first(tiny, pixels):
    llava = tiny[0]
    held_back = DyMU(similarity=ideas.less_contrast_first(pixels, 14, weight=10.0))
    _, token_at = llava.vision_tower(pixels, replace(held_back, r=(40, 0, 0, 0, 0, 0, 0)))
    stood = token_at.bincount()[token_at] == 1
    patches = [patch for row in pixels.split(14, 1) for patch in row.split(14, 2)]
    contrast = torch.stack([patch.std((1, 2)).mean() for patch in patches])
    assert contrast[~stood].mean() < 0.5 * contrast[stood].mean()
    taus = find_thresholds(llava.vision_tower, [pixels], (110,) * 7, 1, held_back, -torch.inf)
    assert min(taus) < 0  # a floor of 0 would be wrong


@torch.no_grad()
@pytest.mark.parametrize("dominant, contextual", [(20, 6), (26, 0), (13, 13)])
def test_visionzip(tiny, pixels, dominant, contextual):
    llava = tiny[0]
    ((rows, token_at),) = llava.encode(VisionZip(pixels, dominant, contextual))
    assert len(rows) == dominant + contextual and len(token_at) == 256
    size = token_at.bincount()
    if contextual:
        assert (size == 1).sum() >= dominant  # what is attended to stays as it is
    x, _ = llava.vision_tower(pixels)
    for t in (0, len(rows) - 1):
        torch.testing.assert_close(
            rows[t], llava.multi_modal_projector(x[token_at == t].mean(0)), rtol=1e-4, atol=1e-5
        )
    # attention of the class token in the last layer, written anew
    h = llava.vision_tower.embed(pixels)
    for layer in llava.vision_tower.layers[:-1]:
        h = layer.feed_forward(layer.attend(h, None)[0])
    last = llava.vision_tower.layers[-1]
    _, q, k, _ = last.attend(h, None)
    score = torch.einsum("hd,hnd->hn", q[:, 0], k) / q.shape[-1] ** 0.5
    top = score.softmax(-1).mean(0)[1:].topk(dominant).indices
    assert len(token_at[top].unique()) == dominant
    ids = torch.tensor([5, llava.config.image_token_index, 6])
    for vtu, n in ((True, 256), (False, dominant + contextual)):
        _, at = llava.splice(ids, [(rows, token_at)], vtu)
        assert len(at) == 2 + n


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("first", [DyMU(), DyMU(r=(20,) * 7), DyMU(r=(20,) * 7, vtu=False)])
def test_fastv_that_keeps_all_is_the_model_as_it_is(tiny, pixels, prompt, merged, first):
    llava = tiny[0]
    visual = llava.encode(pixels, first)
    logits = fastv(llava, prompt, visual, 256, first, merged=merged)
    torch.testing.assert_close(logits, llava(prompt, pixels, first), rtol=1e-4, atol=1e-4)


def plain_with_a_mask(llava, rows, after, seen):
    """The decoder at full length, whose layers from `after` on see only some rows (R,) bool"""
    cos, sin = rope_table(len(rows), llava.config.text_config, rows.device)
    causal = torch.ones(len(rows), len(rows)).tril().bool()
    x = rows
    for i, layer in enumerate(llava.language_model.layers):
        h = layer.input_layernorm(x)
        q, k, v = (
            rearrange(proj(h), "n (h d) -> h n d", d=layer.d)
            for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        k, v = (one.repeat_interleave(len(q) // len(k), 0) for one in (k, v))
        mask = causal if i < after else causal & (seen | torch.eye(len(rows)).bool())
        score = rotate(q, cos, sin) @ rotate(k, cos, sin).mT / layer.d**0.5
        weight = score.masked_fill(~mask, -torch.inf).softmax(-1)
        if i == after - 1:
            attended = weight.mean(0)[-1]
        x = x + layer.o_proj(rearrange(weight @ v, "h n d -> n (h d)"))
        h = layer.post_attention_layernorm(x)
        x = x + layer.down_proj(layer.act(layer.gate_proj(h)) * layer.up_proj(h))
    return llava.logits(llava.language_model.norm(x)), attended


@torch.no_grad()
def test_fastv_drops_what_the_question_attends_to_least(tiny, pixels, prompt):
    llava = tiny[0]
    rows, _ = llava.prepare(prompt, pixels, DyMU())
    place = prompt.tolist().index(llava.config.image_token_index)
    everything = torch.ones(len(rows), dtype=torch.bool)
    _, attended = plain_with_a_mask(llava, rows, 2, everything)
    seen = everything.clone()
    seen[place : place + 256] = False
    seen[place + attended[place : place + 256].topk(26).indices] = True
    expected, _ = plain_with_a_mask(llava, rows, 2, seen)
    logits = fastv(llava, prompt, llava.encode(pixels), 26)
    assert len(logits) == len(prompt) - 1 + 26
    torch.testing.assert_close(logits, expected[seen], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[-1], llava(prompt, pixels)[-1], atol=1e-2)


@torch.no_grad()
def test_fastv_merged_keeps_all_positions(tiny, pixels, prompt):
    llava = tiny[0]
    visual = llava.encode(pixels, DyMU(r=(20,) * 7))
    dropped = fastv(llava, prompt, visual, 26, DyMU(r=(20,) * 7))
    merged = fastv(llava, prompt, visual, 26, DyMU(r=(20,) * 7), merged=True)
    assert dropped.shape == merged.shape == (len(prompt) - 1 + 26, len(dropped[0]))
    assert not torch.allclose(dropped, merged, atol=1e-2)
    # the row that asks may stand before the prompt's end
    asked = fastv(llava, torch.cat((prompt, prompt[-1:])), visual, 26, row=-2)
    torch.testing.assert_close(asked[:-1], dropped, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_run_in_bfloat16(pixels, prompt):
    llava, _ = load(TINY, "cpu", "bfloat16")
    pixels = pixels.bfloat16()
    by_contrast = ideas.less_contrast_first(pixels, 14)
    for similarity in (ideas.values, ideas.states, by_contrast):
        visual = llava.encode(pixels, DyMU(r=(20,) * 7, similarity=similarity))
        assert visual[0][0].dtype == torch.bfloat16
    ((rows, _),) = llava.encode(VisionZip(pixels, 9, 3))
    assert rows.dtype == torch.bfloat16 and len(rows) == 12
    for merged in (False, True):
        logits = fastv(llava, prompt, visual, 26, DyMU(r=(20,) * 7), merged=merged)
        assert len(logits) == len(prompt) - 1 + 26 and logits.isfinite().all()
    assert 0 < attended(llava, prompt, pixels).sum() < 128


@torch.no_grad()
def test_attention_is_that_of_the_expanded_sequence(tiny, pixels, prompt):
    llava = tiny[0]
    rows, at = llava.prepare(prompt, pixels, DyMU(r=(20,) * 7))
    cos, sin = rope_table(len(at), llava.config.text_config, "cpu")
    layer = llava.language_model.layers[0]
    weight = ideas.attention_from(layer, rows, at, cos, sin, len(rows) - 1)
    identity = torch.arange(len(at))
    full = ideas.attention_from(layer, rows[at], identity, cos, sin, len(at) - 1)
    torch.testing.assert_close(weight, torch.zeros(len(rows)).index_add(0, at, full))
    assert float(weight.sum()) == pytest.approx(1)


@torch.no_grad()
def test_the_question_says_what_is_inside(tiny, pixels):
    llava, processor = tiny
    found = []
    for question in ("describe the image.", "how many shapes are there?"):
        ids = processor.prompt(question)
        inside = attended(llava, ids, pixels)
        x, _ = llava.prepare(ids, pixels, DyMU())
        _, weight = plain_with_a_mask(llava, x, 2, torch.ones(len(x), dtype=torch.bool))
        place = ids.tolist().index(llava.config.image_token_index)
        assert inside.nonzero().flatten().tolist() == sorted(
            weight[place : place + 256].topk(64).indices.tolist()
        )
        ((rows, at),) = llava.encode(Controlled(pixels, inside, NONE), DyMU(after=second_stage(1)))
        assert len(rows) == 65 and len(at[~inside].unique()) == 1
        found.append(inside)
    assert not torch.equal(*found)
