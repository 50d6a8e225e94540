"""The seam: ideas of one's own as functions, in one file, without a change to ours."""

import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
from checkpoints import QUESTION
from einops import rearrange
from test_model import decoder_by_expansion

from dymu import DyMU, best, cosine, match, merge, similar_keys
from extras.thresholds import find_thresholds
from load import load
from model import KVCache

# ---- four ideas ----


def values(seen):
    return cosine(rearrange(seen.v, "h n d -> n (h d)"))


def share(score, seen):
    return best(score, len(score) // 3)


def first_position(token_at):
    order = token_at.argsort(stable=True)
    return order[token_at[order].diff(prepend=token_at.new_tensor([-1])) > 0].sort().values


def once_more(x, token_at, tau=0.0):
    score, partner = match(cosine(x), class_token=False)
    size = torch.bincount(token_at).float()
    return merge(x, size, token_at, partner, score > tau)[::2]


def test_they_are_short():
    for idea in (values, share, first_position, once_more):
        assert len(inspect.getsource(idea).strip().splitlines()) <= 10


# ---- what they do ----


def test_the_defaults_are_the_keys_and_the_thresholds(llava, ids, images):
    taus = find_thresholds(llava.vision_tower, images, (4, 3, 2), 6)
    expected = llava(ids, images[3], DyMU(thresholds=taus))
    for same in (
        DyMU(thresholds=taus, similarity=similar_keys),
        DyMU(thresholds=taus, similarity=lambda seen: cosine(seen.k.mean(0))),
        DyMU(rule=lambda score, seen: score > taus[seen.layer]),
    ):
        assert torch.equal(llava(ids, images[3], same), expected)


def test_a_similarity_decides_who_merges(llava, images):
    """In the first layer, against the values' cosines one by one."""
    tower = llava.vision_tower
    x, token_at = tower(images[3], DyMU(r=(5, 0, 0), similarity=values))
    h = tower.layers[0].layer_norm1(tower.embed(images[3]))
    v = tower.layers[0].v_proj(h)
    pairs = []
    for a in range(2, 17, 2):
        scores = [float(torch.cosine_similarity(v[a], v[b], dim=0)) for b in range(1, 17, 2)]
        pairs.append((max(scores), a, 1 + 2 * scores.index(max(scores))))
    for _, a, b in sorted(pairs)[-5:]:
        assert token_at[a - 1] == token_at[b - 1]
    assert len(x) == 16 - 5
    keys = tower(images[3], DyMU(r=(5, 0, 0)))[1]
    assert not torch.equal(keys, token_at)


def test_a_similarity_may_forbid_and_see_all_that_a_layer_knows(llava, images):
    known = []

    def only_small(seen):
        known.append(seen)
        big = seen.size > 1
        return similar_keys(seen).masked_fill(big[:, None] | big, -torch.inf)

    x, token_at = llava.vision_tower(images[1], DyMU(r=(8, 8, 8), similarity=only_small))
    assert token_at.bincount().max() <= 9  # what met in one layer never grows again
    for i, seen in enumerate(known):
        assert seen.layer == i and seen.class_token
        n = len(seen.x)
        assert seen.q.shape == seen.k.shape == seen.v.shape == (4, n, 12)
        assert torch.equal(seen.size, seen.token_at.bincount().float())


def test_a_rule_decides_how_many(llava, images):
    x, token_at = llava.vision_tower(images[3], DyMU(rule=share))
    n = 17
    for _ in range(3):
        n -= ((n + 1) // 2) // 3
    assert (len(x), len(token_at)) == (n - 1, 16)


def test_queries_decide_where_attention_is_computed(llava, ids, images):
    """Against one position of each token in the slow form."""
    settings = DyMU(r=(4, 3, 2), queries=first_position)
    rows, token_at = llava.splice(ids, llava.encode(images[3], settings))
    first = [token_at.tolist().index(t) for t in range(len(rows))]
    assert first_position(token_at).tolist() == sorted(first)
    expected = decoder_by_expansion(llava, rows, token_at, [[p] for p in first])
    torch.testing.assert_close(llava(ids, images[3], settings), expected, rtol=1e-5, atol=1e-5)


def test_a_similarity_of_another_shape_is_told(llava, images):
    for wrong in (lambda seen: seen.k.mean(0), lambda seen: seen.x, lambda seen: seen.size):
        with pytest.raises(AssertionError, match="a similarity of shape"):
            llava.vision_tower(images[3], DyMU(similarity=wrong, r=(1, 1, 1)))


@pytest.mark.parametrize("chosen", [True, False])
def test_no_rule_merges_the_class_token_or_what_is_forbidden(llava, images, chosen):
    def everything(score, seen):
        return torch.ones_like(score, dtype=torch.bool)

    forbid = (lambda seen: torch.full_like(similar_keys(seen), -torch.inf)) if not chosen else None
    settings = DyMU(rule=everything, similarity=forbid or similar_keys)
    x, token_at = llava.vision_tower(images[3], settings)
    plain, _ = llava.vision_tower(images[3])
    assert len(x) < 8 if chosen else torch.equal(x, plain)
    assert (
        token_at >= 0
    ).all()  # the class token's own position is gone, and it stood nowhere else


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [DyMU(), DyMU(r=(3, 2, 1)), DyMU(similarity=values, r=(3, 2, 1))]
)
def test_a_second_stage_behind_the_projector(llava, ids, images, settings):
    twice = replace(settings, after=once_more)
    rows, token_at = llava.splice(ids, llava.encode(images[3], twice))
    (once,) = llava.encode(images[3], settings)
    assert len(rows) < len(ids) - 1 + len(once[0]) and len(token_at) == len(ids) - 1 + 16
    logits = llava(ids, images[3], twice)
    expected = decoder_by_expansion(llava, rows, token_at, None)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    answer = llava.decode(rows, token_at, KVCache(), max_new_tokens=4, eos=())
    assert list(answer) == list(llava.generate(ids, images[3], twice, 4, eos=()))
    none = replace(settings, after=partial(once_more, tau=1.0))
    (nothing,) = llava.encode(images[3], none)
    assert torch.equal(nothing[0], once[0]) and torch.equal(nothing[1], once[1])


def test_settings_of_its_own_for_each_picture(llava, saved, images):
    ids = load(saved, "cpu")[1].prompt(QUESTION, 2)
    plain, merged = DyMU(), DyMU(r=(4, 3, 2))
    visual = [*llava.encode(images[2], plain), *llava.encode(images[3], merged)]
    rows, token_at = llava.splice(ids, visual)
    assert [len(x) for x, _ in visual] == [16, 7] and len(token_at) == len(ids) - 2 + 32
    logits = llava.logits(llava.language_model(rows, token_at, KVCache()))
    expected = decoder_by_expansion(llava, rows, token_at, None)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
