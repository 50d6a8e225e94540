"""Small random checkpoints in Hugging Face's format, made by transformers: the tests' reference and their input."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE, VOCAB = 259, 260  # <s> 0, </s> 1, <pad> 2, then the 256 bytes
LLAVA_15_TEMPLATE = (  # what llava-hf/llava-1.5-7b-hf ships
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer() -> Tokenizer:
    """One token per byte, <s> in front."""
    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2}
    vocab |= {c: 3 + i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    t = Tokenizer(models.BPE(vocab, []))
    t.add_special_tokens(["<s>", "</s>", "<pad>", "<image>"])
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert t.token_to_id("<image>") == IMAGE
    return t


def make(folder: Path, seed=0, template=LLAVA_15_TEMPLATE, vision=None, text=None, **llava) -> Path:
    """Saves a LLaVA-1.5-shaped checkpoint: 56 x 56 pictures, 16 patches, 4 vision and 3 text layers."""
    torch.manual_seed(seed)
    vision = {
        **dict(model_type="clip_vision_model", hidden_size=48, intermediate_size=96, num_hidden_layers=4),
        **dict(num_attention_heads=4, image_size=56, patch_size=14, projection_dim=16),
        **(vision or {}),
    }
    text = {
        **dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4),
        **dict(num_key_value_heads=2, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2),
        **(text or {}),
    }
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **llava)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # wider than transformers' initial 0.02, so that a mistake anywhere shows in the logits
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn_like(p) * (0.3 if "norm" in name or p.ndim == 1 else p.shape[-1] ** -0.5) + ("norm" in name)
            )
    model.save_pretrained(folder)
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": vision["image_size"]}, crop_size=side),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", image_token="<image>"
        ),
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=llava.get("vision_feature_select_strategy", "default"),
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder
