"""DyMU (arXiv 2504.17040v2) in plain PyTorch, in the paper's order and with its equation numbers.

    paper     here      shape     meaning
    N         N         int       positions of the sequence at hand, one for each token before any
                                  merging: 24 x 24 = 576 of a picture in LLaVA-1.5, and one more for
                                  the encoder's class token; in the decoder those of the text, too
    N_un      N_un      int       tokens that are left to stand at them, the *unique* ones
    N_i       N_i       int       tokens that enter encoder layer i's merge
    x_i       x         (N_i, D)  output of layer i's self-attention, residual added
    A, B                          every second token, from the first, and the rest; |A| tokens in A
    S_i       score     (|A|,)    how similar a token of A is to its partner in B
    tau_i               float     layer i merges the pairs whose score is above it
    r_i                 int       how many that are in layer i: on average over pictures in the
                                  paper, exactly in ToMe
    P_i[t]              set       the positions at which token t stands
    |P_i[t]|  size      (N_i,)    how many these are
    M         token_at  (N,)      the one-hot N x N_un matrix as an index: M e_un is e_un[token_at]
    C, S      cos, sin  (N, d/2)  of the RoPE angles of each position, one per pair of dimensions

H heads, d the width of one, D of all. If of four tokens (none is a class token) the first merges
into the last, token_at = [2, 1, 0, 2] and size = [1, 1, 2]. Every function takes one picture or one
sequence, without a batch axis: lengths differ, and nothing is padded.

Eq. 4, by which thresholds are found, is in extras/thresholds.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

# ---- An average, for Eq. 1 and Eq. 11 ----


def at_least_float32(x: Tensor) -> Tensor:
    """Similarities and averages are taken in float32 where the model runs in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def average(x: Tensor, goes_to: Tensor, n: int, size: Tensor | None = None):
    """Averages the rows of x that go to the same place, each counted size times, or once.

    x (..., rows, width), goes_to (rows,) with values below n, size (rows,)
    -> (..., n, width), and the sizes added up, (n,)
    """
    wide = at_least_float32(x)
    if size is None:
        size = wide.new_ones(len(goes_to))
    else:
        wide = wide * size[:, None]

    total = wide.new_zeros(*x.shape[:-2], n, x.shape[-1]).index_add(-2, goes_to, wide)
    size = size.new_zeros(n).index_add(0, goes_to, size)
    return (total / size[:, None]).to(x.dtype), size


# ---- 3.1 Dynamic Token Merging (DToMe): in every encoder layer, between attention and MLP ----


@dataclass(frozen=True)
class Seen:
    """What an encoder layer knows of its tokens when they are matched."""

    layer: int
    x: Tensor  # (N_i, D), after the attention
    q: Tensor  # (H, N_i, d), its queries; k and v alike
    k: Tensor
    v: Tensor
    size: Tensor  # (N_i,)
    token_at: Tensor  # (N,)
    class_token: bool  # whether token 0 is one, at position 0. SigLIP has none


def similar_keys(seen: Seen) -> Tensor:
    """How similar the tokens are, (N_i, N_i): the cosine of their keys' average over the heads.

    The paper writes the raw product k[t] . k[n].
    The authors' code takes the cosine, as ToMe does, and so do we. Every two tokens are compared,
    although `match` reads a quarter, so that a similarity of one's own can add to any of them.
    """
    return cosine(at_least_float32(seen.k).mean(dim=0))


def cosine(features: Tensor) -> Tensor:
    """features (N_i, D_k) -> the cosine of each pair (N_i, N_i)"""
    features = F.normalize(at_least_float32(features), dim=-1)

    # clamped, so that rounding lifts none over a threshold of 1
    return (features @ features.T).clamp(max=1)


def match(similarity: Tensor, class_token: bool = True) -> tuple[Tensor, Tensor]:
    """Pairs each token of A with the most similar token of B.

    similarity (N_i, N_i) -> score (|A|,), partner (|A|,), an index into B
    """
    assert similarity.shape == (len(similarity),) * 2, f"a similarity of shape {similarity.shape}"
    if len(similarity) == 1:
        # without a class token all tokens can merge into one: it is in A, and B is empty
        return similarity.new_full((1,), -torch.inf), similarity.new_zeros(1, dtype=torch.long)

    score, partner = similarity[::2, 1::2].max(dim=-1)

    # the class token is token 0, so it is in A: it never merges, and as only B receives,
    # nothing merges into it
    if class_token:
        score[0] = -torch.inf
    return score, partner


