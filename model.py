"""CLIP, a projector, Llama, and the LLaVA that joins them, with DyMU in it.

Parameters bear the names of Hugging Face's checkpoints. Shapes are without a batch axis: one
picture, one sequence. A row is what stands for one token in the decoder, of text or of a picture.
DyMU changes a standard block in the places marked "differs from".
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

import dymu
from dymu import DyMU

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI trained CLIP with it
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


# ---- CLIP, the vision tower ----


@strict
@dataclass
class VisionConfig:
    """A ViT. The defaults are transformers' CLIPVisionConfig; a config.json may omit them."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, square
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5

    # CLIP: token 0, and a norm before the blocks. SigLIP: neither, but a bias on its patches
    class_token: bool = True

    @property
    def grid(self) -> int:
        """Patches along each side of a picture."""
        return self.image_size // self.patch_size


class VisionLayer(nn.Module):
    """A pre-norm transformer block in two halves. DToMe merges between them."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        D = c.hidden_size
        self.heads = c.num_attention_heads

        self.layer_norm1 = nn.LayerNorm(D, eps=c.layer_norm_eps)
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

        self.layer_norm2 = nn.LayerNorm(D, eps=c.layer_norm_eps)
        self.fc1 = nn.Linear(D, c.intermediate_size)
        self.act = ACTIVATIONS[c.hidden_act]
        self.fc2 = nn.Linear(c.intermediate_size, D)

    def attend(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N_i, D), bias (N_i,) on each key's scores -> x (N_i, D); q, k and v (H, N_i, d)"""
        normed = self.layer_norm1(x)
        q = rearrange(self.q_proj(normed), "n (h d) -> h n d", h=self.heads)
        k = rearrange(self.k_proj(normed), "n (h d) -> h n d", h=self.heads)
        v = rearrange(self.v_proj(normed), "n (h d) -> h n d", h=self.heads)

        out = dymu.attention(q, k, v, mask=None if bias is None else bias.expand(len(x), -1))
        x = x + self.out_proj(rearrange(out, "h n d -> n (h d)"))
        return x, q, k, v

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.layer_norm2(x))))


class VisionTower(nn.Module):
    """The ViT up to the layer that LLaVA reads.

    What would come after it, blocks and a final norm, is not built.
    """

    def __init__(self, c: VisionConfig, layers: int, keep_class_token: bool):
        super().__init__()
        self.c = c
        self.keep_class_token = keep_class_token
        D = c.hidden_size

        # CLIP has no bias here, SigLIP has
        self.patch_embedding = nn.Conv2d(
            c.num_channels, D, c.patch_size, stride=c.patch_size, bias=not c.class_token
        )
        self.position_embedding = nn.Embedding(c.class_token + c.grid**2, D)
        if c.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(D))
            # the checkpoints' own spelling
            self.pre_layrnorm = nn.LayerNorm(D, eps=c.layer_norm_eps)

        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(layers))

    def forward(self, pixels: Tensor, settings: DyMU = DyMU()) -> tuple[Tensor, Tensor]:
        """pixels (3, H, W) -> x (N_un, D) of the layer that is read, token_at (N,)"""
        check_layers(settings, len(self.layers), self.c.num_hidden_layers)
        x = self.embed(pixels)
        size = torch.ones(len(x), device=x.device)
        token_at = torch.arange(len(x), device=x.device)
        bias = None  # until something has merged

        for i, layer in enumerate(self.layers):
            x, q, k, v = layer.attend(x, bias)

            # differs from CLIP: DToMe, between attention and MLP
            if settings.merging:
                seen = dymu.Seen(i, x, q, k, v, size, token_at, self.c.class_token)
                score, partner = dymu.match(settings.similarity(seen), self.c.class_token)
                chosen = settings.choose(score, seen)
                x, size, token_at = dymu.merge(x, size, token_at, partner, chosen)

                # differs from CLIP: Eq. 5, in the next layer's attention. It takes x's dtype
                if len(x) < len(token_at):
                    bias = dymu.size_bias(size).to(x.dtype)

            x = layer.feed_forward(x)

        if self.keep_class_token or not self.c.class_token:
            return x, token_at

        # the class token is token 0 still, and stands at position 0 alone
        return x[1:], token_at[1:] - 1

    def embed(self, pixels: Tensor) -> Tensor:
        """pixels (3, H, W) -> x (N, D): the class token, if there is one, and patches

        Raises ValueError for pixels of another shape.
        """
        wanted = (self.c.num_channels, self.c.image_size, self.c.image_size)
        if pixels.shape != wanted:
            raise ValueError(f"pixels {tuple(pixels.shape)}, wanted {wanted}")

        x = self.patch_embedding(pixels.to(self.patch_embedding.weight)[None])
        x = rearrange(x, "1 d h w -> (h w) d")
        if not self.c.class_token:
            return x + self.position_embedding.weight

        x = torch.cat((self.class_embedding[None], x))
        return self.pre_layrnorm(x + self.position_embedding.weight)


