"""From a Hub id or a folder to a model and its processor: weights, pictures, prompts.

What its config.json leaves out is in extras/families.py, what can be wrong in extras/door.py.
"""

import math
import re
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from extras import families
from extras.devices import check_memory, choose_device, choose_dtype
from extras.door import find, one_line, read_picture, weight_files
from model import Llava, LlavaConfig, as_list

# checkpoints of different ages name one tensor differently; every key goes through every row
KEYS = (
    (r"^model\.", ""),
    (r"^language_model\.model\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^vision_tower\.(embeddings|encoder)\.", "vision_tower."),
    (r"\.(self_attn|mlp)\.", "."),
)

# in checkpoints, but nothing that runs needs them
IGNORED = r"inv_freq$|position_ids$|^vision_tower\.(post_layernorm|head)\."


def load(path_or_repo_id, device=None, dtype=None, pad: bool = False):
    """A Hub id or a folder -> the model, ready to run, and its processor.

    device: "cuda", "mps" or "cpu", by default the first there is; dtype: see `choose_dtype`; pad:
    see `Processor`. Raises ValueError for what does not load.
    """
    folder = find(path_or_repo_id)
    processor = load_processor(folder, pad)
    return load_model(folder, device, dtype), processor


# ---- weights ----


def load_model(
    folder: Path, device=None, dtype=None, announce=None, progress=iter, only=""
) -> Llava:
    """Builds the model on the meta device and assigns the tensors of the memory-mapped shards.

    So it never exists twice. announce: see `check_memory`; progress: wraps the names that are read
    one by one, as tqdm would; only: a prefix or several, other tensors stay on the meta device.
    """
    config = families.read_config(folder)
    device = choose_device(device)
    stored = stored_tensors(folder, config)
    if "lm_head.weight" in stored:
        config.tie_word_embeddings = False  # a head of its own goes before what config.json says

    with torch.device("meta"):
        model = families.model_class(config)(config).eval().requires_grad_(False)
        shapes = {name: torch.empty(shape) for name, (_, _, shape, _) in stored.items()}

    # before anything is read: one error names missing, left-over and misshapen tensors
    try:
        model.load_state_dict(shapes, assign=True)
    except RuntimeError as e:
        what = one_line(e).partition(": ")[2]
        raise ValueError(f"{folder}: {what[:500]}") from e

    kinds = {kind for _, _, _, kind in stored.values()}
    half = kinds <= {"F16", "BF16"}
    if config.dtype is not None:  # what config.json says goes before what is stored
        half = config.dtype != "float32"
    dtype = choose_dtype(dtype, device, half)

    names = [name for name in model.state_dict() if name.startswith(only)]
    numbers = sum(math.prod(stored[name][2]) for name in names)
    check_memory(numbers * dtype.itemsize, device, announce)

    tensors = {}
    for name in progress(names):
        file, key, _, _ = stored[name]
        with safe_open(file, framework="pt") as shard:  # anew, so that what is converted is freed
            tensors[name] = shard.get_tensor(key).to(device, dtype)
    model.load_state_dict(tensors, strict=False, assign=True)
    return model


def stored_tensors(folder: Path, config: LlavaConfig) -> dict[str, tuple]:
    """Name in the model -> file, key in it, shape, dtype, from the headers of the shards alone."""
    stored = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as shard:
                slices = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118
                found = {key: (s.get_shape(), s.get_dtype()) for key, s in slices.items()}
        except Exception as e:  # SafetensorError, OSError
            raise ValueError(f"{file}: not a whole safetensors file ({one_line(e)})") from e

        for key, (shape, kind) in found.items():
            name = key
            for pattern, replacement in KEYS:
                name = re.sub(pattern, replacement, name)

            block = re.match(r"vision_tower\.layers\.(\d+)\.", name)
            behind = block and int(block[1]) >= config.vision_layers  # the layer that is read
            if behind or re.search(IGNORED, name):
                continue
            if name in stored:
                raise ValueError(f"{file}: tensor {key} is there twice")
            if kind not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(
                    f"{file}: tensor {key} is {kind}; quantised ones are not supported"
                )
            stored[name] = file, key, shape, kind
    return stored


# ---- pictures and prompts ----


def load_processor(folder: Path, pad: bool = False):
    """The checkpoint's `Processor`, which in other families is a subclass of it."""
    _, _, kind = families.classes(families.read_config(folder).model_type)
    return kind(folder, pad)


