"""Worked examples for who forks this: other papers' methods, and some ideas, on the seam.

Each is a function or a picture that encodes itself, written anew from the paper, with nothing of
the core changed. `python -m lab.peers` measures them; RESULTS.md has the table.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dymu import DyMU, Seen, average, cosine, remerge, rotate, similar_keys
from model import KVCache, Llava, rope_table

# ---- Another similarity: DyMU(similarity=...). ToMe (arXiv 2210.09461) compares such features ----


def values(seen: Seen) -> Tensor:
    """By the values of all heads, side by side"""
    return cosine(rearrange(seen.v, "h n d -> n (h d)"))


def states(seen: Seen) -> Tensor:
    """By the tokens themselves, after the attention"""
    return cosine(seen.x)


def less_contrast_first(pixels: Tensor, patch_size: int, weight=0.03, similarity=similar_keys):
    """Another term: patches in which pixels differ are held back. pixels (3, H, W) of a picture

    That pixels alone may say which patches share a token is the idea of CTS (arXiv 2306.02095).
    The term is below 0, so thresholds are found with a floor of -inf.
    """
    patches = rearrange(pixels, "c (h p) (w q) -> (h w) c (p q)", p=patch_size, q=patch_size)
    contrast = patches.std(-1).mean(-1)
    contrast = contrast / contrast.mean().clamp(min=1e-6)

    def with_contrast(seen: Seen) -> Tensor:
        class_token = len(seen.token_at) - len(contrast)
        at_positions = F.pad(contrast, (class_token, 0))[:, None].to(seen.x)
        of = remerge(at_positions, seen.token_at, len(seen.x))  # (N_i, 1)
        return similarity(seen) - weight * (of + of.T)

    return with_contrast


# ---- VisionZip (arXiv 2412.04467) ----


@dataclass
class VisionZip:
    """Keeps the tokens that the class token attends to most, and some of the rest, evenly spread.

    These take in the others, each the most similar. In the paper the decoder is then given fewer
    tokens. Here token_at says where each stood, so that VTU costs no line.
    """

    pixels: Tensor
    dominant: int
    contextual: int  # 0: all the rest join the dominant ones

    def encode(self, llava: Llava, settings: DyMU):
        tower = llava.vision_tower
        x = tower.embed(self.pixels)
        for layer in tower.layers:
            x, q, k, _ = layer.attend(x, None)
            x = layer.feed_forward(x)

        # in the last layer that runs
        attended = (q[:, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)[0, 1:]
        order = attended.argsort(descending=True)
        rest = order[self.dominant :].sort().values
        spread = torch.linspace(0, len(rest) - 1, self.contextual, device=x.device)
        spread = spread.round().long()
        kept = torch.cat((order[: self.dominant], rest[spread])).sort().values

        taking = rest[spread].sort().values if self.contextual else kept
        similar = cosine(k.mean(0)[1:])[:, taking]
        goes_to = taking[similar.argmax(-1)]
        goes_to[kept] = kept
        token_at = torch.searchsorted(kept, goes_to)
        return llava.multi_modal_projector(remerge(x[1:], token_at, len(kept))), token_at


# ---- FastV (arXiv 2403.06764) ----


def attention_from(layer, x: Tensor, token_at: Tensor, cos, sin, row: int) -> Tensor:
    """How much a row of text attends to each row of x (R, D) in a decoder layer, mean over heads"""
    h = layer.input_layernorm(x)
    q = rearrange(layer.q_proj(h[row]), "(h d) -> h 1 d", d=layer.d)
    k = rearrange(layer.k_proj(h), "n (h d) -> h n d", d=layer.d)
    k = k.repeat_interleave(len(q) // len(k), 0)

    position = int((token_at == row).nonzero())
    before = slice(0, position + 1)
    k = rotate(k[:, token_at[before]], cos[before], sin[before])
    q = rotate(q, cos[position], sin[position])
    weight = (q @ k.mT / layer.d**0.5).softmax(-1).mean(0)[0]
    return weight.new_zeros(len(x)).index_add(0, token_at[before], weight)


@torch.no_grad()
def fastv(llava, ids, visual, keep, settings=DyMU(), after=2, merged=False, row=-1) -> Tensor:
    """The logits of all rows of ids (T,) but those of the visual tokens that FastV drops.

    It runs `after` layers with all tokens; behind them `keep` stay, those that a row (the last of
    the question) attends to most in the last of these layers. merged: the others are not dropped,
    each joins the most similar that stays. visual: one picture's, from `Llava.encode`. If settings
    merge it is FastV behind DyMU.
    """
    rows, token_at = llava.splice(ids, visual, settings.vtu)
    (first,) = llava.find_placeholders(ids, 1)
    N_un = len(visual[0][0])
    decoder = llava.language_model
    cos, sin = (one.to(rows) for one in rope_table(len(token_at), decoder.c, rows.device))

    x = rows
    cache = KVCache()
    for layer in decoder.layers[:after]:
        weight = attention_from(layer, x, token_at, cos, sin, row % len(x))
        x = layer(x, token_at, cos, sin, None, cache)

    stays = torch.ones(len(x), dtype=torch.bool, device=x.device)
    stays[first : first + N_un] = False
    stays[first + weight[first : first + N_un].topk(min(keep, N_un)).indices] = True
    number = stays.cumsum(0) - 1
    if merged:
        kept = first + stays[first : first + N_un].nonzero().flatten()
        nearest = number[kept[cosine(x)[:, kept].argmax(-1)]]
        goes_to = torch.where(stays, number, nearest)
        size = torch.bincount(token_at).float()
        x, _ = average(x, goes_to, int(stays.sum()), size)
        token_at = goes_to[token_at]
    else:
        here = stays[token_at]
        x = x[stays]
        token_at = number[token_at[here]]
        cos, sin = cos[here], sin[here]

    for layer in decoder.layers[after:]:
        x = layer(x, token_at, cos, sin, None, cache)
    return llava.logits(decoder.norm(x))


# ---- The question decides, as in SparseVLM (arXiv 2410.04417) ----


@torch.no_grad()
def attended(llava: Llava, ids: Tensor, pixels: Tensor, share=0.25, layers=2) -> Tensor:
    """Which positions the end of the question attends to most, in a first pass -> (N,) bool

    ids (T,): the prompt; share: of the positions; layers: so many of the decoder run, the last one
    counts. `Controlled(pixels, attended(llava, ids, pixels))` merges the others further.
    """
    x, token_at = llava.prepare(ids, pixels, DyMU())
    (first,) = llava.find_placeholders(ids, 1)
    table = rope_table(len(token_at), llava.config.text_config, x.device)
    cos, sin = (one.to(x) for one in table)
    for layer in llava.language_model.layers[:layers]:
        weight = attention_from(layer, x, token_at, cos, sin, len(x) - 1)
        x = layer(x, token_at, cos, sin, None, KVCache())

    weight = weight[first : first + llava.config.visual_tokens].float()
    return weight >= weight.quantile(1 - share)
