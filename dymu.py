"""DyMU (arXiv 2504.17040v2) in plain PyTorch, in the paper's order; equation numbers are the paper's.

    paper      here         shape       meaning
    N          N            int         visual tokens before any merging (LLaVA-1.5: 24 x 24 patches = 576)
    N_un       N_un         int         tokens left after merging, the *unique* ones
    N_i        N_i          int         tokens that enter the merge of encoder layer i, class token included
    x_i, k_i   x, keys      (N_i, D)    output of layer i's self-attention (residual added); its keys are (N_i, D_k)
    S_i        score        (|A|,)      how alike a token of A and its partner in B are; tau_i is the threshold on it
    |P_i[t]|   size         (N_i,)      how many original positions token t stands for
    M          token_at     (N,) int    the one-hot N x N_un matrix as an index: e = M e_un is e_un[token_at]
    theta      cos, sin     (N, d/2)    RoPE angles of the N virtual positions, one per pair of dimensions

Four tokens of which two merged: token_at = [0, 1, 0, 2], so positions 0 and 2 hold token 0, and size = [2, 1, 1].
Every function but join_frames takes one image or one sequence: lengths differ, and nothing is padded.
"""

from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor


@dataclass(frozen=True)
class DyMU:
    """What to do with the visual tokens. By default nothing merges."""

    thresholds: tuple[float, ...] | None = None  # DToMe: merge every edge of encoder layer i whose score is > tau_i
    r: tuple[int, ...] | None = None  # ToMe instead, of fixed length: merge the r_i best edges of layer i, or all
    vtu: bool = True  # False: the decoder is simply given fewer tokens, at consecutive positions (Fig. 4's ablation)
    queries: int | None = None  # queries per token in the re-merge (Eq. 11); None: all of its positions, the paper
    temporal: float | None = None  # join tokens of a frame that are more alike than this to one of the frame before

    def __post_init__(self):
        if self.thresholds is not None and self.r is not None:
            raise ValueError("give thresholds (DToMe) or r (ToMe), not both")
        if self.queries is not None and self.queries < 1:
            raise ValueError(f"queries is {self.queries}; it must be at least 1, or None for all positions")
        if self.temporal is not None and not -1 <= self.temporal <= 1:
            raise ValueError(f"temporal is {self.temporal}; it is a cosine, from -1 to 1, or None")

    def edges(self, score: Tensor, layer: int) -> Tensor:
        """Which edges of this encoder layer merge: score (|A|,) -> (|A|,) bool. A score of -inf never does."""
        if self.thresholds is not None:
            return score > self.thresholds[layer]
        best = score.topk(min(self.r[layer], len(score))).indices
        return torch.zeros_like(score, dtype=torch.bool).index_fill(0, best, True) & (score > -torch.inf)


def at_least_float32(x: Tensor) -> Tensor:
    """Similarities and averages are taken in float32 when the model runs in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v. q (H, Q, d); k and v (H_kv, K, d), H a multiple of H_kv -> (H, Q, d)."""
    q, k, v = q[None], k[None], v[None]  # the fused kernels want a batch axis
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=k.shape[1] < q.shape[1])[0]


# ---- 3.1 Dynamic Token Merging (DToMe): in every encoder layer, between self-attention and MLP ----


