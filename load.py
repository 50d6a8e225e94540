"""From a Hub id or a folder to a model and its processor: configuration, weights, pictures, prompts.

Only data is read, never a pickle that could run code. What is wrong with a checkpoint or an input is a ValueError whose
one line says what, where and what to do.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageOps
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from model import ACTIVATIONS, Llava, LlavaConfig, TextConfig, VisionConfig

FILES = ["*.json", "*.safetensors", "chat_template.jinja"]  # all that is read of a checkpoint, or downloaded
KEYS = (  # checkpoints of different ages name one tensor differently; every key goes through every row
    (r"^model\.", ""),
    (r"^language_model\.model\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^vision_tower\.(embeddings|encoder)\.", "vision_tower."),
    (r"\.(self_attn|mlp)\.", "."),
)
IGNORED = r"inv_freq$|position_ids$|^vision_tower\.post_layernorm\."  # in checkpoints, but nothing that runs needs them
PROMPTS = (  # a chat format: its mark in the checkpoint's Jinja template, a prompt with a picture, one without
    (".upper() + ': '", "USER: <image>\n{} ASSISTANT:", "USER: {} ASSISTANT:"),  # LLaVA-1.5; also without a template
    ("'[INST] '", "[INST] <image>\n{} [/INST]", "[INST] {} [/INST]"),  # Mistral
    (
        "'<|im_start|>' + message['role'] + ' '",  # ChatML, as the llava-hf checkpoints write it
        "<|im_start|>user <image>\n{}<|im_end|><|im_start|>assistant\n",
        "<|im_start|>user \n{}<|im_end|><|im_start|>assistant\n",
    ),
)
RANGES = {"num_hidden_layers": (1, 1000), "vision_feature_layer": (-1000, 1000), "image_token_index": (0, 1e9)}


def find(path_or_repo_id, announce=None) -> Path:
    """The folder of a checkpoint; "tiny" is the built-in one. A Hub id is downloaded, after announce(bytes, cache)."""
    name = str(path_or_repo_id)
    folder = Path(__file__).with_name("tiny") if name == "tiny" else Path(name)
    if folder.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        if not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "is neither a folder nor a Hub id (owner/name)"
            raise ValueError(f"model {name!r} {what}")
        return folder
    try:
        if announce is not None:
            files = snapshot_download(name, allow_patterns=FILES, dry_run=True)
            if size := sum(f.file_size for f in files if f.will_download):
                announce(size, HF_HUB_CACHE)
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as e:  # of many types: no such repository, no network, no right to it, a full disk
        why = f"no connection, no such repository or no right to it ({type(e).__name__})"
        raise ValueError(f"model {name!r} is not a folder, and not to be had from the Hub: {why}") from e


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


# ---- config.json ----


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

    # With no vision_config at all it is CLIP ViT-L/14-336; what a vision_config omits is CLIPVisionConfig's default.
    large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    vision = section(c, "vision_config") or large | dict(image_size=336, patch_size=14)
    text = section(c, "text_config")
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")  # the new name and the old one
    supported("model_type", c.get("model_type"), "llava")
    supported("vision model_type", vision.get("model_type", "clip_vision_model"), "clip_vision_model")
    supported("text model_type", text.get("model_type", "llama"), "llama")
    supported("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    eos_places = read_json(folder / "generation_config.json"), c, text
    eos = next((d["eos_token_id"] for d in eos_places if d.get("eos_token_id") is not None), 2)
    joined = dict(
        vision_config=fill(VisionConfig, vision),
        text_config=fill(TextConfig, text | dict(rope_theta=rope.get("rope_theta", text.get("rope_theta")))),
        image_token_index=c.get("image_token_index", c.get("image_token_id")),  # two names for one thing
        tie_word_embeddings=bool(c.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        eos_token_id=tuple(eos) if isinstance(eos, list) else (eos,),
        dtype=c.get("dtype") or c.get("torch_dtype"),
    )
    config = fill(LlavaConfig, c | joined)
    v, t = config.vision_config, config.text_config
    supported("vision hidden_act", v.hidden_act, *ACTIVATIONS)
    supported("text hidden_act", t.hidden_act, *ACTIVATIONS)
    supported("projector_hidden_act", config.projector_hidden_act, *ACTIVATIONS)
    supported("vision_feature_select_strategy", config.vision_feature_select_strategy, "default", "full")
    supported(
        "vision_feature_layer", config.vision_feature_layer, *range(-v.num_hidden_layers - 1, v.num_hidden_layers + 1)
    )
    supported("dtype", config.dtype, None, "float32", "float16", "bfloat16")
    supported("eos_token_id", tuple(map(type, config.eos_token_id)), (int,) * len(config.eos_token_id))
    supported("hidden_size % num_attention_heads", v.hidden_size % v.num_attention_heads, 0)
    supported("num_attention_heads % num_key_value_heads", t.num_attention_heads % t.num_key_value_heads, 0)
    return config


# ---- weights ----


def weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: weight_map is missing or malformed")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} points outside the folder")
        if not (folder / name).is_file():
            pickles = "; pytorch_model.bin is a pickle, which is never read" if list(folder.glob("*.bin")) else ""
            raise ValueError(f"{folder / name} is missing{pickles}")
    return [folder / name for name in names]


def load_model(folder: Path, device=None, dtype=None, only: str = "", progress=iter) -> Llava:
    """Builds the model on the meta device and assigns the tensors of the memory-mapped shards: it never exists twice.

    Strict, before anything is read: a missing, left-over or misshapen tensor is a ValueError that names it.
    only: a prefix; tensors whose name does not begin with it stay on the meta device. progress: wraps the list of names
    that are read one by one, as tqdm would.
    """
    config, device, source = read_config(folder), choose_device(device), {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as shard:
                found = {k: (shard.get_slice(k).get_shape(), shard.get_slice(k).get_dtype()) for k in shard.keys()}  # noqa: SIM118
        except Exception as e:  # SafetensorError, OSError
            raise ValueError(f"{file}: not a whole safetensors file ({one_line(e)})") from e
        for key, (shape, kind) in found.items():
            name = key
            for pattern, replacement in KEYS:
                name = re.sub(pattern, replacement, name)
            if name in source:
                raise ValueError(f"{file}: tensor {key} is there twice")
            source[name] = file, key, shape, kind
    if "lm_head.weight" in source:
        config.tie_word_embeddings = False  # a head of its own goes before what config.json says, as in transformers
    with torch.device("meta"):
        model = Llava(config).eval().requires_grad_(False)
    wanted, kinds = model.state_dict(), set()
    for name, (file, key, shape, kind) in source.items():
        block = re.match(r"vision_tower\.layers\.(\d+)\.", name)
        if name in wanted:
            kinds.add(kind)
            if shape != list(wanted[name].shape):
                raise ValueError(f"{file}: tensor {key} is {shape}, config.json says {list(wanted[name].shape)}")
            if kind not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{file}: tensor {key} is {kind}; quantised checkpoints are not supported")
        elif not re.search(IGNORED, name) and not (block and int(block[1]) >= config.vision_layers):
            raise ValueError(f"{file}: tensor {key} has no place in the model")
    if missing := sorted(wanted.keys() - source.keys()):
        raise ValueError(f"{folder}: tensor {missing[0]} is missing, one of {len(missing)}")
    half = config.dtype in ("float16", "bfloat16") if config.dtype else kinds <= {"F16", "BF16"}
    dtype = choose_dtype(dtype, device, half)
    for name in progress([name for name in wanted if name.startswith(only)]):
        file, key, _, _ = source[name]
        with safe_open(file, framework="pt") as shard:  # anew for each, so that what is converted leaves the memory
            wanted[name] = shard.get_tensor(key).to(device, dtype)
    model.load_state_dict(wanted, assign=True)
    return model


def choose_device(device=None) -> torch.device:
    """The one asked for, else the first there is of cuda, mps and cpu."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(device).type in ("cuda", "mps", "cpu"):
            return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device {str(device)!r} cannot be used: {one_line(e).split('. ')[0]}") from e
    raise ValueError(f"device {str(device)!r} is not cuda, mps or cpu")


