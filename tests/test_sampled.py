"""Sampled queries: where they are taken."""

import pytest
import torch
from test_dymu import evenly, random_map

from dymu import causal_attention
from extras.sampled import LONG, fewer_if_long, spread


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_query_positions_are_spread_evenly():
    token_at = torch.tensor([0, 1, 1, 1, 0, 2, 1, 1])
    # the medians of {0, 4}, {1, 2, 3, 6, 7} and {5}
    assert spread(1)(token_at).tolist() == [3, 4, 5]
    assert spread(5)(token_at).tolist() == list(range(8))
    token_at = random_map(60, 13)
    for s in (1, 2, 3, 7):
        lists = [(token_at == t).nonzero().flatten().tolist() for t in range(13)]
        expected = sorted(p for one in lists for p in evenly(one, s))
        assert spread(s)(token_at).tolist() == expected


@pytest.mark.parametrize("N", [LONG, LONG + 1])
def test_a_long_prompt_takes_one_query_per_token(N):
    token_at = random_map(N, 90)
    few = fewer_if_long(token_at)
    assert torch.equal(few, spread(1)(token_at) if N > LONG else torch.arange(N))
    assert len(few) == (90 if N > LONG else N)


def test_less_than_one_query_is_refused():
    with pytest.raises(ValueError, match="queries is 0"):
        spread(0)


@pytest.mark.parametrize("Q", [1, 63, 64, 65, 200])
def test_attention_in_blocks_equals_one_mask(Q):
    """Each query sees the keys up to its own position, in whichever block it is."""
    N = 300
    q = torch.randn(4, Q, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, N, 8, dtype=torch.float64)
    for query_at in (torch.randperm(N)[:Q].sort().values, None):
        at = torch.arange(N - Q, N) if query_at is None else query_at
        scores = q @ k.repeat_interleave(2, 0).mT / 8**0.5
        scores = scores.masked_fill(at[:, None] < torch.arange(N), -torch.inf)
        expected = scores.softmax(-1) @ v.repeat_interleave(2, 0)
        got = causal_attention(q, k, v, query_at)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