def most_alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of a (A, D) the row of b (B, D) of the greatest cosine -> score (A,), partner (A,), an index into b.

    The paper writes the raw product k[t] . k[n]; the authors' code takes the cosine, as ToMe does, and so do we.
    """
    a, b = (F.normalize(at_least_float32(x), dim=-1) for x in (a, b))
    score, partner = (a @ b.T).max(dim=-1)
    return score.clamp(max=1), partner  # rounding must not lift a cosine over a threshold of 1, which means "never"


def match(keys: Tensor, class_token: bool = True) -> tuple[Tensor, Tensor]:
    """Bipartite matching. keys (N_i, D_k), averaged over heads -> score (|A|,), partner (|A|,), an index into B.

    A is every second token from the first, B the rest; each t in A points at the token of B that it is most like.
    """
    if len(keys) == 1:  # all has merged into one: A is that token, B is empty
        return keys.new_full((1,), -torch.inf), torch.zeros(1, dtype=torch.long, device=keys.device)
    score, partner = most_alike(keys[::2], keys[1::2])
    if class_token:  # index 0, hence in A: it never merges, and as only B receives, nothing merges into it
        score[0] = -torch.inf
    return score, partner


def merge(x: Tensor, size: Tensor, token_at: Tensor, partner: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges along the edges where keep (|A|,) is true: x (N_i, D), size (N_i,), token_at (N,) -> the same, after.

    The order of the new tokens is the rest of A, then all of B. The next layer splits A and B by that order, so it
    decides which tokens can meet. Where nothing merges the order stays as it was, as in the authors' code.
    """
    stays = ~keep
    n_stay = int(stays.sum())  # the new length: the one host-device synchronisation of a layer
    if n_stay == len(keep):
        return x, size, token_at
    n_new = n_stay + len(x) - len(keep)
    new = token_at.new_empty(len(x))  # where each old token goes: again a one-hot matrix kept as an index
    new[::2] = torch.where(stays, stays.cumsum(0) - 1, n_stay + partner)
    new[1::2] = torch.arange(n_stay, n_new, device=x.device)
    x, size = regroup(x, size, new, n_new)
    return x, size, new[token_at]  # Eq. 2 and 3: each position follows its token, so P[t] joins P[t_B]


def regroup(x: Tensor, size: Tensor, new: Tensor, n_new: int) -> tuple[Tensor, Tensor]:
    """Token t becomes part of token new[t]: x (N_i, D), size (N_i,), new (N_i,) -> x (n_new, D), size (n_new,)"""
    wide = at_least_float32(x)
    total = wide.new_zeros(n_new, x.shape[1]).index_add(0, new, wide * size[:, None])
    size = size.new_zeros(n_new).index_add(0, new, size)
    return (total / size[:, None]).to(x.dtype), size  # Eq. 1: the average weighted by size


def size_bias(size: Tensor) -> Tensor:
    """Eq. 5: log|P|, (N_i,), added to the scores of each key *before* the softmax, where it is a factor |P| on the
    exponential: a token of size s weighs as much as s copies of it would."""
    return at_least_float32(size).log()


