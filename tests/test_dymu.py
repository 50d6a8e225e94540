"""Every equation against a slow form of it that is written in another way.

The names carry the equations' numbers.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dymu
from dymu import (
    DyMU,
    cosine,
    match,
    merge,
    remerge,
    rope_scores,
    rotate,
    size_bias,
    vtu_attention,
)
from extras.sampled import spread


def angles(N, d, base=10000.0):
    exponent = torch.arange(0, d, 2, dtype=torch.float64) / d
    theta = torch.arange(N, dtype=torch.float64)[:, None] / base**exponent
    return theta.cos(), theta.sin()


def choose(settings, score, layer=0):
    return settings.choose(score, SimpleNamespace(layer=layer))


def random_map(N, N_un):
    token_at = torch.cat((torch.arange(N_un), torch.randint(0, N_un, (N - N_un,))))
    return token_at[torch.randperm(N)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- DToMe ----


def test_match_is_the_best_cosine_between_alternating_tokens():
    keys = torch.randn(9, 5, dtype=torch.float64)
    score, partner = match(cosine(keys))
    assert score[0] == -math.inf  # the class token
    for i, t in enumerate(range(2, 9, 2), start=1):
        cosines = [float(torch.cosine_similarity(keys[t], keys[n], dim=0)) for n in range(1, 9, 2)]
        assert partner[i] == max(range(4), key=cosines.__getitem__)
        assert abs(score[i] - max(cosines)) < 1e-12
    assert match(cosine(keys), class_token=False)[0][0] > -1
    # rounding does not reach over a threshold of 1
    assert match(cosine(torch.ones(6, 3) / 3))[0].max() <= 1


def test_matching_in_float32_flips_no_merge_beyond_ties():
    """Against float64, at ViT-L's size and with keys as alike as a picture's.

    Only ties may fall either way.
    """
    keys = torch.randn(577, 64, dtype=torch.float64) * 0.2 + torch.randn(64, dtype=torch.float64)
    (score, partner), (exact, exact_partner) = match(cosine(keys.float())), match(cosine(keys))
    cosines = F.normalize(keys, dim=-1)[::2] @ F.normalize(keys, dim=-1)[1::2].T
    best_two = cosines.topk(2, dim=-1).values
    flipped = (partner != exact_partner) & ((best_two[:, 0] - best_two[:, 1]) > 1e-6)
    assert not flipped[1:].any()
    assert (score[1:] - exact[1:]).abs().max() < 1e-6
    r = DyMU(r=(21,))
    assert (choose(r, score) != choose(r, exact)).sum() == 0


def merged_by_sets(x, positions, partner, keep):
    """Eq. 1-3 token by token, with P as Python sets."""
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    x, positions = [row.clone() for row in x], [set(p) for p in positions]
    for i, t in enumerate(a):
        if keep[i]:
            n = b[partner[i]]
            weight, own = len(positions[t]), len(positions[n])
            x[n] = (x[t] * weight + x[n] * own) / (weight + own)
            positions[n] |= positions[t]
    order = [t for i, t in enumerate(a) if not keep[i]] + b
    return torch.stack([x[t] for t in order]), [positions[t] for t in order]


def test_eq1_eq2_eq3_merge_equals_one_edge_at_a_time():
    x = torch.randn(11, 4, dtype=torch.float64)
    size, token_at, positions = torch.ones(11), torch.arange(11), [{i} for i in range(11)]
    for _ in range(3):
        score, partner = match(cosine(x))
        keep = score > score[1:].median()
        expected_x, positions = merged_by_sets(x, positions, partner.tolist(), keep.tolist())
        x, size, token_at = merge(x, size, token_at, partner, keep)
        torch.testing.assert_close(x, expected_x)
        found = [set((token_at == t).nonzero().flatten().tolist()) for t in range(len(x))]
        assert found == positions
        assert size.tolist() == torch.bincount(token_at).tolist()
        assert size.sum() == 11
        assert positions[0] == {0}  # the class token stays alone, and first


def test_eq1_several_tokens_may_join_one():
    x, keep = torch.tensor([[0.0], [10.0], [1.0], [20.0], [4.0]]), torch.tensor([False, True, True])
    x, size, token_at = merge(
        x, torch.tensor([1.0, 2, 1, 1, 3]), torch.arange(5), torch.tensor([0, 0, 0]), keep
    )
    assert x.flatten().tolist() == [0, (10 * 2 + 1 + 4 * 3) / 6, 20]
    assert (size.tolist(), token_at.tolist()) == ([1, 6, 1], [0, 1, 1, 2, 1])


def test_merge_of_nothing_changes_nothing():
    x, size, token_at = torch.randn(7, 3), torch.rand(7), torch.arange(7)
    after = merge(
        x, size, token_at, torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool)
    )
    assert all(a is b for a, b in zip(after, (x, size, token_at)))


def test_tome_merges_the_r_best_edges_and_never_the_class_token():
    score = torch.tensor([-math.inf, 0.1, 0.9, -0.5, 0.3])
    assert choose(DyMU(r=(2,)), score).tolist() == [False, False, True, False, True]
    assert choose(DyMU(r=(9,)), score).tolist() == [False, True, True, True, True]
    strictly_above = [False, False, True, False, False]
    assert choose(DyMU(thresholds=(0.3,)), score).tolist() == strictly_above


def test_eq5_size_s_equals_s_copies():
    q, k, v = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    size = torch.tensor([1, 3, 2, 1, 4])
    copies = torch.arange(5).repeat_interleave(size)
    weighted = dymu.attention(q, k, v, size_bias(size).double().expand(1, 5, 5))
    torch.testing.assert_close(
        weighted, dymu.attention(q, k[:, copies], v[:, copies]), rtol=1e-6, atol=1e-6
    )


def test_a_token_that_is_alone_has_no_partner():
    for class_token in (True, False):
        score, partner = match(cosine(torch.randn(1, 4)), class_token)
        assert score.tolist() == [-math.inf] and partner.tolist() == [0]
        assert not choose(DyMU(r=(3,)), score).any()
        assert not choose(DyMU(thresholds=(-1.0,)), score).any()


# ---- VTU ----


def test_eq6_eq7_eq8_scores_depend_on_the_difference_of_angles():
    d, (cos, sin) = 8, angles(40, 8)
    q, k = torch.randn(2, d, dtype=torch.float64)
    theta = torch.atan2(sin, cos)
    for m, n in ((3, 3), (7, 2), (39, 0)):
        score = rotate(q[None], cos[m], sin[m])[0] @ rotate(k[None], cos[n], sin[n])[0]
        difference = theta[m] - theta[n]
        dot, cross = q[:4] * k[:4] + q[4:] * k[4:], q[:4] * k[4:] - q[4:] * k[:4]
        torch.testing.assert_close(score, (dot * difference.cos() + cross * difference.sin()).sum())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_eq9_eq10_term_by_term_equals_expand_and_rotate(kv_heads):
    N, N_un, d = 23, 9, 16
    q = torch.randn(4, N_un, d, dtype=torch.float64)
    k = torch.randn(kv_heads, N_un, d, dtype=torch.float64)
    token_at, (cos, sin) = random_map(N, N_un), angles(N, d)
    every_k = k.repeat_interleave(4 // kv_heads, 0)[:, token_at]
    expanded = rotate(q[:, token_at], cos, sin) @ rotate(every_k, cos, sin).transpose(1, 2)
    torch.testing.assert_close(rope_scores(q, k, token_at, cos, sin), expanded, rtol=0, atol=1e-12)


def evenly(positions, s):
    """s of a sorted list."""
    s = min(s, len(positions))
    return [positions[(2 * j + 1) * len(positions) // (2 * s)] for j in range(s)]


def remerged_by_loops(q, k, v, token_at, cos, sin, queries):
    """Eq. 10 and 11 from the scores of rope_scores, one head and one token at a time."""
    (H, N_un, d), N = q.shape, len(token_at)
    scores = rope_scores(q, k, token_at, cos, sin) / math.sqrt(d)
    out = torch.zeros(H, N_un, d, dtype=q.dtype)
    for h in range(H):
        value = v[h * len(v) // H][token_at]
        rows = [scores[h, n, : n + 1].softmax(0) @ value[: n + 1] for n in range(N)]
        for t in range(N_un):
            positions = (token_at == t).nonzero().flatten().tolist()
            chosen = positions if queries is None else evenly(positions, queries)
            out[h, t] = sum(rows[n] for n in chosen) / len(chosen)
    return out


@pytest.mark.parametrize("queries", [None, 1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_eq10_eq11_as_run_equals_the_loops(queries, kv_heads):
    N, N_un, d = 19, 7, 8
    q = torch.randn(4, N_un, d, dtype=torch.float64)
    k, v = torch.randn(2, kv_heads, N_un, d, dtype=torch.float64)
    token_at, (cos, sin) = random_map(N, N_un), angles(N, d)
    query_at = None if queries is None else spread(queries)(token_at)
    got = vtu_attention(q, k, v, token_at, cos, sin, query_at)
    torch.testing.assert_close(
        got, remerged_by_loops(q, k, v, token_at, cos, sin, queries), rtol=0, atol=1e-12
    )


def test_eq11_remerge_is_the_pseudo_inverse_of_the_map():
    token_at, x = random_map(12, 5), torch.randn(3, 12, 4, dtype=torch.float64)
    M = F.one_hot(token_at).double()
    torch.testing.assert_close(remerge(x, token_at, 5), torch.linalg.inv(M.T @ M) @ M.T @ x)


def test_identity_map_makes_vtu_plain_attention():
    q, k, v = torch.randn(3, 2, 10, 8, dtype=torch.float64)
    cos, sin = angles(10, 8)
    plain = dymu.attention(rotate(q, cos, sin), rotate(k, cos, sin), v, causal=True)
    for query_at in (None, spread(1)(torch.arange(10))):
        assert torch.equal(vtu_attention(q, k, v, torch.arange(10), cos, sin, query_at), plain)


def test_a_cached_step_equals_the_last_row_of_one_pass():
    q, k, v = torch.randn(3, 2, 6, 8, dtype=torch.float64)
    token_at, (cos, sin) = torch.tensor([0, 1, 2, 1, 3, 3, 4, 5]), angles(8, 8)
    whole = vtu_attention(q, k, v, token_at, cos, sin)
    torch.testing.assert_close(vtu_attention(q[:, -1:], k, v, token_at, cos, sin), whole[:, -1:])


def test_half_precision_is_averaged_and_compared_in_float32():
    keys, x = torch.randn(200, 16).bfloat16(), (100 + torch.randn(2, 300, 4)).bfloat16()
    score, partner = match(cosine(keys))
    exact_score, exact_partner = match(cosine(keys.float()))
    assert torch.equal(score, exact_score) and torch.equal(partner, exact_partner)
    one = torch.zeros(300, dtype=torch.long)
    mean = x.float().mean(1, keepdim=True).bfloat16()
    assert torch.equal(remerge(x, one, 1), mean)
    tokens = torch.cat((x[0, :1], x[0]))  # all of A but the first join one token of B
    partner, keep = torch.zeros(151, dtype=torch.long), torch.arange(151) > 0
    merged = merge(tokens, torch.ones(301), torch.arange(301), partner, keep)[0][1]
    assert torch.equal(merged, torch.cat((tokens[2::2], tokens[1:2])).float().mean(0).bfloat16())
    assert size_bias(torch.tensor([300.0]).bfloat16()).dtype == torch.float32


def test_settings_that_contradict_are_refused():
    rule = similar = lambda *_: None
    for wrong in (
        dict(thresholds=(0.5,), r=(1,)),
        dict(thresholds=(0.5,), rule=rule),
        dict(r=(1,), rule=rule),
    ):
        with pytest.raises(ValueError, match="at most one of thresholds"):
            DyMU(**wrong)
    assert not DyMU(similarity=similar).merging and DyMU(rule=rule).merging
