"""Not in the paper: a few queries per token, from which the average of Eq. 11 is estimated.

For long prompts, where attention costs as much as everything else: `DyMU(queries=spread(1))`, or
`DyMU(queries=fewer_if_long)`, which decides by the length.
"""

from functools import partial

import torch
from torch import Tensor

LONG = 1024  # positions; beyond them attention at all of them costs more than the linear layers


def fewer_if_long(token_at: Tensor) -> Tensor:
    """For DyMU.queries: all positions (N,), the paper's way, of a long prompt one of each token."""
    if len(token_at) <= LONG:
        return torch.arange(len(token_at), device=token_at.device)
    return spread_positions(token_at, queries=1)


def spread(queries: int):
    """For DyMU.queries: takes at most so many positions of each token, evenly over its own.

    A single one is the median position. Attention then has Q x N scores, not N x N, while keys
    and values stay exact at all N positions. Raises ValueError for less than one.
    """
    if queries < 1:
        raise ValueError(f"queries is {queries}; it must be at least 1")
    return partial(spread_positions, queries=queries)


def spread_positions(token_at: Tensor, queries: int) -> Tensor:
    """token_at (N,) -> (Q,), ascending: s = min(queries, n) of the n positions of each token

    They are at the offsets (2j + 1)n / 2s of its sorted list, j = 0 .. s-1.
    """
    size = torch.bincount(token_at)

    # of each position, its rank among those of its token
    by_token = token_at.argsort(stable=True)
    first = size.cumsum(0) - size
    rank = torch.empty_like(token_at)
    count = torch.arange(len(rank), device=rank.device)
    rank[by_token] = count - first[token_at[by_token]]

    n = size[token_at]
    s = n.clamp(max=queries)

    def before(rank):
        """How many of the s offsets lie before this rank."""
        return (2 * s * rank + n - 1) // (2 * n)

    return (before(rank + 1) > before(rank)).nonzero().flatten()