def merge(x: Tensor, size: Tensor, token_at: Tensor, partner: Tensor, chosen: Tensor):
    """Merges each chosen token of A into its partner in B.

    x (N_i, D), size (N_i,), token_at (N,) -> the same for the tokens that are left
    chosen (|A|,) is bool: in the paper, it is true where score > tau_i (`DyMU.choose`).

    The tokens of A that stay come first, then all of B. The next layer splits A and B by that
    order, so it decides which tokens can meet. Only if nothing merges does the order stay.
    """
    # the new length must be known: on a GPU this is the one time that a layer waits for it
    n_stay = int((~chosen).sum())
    if n_stay == len(chosen):
        # as when the authors' code runs one picture. So token_at is the identity until something
        # has merged, and the decoder may count on that
        return x, size, token_at

    n_left = n_stay + (len(x) - len(chosen))  # and all of B

    # old token -> new token: again a one-hot matrix kept as an index
    goes_to = token_at.new_empty(len(x))
    goes_to[::2] = torch.where(chosen, n_stay + partner, (~chosen).cumsum(0) - 1)
    goes_to[1::2] = torch.arange(n_stay, n_left, device=x.device)

    # Eq. 1, for all that meet in one token at once
    x, size = average(x, goes_to, n_left, size)

    # Eq. 2 and 3: each position follows its token, so that P[t] joins P[t_B]
    token_at = goes_to[token_at]
    return x, size, token_at


def size_bias(size: Tensor) -> Tensor:
    """Eq. 5: log|P|, (N_i,), is added to the scores of each key before the softmax.

    The exponential turns it into a factor |P|: a token of size s weighs as much as s copies of it.
    """
    return at_least_float32(size).log()


