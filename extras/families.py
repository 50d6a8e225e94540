"""What sparse config.json files leave out, each family's classes, preprocessing and chat format.

For checkpoints beside LLaVA-1.5: LLaVA-Interleave, LLaVA-NeXT, LLaVA-OneVision. A config.json holds
only what differs from transformers' defaults, so these must be known. SigLIP is the same ViT as
CLIP, Mistral and Qwen2 are the same decoder as Llama, with other numbers and flags.

A new family: a row in the tables below, its classes, the names of its tensors in load.py (KEYS),
and a row in tests/test_families.py, which compares it with transformers.
"""

from dataclasses import fields
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from dymu import DyMU
from extras.door import one_line, read_json
from model import ACTIVATIONS, Llava, LlavaConfig, TextConfig, VisionConfig, VisionTower

# ---- What config.json may omit, where the dataclasses' defaults are not transformers' ----

# the towers of configs without a vision_config: CLIP ViT-L/14-336, SigLIP so400m/14-384
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("image_size", "patch_size")
CLIP_L = dict(zip(SIZES, (1024, 4096, 24, 16, 336, 14)), model_type="clip_vision_model")
SO400M = dict(zip(SIZES, (1152, 4304, 26, 16, 384, 14)), model_type="siglip_vision_model")

NEXT = {
    # [height, width]
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
ONEVISION = {
    "image_token_index": 151646,
    "video_token_index": 151647,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "image_grid_pinpoints": [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)],
    "vision_aspect_ratio": "anyres_max_9",
}

# model_type -> defaults of the whole, the tower and the decoder where nothing is said of them
FAMILIES = {
    "llava": ({}, CLIP_L, "llama"),
    "llava_next": (NEXT, CLIP_L, "llama"),
    "llava_onevision": (ONEVISION, SO400M, "qwen2"),
}
TOWERS = {
    "clip_vision_model": {"class_token": True},
    "siglip_vision_model": {
        "class_token": False,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
DECODERS = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
        "eos_token_id": [],
    },
}

# of numbers that may be other than from just above 0 to a billion
RANGES = {
    "num_hidden_layers": (1, 1000),
    "vision_feature_layer": (-1000, 1000),
    "image_token_index": (0, 1e9),
    "video_token_index": (0, 1e9),
}


def read_config(folder: Path) -> LlavaConfig:
    """config.json, where a field that equals transformers' default may be absent.

    Raises ValueError, naming the field, for what is wrong or not implemented.
    """
    file = folder / "config.json"
    said = read_json(file)
    try:
        supported("model_type", said.get("model_type"), *FAMILIES)
        defaults, tower, decoder = FAMILIES[said["model_type"]]
        vision = complete_vision(section(said, "vision_config"), tower)
        text = complete_text({"model_type": decoder} | section(said, "text_config"))
        values = complete(defaults, said, text, read_json(folder / "generation_config.json"))

        values["vision_config"] = build(VisionConfig, vision)
        values["text_config"] = build(TextConfig, text)
        config = build(classes(said["model_type"])[0], values)
        check(config)

        # a sliding window is not implemented: prompts end where it would begin to matter
        window = text.get("sliding_window")
        windowed = text["model_type"] == "mistral" or text.get("use_sliding_window")
        if windowed and type(window) is int:
            limit = config.text_config.max_position_embeddings
            config.text_config.max_position_embeddings = min(limit, window)
    except (StrictDataclassError, ValueError) as e:
        raise ValueError(f"{file}: {one_line(e)}") from e
    return config


def complete_vision(said: dict, tower: dict) -> dict:
    """vision_config with its defaults: those of its model_type or, if it is empty, of tower"""
    vision = {"model_type": tower["model_type"]} | (said or tower)
    supported("vision model_type", vision["model_type"], *TOWERS)
    defaults = TOWERS[vision["model_type"]]
    return defaults | vision | {"class_token": defaults["class_token"]}


