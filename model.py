"""CLIP or SigLIP, projector, Llama or a relative, and the LLaVA that joins them. Layers bear their names in Hugging
Face's checkpoints, shapes are without a batch axis, and DyMU changes a standard block in the places marked "differs".
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from anyres import Picture, Video, arrange, as_list, settle
from config import ACTIVATIONS, LlavaConfig, TextConfig, VisionConfig
from dymu import (
    DyMU,
    at_least_float32,
    attention,
    join_frames,
    match,
    merge,
    query_blocks,
    rotate,
    size_bias,
    vtu_attention,
)

# ---- CLIP and SigLIP ----


class VisionLayer(nn.Module):
    """A pre-norm transformer block in two halves: DToMe merges between them."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        D, self.heads, self.act = c.hidden_size, c.num_attention_heads, ACTIVATIONS[c.hidden_act]
        self.layer_norm1 = nn.LayerNorm(D, eps=c.layer_norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))
        self.layer_norm2 = nn.LayerNorm(D, eps=c.layer_norm_eps)
        self.fc1, self.fc2 = nn.Linear(D, c.intermediate_size), nn.Linear(c.intermediate_size, D)

    def attend(self, x: Tensor, size: Tensor, token_at: Tensor) -> tuple[Tensor, Tensor]:
        """x (N_i, D), size (N_i,) -> x (N_i, D), keys averaged over heads (N_i, D / heads)"""
        h = self.layer_norm1(x)
        q, k, v = (rearrange(p(h), "n (h d) -> h n d", h=self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        mask = None  # until something has merged this is plain attention, bit for bit
        if len(x) < len(token_at):  # differs from CLIP and SigLIP: Eq. 5
            mask = size_bias(size).to(x.dtype).expand(1, len(x), len(x))
        x = x + self.out_proj(rearrange(attention(q, k, v, mask), "h n d -> n (h d)"))
        return x, at_least_float32(k).mean(dim=0)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.layer_norm2(x))))


class VisionTower(nn.Module):
    """The ViT up to the layer that LLaVA reads, whose output no final norm has touched: later blocks are not built."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config, c = config, config.vision_config
        self.class_token = c.class_token  # token 0, if there is one: `match` keeps it from merging
        self.patch_embedding = nn.Conv2d(
            c.num_channels, c.hidden_size, c.patch_size, c.patch_size, bias=not c.class_token
        )
        self.position_embedding = nn.Embedding(c.class_token + c.grid**2, c.hidden_size)
        if c.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
            self.pre_layrnorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)  # the name is the checkpoints' own
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(config.vision_layers))

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pixels (3, H, W) -> x (N, D), the class token, if any, and patches; size all ones, token_at the identity"""
        c, weight = self.config.vision_config, self.patch_embedding.weight
        if tuple(pixels.shape) != (c.num_channels, c.image_size, c.image_size):
            raise ValueError(f"pixels {tuple(pixels.shape)}, wanted {(c.num_channels, c.image_size, c.image_size)}")
        x = rearrange(self.patch_embedding(pixels.to(weight)[None]), "1 d h w -> (h w) d")
        if self.class_token:
            x = torch.cat((self.class_embedding[None], x))
        x = x + self.position_embedding.weight
        if self.class_token:
            x = self.pre_layrnorm(x)
        return x, torch.ones(len(x), device=x.device), torch.arange(len(x), device=x.device)

    def forward(self, pixels: Tensor, settings: DyMU = DyMU()) -> tuple[Tensor, Tensor]:
        """pixels (3, H, W) -> x (N_un, D) of the layer that is read, token_at (N,)"""
        self.config.check(settings)
        x, size, token_at = self.embed(pixels)
        for i, layer in enumerate(self.layers):
            x, keys = layer.attend(x, size, token_at)
            # differs from CLIP and SigLIP: DToMe, between attention and MLP
            if settings.thresholds is not None or settings.r is not None:
                score, partner = match(keys, self.class_token)
                x, size, token_at = merge(x, size, token_at, partner, settings.edges(score, i))
            x = layer.feed_forward(x)
        if self.config.vision_feature_select_strategy == "default":  # without position 0, the class token's
            return settle(x, token_at[1:])
        return x, token_at