def check_layers(settings: DyMU, runs: int, layers: int) -> None:
    """Raises ValueError unless thresholds, or r, has a value for each running layer, or for all"""
    for name in ("thresholds", "r"):
        values = getattr(settings, name)
        if values is not None and len(values) not in (runs, layers):
            raise ValueError(
                f"{len(values)} {name} given, the vision tower runs {runs} of its {layers} layers"
            )


# ---- Llama, the language model ----


@strict
@dataclass
class TextConfig:
    """Llama and its relatives. The defaults are transformers' LlamaConfig."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32

    # fewer than heads: grouped-query attention; None: as many
    num_key_value_heads: int | None = None

    head_dim: int | None = None  # None: hidden_size / heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float | int = 1e-6
    rope_theta: float | int = 10000.0  # base of the RoPE angles
    attention_bias: bool = False  # of q, k and v: Qwen2 has them
    output_bias: bool = False  # of o: in a config.json of Llama attention_bias is all four
    mlp_bias: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


def rope_table(N: int, c: TextConfig, device, start: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin (N - start, d/2) of theta_f[n] = n / base^(2f / d), float32"""
    exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=device) / c.head_dim
    n = torch.arange(start, N, dtype=torch.float32, device=device)
    theta = n[:, None] * (1 / c.rope_theta**exponent)
    return theta.cos(), theta.sin()