def complete_text(said: dict) -> dict:
    """text_config with the defaults of its model_type, where some things are told in two ways"""
    supported("text model_type", said["model_type"], *DECODERS)
    kind = said["model_type"]
    text = DECODERS[kind] | said

    rope = section(text, "rope_parameters") or section(text, "rope_scaling")  # new name, old name
    supported("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))

    text["output_bias"] = kind == "llama" and bool(text.get("attention_bias"))
    text["attention_bias"] = kind == "qwen2" or text["output_bias"]
    return text


def complete(defaults: dict, said: dict, text: dict, generation: dict) -> dict:
    """What the whole says beside its two parts, with the family's defaults"""
    said = {name: value for name, value in said.items() if value is not None}
    for kind in ("image", "video"):  # two names for one thing
        if f"{kind}_token_id" in said:
            said.setdefault(f"{kind}_token_index", said[f"{kind}_token_id"])
    values = defaults | said

    # an id or a list of them, from the first place that has it
    places = [one.get("eos_token_id") for one in (generation, said, text)]
    eos = next((eos for eos in places if eos is not None), 2)
    values["eos_token_id"] = eos if isinstance(eos, list) else [eos]

    tied = values.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    values["tie_word_embeddings"] = bool(tied)
    values["dtype"] = values.get("dtype") or values.get("torch_dtype")
    return values


def build(kind, values: dict):
    """A config dataclass from the values that it has fields for

    Raises ValueError for a number out of its range; the dataclass itself names a wrong type.
    """
    given = {f.name: values[f.name] for f in fields(kind) if values.get(f.name) is not None}
    for name, value in given.items():
        least, most = RANGES.get(name, (1e-12, 1e9))
        if type(value) in (int, float) and not least <= value <= most:
            raise ValueError(f"{name} is {value!r}")
    return kind(**{name: to_tuple(value) for name, value in given.items()})


def to_tuple(value):
    """JSON's lists as tuples, inner ones too"""
    return tuple(map(to_tuple, value)) if isinstance(value, list) else value


def check(c: LlavaConfig) -> None:
    """What types alone do not tell"""
    v = c.vision_config
    t = c.text_config
    supported("vision hidden_act", v.hidden_act, *ACTIVATIONS)
    supported("text hidden_act", t.hidden_act, *ACTIVATIONS)
    supported("projector_hidden_act", c.projector_hidden_act, *ACTIVATIONS)
    supported("dtype", c.dtype, None, "float32", "float16", "bfloat16")
    strategy = c.vision_feature_select_strategy
    supported("vision_feature_select_strategy", strategy, "default", "full")
    layers = range(-v.num_hidden_layers - 1, v.num_hidden_layers + 1)
    supported("vision_feature_layer", c.vision_feature_layer, *layers)

    remainder = v.hidden_size % v.num_attention_heads
    supported("hidden_size % num_attention_heads", remainder, 0)
    remainder = t.num_attention_heads % t.num_key_value_heads
    supported("num_attention_heads % num_key_value_heads", remainder, 0)


def supported(what: str, found, *known) -> None:
    if found not in known:
        only = ", ".join(map(repr, known))
        raise ValueError(f"{what} {found!r} is not implemented, only {only}")


def section(parent: dict, name: str) -> dict:
    part = parent.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"{name} is {part!r}, not an object")
    return part


# ---- The classes of a family ----


def classes(model_type: str):
    """Config, model and processor"""
    import load
    from extras import anyres, video  # here, because they build on load.py, which builds on this

    return {
        "llava": (LlavaConfig, Llava, load.Processor),
        "llava_next": (anyres.AnyResConfig, anyres.AnyRes, anyres.AnyResProcessor),
        "llava_onevision": (video.OneVisionConfig, video.OneVision, video.OneVisionProcessor),
    }[model_type]


def model_class(c: LlavaConfig):
    if c.vision_feature_select_strategy == "default" and not c.vision_config.class_token:
        return FirstPatchDropped
    return classes(c.model_type)[1]


class FirstPatchDropped(Llava):
    """A config.json may ask SigLIP for "default", too: transformers then drops position 0."""

    def __init__(self, c: LlavaConfig):
        super().__init__(c)
        self.vision_tower = TowerWithoutFirst(c.vision_config, c.vision_layers, True)


class TowerWithoutFirst(VisionTower):
    def forward(self, pixels, settings: DyMU = DyMU()):
        from extras.anyres import settle

        x, token_at = super().forward(pixels, settings)
        return settle(x, token_at[1:])