class Projector(nn.Module):
    def __init__(self, c: LlavaConfig):
        super().__init__()
        D, bias, self.act = c.text_config.hidden_size, c.multimodal_projector_bias, ACTIVATIONS[c.projector_hidden_act]
        self.linear_1, self.linear_2 = nn.Linear(c.vision_config.hidden_size, D, bias), nn.Linear(D, D, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


# ---- Llama ----


def rope_table(N: int, c: TextConfig, device) -> tuple[Tensor, Tensor]:
    """cos and sin (N, head_dim / 2) of theta_f[n] = n / base^(2f/d), float32"""
    f = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=device) / c.head_dim
    theta = torch.arange(N, dtype=torch.float32, device=device)[:, None] * (1 / c.rope_theta**f)
    return theta.cos(), theta.sin()


class KVCache:
    """Keys and values of every decoder layer, one entry per *row*: N_un for a picture, not N (until `expand`)."""

    def __init__(self, c: TextConfig, capacity: int, like: Tensor):
        self.kv = like.new_empty(c.num_hidden_layers, 2, c.num_key_value_heads, capacity, c.head_dim)
        self.rows = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (H_kv, new rows, d) -> those of all rows so far. `rows` moves on after the last layer."""
        end = self.rows + k.shape[1]
        self.kv[layer, 0, :, self.rows : end], self.kv[layer, 1, :, self.rows : end] = k, v
        if layer == len(self.kv) - 1:
            self.rows = end
        return self.kv[layer, 0, :, :end], self.kv[layer, 1, :, :end]

    def expand(self, token_at: Tensor, cos: Tensor, sin: Tensor) -> None:
        """From rows to virtual positions, keys rotated: N entries instead of N_un, and steps are plain Llama's then."""
        rows, self.rows, more = self.rows, len(token_at), self.kv.shape[3] - self.rows
        kv = self.kv.new_empty(*self.kv.shape[:3], self.rows + more, self.kv.shape[4])
        for new, (k, v) in zip(kv, self.kv[:, :, :, :rows]):
            new[0, :, : self.rows] = rotate(k.index_select(1, token_at), cos.to(k.dtype), sin.to(k.dtype))
            new[1, :, : self.rows] = v.index_select(1, token_at)
        self.kv = kv

    @property
    def bytes(self) -> int:
        """Bytes of the rows held so far."""
        return self.kv[..., : self.rows, :].numel() * self.kv.element_size()


