"""Trains tiny/, a real LLaVA of 2.2 M parameters, from scratch on drawn scenes and on easy-VQA's train split.

    python -m lab.train_tiny --minutes 90        # CPU or GPU; the same command again resumes from its last state

What makes so small a model see within an hour or two on a CPU:
- Dense labels: linear heads on the visual features, before and after the projector, tell for every patch the shape, the
  colour, the character and where the object's centre is. On answers alone the model does not leave the blind guess.
- Pointers: linear heads inside the decoder tell where the object is that a question or a description has just named,
  how far apart the two of a relation are, and where the object is that a description names next. Without them
  "is the circle left of the star?" stays a coin toss.
- Windows: at first only an 8 x 8 window of the 16 x 16 patches is drawn, encoded and decoded, at its true positions.
- Packing: all questions about a picture stand in one sequence behind it. Each sees the picture and itself, and its
  positions continue the picture's, so the sequence computes exactly what one prompt per question would.
- Muon (orthogonalised momentum) for the matrices of the blocks.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from collections import defaultdict
from pathlib import Path

import easy_vqa
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
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

from lab.scenes import (
    GRID,
    HELD_OUT,
    KINDS,
    LABELS,
    PATCH,
    SIZE,
    ask,
    ask_counting,
    ask_relation,
    blind_guess,
    easy_pictures,
    place_things,
    pointers,
    scene,
)

WIDTH = 128
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
PREFIX, QUESTION, ANSWER = "USER: ", "\n{} ASSISTANT:", " {}"  # LLaVA-1.5's template around <image>
CURRICULUM = (  # until this part of the run: {window side in patches: share of the batches}
    (0.13, {8: 1.0}),
    (0.25, {8: 0.3, 12: 0.7}),
    (0.40, {8: 0.1, 12: 0.4, 16: 0.5}),
    (0.65, {12: 0.25, 16: 0.75}),
    (1.00, {16: 1.0}),
)
PICTURES = {8: 64, 12: 32, 16: 24}  # per batch
DENSE_ONLY = 0.03  # the part of the run before the first question
EASY = 0.12  # share of easy-VQA among full-size pictures
EVERY_KIND = (*KINDS, "easy")
POINTERS = {"named": 2, "apart": 3, "next": 3}  # read from the output of this decoder layer


# The model and its folder


def build_tokenizer():
    """Byte-level BPE: every string has an encoding, the words of the questions are single tokens, so is every digit."""
    rng, lines = random.Random(0), ["USER: \n ASSISTANT:"] * 1000
    for _ in range(4000):
        things = place_things(rng, rng.random(), GRID, (0, 0))
        lines += [f"{QUESTION.format(q)}{ANSWER.format(a)}" for _, q, a in ask(rng, things, 10)]
    lines += [vary(rng, line) for line in lines + easy_vqa.get_train_questions()[0][:4000]]
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def vary(rng, question):
    """A question as people type it: sometimes with a capital, sometimes without its mark."""
    question = question[0].upper() + question[1:] if rng.random() < 0.2 else question
    return question.rstrip("?.") if rng.random() < 0.1 else question


def build_processor(tokenizer):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"], model_max_length=1024, padding_side="left",
    )  # fmt: skip
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=MEAN,
        image_std=STD,
    )
    template = (  # llava-1.5-hf's own
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
        "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] + ' '}}{% endfor %}"
        "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    return LlavaProcessor(
        pictures, fast, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


def build_model(tokenizer):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=8, num_attention_heads=4,
        image_size=SIZE, patch_size=PATCH, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=3, image_seq_length=GRID**2,
            vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu", **ids,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(max_new_tokens=64, **ids)
    for name, p in model.named_parameters():
        if (
            p.dim() == 2 and "embed" not in name
        ):  # branches start small: at first the stream is the embedding
            quiet = name.endswith(
                ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
            )
            nn.init.normal_(p, std=(0.2 if quiet else 1) / math.sqrt(p.shape[1]))
    tower = model.model.vision_tower
    nn.init.normal_(tower.embeddings.patch_embedding.weight, std=1 / math.sqrt(3 * PATCH**2))
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    place = torch.arange(GRID)[:, None] * 100.0 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
    wave = torch.cat(
        [place.sin(), place.cos()], 1
    )  # (16, 64): learned positions start as waves, columns then rows
    waves = torch.cat([wave.repeat(GRID, 1), wave.repeat_interleave(GRID, 0)], 1)
    tower.embeddings.position_embedding.weight.data[1:] = waves * 0.7
    return model


def save(model, processor, folder, facts):
    """The folder appears complete or not at all. Weights are stored in float16; config.json has them run in float32."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(
        fresh, state_dict={k: v.half().cpu() for k, v in model.state_dict().items()}
    )
    config = json.loads((fresh / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor.save_pretrained(fresh)
    processor.image_processor.save_pretrained(
        fresh
    )  # preprocessor_config.json, which older loaders read
    (fresh / "model.safetensors").chmod(0o644)
    (fresh / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    if (folder / "sample.png").exists():  # it stays; thresholds were those of other weights, and go
        shutil.copy(folder / "sample.png", fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# The data


def easy_list(split):
    return list(easy_pictures(split, "easy").values())


def scene_sample(seed, level=None, side=GRID, questions=10):
    """-> pixels (n, n, 3) uint8, the patches they are of (side^2,), labels (side^2, 6), things, questions."""
    s = scene(seed, level, side, questions)
    column, row = s.corner
    cells = (np.arange(row, row + side)[:, None] * GRID + np.arange(column, column + side)).ravel()
    return np.asarray(s.image), cells, s.labels, s.things, s.questions


def easy_sample(path, questions):
    """Nothing is known of its patches: kind -1."""
    pixels = np.asarray(
        Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    )
    return pixels, np.arange(GRID**2), np.full((GRID**2, 6), -1, np.int16), [], questions


def collate(samples, tokenizer):
    """One sequence per picture: the prefix, V visual tokens, T text tokens; `segment` numbers the questions, 0 pads."""
    segments = []
    for *_, things, questions in samples:
        row = []
        for kind, question, answer in questions:
            asked = tokenizer.encode(QUESTION.format(question), add_special_tokens=False)
            told = tokenizer.encode(ANSWER.format(answer), add_special_tokens=False)
            pointed = point(question, kind, asked, told, things)
            row.append((EVERY_KIND.index(kind), asked.ids, told.ids + [2], pointed))
        segments.append(row)
    T = max(sum(len(q) + len(a) - 1 for _, q, a, _ in row) for row in segments)
    ids, segment, place = (np.zeros((len(samples), T), np.int64) for _ in range(3))
    answers = []  # (row, column, target, kind, number of the answer, its length)
    places = {name: [] for name in POINTERS}  # (row, column, x, y)
    count = 0
    for b, row in enumerate(segments):
        t = 0
        for number, (kind, asked, told, pointed) in enumerate(row, 1):
            n = len(asked) + len(told) - 1
            ids[b, t : t + n], segment[b, t : t + n], place[b, t : t + n] = (
                asked + told[:-1],
                number,
                np.arange(n),
            )
            answers += [
                (b, t + len(asked) - 1 + i, target, kind, count, len(told))
                for i, target in enumerate(told)
            ]
            for name, column, x, y in pointed:
                places[name].append((b, t + column, x, y))
            t, count = t + n, count + 1
    prefix = tokenizer.encode(PREFIX).ids  # with <s>
    out = {
        "pixels": np.stack([s[0] for s in samples]), "cells": np.stack([s[1] for s in samples]),
        "labels": np.stack([s[2] for s in samples]), "prefix": np.array(prefix), "ids": ids,
        "segment": segment, "place": place, "answers": np.array(answers),
        **{name: np.array(rows, np.float32).reshape(-1, 4) for name, rows in places.items()},
    }  # fmt: skip
    return {k: torch.from_numpy(v) for k, v in out.items()}


def point(question, kind, asked, told, things):
    """-> [(which of POINTERS, token index in question + answer, x, y)], in pixels from the centre."""
    here = {t: (t.x - SIZE / 2, t.y - SIZE / 2) for t in things}
    ends = [end for _, end in asked.offsets]  # of each token, in "\n" + question
    named = [(ends.index(end + 1), t) for end, t in pointers(question, things)]
    out = [("named", i, *here[t]) for i, t in named]
    if kind == "relation":
        (_, a), (_, b) = named
        out.append(("apart", len(ends) - 1, b.x - a.x, b.y - a.y))
    if kind == "description":
        answer_ends, end = [end for _, end in told.offsets], 1  # of each token, in " " + answer
        before = len(ends) - 1  # the token after which the next object is named
        for t in sorted(things, key=lambda t: t.x):
            end += len(t.name)
            last = len(ends) + answer_ends.index(end)
            out += [("next", before, *here[t]), ("named", last, *here[t])]
            before, end = last + 1, end + 2
    return out


class Batches(IterableDataset):
    """Endless training batches from step `start` on. `progress`: a shared float, how far the run is (0 to 1)."""

    def __init__(self, tokenizer, seed, start, progress):
        self.tokenizer, self.seed, self.start, self.progress = tokenizer, seed, start, progress

    def __iter__(self):
        easy, worker = easy_list("train"), get_worker_info()
        step = self.start + worker.id  # the loader takes from its workers in turn
        while True:
            rng = random.Random(f"{self.seed} {step}")
            p = self.progress.value
            sides = next(shares for until, shares in CURRICULUM if p <= until)
            side = rng.choices(list(sides), list(sides.values()))[0]
            samples = []
            for i in range(PICTURES[side]):
                if side == GRID and rng.random() < EASY:
                    sample = easy_sample(*rng.choice(easy))
                else:
                    seed = self.seed * 50_000_000 + step * 64 + i
                    assert seed < HELD_OUT, seed
                    hardest = min(1, 0.1 + 3 * p)  # plain scenes with few things first
                    sample = scene_sample(seed, rng.random() * hardest, side, 8)
                *rest, things, questions = sample
                shapes = [t for t in things if t.color]
                for kind, hard in (("relation", ask_relation), ("counting", ask_counting)):
                    more = {hard(rng, shapes) for _ in range(3)} - {None} if things else {}
                    questions = questions + [(kind, *pair) for pair in sorted(more)]
                samples.append((*rest, things, [(k, vary(rng, q), a) for k, q, a in questions]))
            yield collate(samples, self.tokenizer)
            step += worker.num_workers


# The forward pass, over packed batches


def see(model, pixels, cells):
    """pixels (B, n, n, 3) uint8 of patches `cells` (B, V) -> features at layer -2, visual tokens, both (B, V, D)."""
    tower = model.model.vision_tower
    mean, std = (torch.tensor(v, device=pixels.device) * 255 for v in (MEAN, STD))
    x = tower.embeddings.patch_embedding(((pixels - mean) / std).permute(0, 3, 1, 2)).flatten(2).mT
    position = tower.embeddings.position_embedding.weight
    first = (tower.embeddings.class_embedding + position[0]).expand(len(x), 1, -1)
    x = tower.pre_layrnorm(torch.cat([first, x + position[cells + 1]], 1))
    for layer in tower.encoder.layers[
        :-1
    ]:  # vision_feature_layer -2: the last block is never run, nor trained
        x = layer(x, attention_mask=None)
    return x[:, 1:], model.model.multi_modal_projector(x[:, 1:])


def decode(model, batch, tokens):
    """-> logits at the places in batch["answers"], and what the decoder holds at the places of each of POINTERS."""
    language, (B, T), P, V = (
        model.model.language_model,
        batch["ids"].shape,
        len(batch["prefix"]),
        tokens.shape[1],
    )
    before = batch["prefix"].expand(B, P)
    x = torch.cat([language.embed_tokens(before), tokens, language.embed_tokens(batch["ids"])], 1)
    position = torch.cat(
        [
            torch.arange(P, device=x.device).expand(B, P),
            P + batch["cells"],
            P + GRID**2 + batch["place"],
        ],
        1,
    )
    segment = torch.cat([batch["segment"].new_zeros(B, P + V), batch["segment"]], 1)
    N = (
        P + V + T
    )  # a token sees what is not after it, if it is the picture's (or padding) or its own question's
    sees = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    sees = sees & torch.ones(N, N, dtype=torch.bool, device=x.device).tril()
    mask = torch.zeros(B, 1, N, N, device=x.device).masked_fill_(~sees[:, None], float("-inf"))
    out = language(
        inputs_embeds=x,
        attention_mask=mask,
        position_ids=position,
        use_cache=False,
        output_hidden_states=True,
    )

    def at(x, places):
        return x[places[:, 0].long(), P + V + places[:, 1].long()]

    logits = model.lm_head(at(out.last_hidden_state, batch["answers"]))
    return logits, [at(out.hidden_states[layer], batch[name]) for name, layer in POINTERS.items()]


def dense_loss(out, labels):
    """out: (B, V, all classes + 2) of one linear head; labels: (B, V, 6) as Scene.labels, kind -1 where unknown."""
    labels = labels.long()
    *scores, offset = out.float().split([*LABELS.values(), 2], -1)
    loss = 0
    for i, score in enumerate(scores):
        known = labels[..., i] >= 0 if i == 0 else labels[..., i] > 0
        if known.any():
            loss = loss + F.cross_entropy(score[known], labels[..., i][known])
    thing = labels[..., 0] > 0
    if thing.any():
        loss = loss + F.smooth_l1_loss(offset[thing], labels[..., 4:][thing] / PATCH, beta=0.2)
    return loss


@torch.no_grad()
def exact_answers(model, samples, tokenizer, device, size=16):
    """-> [(kind, right)]: right if each token of the answer, </s> too, is the likeliest: greedy decoding gives it."""
    out = []
    for i in range(0, len(samples), size):
        batch = {k: v.to(device) for k, v in collate(samples[i : i + size], tokenizer).items()}
        _, tokens = see(model, batch["pixels"], batch["cells"])
        hit = decode(model, batch, tokens)[0].argmax(-1) == batch["answers"][:, 2]
        right = {}
        for (*_, kind, number, _), ok in zip(batch["answers"].tolist(), hit.tolist(), strict=True):
            right[number] = EVERY_KIND[kind], right.get(number, (0, True))[1] and ok
        out += right.values()
    return out


def accuracies(results):
    by_kind = defaultdict(list)
    for kind, right in results:
        by_kind[kind].append(right)
    return {
        k: round(100 * sum(by_kind[k]) / len(by_kind[k]), 1) for k in EVERY_KIND if k in by_kind
    }


# Training


def optimizers(model, heads):
    """Muon for the matrices of the blocks, AdamW for embeddings, heads, norms, biases -> [(optimizer, peak rate)]."""
    unused = {id(p) for p in model.model.vision_tower.encoder.layers[-1].parameters()}
    named = [
        (n, p)
        for n, p in model.named_parameters()
        if id(p) not in unused and "post_layernorm" not in n
    ]
    inner = [p for n, p in named if p.dim() == 2 and ".layers." in n]
    chosen = {id(p) for p in inner}
    outer = [p for n, p in named if id(p) not in chosen] + list(heads.parameters())
    muon = torch.optim.Muon(
        inner, lr=0, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [
        (muon, 3e-3),
        (torch.optim.AdamW(outer, lr=0, betas=(0.9, 0.98), weight_decay=0.01), 2e-3),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tiny")
    parser.add_argument("--run", type=Path, default=Path("run"), help="state and log, for resuming")
    parser.add_argument(
        "--minutes",
        type=float,
        default=90,
        help="of training; curriculum and learning rate follow it",
    )
    parser.add_argument("--seed", type=int, default=0, help="0 to 39")
    parser.add_argument("--eval-every", type=float, default=5, help="minutes")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.run.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer()
    processor, model = build_processor(tokenizer), build_model(tokenizer).to(device)
    heads = nn.ModuleList(
        nn.Linear(WIDTH, n) for n in [sum(LABELS.values()) + 2] * 2 + [2] * len(POINTERS)
    ).to(device)
    trained = [*model.parameters(), *heads.parameters()]
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    rates = optimizers(model, heads)
    state = {"step": 0, "seconds": 0.0, "pictures": 0}
    if (args.run / "state.pt").exists():
        kept = torch.load(args.run / "state.pt", map_location=device, weights_only=True)
        model.load_state_dict(kept["model"])
        heads.load_state_dict(kept["heads"])
        average, state = kept["average"], kept["state"]
        for (optimizer, _), saved in zip(rates, kept["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    progress = torch.multiprocessing.Value("d", state["seconds"] / 60 / args.minutes)
    loader = DataLoader(
        Batches(tokenizer, args.seed, state["step"], progress), None,
        num_workers=1 if device == "cpu" else os.cpu_count() - 1, prefetch_factor=4,
    )  # fmt: skip
    held_out = [scene_sample(HELD_OUT + i) for i in range(150)]
    easy = [easy_sample(*e) for e in easy_list("test")]
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, vocabulary {tokenizer.get_vocab_size()}, {device}"
    )

    def measure(samples, **more):
        """Of the running average of the weights, which is what tiny/ gets."""
        live = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(average)
        found = accuracies(exact_answers(model, samples, tokenizer, device))
        save(
            model,
            processor,
            args.out,
            {**state, "device": device, "seed": args.seed, "accuracy": found, **more},
        )
        model.load_state_dict(live)
        return found

    start, last_eval, shown = time.time() - state["seconds"], time.time(), defaultdict(float)
    for batch in loader:
        p = (time.time() - start) / 60 / args.minutes
        if p >= 1:
            break
        progress.value = p
        batch = {k: v.to(device) for k, v in batch.items()}
        for optimizer, peak in rates:
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, (state["step"] + 1) / 100) * min(1, (1 - p) / 0.4)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            features, tokens = see(model, batch["pixels"], batch["cells"])
            dense = sum(
                dense_loss(head(x), batch["labels"]) for head, x in zip(heads, (features, tokens))
            )
            loss = dense * (0.5 if p < 0.3 else 0.25)
            if p > DENSE_ONLY:
                _, _, target, kind, _, length = batch["answers"].T
                logits, held = decode(model, batch, tokens)
                each = F.cross_entropy(logits.float(), target, reduction="none")
                weight = length**-0.5  # between every token alike and every answer alike
                loss = loss + (each * weight).sum() / weight.sum()
                for name, head, x in zip(POINTERS, heads[2:], held):
                    if len(x):
                        off = F.smooth_l1_loss(
                            head(x).float(), batch[name][:, 2:] / (2 * PATCH), beta=0.2
                        )
                        loss = loss + 0.5 * off
                        shown[name] += 0.05 * (off.item() - shown[name])
                for k in range(len(EVERY_KIND)):
                    if (kind == k).any():
                        shown[EVERY_KIND[k]] += 0.05 * (
                            each[kind == k].mean().item() - shown[EVERY_KIND[k]]
                        )
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer, _ in rates:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        live, keep = model.state_dict(), min(0.998, (1 + state["step"]) / (20 + state["step"]))
        torch._foreach_lerp_(list(average.values()), [live[k] for k in average], 1 - keep)
        state["step"] += 1
        state["pictures"] += len(batch["pixels"])
        state["seconds"] = time.time() - start
        shown["dense"] += 0.05 * (dense.item() - shown["dense"])
        if state["step"] % 50 == 0:
            losses = " ".join(f"{k} {v:.2f}" for k, v in shown.items())
            done = f"{state['seconds'] / 60:5.1f} min, step {state['step']}, {state['pictures']} pictures"
            print(f"{done}: {losses}", flush=True)
        if time.time() - last_eval > 60 * args.eval_every:
            print(f"held out, exact answers in %: {measure(held_out + easy[:40])}", flush=True)
            kept = {
                "model": model.state_dict(), "heads": heads.state_dict(), "average": average, "state": state,
                "optimizers": [o.state_dict() for o, _ in rates],
            }  # fmt: skip
            torch.save(kept, args.run / "state.new")
            (args.run / "state.new").rename(args.run / "state.pt")
            start, last_eval = (
                time.time() - state["seconds"],
                time.time(),
            )  # measuring is not training

    everything = [scene_sample(HELD_OUT + i) for i in range(600)] + easy
    seen = [q for i in range(5000) for q in scene(i).questions] + [
        q for _, qs in easy_list("train") for q in qs
    ]
    blind = blind_guess(seen, [q for *_, questions in everything for q in questions])
    blind = {k: round(100 * blind[k], 1) for k in EVERY_KIND}
    print(
        f"held out, exact answers in %: {measure(everything, blind_guess=blind)}\nthe best blind guess: {blind}"
    )


if __name__ == "__main__":
    main()