# ---- Preprocessing ----

CLIP_PICTURES = {
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def read_preprocessing(folder: Path, c: LlavaConfig) -> tuple[dict, dict]:
    """What is done to pictures, and to the frames of a video, with what the files omit filled in"""
    both = read_json(folder / "processor_config.json")
    said = both.get("image_processor") or read_json(folder / "preprocessor_config.json")
    frames = both.get("video_processor") or read_json(folder / "video_preprocessor_config.json")

    side = c.vision_config.image_size
    pictures = CLIP_PICTURES | {"size": {"shortest_edge": side}, "crop_size": side}
    siglip = c.model_type == "llava" and not c.vision_config.class_token
    kind = said.get("image_processor_type") or ("Siglip" if siglip else "")
    if kind.startswith("Siglip"):
        pictures |= {"size": {"height": side, "width": side}}
        pictures |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

    pictures |= {name: value for name, value in said.items() if value is not None}
    return pictures, pictures | {name: value for name, value in frames.items() if value is not None}


# ---- Chat formats ----

# a mark in the checkpoint's Jinja template; what it makes of the text of a system (None: it knows
# none), a user and an assistant; and how it opens the answer
CHATS = (
    (".upper() + ': '", "{} ", "USER: {} ", "ASSISTANT: {} ", "ASSISTANT:"),  # Vicuna's
    ("'[INST] '", None, "[INST] {} [/INST]", " {}<\\s> ", ""),  # Mistral's, misspelt as it is there
    (  # ChatML, in two ways
        "'<|im_start|>' + message['role'] + ' '",
        "<|im_start|>system {}<|im_end|>",
        "<|im_start|>user {}<|im_end|>",
        "<|im_start|>assistant {}<|im_end|>",
        "<|im_start|>assistant\n",
    ),
    (
        "'<|im_start|>' + message['role'] + '\n'",
        "<|im_start|>system\n{}<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n{}<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    (  # Llama 3's
        "'<|start_header_id|>' + message['role']",
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
)

# without a template: what matters of that of llava-hf's checkpoints with such a decoder
NO_TEMPLATE = {
    "llama": "message['role'].upper() + ': ' '<image>\n'",
    "mistral": "'[INST] ' '<image>\n'",
    "qwen2": "'<|im_start|>' + message['role'] + ' ' '<image>' '\n' + content['text']",
}


def read_template(folder: Path, c: LlavaConfig) -> str:
    """The checkpoint's chat template"""
    jinja = folder / "chat_template.jinja"
    places = [
        read_json(folder / "processor_config.json").get("chat_template"),
        read_json(folder / "chat_template.json").get("chat_template"),
        jinja.read_text(encoding="utf-8") if jinja.is_file() else None,
        read_json(folder / "tokenizer_config.json").get("chat_template"),
        NO_TEMPLATE[c.text_config.model_type],
    ]
    found = next(template for template in places if template)
    return str(found).replace("\\n", "\n")  # in a Jinja string both are a line break


def chat(template: str, placeholders: list[str], question: str, turns=(), system: str = "") -> str:
    """The prompt of a question, as the template has it.

    placeholders: of what is shown, before the first question; turns: (question, answer) before
    this one; system: what the template puts in front of all. Raises ValueError.
    """
    known = [formats for mark, *formats in CHATS if mark in template]
    a_system_turn_of_its_own = "<|im_start|>system" in template
    if not known or "<image>" not in template or a_system_turn_of_its_own:
        raise ValueError("chat template not recognised; extras/families.py lists the known ones")

    system_format, user, assistant, opening = known[0]
    if system and system_format is None:
        raise ValueError("this chat format has no system prompt")

    # a line break is behind each placeholder, or before each text
    behind = "\n" if "'<image>\n'" in template else ""
    before = "\n" if "'\n' + content['text']" in template else ""

    def say(text, form, shown=""):
        return form.replace("{}", shown + before + text)

    said = say(system, system_format) if system else ""
    shown = "".join(one + behind for one in placeholders)
    for asked, answer in turns:
        said += say(asked, user, shown) + say(answer, assistant)
        shown = ""
    return said + say(question, user, shown) + opening
