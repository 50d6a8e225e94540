"""Small random checkpoints in Hugging Face's format: the tests' reference and their input.

transformers makes them.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

IMAGE, VOCAB = 259, 260  # <s> 0, </s> 1, <pad> 2, then the 256 bytes
VIDEO = 260  # OneVision alone has it
QUESTION = "What is in the picture?"
LLAVA_15_TEMPLATE = (  # what llava-hf/llava-1.5-7b-hf ships
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (  # what llava-hf/llava-v1.6-mistral-7b-hf ships, without its system part
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
    "{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    r"{{ ' ' + message['content'][0]['text'] + '<\s> '}}{% endif %}{% endfor %}"
)
CHATML = (  # what llava-hf/llava-interleave-qwen-0.5b-hf and llava-onevision-qwen2-7b-ov-hf ship
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_LINES = (  # what llava-hf/llava-v1.6-34b-hf and llava-onevision-qwen2-72b-si-hf ship
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
    "{{'<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_NEXT = (  # what llava-hf/llava-next-72b-hf ships
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (  # what llava-hf/llama3-llava-next-8b-hf ships
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] + '<|eot_id|>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CLASSES = {
    "llava": (hf.LlavaConfig, hf.LlavaForConditionalGeneration),
    "llava_next": (hf.LlavaNextConfig, hf.LlavaNextForConditionalGeneration),
    "llava_onevision": (hf.LlavaOnevisionConfig, hf.LlavaOnevisionForConditionalGeneration),
}


def tokenizer(special=("<image>",)) -> Tokenizer:
    """One token per byte, <s> in front."""
    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2}
    vocab |= {c: 3 + i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    t = Tokenizer(models.BPE(vocab, []))
    t.add_special_tokens(["<s>", "</s>", "<pad>", *special])
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert t.token_to_id("<image>") == IMAGE
    return t


def make(
    folder: Path,
    family="llava",
    seed=0,
    template=LLAVA_15_TEMPLATE,
    vision=None,
    text=None,
    **llava,
) -> Path:
    """Saves a LLaVA-1.5-shaped checkpoint, or one of another family.

    It has 4 vision and 3 text layers, and unless `vision` or `text` says otherwise CLIP on 56 x 56
    pictures, 16 patches, and Llama. SigLIP has 7 x 7 patches of 8 pixels.
    """
    torch.manual_seed(seed)
    siglip = "siglip" in (vision or {}).get("model_type", "")
    onevision = family == "llava_onevision"
    vision = {
        **dict(
            model_type="clip_vision_model",
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=4,
        ),
        **dict(num_attention_heads=4, image_size=56, patch_size=8 if siglip else 14),
        **({} if siglip else dict(projection_dim=16)),
        **(vision or {}),
    }
    text = {
        **dict(
            model_type="llama",
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
        ),
        **dict(
            num_key_value_heads=2,
            vocab_size=VOCAB + onevision,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
        **(text or {}),
    }
    if onevision:
        llava["video_token_index"] = VIDEO
    config_class, model_class = CLASSES[family]
    model = model_class(
        config_class(vision_config=vision, text_config=text, image_token_index=IMAGE, **llava)
    ).eval()
    # wider than transformers' initial 0.02, so that a mistake anywhere shows in the logits
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.3 if "norm" in name or p.ndim == 1 else p.shape[-1] ** -0.5
            p.copy_(torch.randn_like(p) * std + ("norm" in name))
    model.save_pretrained(folder)
    side = vision["image_size"]
    square = {"height": side, "width": side}
    grids = dict(image_grid_pinpoints=llava.get("image_grid_pinpoints"))
    words = tokenizer(("<image>", "<video>") if onevision else ("<image>",))
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        image_token="<image>",
    )
    if onevision:  # its LlavaOnevisionProcessor needs torchvision
        LlavaOnevisionImageProcessorPil(size=square, **grids).save_pretrained(folder)
        words.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(template)
        return folder
    if family == "llava_next":
        pictures = LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, **grids
        )
    elif siglip:
        pictures = SiglipImageProcessorPil(size=square)
    else:
        pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    (hf.LlavaNextProcessor if family == "llava_next" else hf.LlavaProcessor)(
        pictures,
        words,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=llava.get("vision_feature_select_strategy", "default"),
        num_additional_image_tokens=int(not siglip),
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def reference_of(folder):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return CLASSES[kind][1].from_pretrained(folder, dtype=torch.float32).eval()


# ---- a checkpoint of every family, and what it is shown ----

SIGLIP = dict(model_type="siglip_vision_model")
# (height, width): LLaVA-NeXT's at a sixth
GRIDS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
MANY = [[56 * h, 56 * w] for h in range(1, 5) for w in range(1, 5)]
FAMILIES = {
    "llava, SigLIP, Llama": dict(vision=SIGLIP, vision_feature_select_strategy="full"),
    "llava, CLIP, Qwen2": dict(text=dict(model_type="qwen2")),
    "llava, SigLIP, Qwen2": dict(  # as llava-interleave-qwen
        vision=SIGLIP,
        text=dict(model_type="qwen2", tie_word_embeddings=True),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        template=CHATML,
    ),
    "llava_next, Llama": dict(family="llava_next", image_grid_pinpoints=GRIDS),
    "llava_next, Mistral": dict(
        family="llava_next",
        text=dict(model_type="mistral", sliding_window=None),
        image_grid_pinpoints=GRIDS,
        template=MISTRAL,
    ),
    "llava_onevision": dict(
        family="llava_onevision",
        vision=SIGLIP,
        text=dict(model_type="qwen2"),
        image_grid_pinpoints=MANY,
        vision_aspect_ratio="anyres_max_4",
        template=CHATML,
    ),
}
SIZES = dict(
    square=(80, 80),
    wide=(150, 47),
    tall=(61, 173),
    one_tile=(56, 56),
    large=(301, 283),
    thin=(400, 7),
    dot=(1, 1),
)


def picture(size=(80, 80), seed=3):
    """Coarse noise: plain and busy parts."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size[1] // 9 + 1, size[0] // 9 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def clip(frames=3):
    """A still background of coarse noise, on which a white square moves."""
    out = []
    for i in range(frames):
        out.append(picture((84, 84)))
        out[-1].paste((255, 255, 255), (28 * i, 28, 28 * i + 14, 42))
    return out
