"""Where an answer looked: the attention with which each of its words was chosen.

For the page of `--show FILE.html`. PyTorch's fused kernels do not give it, so it is computed once
more in plain form, from what the cache still holds.
"""

import math
import re

import torch
from einops import einsum, rearrange
from torch import Tensor

from dymu import at_least_float32, rotate
from extras.report import Measured
from model import TextConfig, rope_table

TOO_MUCH = 50_000_000  # bytes that the scores of one layer may take


@torch.no_grad()
def looked(session: Measured, prompt: Tensor) -> tuple[list[str], Tensor] | None:
    """The words of the answer to prompt (T,), and how each attended to the visual positions.

    -> words; (layers, words, visual positions), averaged over heads; positions are rows where the
    settings are without VTU. None for an answer without words, and where it would take TOO_MUCH.
    The session cannot go on behind it.
    """
    llava = session.llava
    cache = session.cache
    c = llava.config.text_config
    new = session.ids[len(prompt) :]
    words, ids_of = words_of(session.processor, new)
    T = len(new)
    if not words or 4 * c.num_attention_heads * T * (cache.positions + T) > TOO_MUCH:
        return None

    # back to before the prompt's last id: the ids of the answer are asked for again, all at once
    cache.rows -= T
    cache.positions -= T
    _, token_at = llava.splice(prompt, session.visual, session.settings.vtu)
    rows = torch.arange(cache.rows, cache.rows + T, device=token_at.device)
    token_at = torch.cat((token_at[: cache.positions], rows))

    queries = []
    hooks = [
        layer.q_proj.register_forward_hook(lambda layer, args, q: queries.append(q))
        for layer in llava.language_model.layers
    ]
    try:
        ids = torch.tensor(session.ids[-T - 1 : -1], device=token_at.device)
        llava.language_model(llava.language_model.embed_tokens(ids), token_at, cache)
    finally:
        for hook in hooks:
            hook.remove()

    at = visual_positions(session, prompt).to(token_at.device)
    found = []
    for layer, q in enumerate(queries):
        q = rearrange(q, "t (h d) -> h t d", d=c.head_dim)
        weight = attention(q, cache.kv[layer][0][:, : cache.rows], token_at, c)[:, at]
        found.append(torch.stack([weight[ids].mean(0) for ids in ids_of]).cpu())
    return words, torch.stack(found)


def attention(q: Tensor, k: Tensor, token_at: Tensor, c: TextConfig) -> Tensor:
    """Plain causal attention, averaged over heads, at the last T of N positions -> (T, N)

    q (H, T, d), not rotated; k (H_kv, R, d) as the cache has them, and token_at (N,).
    """
    T = q.shape[1]
    N = len(token_at)
    cos, sin = (x.to(q) for x in rope_table(N, c, q.device))
    if k.shape[1] < N:  # Eq. 10: expanded; else the cache has them rotated
        k = rotate(k[:, token_at], cos, sin)
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    q = rotate(q, cos[-T:], sin[-T:])

    score = einsum(at_least_float32(q), at_least_float32(k), "h t d, h n d -> h t n")
    position = torch.arange(N, device=q.device)
    later = position > position[-T:, None]
    score = (score / math.sqrt(c.head_dim)).masked_fill(later, -torch.inf)
    return score.softmax(-1).mean(0)


def visual_positions(session: Measured, prompt: Tensor) -> Tensor:
    """Where in the decoder's sequence the visual positions are, or the visual rows without VTU"""
    vtu = session.settings.vtu
    placeholder = torch.isin(prompt, torch.tensor(session.llava.config.placeholders))
    counts = torch.ones(len(prompt), dtype=torch.long)
    counts[placeholder] = torch.tensor([len(at if vtu else x) for x, at in session.visual])
    return placeholder.repeat_interleave(counts).nonzero().flatten()


def words_of(processor, ids: list[int]) -> tuple[list[str], list[list[int]]]:
    """The words of an answer, and which of its ids, by index, wrote each"""
    ends = [len(processor.decode(ids[: i + 1])) for i in range(len(ids))]
    words = []
    ids_of = []
    for word in re.finditer(r"\S+", processor.decode(ids)):
        spans = enumerate(zip([0, *ends], ends))
        wrote = [i for i, (start, end) in spans if start < word.end() and end > word.start()]
        if wrote:
            words.append(word[0])
            ids_of.append(wrote)
    return words, ids_of
