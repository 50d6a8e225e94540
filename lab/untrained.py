"""tiny/ before its training: tokenizer, processor, a LLaVA with its first weights, and its folder.

All of it is transformers' own, so that what is trained is a real checkpoint: LLaVA-1.5's prompt,
CLIP's pixels, a CLIP tower of 8 blocks and a Llama of 4 layers with grouped-query attention.
"""

import json
import math
import random

import easy_vqa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from lab.scenes import GRID, PATCH, SIZE, ask, place_things

WIDTH = 128
MEAN = [0.48145466, 0.4578275, 0.40821073]  # CLIP's
STD = [0.26862954, 0.26130258, 0.27577711]

# LLaVA-1.5's prompt: the prefix, <image>, the question, the answer.
PREFIX = "USER: "
QUESTION = "\n{} ASSISTANT:"
ANSWER = " {}"

# llava-1.5-hf's own template, which makes the same prompt of a list of messages
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vary(rng, question):
    """A question as people type it: sometimes with a capital, sometimes without its mark."""
    if rng.random() < 0.2:
        question = question[0].upper() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return question


def build_tokenizer():
    """Byte-level BPE: every string has an encoding, every word of the questions is a single token,
    and so is every digit."""
    rng = random.Random(0)
    lines = ["USER: \n ASSISTANT:"] * 1000
    for _ in range(4000):
        things = place_things(rng, rng.random(), GRID, (0, 0))
        lines += [QUESTION.format(q) + ANSWER.format(a) for _, q, a in ask(rng, things, 10)]
    lines += [vary(rng, line) for line in lines + easy_vqa.get_train_questions()[0][:4000]]

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def build_processor(tokenizer):
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        model_max_length=1024,
        padding_side="left",
    )
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=MEAN,
        image_std=STD,
    )
    return LlavaProcessor(
        pictures,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        image_seq_length=GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(max_new_tokens=64, **ids)
    first_weights(model)
    return model


@torch.no_grad()
def first_weights(model):
    # Branches start small: at first the stream is the embedding.
    quiet = ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embed" not in name:
            scale = 0.2 if name.endswith(quiet) else 1.0
            nn.init.normal_(p, std=scale / math.sqrt(p.shape[1]))

    embeddings = model.model.vision_tower.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=1 / math.sqrt(3 * PATCH**2))
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
    nn.init.normal_(model.lm_head.weight, std=0.02)

    # Learned positions start as waves: half of the channels tell the column, half the row.
    frequency = 100.0 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
    angle = torch.arange(GRID)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # (16, 64)
    waves = torch.cat([wave.repeat(GRID, 1), wave.repeat_interleave(GRID, 0)], 1)  # (256, 128)
    embeddings.position_embedding.weight[1:] = waves * 0.7


def save(model, processor, folder):
    """Weights are stored in float16; config.json has them run in float32."""
    logging.disable_progress_bar()
    halves = {k: v.half().cpu() for k, v in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=halves)
    (folder / "model.safetensors").chmod(0o644)

    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # the file that older loaders read

    # Thresholds that lie there are those of other weights.
    (folder / "thresholds.json").unlink(missing_ok=True)
