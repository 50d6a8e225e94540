"""What a checkpoint says of itself: config.json, by the names of Hugging Face, where what it omits is a default."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from dymu import DyMU

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # what OpenAI's CLIP was trained with
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@dataclass
class VisionConfig:
    """A ViT; the defaults are transformers' CLIPVisionConfig, whose values a config.json may omit."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, square
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    class_token: bool = True  # CLIP: token 0, and a norm before the blocks. SigLIP: neither, but a bias on its patches

    @property
    def grid(self) -> int:
        """Patches along each side of a crop."""
        return self.image_size // self.patch_size


@dataclass
class TextConfig:
    """Llama; Mistral, which has other numbers; Qwen2, which has biases. The defaults are transformers' LlamaConfig."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # fewer than heads: grouped-query attention; None: as many
    head_dim: int | None = None  # None: hidden_size / heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # base of the RoPE angles
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of o
    mlp_bias: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass
class LlavaConfig:
    """How the two are joined; the defaults are transformers' LlavaConfig."""

    vision_config: VisionConfig = field(default_factory=VisionConfig)
    text_config: TextConfig = field(default_factory=TextConfig)
    image_token_index: int = 32000
    vision_feature_layer: int = -2  # an index into [embeddings, output of block 0, output of block 1, ...]
    vision_feature_select_strategy: str = "default"  # "default" drops the class token, "full" keeps it
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = (2,)
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()  # AnyRes: the (height, width) that tiles may form; else none
    anyres_max: int | None = None  # AnyRes: tiles whose patches a picture may have at most; more are resampled to that
    video_token_index: int | None = None  # a placeholder of its own for a video; None: frames are pictures
    dtype: str | None = None  # what the checkpoint wants to run in; None: what its tensors are stored in

    @property
    def vision_layers(self) -> int:
        """How many blocks of the tower run: those up to the layer that is read."""
        last = self.vision_feature_layer
        return last if last >= 0 else self.vision_config.num_hidden_layers + 1 + last

    @property
    def visual_tokens(self) -> int:
        """N of one crop, before any merging."""
        c = self.vision_config
        return c.grid**2 + c.class_token - (self.vision_feature_select_strategy == "default")

    @property
    def has_video(self) -> bool:
        """Whether it is LLaVA-OneVision, to which a video is one thing and not several pictures."""
        return self.video_token_index is not None

    @property
    def placeholders(self) -> tuple[int, ...]:
        """The ids that stand for a picture or a video in a prompt."""
        return tuple(i for i in (self.image_token_index, self.video_token_index) if i is not None)

    def check(self, settings: DyMU) -> None:
        """Raises ValueError unless thresholds or r has a value per layer that runs, or per layer of the whole tower."""
        runs, whole = self.vision_layers, self.vision_config.num_hidden_layers
        for name, values in (("thresholds", settings.thresholds), ("r", settings.r)):
            if values is not None and len(values) not in (runs, whole):
                raise ValueError(f"{len(values)} {name} given, the vision tower runs {runs} of its {whole} layers")

    def check_length(self, positions: int) -> None:
        """Raises ValueError for a prompt of more virtual positions than the decoder was made for."""
        if positions > self.text_config.max_position_embeddings:
            limit = self.text_config.max_position_embeddings
            fewer = "fewer pictures or frames, or a shorter question"
            raise ValueError(f"the prompt takes {positions} positions, the model has {limit}: {fewer}")


# ---- config.json ----

# What a config.json may omit, where the dataclasses' defaults are not transformers': by model_type.
LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
LARGE |= dict(model_type="clip_vision_model", image_size=336, patch_size=14)  # CLIP ViT-L/14-336
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16)
SO400M |= dict(model_type="siglip_vision_model", image_size=384, patch_size=14)
NEXT = dict(image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])  # [height, width]
ONEVISION = dict(image_token_index=151646, vision_feature_layer=-1, vision_feature_select_strategy="full")
ONEVISION |= dict(image_grid_pinpoints=[[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)])
ONEVISION |= dict(vision_aspect_ratio="anyres_max_9", video_token_index=151647)
FAMILIES = {  # of the whole; the vision tower, where there is no vision_config at all; the model_type of the decoder
    "llava": ({}, LARGE, "llama"),
    "llava_next": (NEXT, LARGE, "llama"),
    "llava_onevision": (ONEVISION, SO400M, "qwen2"),
}
OF_FAMILIES = {"image_grid_pinpoints", "vision_aspect_ratio", "video_token_index"}  # of those whose defaults have them
TOWERS = {
    "clip_vision_model": dict(class_token=True),
    "siglip_vision_model": dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, class_token=False),
}
MISTRAL = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
QWEN2 = dict(intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768, vocab_size=151936)
DECODERS = {"llama": {}, "mistral": MISTRAL, "qwen2": QWEN2 | dict(eos_token_id=[])}
RANGES = {"num_hidden_layers": (1, 1000), "vision_feature_layer": (-1000, 1000)}
RANGES |= {"image_token_index": (0, 1e9), "video_token_index": (0, 1e9)}