class KVCache:
    """Keys and values of every decoder layer, one entry per row: N_un for a picture, not N.

    Keys are rotated if every row has one position. If not, they are rotated where they are used.
    """

    def __init__(self):
        self.kv = {}  # layer -> k and v (H_kv, room, d), where room >= rows
        self.rows = 0
        self.positions = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (H_kv, R, d) of the newest rows -> those of all rows so far"""
        end = self.rows + k.shape[1]
        if layer in self.kv:
            old_k, old_v = self.kv[layer]
            k = self.behind(old_k, k)
            v = self.behind(old_v, v)
        self.kv[layer] = k, v
        return k[:, :end], v[:, :end]

    def behind(self, old: Tensor, new: Tensor) -> Tensor:
        """The cached rows of old, then new. Room is doubled at need: a step copies one row."""
        end = self.rows + new.shape[1]
        if end > old.shape[1]:
            old = F.pad(old, (0, 0, 0, end))
        old[:, self.rows : end] = new
        return old

    def rotate(self, cos: Tensor, sin: Tensor) -> None:
        """Turns every key by the angle of its row: cos, sin (rows, d/2)"""
        for layer, (k, v) in self.kv.items():
            self.kv[layer] = dymu.rotate(k[:, : self.rows], cos.to(k), sin.to(k)), v

    @property
    def bytes(self) -> int:
        """Of the rows that are held."""
        return sum(x[:, : self.rows].nbytes for kv in self.kv.values() for x in kv)


class RMSNorm(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c.hidden_size))
        self.eps = c.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = dymu.at_least_float32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class DecoderLayer(nn.Module):
    """Grouped-query attention with RoPE, then SwiGLU, an RMSNorm before each."""

    def __init__(self, c: TextConfig, index: int):
        super().__init__()
        D = c.hidden_size
        q_size = c.num_attention_heads * c.head_dim
        kv_size = c.num_key_value_heads * c.head_dim
        self.index = index
        self.d = c.head_dim

        self.input_layernorm = RMSNorm(c)
        self.q_proj = nn.Linear(D, q_size, bias=c.attention_bias)
        self.k_proj = nn.Linear(D, kv_size, bias=c.attention_bias)
        self.v_proj = nn.Linear(D, kv_size, bias=c.attention_bias)
        self.o_proj = nn.Linear(q_size, D, bias=c.output_bias)

        self.post_attention_layernorm = RMSNorm(c)
        self.gate_proj = nn.Linear(D, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(D, c.intermediate_size, bias=c.mlp_bias)
        self.act = ACTIVATIONS[c.hidden_act]
        self.down_proj = nn.Linear(c.intermediate_size, D, bias=c.mlp_bias)

    def forward(self, x: Tensor, token_at, cos, sin, query_at, cache: KVCache) -> Tensor:
        """x (R, D) -> (R, D)

        token_at, cos, sin, query_at: as in `vtu_attention`. token_at=None makes it plain Llama,
        with cos and sin (R, d/2) of these rows alone.
        """
        normed = self.input_layernorm(x)
        q = rearrange(self.q_proj(normed), "n (h d) -> h n d", d=self.d)
        k = rearrange(self.k_proj(normed), "n (h d) -> h n d", d=self.d)
        v = rearrange(self.v_proj(normed), "n (h d) -> h n d", d=self.d)

        if token_at is None:
            k, v = cache.append(self.index, dymu.rotate(k, cos, sin), v)
            out = dymu.causal_attention(dymu.rotate(q, cos, sin), k, v)
        else:
            # differs from Llama: VTU. A token has an angle at each of its positions,
            # so its key is cached unrotated
            k, v = cache.append(self.index, k, v)
            out = dymu.vtu_attention(q, k, v, token_at, cos, sin, query_at)

        x = x + self.o_proj(rearrange(out, "h n d -> n (h d)"))

        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(self.act(self.gate_proj(normed)) * self.up_proj(normed))


class Llama(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c)

    def forward(self, x: Tensor, token_at: Tensor, cache: KVCache, queries=None) -> Tensor:
        """The rows x (R, D) that follow those in the cache -> (R, D), normalised.

        token_at (N,): which row stands at each position so far, the first cached one being row 0.
        If no row has two positions, it must be the identity. queries: see `DyMU`.

        Norms, linear layers and the MLP work row by row, f(M e) = M f(e), so they run on R rows,
        not on N positions.
        """
        N = len(token_at)
        past = cache.positions
        plain = cache.rows + len(x) == N  # every row so far has one position: this is Llama

        # plain Llama needs the new rows' angles alone
        cos, sin = rope_table(N, self.c, x.device, start=past if plain else 0)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)

        # if what is cached was plain until now, its keys were rotated, which is taken back
        if not plain and cache.rows == past:
            cache.rotate(cos[:past], -sin[:past])

        if len(x) == N - past:
            query_at = None  # each of the new rows has one position
        elif queries is None:
            query_at = torch.arange(past, N, device=x.device)
        else:
            query_at = queries(token_at).sort().values
            query_at = query_at[query_at >= past]
            found = token_at[query_at].unique()
            assert len(found) == len(x), "queries must give a position of each token"

        for layer in self.layers:
            x = layer(x, None if plain else token_at, cos, sin, query_at, cache)

        cache.rows += len(x)
        cache.positions = N
        return self.norm(x)


# ---- LLaVA ----


@strict
@dataclass
class LlavaConfig:
    """How the two are joined. The defaults are LLaVA-1.5's, but for those of the two configs.

    What else a config.json of each family may leave out is in extras/families.py.
    """

    vision_config: VisionConfig = field(default_factory=VisionConfig)
    text_config: TextConfig = field(default_factory=TextConfig)
    model_type: str = "llava"
    image_token_index: int = 32000

    # an index into [embeddings, output of block 0, output of block 1, ...]
    vision_feature_layer: int = -2

    # "default" drops the class token, "full" keeps it
    vision_feature_select_strategy: str = "default"

    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = (2,)
    dtype: str | None = None  # to run in; None: as its tensors are stored

    @property
    def vision_layers(self) -> int:
        """How many blocks of the tower run: those up to the layer that is read."""
        last = self.vision_feature_layer
        return last if last >= 0 else self.vision_config.num_hidden_layers + 1 + last

    @property
    def visual_tokens(self) -> int:
        """N of one picture, before any merging."""
        c = self.vision_config
        return c.class_token + c.grid**2 - (self.vision_feature_select_strategy == "default")

    @property
    def placeholders(self) -> tuple[int, ...]:
        """The ids that stand for a picture in a prompt."""
        return (self.image_token_index,)

    def check_length(self, positions: int) -> None:
        """Raises ValueError for a prompt of more positions than the decoder was made for."""
        limit = self.text_config.max_position_embeddings
        if positions > limit:
            raise ValueError(
                f"the prompt takes {positions} positions, the model has {limit}: "
                "fewer pictures or frames, or a shorter question"
            )


def as_list(pixels) -> list:
    """What a prompt shows: nothing, one picture or a list of them -> a list"""
    if pixels is None:
        return []
    return pixels if isinstance(pixels, list) else [pixels]


class Projector(nn.Module):
    def __init__(self, c: LlavaConfig):
        super().__init__()
        D = c.text_config.hidden_size
        self.linear_1 = nn.Linear(c.vision_config.hidden_size, D, bias=c.multimodal_projector_bias)
        self.act = ACTIVATIONS[c.projector_hidden_act]
        self.linear_2 = nn.Linear(D, D, bias=c.multimodal_projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class Llava(nn.Module):
    def __init__(self, c: LlavaConfig):
        super().__init__()
        self.config = c
        text = c.text_config
        keep_class_token = c.vision_feature_select_strategy == "full"
        self.vision_tower = VisionTower(c.vision_config, c.vision_layers, keep_class_token)
        self.multi_modal_projector = Projector(c)
        self.language_model = Llama(text)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def forward(self, ids: Tensor, pixels=None, settings: DyMU = DyMU()) -> Tensor:
        """ids (T,) with one placeholder for each picture in pixels -> logits (R, vocab).

        R counts the text and what is left of the visual tokens.
        pixels: see `encode`; None for a prompt of text alone.
        """
        rows, token_at = self.prepare(ids, pixels, settings)
        return self.logits(self.language_model(rows, token_at, KVCache(), settings.queries))

    def generate(self, ids, pixels=None, settings=DyMU(), max_new_tokens=128, **options):
        """Iterates over the ids of the answer to ids and pixels, which are as in `forward`.

        options are passed on to `decode`.
        """
        with torch.no_grad():
            rows, token_at = self.prepare(ids, pixels, settings)
        return self.decode(rows, token_at, KVCache(), settings.queries, max_new_tokens, **options)

    @torch.no_grad()
    def decode(
        self, rows, token_at, cache, queries=None, max_new_tokens=128, eos=None, pick=torch.argmax
    ):
        """Yields the ids that follow the rows, one at a time, up to and with an end-of-text id.

        rows, token_at, cache, queries: as in `Llama`; eos: an id, or several, in the place of the
        checkpoint's own; pick: logits (vocab,) -> id, by default the likeliest. It ends early
        where the decoder's positions end.
        """
        eos = self.config.eos_token_id if eos is None else eos
        eos = (eos,) if isinstance(eos, int) else eos
        limit = self.config.text_config.max_position_embeddings

        for _ in range(max_new_tokens):
            cached = cache.rows
            x = self.language_model(rows, token_at, cache, queries)
            last = x[token_at[-1:] - cached]  # at the last position, even if a picture ends there
            id = int(pick(self.logits(last)[0]))
            yield id

            if id in eos or cache.positions >= limit:
                return

            # the id gets a row of its own, at the next position
            rows = self.language_model.embed_tokens.weight[id][None]
            token_at = F.pad(token_at, (0, 1), value=cache.rows)

    def prepare(self, ids: Tensor, pixels, settings: DyMU) -> tuple[Tensor, Tensor]:
        """ids, pixels: as in `forward` -> what the decoder takes: rows (R, D), token_at (N,)"""
        return self.splice(ids, self.encode(pixels, settings), settings.vtu)

    def encode(self, pixels, settings: DyMU = DyMU()) -> list[tuple[Tensor, Tensor]]:
        """For each picture its rows (N_un, D), as the decoder takes them, and token_at (N,).

        pixels: one picture or a list of them, each (3, H, W) or an object that encodes itself, as
        tiles and videos do in extras/: picture.encode(llava, settings) -> rows, token_at, or a
        list of these if it has several placeholders
        """
        visual = []
        for picture in as_list(pixels):
            if isinstance(picture, Tensor):
                x, token_at = self.vision_tower(picture, settings)
                x = self.multi_modal_projector(x)
                if settings.after is not None:
                    x, token_at = settings.after(x, token_at)
                visual.append((x, token_at))
            elif hasattr(picture, "encode") and not isinstance(picture, str):
                visual += as_list(picture.encode(self, settings))
            else:
                raise ValueError(f"pixels are a {type(picture).__name__}, see Processor.image")
        return visual

    def splice(self, ids: Tensor, visual: list, vtu: bool = True) -> tuple[Tensor, Tensor]:
        """Puts the rows of each picture in the place of its placeholder in ids.

        ids (T,), visual: as `encode` gives it -> rows (R, D), token_at (N,)
        vtu=False: each row has one position. Raises ValueError for a prompt that the model cannot
        take. In a picture's token_at -1 is the last row of the picture before it, and so on: such
        a row stands in both (extras/video.py).
        """
        embed = self.language_model.embed_tokens
        ids = torch.as_tensor(ids, device=embed.weight.device)
        split_at = self.find_placeholders(ids, len(visual))

        rows = []
        token_at = []
        row_of = ids[:0]  # where each row of a picture is, of all rows
        n = 0  # rows so far
        for i, text in enumerate(ids.tensor_split(split_at)):
            if i > 0:  # it begins with a placeholder
                x, at = visual[i - 1]
                at = at + len(row_of)
                row_of = torch.cat((row_of, torch.arange(n, n + len(x), device=ids.device)))
                token_at.append(row_of[at])
                rows.append(x)
                n += len(x)
                text = text[1:]

            rows.append(embed(text))
            token_at.append(torch.arange(n, n + len(text), device=ids.device))
            n += len(text)

        token_at = torch.cat(token_at) if vtu else torch.arange(n, device=ids.device)
        self.config.check_length(len(token_at))
        return torch.cat(rows), token_at

    def find_placeholders(self, ids: Tensor, pictures: int) -> list[int]:
        """Where in ids (T,) they are; ValueError if not as many as pictures, or for wrong ids."""
        found = torch.isin(ids, torch.tensor(self.config.placeholders, device=ids.device))
        n = int(found.sum())
        if n != pictures:
            raise ValueError(f"{n} image placeholders in the prompt, {pictures} pictures given")

        text = ids[~found]
        vocab = self.config.text_config.vocab_size
        if not len(text) or text.min() < 0 or text.max() >= vocab:
            raise ValueError(f"the prompt needs text, as token ids from 0 to {vocab - 1}")
        return found.nonzero().flatten().tolist()

    def logits(self, x: Tensor) -> Tensor:
        """Rows that the language model gives, (..., D) -> (..., vocab)"""
        head = self.language_model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(x, head.weight)