class Processor:
    """Pictures to pixels, questions to ids, ids to text.

    It does what transformers' processors do, without NumPy and Jinja. pad=True pads a picture to a
    square with the mean colour first, as the authors' own LLaVA-1.5 does.
    """

    def __init__(self, folder: Path, pad: bool = False):
        self.folder = folder
        self.config = families.read_config(folder)
        self.tokenizer = self.read_tokenizer()
        self.template = families.read_template(folder, self.config)

        # one black picture shows whether the preprocessing can be followed
        try:
            self.pictures, self.frames = families.read_preprocessing(folder, self.config)
            self.pad = pad or bool(self.pictures.get("do_pad"))
            self.check()
        except Exception as e:  # whatever wrong types and numbers lead to
            file = f"{folder}: preprocessor_config.json"
            raise ValueError(f"{file} cannot be followed ({one_line(e)})") from e

    def check(self) -> None:
        side = self.config.vision_config.image_size
        black = self.pixels(self.view(Image.new("RGB", (side, side))), self.pictures)
        if not black.isfinite().all():
            raise ValueError("pixels are not finite")

    def read_tokenizer(self) -> Tokenizer:
        file = self.folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as e:  # tokenizers raises nothing more precise
            raise ValueError(f"{file} cannot be read: {one_line(e)}") from e

        tokenizer.no_padding()  # of batches that it was once used for
        tokenizer.no_truncation()
        for token, index in zip(("<image>", "<video>"), self.config.placeholders):
            found = tokenizer.token_to_id(token)
            if found != index:
                raise ValueError(f"{file}: the id of {token} is {found}, config.json says {index}")
        return tokenizer

    def view(self, picture, several: bool = False) -> Image.Image:
        """A PIL image or the path of one -> what the model sees of it, RGB.

        several: it is one of several in a prompt, which some models see in another way.
        """
        picture = read_picture(picture)
        p = self.pictures
        if self.pad:
            picture = pad_to_square(picture, p["image_mean"])
        if p["do_resize"]:
            size = width_height(p["size"], picture.size)
            check_size(size, picture, "crop to")
            picture = picture.resize(size, p["resample"])
        if p["do_center_crop"]:
            w, h = width_height(p["crop_size"])
            left = (picture.width - w) // 2
            top = (picture.height - h) // 2
            picture = picture.crop((left, top, left + w, top + h))
        return picture

    def pixels(self, picture: Image.Image, p: dict) -> Tensor:
        """A picture -> (3, H, W), float32, normalised as p, a preprocessor_config.json, says"""
        x = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        x = x.view(picture.height, picture.width, 3).permute(2, 0, 1).double()
        if p["do_rescale"]:
            x = x * p["rescale_factor"]
        if not p["do_normalize"]:
            return x.float()

        mean = torch.tensor(p["image_mean"]).view(3, 1, 1)
        std = torch.tensor(p["image_std"]).view(3, 1, 1)
        return (x.float() - mean) / std

    def image(self, picture, several: bool = False):
        """A PIL image, the path of one, or a list of them -> what `Llava.encode` takes.

        That is pixels (3, H, W), float32, normalised; for a list a list. several: see `view`.
        """
        if isinstance(picture, list):
            return [self.image(one, len(picture) > 1) for one in picture]
        return self.pixels(self.view(picture, several), self.pictures)

    def video(self, frames: list):
        """Frames, as pictures -> what `Llava.encode` takes: a list of pictures, in this family"""
        return [self.image(frame) for frame in frames]

    def prompt(self, question: str, image=True, turns=(), system: str = "") -> Tensor:
        """The question in the checkpoint's chat format -> ids (T,), a placeholder for each picture.

        image: how many pictures, or what `image` or `video` returned for them; turns: (question,
        answer) of the conversation before; system: text in front of it all.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        question.encode()  # a ValueError for what is not Unicode

        shown = [None] * image if isinstance(image, int) else as_list(image)
        names = [name for one in shown for name in getattr(one, "placeholders", ("<image>",))]
        try:
            text = families.chat(self.template, names, question, turns, system)
        except ValueError as e:
            raise ValueError(f"{self.folder}: {e}") from e

        ids = self.tokenizer.encode(text).ids
        if sum(i in self.config.placeholders for i in ids) != len(names):
            raise ValueError("the question must not hold the image placeholder <image>")
        return torch.tensor(ids)

    def decode(self, ids) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def pad_to_square(picture: Image.Image, mean: list[float]) -> Image.Image:
    side = max(picture.size)
    check_size((side, side), picture, "pad to")
    left = (side - picture.width) // 2
    top = (side - picture.height) // 2
    border = (left, top, side - picture.width - left, side - picture.height - top)
    return ImageOps.expand(picture, border, tuple(int(255 * m) for m in mean))


def check_size(size: tuple[int, int], picture: Image.Image, what: str) -> None:
    if math.prod(size) > Image.MAX_IMAGE_PIXELS * 2:  # what Pillow calls a decompression bomb
        w, h = picture.size
        raise ValueError(f"a picture of {w} x {h} is too narrow to {what} a square")


def width_height(size, picture: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """A size of preprocessor_config.json -> (width, height): an edge, both, or the shortest."""
    if isinstance(size, int):
        return size, size
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    return tuple(int(size["shortest_edge"] * edge / min(picture)) for edge in picture)
