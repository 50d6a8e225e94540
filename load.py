"""From a Hub id or a folder to a model and its processor: configuration, weights, pictures, prompts.

Only data is read, never a pickle that could run code. What is wrong with a checkpoint or an input is a ValueError whose
one line says what, where and what to do.
"""

import contextlib
import math
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from anyres import Picture, Video, as_list, cut
from config import one_line, read_config, read_json
from model import Llava
from pictures import read_frames, read_picture

FILES = ["*.json", "*.safetensors", "chat_template.jinja"]  # all that is read of a checkpoint, or downloaded
KEYS = (  # checkpoints of different ages name one tensor differently; every key goes through every row
    (r"^model\.", ""),
    (r"^language_model\.model\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^vision_tower\.(embeddings|encoder)\.", "vision_tower."),
    (r"\.(self_attn|mlp)\.", "."),
)
IGNORED = (  # in checkpoints, but nothing that runs needs them
    r"inv_freq$|position_ids$|^vision_tower\.(post_layernorm|head)\."
)
PROMPTS = (  # a chat format: its mark in the checkpoint's Jinja template, the prompt around pictures and question
    (".upper() + ': '", "USER: {} ASSISTANT:"),  # Vicuna's
    ("'[INST] '", "[INST] {} [/INST]"),  # Mistral's
    ("'<|im_start|>' + message['role'] + ' '", "<|im_start|>user {}<|im_end|><|im_start|>assistant\n"),  # ChatML
    ("'<|im_start|>' + message['role'] + '\n'", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"),
    (
        "'<|start_header_id|>' + message['role']",  # Llama 3's
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
)
NO_TEMPLATE = {  # then it is that of llava-hf's checkpoints with such a decoder
    "llama": "message['role'].upper() + ': ' '<image>\n'",
    "mistral": "'[INST] ' '<image>\n'",
    "qwen2": "'<|im_start|>' + message['role'] + ' ' '<image>' '\n' + content['text']",
}


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
            with contextlib.suppress(DryRunError):  # no connection: it may be in the cache
                files = snapshot_download(name, allow_patterns=FILES, dry_run=True)
                if size := sum(f.file_size for f in files if f.will_download):
                    announce(size, HF_HUB_CACHE)
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as e:  # of many types: no such repository, no network, no right to it, a full disk
        why = f"no connection, no such repository or no right to it ({type(e).__name__})"
        raise ValueError(f"model {name!r} is not a folder, and not to be had from the Hub: {why}") from e


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


class Processor:
    """Pictures to pixels, questions to ids, ids to text: transformers' processors without numpy and Jinja.

    pad=True pads a picture to a square with the mean colour first, as the authors' own LLaVA-1.5 does.
    """

    def __init__(self, folder: Path, pad: bool = False):
        self.folder, self.config = folder, (config := read_config(folder))
        whole, side = read_json(folder / "processor_config.json"), config.vision_config.image_size
        anyres = config.image_grid_pinpoints
        clip = dict(do_resize=True, size=dict(shortest_edge=side), resample=3, do_center_crop=True, crop_size=side)
        clip |= dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=True)
        clip |= dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
        if pad and anyres:
            raise ValueError("padding to a square is for models that see one crop; AnyRes pads its tiles by itself")
        try:  # the defaults, at the tower's resolution; then one picture, to see that it all fits
            found = whole.get("image_processor") or read_json(folder / "preprocessor_config.json")
            kind = found.get("image_processor_type") or ("" if config.vision_config.class_token or anyres else "Siglip")
            if kind.startswith("Siglip"):
                clip |= dict(size=dict(height=side, width=side), image_mean=[0.5] * 3, image_std=[0.5] * 3)
            self.pictures = clip | {k: v for k, v in found.items() if v is not None}
            frames = whole.get("video_processor") or read_json(folder / "video_preprocessor_config.json")
            self.frames = self.pictures | {k: v for k, v in frames.items() if v is not None}
            grids = self.pictures.get("image_grid_pinpoints")
            if anyres and grids and sorted(map(tuple, grids)) != sorted(anyres):
                raise ValueError("its image_grid_pinpoints are not those of config.json")
            self.pad = pad or (not anyres and bool(self.pictures.get("do_pad")))  # AnyRes: do_pad is about batches
            if anyres and width_height(self.pictures["size"]) != (side, side):
                raise ValueError(f"its size is {self.pictures['size']}, the tower's {side}")
            black = Image.new("RGB", (side, side))
            shown = [self.image(black), *([self.video([black])[0]] if anyres else [])]
            if not all((one[0] if isinstance(one, tuple) else one).isfinite().all() for one in shown):
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
        for token, index in (("<image>", self.config.image_token_index), ("<video>", self.config.video_token_index)):
            if index is not None and (at := self.tokenizer.token_to_id(token)) != index:
                raise ValueError(f"{file}: the id of {token} is {at}, config.json says {index}")
        jinja = folder / "chat_template.jinja"
        jinja = dict(chat_template=jinja.read_text(encoding="utf-8") if jinja.is_file() else None)
        places = whole, read_json(folder / "chat_template.json"), jinja, read_json(folder / "tokenizer_config.json")
        self.template = str(next((d["chat_template"] for d in places if d.get("chat_template")), ""))
        self.template = self.template or NO_TEMPLATE[config.text_config.model_type]
        self.template = self.template.replace("\\n", "\n")  # in a Jinja string both are a line break

    def view(self, picture, several: bool = False) -> Image.Image:
        """A PIL image or the path of one -> what the model sees of it, RGB, before AnyRes cuts it into tiles.

        several: it is one of several in a prompt, each of which OneVision sees as a padded square, without tiles.
        """
        picture, p = read_picture(picture), self.pictures
        (w, h), side = picture.size, max(picture.size)
        limit = Image.MAX_IMAGE_PIXELS * 2  # what Pillow calls a decompression bomb
        anyres = self.config.image_grid_pinpoints
        if self.pad or (several and self.config.has_video):
            if side * side > limit:
                raise ValueError(f"a picture of {w} x {h} is too narrow to pad to a square")
            square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in p["image_mean"]))
            square.paste(picture, ((side - w) // 2, (side - h) // 2))
            picture = square
        if p["do_resize"] and not anyres:
            size = width_height(p["size"], picture.size)
            if math.prod(size) > limit:
                raise ValueError(f"a picture of {w} x {h} is too narrow to crop to a square")
            picture = picture.resize(size, p["resample"])
        if p["do_center_crop"] and not anyres:
            w, h = width_height(p["crop_size"])
            left, top = (picture.width - w) // 2, (picture.height - h) // 2
            picture = picture.crop((left, top, left + w, top + h))
        return picture

    def pixels(self, picture: Image.Image, p: dict) -> Tensor:
        """A picture of the size of a crop -> (3, H, W), float32, normalised as p, a preprocessor_config.json, says"""
        x = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
        x = (x.double() * (p["rescale_factor"] if p["do_rescale"] else 1)).float().permute(2, 0, 1)
        mean, std = (torch.tensor(p[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
        return (x - mean) / std if p["do_normalize"] else x

    def image(self, picture, several: bool = False):
        """A PIL image, the path of one, or a list of them for one prompt -> what `Llava.encode` takes.

        That is pixels (3, H, W), float32, normalised; for AnyRes models a Picture; for a list a list. several: `view`.
        """
        if isinstance(picture, list):
            return [self.image(one, len(picture) > 1) for one in picture]
        picture, side = self.view(picture, several), self.config.vision_config.image_size
        if not self.config.image_grid_pinpoints:
            return self.pixels(picture, self.pictures)
        whole, (w, h) = self.whole(picture, self.pictures), picture.size
        if several and self.config.has_video:
            return Picture(whole[None], None)
        H, W = (side * n for n in cut((h, w), self.config)[0])
        fits_wide = W / w < H / h
        size = (W, min(math.ceil(h * (W / w)), H)) if fits_wide else (min(math.ceil(w * (H / h)), W), H)
        padded = Image.new("RGB", (W, H))
        padded.paste(picture.resize(size, self.pictures["resample"]), ((W - size[0]) // 2, (H - size[1]) // 2))
        boxes = [(x, y, x + side, y + side) for y in range(0, H, side) for x in range(0, W, side)]
        tiles = [self.pixels(padded.crop(box), self.pictures) for box in boxes]
        return Picture(torch.stack([whole, *tiles]), (h, w))

    def video(self, video, count: int = 8):
        """A list of frames, or what `read_frames` takes -> what `Llava.encode` takes.

        That is a Video for models that have a placeholder for it (OneVision), else a list of pictures, without tiles.
        """
        frames = video if isinstance(video, list) else read_frames(video, count)
        if not self.config.image_grid_pinpoints:
            return [self.image(frame) for frame in frames]
        if not frames:
            raise ValueError("a video without frames")
        frames = torch.stack([self.whole(read_picture(frame), self.frames) for frame in frames])
        return Video(frames) if self.config.has_video else [Picture(frame[None], None) for frame in frames]

    def whole(self, picture: Image.Image, p: dict) -> Tensor:
        """All of a picture as one crop, whatever its shape -> (3, H, W)"""
        side = self.config.vision_config.image_size
        return self.pixels(picture.resize((side, side), p["resample"]), p)

    def prompt(self, question: str, image=True) -> Tensor:
        """The question in the checkpoint's chat format -> ids (T,) with a placeholder for each picture or video.

        image: how many pictures, or what `image` or `video` returned for them.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        formats = [prompt for mark, prompt in PROMPTS if mark in self.template]
        if not formats or "<image>" not in self.template or "<|im_start|>system" in self.template:  # a turn of its own
            raise ValueError(f"{self.folder}: chat template not recognised; load.py's PROMPTS lists the known ones")
        question.encode()  # a ValueError for what is not Unicode
        shown = [None] * image if isinstance(image, int) else as_list(image)
        behind = "\n" if "'<image>\n'" in self.template else ""  # each picture; or one line break before the question
        places = "".join(("<video>" if isinstance(one, Video) else "<image>") + behind for one in shown)
        before = "\n" if "'\n' + content['text']" in self.template else ""
        ids = self.tokenizer.encode(formats[0].replace("{}", places + before + question)).ids
        if sum(i in self.config.placeholders for i in ids) != len(shown):
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