def choose_dtype(dtype, device: torch.device, half: bool) -> torch.dtype:
    """The one asked for; else float32, or for a half-precision checkpoint bfloat16 where the device does that well."""
    if dtype is not None:
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in known and dtype not in known.values() and dtype != torch.float64:
            raise ValueError(f"dtype {str(dtype)!r} is not one of {', '.join(known)}")
        return known.get(dtype, dtype)
    if not half:
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if good else torch.float16


# ---- pictures and prompts ----


def read_picture(picture) -> Image.Image:
    """A PIL image or the path of one -> upright, RGB. Transparency is laid on white, as transformers does."""
    try:
        if not isinstance(picture, Image.Image) and Path(picture).exists() and not Path(picture).is_file():
            raise OSError("it is not a file")
        image = ImageOps.exif_transpose(picture if isinstance(picture, Image.Image) else Image.open(picture))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more on broken files
        raise ValueError(f"picture {str(picture)!r} cannot be read: {one_line(e)}") from e


class Processor:
    """Pictures to pixels, questions to ids, ids to text: transformers' LlavaProcessor without numpy and Jinja.

    pad=True pads a picture to a square with the mean colour first, as the authors' own LLaVA does.
    """

    def __init__(self, folder: Path, pad: bool = False):
        self.folder, self.config = folder, read_config(folder)
        whole, side = read_json(folder / "processor_config.json"), self.config.vision_config.image_size
        found = whole.get("image_processor") or read_json(folder / "preprocessor_config.json")
        clip = dict(do_resize=True, size=dict(shortest_edge=side), resample=3, do_center_crop=True, crop_size=side)
        clip |= dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=True)
        clip |= dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
        try:  # CLIPImageProcessor's defaults, at the tower's resolution; then one picture, to see that it all fits
            self.pictures = clip | {k: v for k, v in found.items() if v is not None}
            self.pad = pad or bool(self.pictures.get("do_pad"))
            if not self.image(Image.new("RGB", (side, side))).isfinite().all():
                raise ValueError("pixels are not finite")
        except Exception as e:  # whatever wrong types and numbers lead to
            raise ValueError(f"{folder}: preprocessor_config.json cannot be followed ({one_line(e)})") from e
        file = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
            self.tokenizer.no_padding()  # of batches that it was once used for
            self.tokenizer.no_truncation()
        except Exception as e:  # tokenizers raises nothing more precise
            raise ValueError(f"{file} cannot be read: {one_line(e)}") from e
        if (at := self.tokenizer.token_to_id("<image>")) != self.config.image_token_index:
            raise ValueError(f"{file}: the id of <image> is {at}, config.json says {self.config.image_token_index}")
        jinja = folder / "chat_template.jinja"
        jinja = dict(chat_template=jinja.read_text(encoding="utf-8") if jinja.is_file() else None)
        places = whole, read_json(folder / "chat_template.json"), jinja, read_json(folder / "tokenizer_config.json")
        self.template = str(next((d["chat_template"] for d in places if d.get("chat_template")), PROMPTS[0][0]))

    def view(self, picture) -> Image.Image:
        """A PIL image or the path of one -> what the model sees of it, RGB."""
        picture, p = read_picture(picture), self.pictures
        (w, h), side = picture.size, max(picture.size)
        limit = Image.MAX_IMAGE_PIXELS * 2  # what Pillow calls a decompression bomb
        if self.pad:
            if side * side > limit:
                raise ValueError(f"a picture of {w} x {h} is too narrow to pad to a square")
            square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in p["image_mean"]))
            square.paste(picture, ((side - w) // 2, (side - h) // 2))
            picture = square
        if p["do_resize"]:
            size = width_height(p["size"], picture.size)
            if math.prod(size) > limit:
                raise ValueError(f"a picture of {w} x {h} is too narrow to crop to a square")
            picture = picture.resize(size, p["resample"])
        if p["do_center_crop"]:
            w, h = width_height(p["crop_size"])
            left, top = (picture.width - w) // 2, (picture.height - h) // 2
            picture = picture.crop((left, top, left + w, top + h))
        return picture

    def image(self, picture) -> Tensor:
        """A PIL image or the path of one -> pixels (3, H, W), float32, normalised."""
        picture, p = self.view(picture), self.pictures
        x = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
        x = (x.double() * (p["rescale_factor"] if p["do_rescale"] else 1)).float().permute(2, 0, 1)
        mean, std = (torch.tensor(p[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
        return (x - mean) / std if p["do_normalize"] else x

    def prompt(self, question: str, image: bool = True) -> Tensor:
        """The question in the checkpoint's chat format -> ids (T,); image: with one image placeholder."""
        if not question.strip():
            raise ValueError("the question is empty")
        formats = [prompts for mark, *prompts in PROMPTS if mark in self.template]
        if not formats:
            raise ValueError(f"{self.folder}: chat template not recognised; load.py's PROMPTS lists the known ones")
        question.encode()  # a ValueError for what is not Unicode
        ids = self.tokenizer.encode(formats[0][0 if image else 1].replace("{}", question)).ids
        if ids.count(self.config.image_token_index) != image:
            raise ValueError("the question must not hold the image placeholder <image>")
        return torch.tensor(ids)

    def decode(self, ids) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def width_height(size, picture: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """A size of preprocessor_config.json as (width, height): an edge, both edges, or the shortest edge of a picture."""
    if isinstance(size, int):
        return size, size
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    return tuple(int(size["shortest_edge"] * edge / min(picture)) for edge in picture)


def load(path_or_repo_id, device=None, dtype=None, pad: bool = False) -> tuple[Llava, Processor]:
    """A Hub id or a folder -> the model, ready to run, and its processor. Raises ValueError for what does not load.

    device: "cuda", "mps" or "cpu", by default the first there is; dtype: see `choose_dtype`; pad: see `Processor`.
    """
    folder = find(path_or_repo_id)
    processor = Processor(folder, pad)
    return load_model(folder, device, dtype), processor