def schedule(r_total: int, layers: int, kind: str = "constant") -> tuple[int, ...]:
    """Appendix B: r_total merges spread over the layers: constant, linear (more early) or reverse_linear.

    Shares are rounded down and the remainder goes one each to the first layers, so that the sum is exact. Constant
    equals the authors' code; their linear truncates in another way.
    """
    if kind not in ("constant", "linear", "reverse_linear"):
        raise ValueError(f"unknown schedule {kind!r}: constant, linear or reverse_linear")
    weight = [1 if kind == "constant" else layers - i for i in range(layers)]
    r = [r_total * w // sum(weight) for w in weight]
    r = [r_i + (i < r_total - sum(r)) for i, r_i in enumerate(r)]
    return tuple(r[::-1] if kind == "reverse_linear" else r)


@torch.no_grad()
def find_thresholds(vision_tower, images, r: tuple[int, ...], batch_size: int) -> tuple[float, ...]:
    """tau_i for every layer that runs, averaged over batches of images, so that r_i edges per image are above it.

    images: any iterable of pixels (3, H, W); only batch_size of them are held at a time. The tower should be in
    float32: bfloat16 keys are coarser than the gaps between edges. Raises ValueError for no images or a wrong r.
    """
    vision_tower.config.check(DyMU(r=r))
    images, found = iter(images), []
    while batch := list(islice(images, batch_size)):
        states, taus = [vision_tower.embed(pixels) for pixels in batch], []  # a state: x, size, token_at
        for layer, r_i in zip(vision_tower.layers, r):
            attended = [layer.attend(*state) for state in states]
            edges = [match(keys, vision_tower.class_token) for _, keys in attended]
            ranked = torch.cat([score for score, _ in edges]).sort(descending=True).values
            first_left_out = ranked[min(r_i * len(batch), len(ranked) - 1)]
            tau = max(float(first_left_out), 0.0) if r_i else 1.0  # Eq. 4, floored at 0; where r_i = 0 nothing merges
            for i, ((x, _), (score, partner)) in enumerate(zip(attended, edges)):
                x, size, token_at = merge(x, *states[i][1:], partner, score > tau)
                states[i] = layer.feed_forward(x), size, token_at
            taus.append(tau)
        found.append(taus)
    if not found:
        raise ValueError("no images to find thresholds with")
    return tuple(sum(taus) / len(found) for taus in zip(*found))


# ---- not in the paper: temporal merging, between the frames of a video (or several pictures) ----


def join_frames(frames: list[tuple[Tensor, Tensor]], threshold: float | None) -> list[tuple[Tensor, Tensor]]:
    """A token that is like one of the frame before joins it, by Eq. 1-3: what stands still costs one frame.

    frames: of each x (N_un, D), token_at (N,) -> of each the tokens that are new in it, and token_at over the tokens of
    all frames up to it. A token joins where the cosine is > threshold (None: nowhere). What it joins stands in both
    frames then, so that the next frame's may join it too, and is the average over all of them.
    """
    if not frames:
        return []
    x, size, maps, counts = frames[0][0][:0], torch.zeros(0, device=frames[0][0].device), [], []
    for new_x, at in frames:
        n, where = len(x), len(x) + torch.arange(len(new_x), device=x.device)
        if threshold is not None and maps:
            before = maps[-1].unique()  # the tokens that stand in the frame before
            score, partner = most_alike(new_x, x[before])
            joins = score > threshold
            where = torch.where(joins, before[partner], n - 1 + (~joins).cumsum(0))
        new = torch.cat((torch.arange(n, device=x.device), where))
        n_new = max(n, int(where.max()) + 1)
        x, size = torch.cat((x, new_x)), torch.cat((size, torch.bincount(at).to(size)))
        if n_new < len(x):
            x, size = regroup(x, size, new, n_new)
        maps.append(where[at])
        counts.append(n_new - n)
    return list(zip(x.split(counts), maps))


# ---- 3.2 Virtual Token Unmerging (VTU): in every decoder layer ----


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE turns each pair (a, b) into (a cos - b sin, b cos + a sin). x (..., N, d), cos and sin (N, d/2).

    Dimension f pairs with f + d/2, the layout of Hugging Face's checkpoints; weights stored for neighbouring pairs
    would run without an error and answer nonsense.
    """
    half = x.shape[-1] // 2
    a, b, cos, sin = x[..., :half], x[..., half:], cos[..., :half], sin[..., :half]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_scores(q: Tensor, k: Tensor, token_at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Eq. 10 term by term, for reading and for the tests: q (H, N_un, d), k (H_kv, N_un, d), neither rotated ->
    the scores A (H, N, N) of the virtual sequence, before 1/sqrt(d), mask and softmax. Holds H N^2 d/2 numbers."""
    half = q.shape[-1] // 2
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    (q1, q2), (k1, k2), C, S = q.split(half, -1), k.split(half, -1), cos[..., :half], sin[..., :half]
    pairs = "h m f, h n f -> h m n f"  # products of queries and keys, before their sum over the d/2 pairs
    dot = einsum(q1, k1, pairs) + einsum(q2, k2, pairs)  # Q K^T
    cross = einsum(q1, k2, pairs) - einsum(q2, k1, pairs)  # Q x K^T
    dot, cross = (p[:, token_at][:, :, token_at] for p in (dot, cross))  # M (.) M^T: (H, N, N, d/2)
    term = "m f, h m n f, n f -> h m n"
    A = einsum(C, dot, C, term) + einsum(S, dot, S, term)  # Eq. 6-9: dot cos(th[m] - th[n]), by the addition theorem
    return A + einsum(S, cross, C, term) - einsum(C, cross, S, term)  # Eq. 10: and cross sin(th[m] - th[n])


def remerge(x: Tensor, token_at: Tensor, N_un: int) -> Tensor:
    """(M^T M)^-1 M^T x of Eq. 11: the average over the positions of each token. x (..., N, D) -> (..., N_un, D)."""
    wide = at_least_float32(x)
    total = wide.new_zeros(*x.shape[:-2], N_un, x.shape[-1]).index_add(-2, token_at, wide)
    count = wide.new_zeros(N_un).index_add(0, token_at, wide.new_ones(len(token_at)))
    return (total / count[:, None]).to(x.dtype)


def query_positions(token_at: Tensor, queries: int | None = None) -> Tensor:
    """The virtual positions, in order, whose outputs Eq. 11 averages: all N, or at most `queries` of each token.

    Not in the paper: s of a token's |P| positions estimate their average well, taken evenly from its sorted list
    at the offsets (2j + 1)|P| / 2s. s = 1 is the median position, s = |P| the paper.
    """
    if queries is None:
        return torch.arange(len(token_at), device=token_at.device)
    by_token = token_at.argsort(stable=True)  # positions grouped by token, ascending inside each group
    size = torch.bincount(token_at)
    s = size.clamp(max=queries)
    token = torch.arange(len(size), device=size.device).repeat_interleave(s)
    j = torch.arange(len(token), device=size.device) - (s.cumsum(0) - s)[token]
    offset = (2 * j + 1) * size[token] // (2 * s[token])
    return by_token[(size.cumsum(0) - size)[token] + offset].sort().values


def query_blocks(token_at: Tensor, queries: int | None = None) -> list[tuple[Tensor, int]]:
    """query_positions as blocks in order, each with the number of positions up to its last one, which is all it sees.

    All N positions are one block, for the kernel's own causal mask. A mask of ours is computed in full, so that a
    sample is cut in eight: that skips most of what a causal kernel skips.
    """
    at = query_positions(token_at, queries)
    blocks = at.chunk(1 if len(at) == len(token_at) else 8)
    return list(zip(blocks, (torch.stack([block[-1] for block in blocks]) + 1).tolist()))


def vtu_attention(q, k, v, token_at, cos, sin, queries: int | None = None, blocks=None) -> Tensor:
    """Causal attention over the virtual sequence (Eq. 10) and re-merge (Eq. 11), as it is run -> (H, N_un, d).

    q (H, N_un, d), k and v (H_kv, N_un, d), not rotated. To expand, rotate, attend and average equals Eq. 10 up to
    rounding, in fused calls and without an N x N matrix. Keys and values are exact at all N positions; queries are
    taken at those of `blocks`, by default query_blocks(token_at, queries), which are the same for every layer.
    A single q beside several k is a cached decoding step: the newest row, at the last position.
    """
    rows, step = q.shape[1], q.shape[1] == 1 < k.shape[1]
    k = rotate(k.index_select(1, token_at), cos, sin)  # M K: (H_kv, N, d), gone after this layer, as is M V
    v = v.index_select(1, token_at)
    if step:
        return attention(rotate(q, cos[-1:], sin[-1:]), k, v)  # the last position sees all, and has its row alone
    out, blocks = [], query_blocks(token_at, queries) if blocks is None else blocks
    for at, seen in blocks:
        q_at = rotate(q.index_select(1, token_at[at]), cos[at], sin[at])
        mask = None if len(at) == seen else at[:, None] >= torch.arange(seen, device=at.device)
        out.append(attention(q_at, k[:, :seen], v[:, :seen], mask, causal=mask is None))
    at = torch.cat([at for at, _ in blocks])
    return remerge(torch.cat(out, dim=1), token_at[at], rows)