def one_line(e: BaseException) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def read_json(path: Path, kind=dict):
    """An empty dict for a file that does not exist."""
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, OSError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as JSON ({one_line(e)})") from e
    if not isinstance(data, kind):
        raise ValueError(f"{path}: the JSON is a {type(data).__name__}, not an object")
    return data


def read_config(folder: Path) -> LlavaConfig:
    """config.json, where a field that equals transformers' default may be absent."""
    c, file = read_json(folder / "config.json"), folder / "config.json"

    def supported(what, found, *known):
        if found not in known:
            raise ValueError(f"{file}: {what} {found!r} is not implemented, only {', '.join(map(repr, known))}")

    def section(parent, name):
        part = parent.get(name) or {}
        if not isinstance(part, dict):
            raise ValueError(f"{file}: {name} is {part!r}, not an object")
        return part

    def fill(kind, values):
        given = {f: values[f.name] for f in dataclasses.fields(kind) if values.get(f.name) is not None}
        for f, value in given.items():
            low, high = RANGES.get(f.name, (1e-12, 1e9))
            number = type(value) is int or (type(value) is float and f.type is float)
            if f.type in (int, int | None, float) and not (number and low <= value <= high):
                raise ValueError(f"{file}: {f.name} is {value!r}")
        return kind(**{f.name: value for f, value in given.items()})

    supported("model_type", c.get("model_type"), *FAMILIES)
    family, tower, decoder = FAMILIES[c["model_type"]]
    vision, text = section(c, "vision_config") or tower, dict(model_type=decoder) | section(c, "text_config")
    vision, decoder = dict(model_type=tower["model_type"]) | vision, text["model_type"]
    supported("vision model_type", vision["model_type"], *TOWERS)
    supported("text model_type", decoder, *DECODERS)
    vision, text = TOWERS[vision["model_type"]] | vision, DECODERS[decoder] | text
    vision["class_token"] = TOWERS[vision["model_type"]]["class_token"]
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")  # the new name and the old one
    supported("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
    text["output_bias"] = decoder == "llama" and bool(text.get("attention_bias"))
    text["attention_bias"] = decoder == "qwen2" or text["output_bias"]
    eos_places = read_json(folder / "generation_config.json"), c, text
    eos = next((d["eos_token_id"] for d in eos_places if d.get("eos_token_id") is not None), 2)
    for kind in ("image", "video"):  # two names for one thing
        c[f"{kind}_token_index"] = c.get(f"{kind}_token_index", c.get(f"{kind}_token_id"))
    c = family | {k: v for k, v in c.items() if v is not None and k not in OF_FAMILIES - family.keys()}
    c["eos_token_id"] = tuple(eos) if isinstance(eos, list) else (eos,)
    c["tie_word_embeddings"] = bool(c.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    c["dtype"] = c.get("dtype") or c.get("torch_dtype")
    grids, cap = c.pop("image_grid_pinpoints", None), c.get("vision_aspect_ratio")
    c |= dict(vision_config=fill(VisionConfig, vision), text_config=fill(TextConfig, text), anyres_max=None)
    config = fill(LlavaConfig, c)
    v, t = config.vision_config, config.text_config
    if family:  # AnyRes
        try:
            config.image_grid_pinpoints = tuple((h, w) for h, w in grids)
            tiles = [edge / v.image_size for grid in grids for edge in grid if type(edge) is int]
            whole = len(tiles) == 2 * len(grids) > 0 and all(n >= 1 and n % 1 == 0 for n in tiles)
        except (TypeError, ValueError):
            whole = False
        if not whole:
            wanted = f"a list of [height, width] in multiples of the tower's {v.image_size} pixels"
            raise ValueError(f"{file}: image_grid_pinpoints is {grids!r}, wanted {wanted}")
        if cap is not None:
            known = re.fullmatch(r"anyres_max_([1-9]\d*)", str(cap))
            supported("vision_aspect_ratio", cap, cap if known else "anyres_max_N")
            config.anyres_max = int(known[1])
    window = text.get("sliding_window") if decoder == "mistral" or text.get("use_sliding_window") else None
    if type(window) is int:  # not implemented: prompts end where it would begin to matter
        t.max_position_embeddings = min(t.max_position_embeddings, window)
    supported("vision hidden_act", v.hidden_act, *ACTIVATIONS)
    supported("text hidden_act", t.hidden_act, *ACTIVATIONS)
    supported("projector_hidden_act", config.projector_hidden_act, *ACTIVATIONS)
    layers = range(-v.num_hidden_layers - 1, v.num_hidden_layers + 1)
    supported("vision_feature_layer", config.vision_feature_layer, *layers)
    # with AnyRes the tokens of a crop must be the square of its patches
    fitting = ("default", "full") if not family else ("default",) if v.class_token else ("full",)
    supported("vision_feature_select_strategy", config.vision_feature_select_strategy, *fitting)
    supported("dtype", config.dtype, None, "float32", "float16", "bfloat16")
    supported("eos_token_id", tuple(map(type, config.eos_token_id)), (int,) * len(config.eos_token_id))
    supported("hidden_size % num_attention_heads", v.hidden_size % v.num_attention_heads, 0)
    supported("num_attention_heads % num_key_value_heads", t.num_attention_heads % t.num_key_value_heads, 0)
    return config
