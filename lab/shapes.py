"""Real shapes with random weights, and what is asked about: for lab/bench.py and lab/questions.py.

Nothing is downloaded. transformers' model and ours are on the same tensors.
"""

import random
import re
import tempfile
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dymu import DyMU
from extras.anyres import positions
from extras.families import CLIP_PICTURES, FAMILIES, SIZES, model_class
from load import KEYS, load_processor
from model import KVCache, as_list

IMAGE, VIDEO, TEXT = 32000, 32001, 40  # placeholders; tokens of text
PHOTO = (1280, 960)
HF = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}


def decoder(kind: str, *sizes: int, **more) -> dict:
    """sizes: those of a tower, without the picture's, and the number of heads of k and v"""
    names = (*SIZES[:4], "num_key_value_heads")
    return dict(zip(names, sizes), model_type=kind, vocab_size=32064) | more


TINY_LLAMA = decoder("llama", 2048, 5632, 22, 32, 4)
LLAMA_7B = decoder("llama", 4096, 11008, 32, 32, 32, max_position_embeddings=4096)
QWEN2_05B = decoder(
    "qwen2",
    *(896, 4864, 24, 14, 2),
    vocab_size=152000,
    tie_word_embeddings=True,
    max_position_embeddings=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
SMALL_TOWER = dict(zip(SIZES, (64, 128, 8, 4)))
SMALL = (256, 512, 2, 8, 2)


@dataclass(frozen=True)
class Shape:
    family: str  # which decides the tower: CLIP ViT-L at 336 pixels, or SigLIP so400m at 384
    text: dict
    vision: dict = field(default_factory=dict)  # where the tower is another


SHAPES = {
    "tiny-llava": Shape("llava", TINY_LLAMA),
    "llava-1.5-7b": Shape("llava", LLAMA_7B),
    "llava-next-7b": Shape("llava_next", LLAMA_7B),
    "onevision-0.5b": Shape("llava_onevision", QWEN2_05B),
    # seconds, to see that it runs
    "smoke": Shape("llava", decoder("llama", *SMALL), SMALL_TOWER),
    "smoke-onevision": Shape(
        "llava_onevision",
        QWEN2_05B | decoder("qwen2", *SMALL),
        SMALL_TOWER | dict(patch_size=64),  # 6 x 6 patches
    ),
}


def find_shape(name: str, layers: int = 0) -> Shape:
    """One of SHAPES, whole or with so many decoder layers."""
    shape = SHAPES[name]
    return replace(shape, text=shape.text | dict(num_hidden_layers=layers)) if layers else shape


# ---- two models, one set of weights ----


def build(shape: Shape, device, dtype):
    """transformers' model with random weights, ours with the same tensors, and the processor."""
    # here and below, because to print the tables one needs no transformers
    import transformers
    from tokenizers import Tokenizer, models
    from transformers.initialization import no_init_weights

    _, tower, _ = FAMILIES[shape.family]
    # of SigLIP's head LLaVA reads nothing
    vision = tower | shape.vision | dict(vision_use_head=False)
    tied = shape.text.get("tie_word_embeddings", False)
    config = getattr(transformers, f"{HF[shape.family]}Config")(
        vision_config=vision,
        text_config=shape.text,
        image_token_index=IMAGE,
        tie_word_embeddings=tied,
        **(dict(video_token_index=VIDEO) if shape.family == "llava_onevision" else {}),
    )
    kind = getattr(transformers, f"{HF[shape.family]}ForConditionalGeneration")
    with no_init_weights(), torch.device(device):
        theirs = kind._from_config(config, dtype=dtype, attn_implementation="sdpa")
    theirs.tie_weights()  # which is left out with the initialisation
    tensors = fill(theirs.eval().requires_grad_(False))

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        words = (*map(str, range(IMAGE)), "<image>", "<video>")
        words = models.WordLevel({word: i for i, word in enumerate(words)}, "<image>")
        Tokenizer(words).save(f"{folder}/tokenizer.json")
        processor = load_processor(Path(folder))
    with torch.device("meta"):
        ours = model_class(processor.config)(processor.config).eval().requires_grad_(False)
    ours.load_state_dict({name: tensors[name] for name in ours.state_dict()}, assign=True)
    for name, tensor in ours.state_dict().items():
        assert tensor.data_ptr() == tensors[name].data_ptr(), "a tensor was copied"
    return ours, theirs, processor


def fill(theirs) -> dict[str, Tensor]:
    """Draws transformers' weights -> by the names that they have in our model"""
    tensors = {}
    for key, tensor in theirs.state_dict().items():
        if tensor.ndim > 1:
            # so that the variance is one over the number of inputs
            bound = (3 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound)
        else:
            tensor.fill_("norm" in key and key.endswith("weight"))
        for pattern, replacement in KEYS:
            key = re.sub(pattern, replacement, key)
        tensors[key] = tensor
    return tensors


# ---- what is asked about ----


def photo(seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (40, 30), random.Random(seed).randbytes(3 * 40 * 30)).resize(
        PHOTO
    )


class Prompt:
    """TEXT tokens about photos, or about a video of so many frames, as each model takes it.

    models: what `build` gives. Theirs has a placeholder for each visual token, N in all, ours one
    for each photo, or for the video.
    """

    def __init__(self, models, photos: int = 1, frames: int = 0):
        self.ours, self.theirs, self.processor = models
        self.config = self.processor.config
        self.frames = frames
        self.shown = [photo(seed) for seed in range(frames or photos)]
        self.their_processor = their_processor(self.config, frames)
        self.N = positions(self.pixels(), self.config)

        text = torch.randint(3, IMAGE, (TEXT,))
        kind = VIDEO if frames else IMAGE
        self.ids, their_ids = (
            torch.cat((text[:5], torch.full((n,), kind), text[5:])).to(self.theirs.device)
            for n in (1 if frames else photos, self.N)
        )
        self.their_ids = their_ids[None]

    def pixels(self):
        """As `Llava.encode` takes them."""
        if self.frames:
            return self.processor.video(self.shown)
        return self.processor.image(self.shown if len(self.shown) > 1 else self.shown[0])

    def their_pixels(self) -> dict[str, Tensor]:
        """As transformers' model takes them."""
        found = self.their_processor(self.shown, return_tensors="pt")
        if self.frames:
            return dict(pixel_values_videos=found["pixel_values"][None])
        return {name: found[name] for name in ("pixel_values", "image_sizes") if name in found}

    def on_device(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        to = self.theirs.device, self.theirs.dtype
        return {k: x.to(*to) if x.is_floating_point() else x for k, x in pixels.items()}

    def their_features(self, pixels: dict[str, Tensor]) -> Tensor:
        """-> (N, D), as the decoder takes them"""
        of = self.theirs.get_video_features if self.frames else self.theirs.get_image_features
        x = torch.cat(list(of(*self.on_device(pixels).values()).pooler_output))
        if len(x) == self.N:
            return x
        # older versions of transformers end a video with its newline only when they read it
        return torch.cat((x, self.theirs.model.image_newline[None]))

    def difference(self) -> float:
        """The most between two numbers of their pixels and of ours"""
        ours = [getattr(p, "frames", getattr(p, "crops", p)) for p in as_list(self.pixels())]
        theirs = next(iter(self.their_pixels().values()))
        ours = torch.stack(ours).view_as(theirs)
        return float((ours - theirs).abs().max())

    def agreement(self) -> float:
        """The correlation of both models' logits at full length"""
        pixels = self.on_device(self.their_pixels())
        there = self.theirs(input_ids=self.their_ids, **pixels, logits_to_keep=1).logits[0, -1]
        rows, token_at = self.ours.prepare(self.ids, self.pixels(), DyMU())
        here = self.ours.logits(self.ours.language_model(rows, token_at, KVCache())[-1])
        return float(torch.corrcoef(torch.stack((here, there)).float())[0, 1])


def their_processor(c, frames: int):
    """transformers' own in Pillow; for frames, of which it has none, one that does the same"""
    side = c.vision_config.image_size
    square = dict(height=side, width=side)
    kind, options = {
        "llava": ("CLIP", dict(size=dict(shortest_edge=side), crop_size=square)),
        "llava_next": ("LlavaNext", dict(size=dict(shortest_edge=side), crop_size=square)),
        "llava_onevision": ("LlavaOnevision", dict(size=square)),
    }[c.model_type]
    if frames:
        norm = {name: CLIP_PICTURES[name] for name in ("image_mean", "image_std")}
        kind, options = "Siglip", dict(size=square, **norm)
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
    module = import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    return getattr(module, f"{kind}ImageProcessorPil")(**options)
