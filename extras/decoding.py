"""Two other ways to decode: sampling, and from a cache of all positions.

For who wants varied answers, or faster steps after a merged picture for more memory.
"""

import torch
from torch import Tensor

from dymu import at_least_float32, rotate
from model import KVCache, Llava, rope_table


def sampler(temperature: float, seed: int, device):
    """For `Llava.decode`'s pick: draws from softmax(logits / temperature); 0: the likeliest id"""
    if temperature == 0:
        return torch.argmax
    generator = torch.Generator(device).manual_seed(seed)

    def pick(logits: Tensor) -> Tensor:
        share = (at_least_float32(logits) / temperature).softmax(-1)
        return torch.multinomial(share, 1, generator=generator)

    return pick


@torch.no_grad()
def prefill_expanded(
    llava: Llava, rows: Tensor, token_at: Tensor, cache: KVCache, queries=None
) -> tuple[Tensor, Tensor]:
    """Reads a prompt that ends in text, all but its last row, into an empty cache, and expands it.

    Each position then has an entry of its own, with its key rotated, and a step is plain Llama's.
    -> the last row and the map, for `Llava.decode`. Raises ValueError if it ends in a picture.
    """
    if len(rows) == len(token_at):  # nothing to expand
        return rows, token_at
    if (token_at == token_at[-1]).sum() > 1 or token_at[-1] < len(rows) - 1:
        raise ValueError("an expanded cache needs text behind the picture")

    before = token_at[:-1]
    llava.language_model(rows[:-1], before, cache, queries)

    cos, sin = rope_table(len(before), llava.language_model.c, rows.device)
    for layer, (k, v) in cache.kv.items():
        k = rotate(k.index_select(1, before), cos.to(k.dtype), sin.to(k.dtype))
        cache.kv[layer] = k, v.index_select(1, before)
    cache.rows = cache.positions
    return rows[-1:], torch.arange(len(token_at), device=rows.device)