# ---- 3.2 Virtual Token Unmerging (VTU): in every decoder layer ----


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE turns each pair (a, b) into (a cos - b sin, b cos + a sin).

    x (..., N, d), cos and sin (N, d/2)
    Products of two that are turned depend on the difference of their angles: Eq. 6-8, below.
    Dimension f pairs with f + d/2, as in Hugging Face's checkpoints. Weights made for pairs of
    neighbours would run here without an error and answer nonsense.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_scores(q: Tensor, k: Tensor, token_at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Eq. 10 term by term, as the paper has it: products first, then their expansion.

    q (H, N_un, d), k (H_kv, N_un, d), not rotated -> A (H, N, N), before 1/sqrt(d), mask, softmax
    It is there for reading and for the tests.
    """
    # one head of k may serve several of q
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    q1, q2 = q.chunk(2, dim=-1)
    k1, k2 = k.chunk(2, dim=-1)

    # of tokens t and u, before the sum over the d/2 pairs of dimensions f
    product = "h t f, h u f -> h t u f"
    dot = einsum(q1, k1, product) + einsum(q2, k2, product)  # Q K^T
    cross = einsum(q1, k2, product) - einsum(q2, k1, product)  # Q x K^T

    dot = dot[:, token_at][:, :, token_at]  # M (.) M^T
    cross = cross[:, token_at][:, :, token_at]

    # Eq. 6-8: A = dot cos(theta_m - theta_n) + cross sin(theta_m - theta_n), at positions m and n,
    # summed over f. Eq. 9: cos(a - b) = cos a cos b + sin a sin b and
    # sin(a - b) = sin a cos b - cos a sin b. Together, Eq. 10:
    term = "m f, h m n f, n f -> h m n"
    A = einsum(cos, dot, cos, term) + einsum(sin, dot, sin, term)
    return A + einsum(sin, cross, cos, term) - einsum(cos, cross, sin, term)


def vtu_attention(
    q, k, v, token_at: Tensor, cos: Tensor, sin: Tensor, query_at: Tensor | None = None
) -> Tensor:
    """Causal attention at all N positions (Eq. 10), averaged back to the tokens (Eq. 11).

    k and v (H_kv, N_un, d); q (H, R, d) of the R newest tokens, which are all of them unless a
    cache holds the rest -> (H, R, d). None of q, k, v is rotated.

    query_at (Q,): where attention is computed: positions of these R tokens, ascending, at least
    one of each. None: all their positions, as in the paper. (Behind a cache None is for tokens
    that have one position each, the last R, such as text has.)

    To expand, rotate and attend gives Eq. 10 without the N x N x d/2 numbers of `rope_scores`.
    """
    R = q.shape[1]
    cached = k.shape[1] - R

    # M K, with each position's angle: made anew in each layer and step, so that a cache holds N_un
    k = rotate(k.index_select(1, token_at), cos, sin)
    v = v.index_select(1, token_at)  # M V

    if query_at is None and cached:
        return causal_attention(rotate(q, cos[-R:], sin[-R:]), k, v)
    if query_at is None:
        query_at = torch.arange(len(token_at), device=q.device)

    token = token_at[query_at] - cached  # which of the R stands there
    q = rotate(q.index_select(1, token), cos[query_at], sin[query_at])  # M Q

    # softmax(A / sqrt(d)) M V, where A is Eq. 10's
    out = causal_attention(q, k, v, query_at)
    return remerge(out, token, R)


def remerge(x: Tensor, token_at: Tensor, N_un: int) -> Tensor:
    """Eq. 11: (M^T M)^-1 M^T x, the average over the positions of each token.

    x (..., N, width) -> (..., N_un, width)
    This is the one approximation of VTU: a full model's outputs differ from position to position.
    """
    return average(x, token_at, N_un)[0]


# ---- What a user chooses ----


@dataclass(frozen=True)
class DyMU:
    """What to do with the visual tokens. By default nothing merges.

    A new idea is a function given here.
    """

    thresholds: tuple[float, ...] | None = None  # DToMe: layer i merges pairs scored above tau_i
    r: tuple[int, ...] | None = None  # ToMe, the baseline: layer i merges just its r_i best pairs
    rule: Callable[[Tensor, Seen], Tensor] | None = None  # or another: (score, seen) -> (|A|,) bool
    similarity: Callable[[Seen], Tensor] = similar_keys  # by which tokens are matched, (N_i, N_i)

    # False: the decoder is simply given fewer tokens, at consecutive positions, in merge's order
    vtu: bool = True

    # token_at -> query_at, at least one for each token (extras/sampled.py). None: all, the paper
    queries: Callable[[Tensor], Tensor] | None = None

    # rows, token_at behind the projector -> fewer (extras/second_stage.py). None: all, the paper
    after: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __post_init__(self):
        if sum(way is not None for way in (self.thresholds, self.r, self.rule)) > 1:
            raise ValueError("give at most one of thresholds (DToMe), r (ToMe) and rule")

    @property
    def merging(self) -> bool:
        return any(way is not None for way in (self.thresholds, self.r, self.rule))

    def choose(self, score: Tensor, seen: Seen) -> Tensor:
        """Which pairs of a layer merge: score (|A|,) -> (|A|,) bool"""
        if self.thresholds is not None:
            chosen = score > self.thresholds[seen.layer]
        elif self.r is not None:
            chosen = best(score, self.r[seen.layer])
        else:
            chosen = self.rule(score, seen)

        # never the class token, nor what a similarity forbids
        return chosen & (score > -torch.inf)


def best(score: Tensor, k: int) -> Tensor:
    """The k best pairs, or all if there are fewer: score (|A|,) -> (|A|,) bool"""
    indices = score.topk(min(k, len(score))).indices
    return torch.zeros_like(score, dtype=torch.bool).index_fill(0, indices, True)


# ---- Attention by PyTorch's fused kernels ----


def attention(q, k, v, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v

    q (H, Q, d), k and v (H_kv, K, d), where H is a multiple of H_kv -> (H, Q, d)
    A mask (Q, K) is added to the scores or, if it is bool, says which of them count.
    """
    grouped = len(k) < len(q)
    q, k, v = q[None], k[None], v[None]  # the fused kernels want a batch axis
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)[0]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, query_at: Tensor | None = None) -> Tensor:
    """Each query attends to the keys up to its own position.

    q (H, Q, d), k and v (H_kv, N, d) -> (H, Q, d)
    query_at (Q,): these positions, ascending. None: they are the last Q.
    """
    Q, N = q.shape[1], k.shape[1]
    if Q == N:  # the kernel's own mask takes query i to stand at key i
        return attention(q, k, v, causal=True)
    if query_at is None and Q == 1:
        # it sees all keys, so heads of q that share one of k can go as queries of one head: the
        # kernel then reads it once, which on a CPU takes a fraction of the time
        return attention(q.reshape(len(k), -1, q.shape[-1]), k, v).reshape(q.shape)

    position = torch.arange(N, device=q.device)
    query_at = position[-Q:] if query_at is None else query_at

    # The kernel computes what a mask of ours hides, too. So queries go in blocks, each with the
    # keys up to its last query alone. On a GPU all are one block: int() would have to wait for it
    on_cpu = q.device.type == "cpu"
    block = 64 if on_cpu else Q
    out = []
    for q_block, at in zip(q.split(block, dim=1), query_at.split(block)):
        keys = int(at[-1]) + 1 if on_cpu else N
        mask = at[:, None] >= position[:keys]
        out.append(attention(q_block, k[:, :keys], v[:, :keys], mask))
    return torch.cat(out, dim=1)