class RMSNorm(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(c.hidden_size)), c.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class DecoderLayer(nn.Module):
    """Grouped-query attention with RoPE, then SwiGLU, each behind an RMSNorm."""

    def __init__(self, c: TextConfig, index: int):
        super().__init__()
        self.index, self.d, self.act = index, c.head_dim, ACTIVATIONS[c.hidden_act]
        D, Q, KV = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c), RMSNorm(c)
        self.q_proj, self.o_proj = nn.Linear(D, Q, c.attention_bias), nn.Linear(Q, D, c.output_bias)
        self.k_proj, self.v_proj = nn.Linear(D, KV, c.attention_bias), nn.Linear(D, KV, c.attention_bias)
        self.gate_proj, self.up_proj = (nn.Linear(D, c.intermediate_size, c.mlp_bias) for _ in range(2))
        self.down_proj = nn.Linear(c.intermediate_size, D, c.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, token_at, blocks, cache: KVCache | None) -> Tensor:
        h = self.input_layernorm(x)
        q, k, v = (rearrange(p(h), "n (h d) -> h n d", d=self.d) for p in (self.q_proj, self.k_proj, self.v_proj))
        if token_at is None:  # every row has one position, so its key is rotated once, before it is cached
            q, k = (rotate(t, cos[-len(x) :], sin[-len(x) :]) for t in (q, k))
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        if token_at is None:
            out = attention(q, k, v, causal=len(x) > 1)
        else:  # differs from Llama: VTU. Cached keys are not rotated: they are expanded and rotated here, where used
            out = vtu_attention(q, k, v, token_at, cos, sin, blocks=blocks)
        x = x + self.o_proj(rearrange(out, "h n d -> n (h d)"))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(self.act(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c)

    def forward(self, x: Tensor, token_at: Tensor, cos: Tensor, sin: Tensor, queries=None, cache=None) -> Tensor:
        """The new rows x (R, D) -> (R, D), normalised: all rows of a sequence, or with a filled cache the next one.

        token_at (N,): the row at each virtual position so far, cached rows counted; cos, sin (N, d/2). queries: as in
        `vtu_attention`. A norm, a linear layer and the MLP work row by row, f(M e) = M f(e): they run on R rows only.
        """
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        cached = cache.rows if cache is not None else 0
        assert not cached or len(x) == 1, f"{len(x)} rows behind {cached} cached ones"
        merged = len(token_at) > cached + len(x)  # else each row stands at its own position, and this is plain Llama
        blocks = query_blocks(token_at, queries) if merged and not cached else None
        for layer in self.layers:
            x = layer(x, cos, sin, token_at if merged else None, blocks, cache)
        return self.norm(x)


# ---- LLaVA ----


class Llava(nn.Module):
    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text_config)
        if config.image_grid_pinpoints:
            self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)

    def encode(self, pixels, settings: DyMU = DyMU()) -> list[tuple[Tensor, Tensor]]:
        """What a prompt shows -> for each placeholder its rows (R, D), and token_at (N,) over all visual rows so far.

        With `settings.temporal` pictures share rows with the one before.

        pixels: one picture or video, or a list of them: (3, H, W); for AnyRes models a Picture; or a Video.
        """
        return join_frames([self.encode_one(one, settings) for one in as_list(pixels)], settings.temporal)

    def encode_one(self, pixels, settings: DyMU) -> tuple[Tensor, Tensor]:
        """A picture or video -> its rows (R, D), token_at (N,). Crops and frames are encoded, and merge, one by one."""
        c = self.config
        takes = (Picture, Video) if c.has_video else Picture if c.image_grid_pinpoints else Tensor
        if not isinstance(pixels, takes):
            kind = type(pixels).__name__
            raise ValueError(f"pixels are a {kind}, not what this model's processor makes of a picture")
        crops = pixels[None] if isinstance(pixels, Tensor) else pixels[0]
        x, at = zip(*join_frames([self.vision_tower(crop, settings) for crop in crops], None))
        x, at = self.multi_modal_projector(torch.cat(x)), torch.stack(at)  # (R, D) of all crops, (C, N)
        if isinstance(pixels, Tensor):
            return x, at[0]
        return arrange(x, at, self.image_newline, pixels, c, settings.temporal)

    def splice(self, ids, visual: list[tuple[Tensor, Tensor]], vtu: bool = True) -> tuple[Tensor, Tensor]:
        """Puts the visual rows that `encode` gives in the place of the placeholders in ids (T,), in order.

        -> rows (R, D), token_at (N + text,) over them; with vtu=False every row has one position, token_at (R,).
        Raises ValueError for ids that the model cannot take.
        """
        c, embedding = self.config, self.language_model.embed_tokens
        ids = torch.as_tensor(ids, device=embedding.weight.device)
        places = torch.isin(ids, torch.tensor(c.placeholders, device=ids.device))
        text, vocab = ids[~places], c.text_config.vocab_size
        if (n := int(places.sum())) != len(visual):
            raise ValueError(f"{n} image placeholders in the prompt, {len(visual)} pictures given")
        if not len(text) or not 0 <= int(text.min()) <= int(text.max()) < vocab:
            raise ValueError(f"the prompt needs text, as token ids from 0 to {vocab - 1}")
        rows, token_at, stands, n = [], [], text[:0], 0  # stands: at which row each visual row is
        for i, part in enumerate(ids.tensor_split(places.nonzero().flatten().tolist())):
            if i:  # it begins with a placeholder
                x, at = visual[i - 1]
                stands = torch.cat((stands, torch.arange(n, n + len(x), device=ids.device)))
                rows, token_at, n, part = [*rows, x], [*token_at, stands[at]], n + len(x), part[1:]
            rows.append(embedding(part))
            token_at.append(torch.arange(n, n + len(part), device=ids.device))
            n += len(part)
        rows, token_at = torch.cat(rows), torch.cat(token_at) if vtu else torch.arange(n, device=ids.device)
        c.check_length(len(token_at))
        return rows, token_at

    def prepare(self, ids, pixels, settings: DyMU) -> tuple[Tensor, Tensor]:
        """encode, then splice. Raises ValueError where a placeholder is not of the kind of what stands for it."""
        c, shown = self.config, [] if pixels is None else as_list(pixels)
        wanted = [c.video_token_index if isinstance(one, Video) else c.image_token_index for one in shown]
        found = [i for i in torch.as_tensor(ids).tolist() if i in c.placeholders]
        if len(found) == len(wanted) and found != wanted:
            raise ValueError(f"the placeholders in the prompt are {found}, those of the pictures and videos {wanted}")
        return self.splice(ids, self.encode(shown, settings), settings.vtu)

    def head(self, x: Tensor) -> Tensor:
        tied = self.config.tie_word_embeddings
        return F.linear(x, (self.language_model.embed_tokens if tied else self.lm_head).weight)

    def forward(self, ids, pixels=None, settings: DyMU = DyMU()) -> Tensor:
        """ids (T,) with a placeholder for each picture or video in pixels, as `encode` takes them -> logits (R, vocab).

        R counts the text tokens and the unique visual tokens. Without pixels, a text-only prompt.
        """
        rows, token_at = self.prepare(ids, pixels, settings)
        return self.logits(rows, token_at, settings.queries)

    def logits(self, rows: Tensor, token_at: Tensor, queries: int | None = None) -> Tensor:
        """rows (R, D) and token_at (N,), as `splice` gives them -> logits (R, vocab)"""
        angles = rope_table(len(token_at), self.config.text_config, rows.device)
        return self.head(self.language_model(rows, token_at, *angles, queries))

    @torch.no_grad()
    def generate(self, ids, pixels=None, settings: DyMU = DyMU(), max_new_tokens=128, **options):
        """Iterates over the ids of the answer. ids and pixels as in `forward`, options as in `decode`."""
        rows, token_at = self.prepare(ids, pixels, settings)
        cache = self.new_cache(len(rows) + max_new_tokens)
        yield from self.decode(rows, token_at, cache, settings.queries, max_new_tokens, **options)

    def new_cache(self, capacity: int) -> KVCache:
        """capacity: rows, of the prompt and of what will be generated"""
        c = self.config.text_config
        return KVCache(c, min(capacity, c.max_position_embeddings), like=self.language_model.embed_tokens.weight)

    @torch.no_grad()
    def decode(
        self,
        rows,
        token_at,
        cache,
        queries=None,
        max_new_tokens=128,
        eos=None,
        temperature=0.0,
        seed=None,
        expand=False,
    ):
        """Prefills rows and token_at, as `splice` gives them, into an empty cache; then yields one id at a time.

        Greedy, or with a temperature sampled from softmax(logits / temperature). Ends after max_new_tokens, where the
        model's positions end, or with an id of eos (one or several; None: the checkpoint's own), which is yielded too.
        expand: after the prefill, trade the cache's memory for faster steps (`KVCache.expand`).
        """
        c, embedding = self.config.text_config, self.language_model.embed_tokens
        eos = self.config.eos_token_id if eos is None else (eos,) if isinstance(eos, int) else eos
        generator = None if seed is None else torch.Generator(rows.device).manual_seed(seed)
        start = len(token_at)
        end = min(start + max_new_tokens, c.max_position_embeddings + 1)  # the last id is not fed back
        cos, sin = rope_table(end, c, rows.device)
        token_at = torch.cat((token_at, torch.arange(len(rows), len(rows) + end - start, device=rows.device)))
        for N in range(start, end):
            x = self.language_model(rows, token_at[:N], cos[:N], sin[:N], queries, cache)
            logits = at_least_float32(self.head(x[-1]))
            if temperature > 0:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            else:
                token = int(logits.argmax())
            yield token
            if token in eos:
                return
            if expand and start == N and cache.rows < N:
                cache.expand(token_at[:N], cos[:N], sin[:N])
                token_at = torch.arange(end, device=rows.device)
            rows = embedding.weight[token][None]
