"""Trains tiny/, a real LLaVA of 2.2 M parameters, from its first weights on drawn scenes and on
easy-VQA's train split.

    python -m lab.train_tiny OUT      # about an hour and a half on 2 CPU cores
    python -m lab.train_tiny OUT --control projector      # half an hour, see CONTROLS
    python -m lab.train_tiny OUT --control tower          # 45 minutes

OUT becomes a checkpoint, with a log in OUT/training.json. All that happens in a step, its data and
its learning rate too, follows from the step's number, the seed and the number of steps. So a run
may be interrupted: the same command resumes it from OUT.state, as if nothing had been.

What makes so small a model see within so short a time:
- Dense labels: linear heads on the visual features, before and after the projector, tell for every
  patch the shape, the colour, the character and where the object's centre is. On answers alone the
  model does not leave the blind guess.
- Pointers: linear heads inside the decoder tell where the object is that a question or a
  description has just named, how far apart the two of a relation are, and where the object is that
  a description names next. Without them "is the circle left of the star?" stays a coin toss.
- Windows: at first only an 8 x 8 window of the 16 x 16 patches is drawn, encoded and decoded, at
  its true positions.
- Packing: all questions about a picture stand in one sequence behind it (lab/packing.py).
- Muon (orthogonalised momentum) for the matrices of the blocks.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import random
import signal
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration

from extras.devices import choose_dtype
from lab import tables
from lab.packing import EVERY_KIND, POINTERS, easy_list, easy_sample, pack, scene_sample
from lab.scenes import GRID, HELD_OUT, LABELS, PATCH, ask_counting, ask_relation
from lab.untrained import (
    MEAN,
    STD,
    WIDTH,
    build_model,
    build_processor,
    build_tokenizer,
    save,
    vary,
)

# Until this part of the run: {window side in patches: share of the batches}
CURRICULUM = (
    (0.13, {8: 1.0}),
    (0.25, {8: 0.3, 12: 0.7}),
    (0.40, {8: 0.1, 12: 0.4, 16: 0.5}),
    (0.65, {12: 0.25, 16: 0.75}),
    (1.00, {16: 1.0}),
)
DENSE_ONLY = 0.03  # the part of the run before the first question
EASY = 0.12  # share of easy-VQA among whole pictures
SMALL = 0.10  # share of scenes with small text
CROWDED = 0.10  # share of crowded scenes among whole pictures
POINTER_LAYER = {"named": 2, "apart": 3, "next": 3}  # each is read from this decoder layer's output
MUON_RATE = 3e-3
ADAMW_RATE = 2e-3
LONGEST_STEP = 10.0  # seconds; what a step takes beyond them, the process was stopped
INNER = 3  # the encoder layer, of 0 to 6 that run, whose output is `see`'s "inner"
TINY = Path(__file__).parent.parent / "tiny"


@dataclass(frozen=True)
class Run:
    """All that decides what a run does. `held_out`: how many pictures of each sort to measure."""

    steps: int = 3900
    seed: int = 0  # 0 to 39
    pictures: dict = field(default_factory=lambda: {8: 64, 12: 32, 16: 24})  # per batch, by side
    measure_every: int = 260
    held_out: int = 80
    held_out_at_the_end: int = 1000
    curriculum: tuple = CURRICULUM
    muon_rate: float = MUON_RATE
    dense: tuple = ("features", "tokens")  # the rows of `see` that dense labels are read from
    from_tiny: bool = False  # starts with the weights of tiny/, but for the projector's


# Models that show what does not come from dense labels on the rows that the decoder reads:
# - projector: only a new projector and tiny/'s decoder learn, from answers and pointers alone;
#   tiny/'s tower is frozen
# - tower: all anew, as tiny/ was, but the dense labels are read from an inner encoder layer alone
CONTROLS = {
    "projector": Run(
        steps=1200,
        seed=2,
        pictures={GRID: 16},
        held_out_at_the_end=200,
        curriculum=((1.00, {GRID: 1.0}),),
        muon_rate=MUON_RATE / 3,
        dense=(),
        from_tiny=True,
    ),
    "tower": Run(steps=1800, seed=1, held_out_at_the_end=200, dense=("inner",)),
}


# ---- data ----


class Batches(Dataset):
    """Step -> its batch."""

    def __init__(self, run, tokenizer):
        self.run = run
        self.tokenizer = tokenizer
        self.easy = easy_list("train")

    def __getitem__(self, step):
        rng = random.Random(f"{self.run.seed} {step}")
        done = step / self.run.steps
        shares = next(shares for until, shares in self.run.curriculum if done <= until)
        side = rng.choices(list(shares), list(shares.values()))[0]

        samples = []
        for i in range(self.run.pictures[side]):
            seed = self.run.seed * 50_000_000 + step * 64 + i
            assert seed < HELD_OUT, seed
            sample = self.sample(rng, seed, side, done)
            more = hard_questions(rng, sample.things)
            asked = sample.questions + more
            sample.questions = [(kind, vary(rng, q), answer) for kind, q, answer in asked]
            samples.append(sample)
        return pack(samples, self.tokenizer)

    def sample(self, rng, seed, side, done):
        whole = side == GRID
        if whole and rng.random() < EASY:
            return easy_sample(*rng.choice(self.easy))

        hardest = min(1, 0.1 + 3 * done)  # plain scenes with few things first
        level = rng.random() * hardest
        chance = rng.random()
        if chance < SMALL:
            variant = "small"
        elif whole and chance < SMALL + CROWDED:
            variant = "crowded"
        else:
            variant = ""
        return scene_sample(seed, level, side, 8, variant)


def hard_questions(rng, things):
    """Up to three more of both kinds that take longest to learn."""
    shapes = [t for t in things if t.color]
    out = []
    for kind, ask in (("relation", ask_relation), ("counting", ask_counting)):
        if things:
            asked = {ask(rng, shapes) for _ in range(3)} - {None}
            out += [(kind, *pair) for pair in sorted(asked)]
    return out


def held_out_samples(n):
    """Sort of pictures -> some that training never sees."""
    seeds = range(HELD_OUT, HELD_OUT + n)
    return {
        "scenes": [scene_sample(seed) for seed in seeds],
        "easy-VQA": [easy_sample(*one) for one in easy_list("test")[:n]],
        "small text": [scene_sample(seed, variant="small") for seed in seeds],
        "crowded": [scene_sample(seed, variant="crowded") for seed in seeds],
    }


# ---- the forward pass, over packed batches ----


def see(model, pixels, cells):
    """pixels (B, n, n, 3) uint8 of patches `cells` (B, V) -> rows of three names, (B, V, D) each

    inner: what encoder layer INNER gives; features: what the last gives; tokens: the projector
    """
    tower = model.model.vision_tower
    mean = torch.tensor(MEAN, device=pixels.device) * 255
    std = torch.tensor(STD, device=pixels.device) * 255
    x = ((pixels - mean) / std).permute(0, 3, 1, 2)
    x = tower.embeddings.patch_embedding(x).flatten(2).mT

    position = tower.embeddings.position_embedding.weight
    first = (tower.embeddings.class_embedding + position[0]).expand(len(x), 1, -1)
    x = torch.cat([first, x + position[cells + 1]], 1)

    x = tower.pre_layrnorm(x)
    rows = {}
    for i, layer in enumerate(tower.encoder.layers[:-1]):  # layer -2 is read: the last never runs
        x = layer(x, attention_mask=None)
        if i == INNER:
            rows["inner"] = x[:, 1:]
    rows["features"] = x[:, 1:]
    rows["tokens"] = model.model.multi_modal_projector(rows["features"])
    return rows


def decode(model, batch, tokens):
    """-> the logits at batch["answers"], and what the decoder holds at each pointer's places"""
    language = model.model.language_model
    B, V, _ = tokens.shape
    P = len(batch["prefix"])
    before = batch["prefix"].expand(B, P)
    x = [language.embed_tokens(before), tokens, language.embed_tokens(batch["ids"])]
    x = torch.cat(x, 1)

    first = torch.arange(P, device=x.device).expand(B, P)
    position = torch.cat([first, P + batch["cells"], P + GRID**2 + batch["place"]], 1)

    # A token sees what is not after it, if that is the picture's or its own question's.
    segment = torch.cat([batch["segment"].new_zeros(B, P + V), batch["segment"]], 1)
    sees = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    N = x.shape[1]
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
    held = {k: at(out.hidden_states[layer], batch[k]) for k, layer in POINTER_LAYER.items()}
    return logits, held


# ---- losses ----


def build_heads(run):
    """The linear heads that only training needs."""
    dense = sum(LABELS.values()) + 2
    heads = {name: nn.Linear(WIDTH, dense) for name in run.dense}
    heads |= {name: nn.Linear(WIDTH, 2) for name in POINTERS}
    return nn.ModuleDict(heads)


def dense_loss(out, labels):
    """out: (B, V, all classes + 2) of one head; labels: (B, V, 6) as Scene.labels, kind -1 where
    nothing is known."""
    labels = labels.long()
    *scores, offset = out.float().split([*LABELS.values(), 2], -1)
    loss = 0 * offset.sum()  # 0, also where nothing is known of any patch
    for i, score in enumerate(scores):
        label = labels[..., i]
        known = label >= 0 if i == 0 else label > 0
        if known.any():
            loss = loss + F.cross_entropy(score[known], label[known])

    thing = labels[..., 0] > 0
    if thing.any():
        loss = loss + F.smooth_l1_loss(offset[thing], labels[..., 4:][thing] / PATCH, beta=0.2)
    return loss


def losses(model, heads, batch, run, done):
    """-> the loss of a batch, and its parts to be shown"""
    rows = see(model, batch["pixels"], batch["cells"])
    loss = 0
    shown = {}
    if run.dense:
        dense = sum(dense_loss(heads[name](rows[name]), batch["labels"]) for name in run.dense)
        loss = dense * (0.5 if done < 0.3 else 0.25)
        shown["dense"] = dense
        if done <= DENSE_ONLY:
            return loss, shown

    logits, held = decode(model, batch, rows["tokens"])
    _, _, target, kind, _, length = batch["answers"].T
    each = F.cross_entropy(logits.float(), target, reduction="none")
    weight = length**-0.5  # between every token alike and every answer alike
    loss = loss + (each * weight).sum() / weight.sum()
    for k in kind.unique().tolist():
        shown[EVERY_KIND[k]] = each[kind == k].mean()

    for name, x in held.items():
        if len(x):
            where = batch[name][:, 2:] / (2 * PATCH)
            off = F.smooth_l1_loss(heads[name](x).float(), where, beta=0.2)
            loss = loss + 0.5 * off
            shown[name] = off
    return loss, shown


# ---- measuring ----


@torch.no_grad()
def exact_answers(model, samples, tokenizer, device, size=16):
    """-> [(kind, right)]: right if each token of the answer, </s> too, is the likeliest after the
    right ones before it. Then, and only then, greedy decoding gives it."""
    out = []
    for i in range(0, len(samples), size):
        batch = pack(samples[i : i + size], tokenizer)
        batch = {k: v.to(device) for k, v in batch.items()}
        tokens = see(model, batch["pixels"], batch["cells"])["tokens"]
        logits, _ = decode(model, batch, tokens)
        hits = logits.argmax(-1) == batch["answers"][:, 2]

        right = {}  # number of the answer -> its kind, and whether all its tokens were hit so far
        for (*_, kind, number, _), hit in zip(batch["answers"].tolist(), hits.tolist()):
            _, so_far = right.get(number, (kind, True))
            right[number] = (EVERY_KIND[kind], so_far and hit)
        out += right.values()
    return out


def accuracies(model, held_out, tokenizer, device):
    """Sort of pictures -> right answers in %: to all questions, and to each kind of question"""
    out = {}
    for sort, samples in held_out.items():
        by_kind = defaultdict(list)
        for kind, right in exact_answers(model, samples, tokenizer, device):
            by_kind["all"].append(right)
            by_kind[kind].append(right)
        kinds = [k for k in ("all", *EVERY_KIND) if k in by_kind]
        out[sort] = {k: round(100 * sum(by_kind[k]) / len(by_kind[k]), 1) for k in kinds}
    return out


def machine(device):
    facts = {"system": platform.system(), "processor": platform.machine(), "device": device}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    else:
        facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    facts |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts |= {"muon": str(muon_dtype(device)).removeprefix("torch.")}
    return facts | {"python": platform.python_version(), "torch": torch.__version__}


# ---- training ----


def tiny_with(projector):
    """The model in tiny/ with another projector. Its tower is frozen."""
    model = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    model.model.multi_modal_projector = projector
    model.model.vision_tower.requires_grad_(False)
    return model


def build_optimizers(model, heads, run):
    """Muon for the matrices of the blocks; AdamW for embeddings, heads, norms and biases."""
    inner = []
    outer = list(heads.parameters())
    for name, p in model.named_parameters():
        if "encoder.layers.7" in name or "post_layernorm" in name:
            continue  # behind the layer that is read
        if not p.requires_grad:
            continue
        matrix_of_a_block = p.dim() == 2 and ".layers." in name
        (inner if matrix_of_a_block else outer).append(p)

    muon = torch.optim.Muon(
        inner, lr=run.muon_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(outer, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    return [muon, adamw]


def muon_dtype(device):
    """Muon iterates in bfloat16. Where that is emulated float32 is many times as fast."""
    good = choose_dtype(None, torch.device(device), half=True) == torch.bfloat16
    return torch.bfloat16 if good else torch.float32


@contextlib.contextmanager
def muon_in(dtype):
    """torch.optim.Muon has no option for it"""
    with mock.patch.object(torch.Tensor, "bfloat16", lambda x: x.to(dtype, copy=True)):
        yield


def rate(step, steps):
    """The learning rate, as a part of its peak: up in 100 steps, down to 0 in the last 40 %."""
    return min(1.0, (step + 1) / 100) * min(1.0, (1 - step / steps) / 0.4)


class Training:
    """Model, optimizers and log: all that changes from step to step, and is kept in a file."""

    def __init__(self, run, tokenizer, device):
        torch.manual_seed(run.seed)  # of the first weights; steps draw no random numbers here
        self.run = run
        self.device = device
        self.model = build_model(tokenizer)
        if run.from_tiny:
            self.model = tiny_with(self.model.model.multi_modal_projector)
        self.model.to(device)
        self.heads = build_heads(run).to(device)
        self.average = copy.deepcopy(self.model)  # running average of the weights: the result
        self.optimizers = build_optimizers(self.model, self.heads, run)
        self.log = {
            "step": 0,
            "pictures": 0,
            "seconds": 0.0,  # of the steps
            "processor_seconds": 0.0,  # of the steps, over all cores
            "interruptions": [],  # after these steps
            "losses": {},  # running means
            "history": {},  # step -> what was measured then
        }

    def parts(self):
        return [self.model, self.heads, self.average, *self.optimizers]

    def keep(self, file):
        new = file.with_name(file.name + ".new")
        kept = {"parts": [part.state_dict() for part in self.parts()], "log": self.log}
        torch.save(kept | {"run": asdict(self.run)}, new)
        new.replace(file)  # the file is whole at any time

    def resume(self, file):
        kept = torch.load(file, map_location=self.device, weights_only=True)
        if Run(**kept["run"]) != self.run:
            raise SystemExit(f"{file} is of a run with other settings: {kept['run']}")
        for part, state in zip(self.parts(), kept["parts"]):
            part.load_state_dict(state)
        self.log = kept["log"]
        self.log["interruptions"].append(self.log["step"])

    def step(self, batch):
        step = self.log["step"]
        batch = {k: v.to(self.device) for k, v in batch.items()}
        for optimizer, peak in zip(self.optimizers, (self.run.muon_rate, ADAMW_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, self.run.steps)

        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss, shown = losses(self.model, self.heads, batch, self.run, step / self.run.steps)
        loss.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        with muon_in(muon_dtype(self.device)):
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        keep = min(0.998, (1 + step) / (20 + step))
        with torch.no_grad():
            averages = list(self.average.parameters())
            torch._foreach_lerp_(averages, list(self.model.parameters()), 1 - keep)

        means = self.log["losses"]
        for name, value in shown.items():
            means[name] = 0.95 * means.get(name, value.item()) + 0.05 * value.item()
        self.log["step"] += 1
        self.log["pictures"] += len(batch["pixels"])


def clock(log, started):
    """Adds the time since `started` = (time, processor time), and returns the present."""
    now = (time.perf_counter(), time.process_time())
    log["seconds"] += min(now[0] - started[0], LONGEST_STEP)
    log["processor_seconds"] += now[1] - started[1]
    return now


def train(out, run, interrupted=lambda step: False, command=""):
    """`interrupted` is asked after every step whether to stop there. -> whether the run is done"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = out.with_name(out.name + ".state")
    out.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    training = Training(run, tokenizer, device)
    if state.exists():
        training.resume(state)
    log = training.log
    n = sum(p.numel() for p in training.model.parameters())
    print(f"{n} parameters, {tokenizer.get_vocab_size()} tokens, {device}, step {log['step']}")

    def measure(held_out):
        """Measures the average of the weights, and writes it and the log to `out`."""
        found = accuracies(training.average, held_out, tokenizer, device)
        print(f"held out, exact answers in %: {json.dumps(found)}", flush=True)
        save(training.average, processor, out)

        means = {k: round(v, 4) for k, v in log["losses"].items()}
        now = {"pictures": log["pictures"], "seconds": round(log["seconds"]), "losses": means}
        log["history"][str(log["step"])] = now | {"accuracy": found}
        facts = {"command": command, "settings": settings(run), "machine": machine(device)}
        facts |= {k: v for k, v in log.items() if k != "losses"}
        tables.save(facts, out / "training.json", depth=2)

    loader = DataLoader(
        Batches(run, tokenizer),
        batch_size=None,
        sampler=range(log["step"], run.steps),
        num_workers=1 if device == "cpu" else os.cpu_count() - 1,
        prefetch_factor=4,
    )
    held_out = held_out_samples(run.held_out)
    now = (time.perf_counter(), time.process_time())
    for batch in loader:
        training.step(batch)
        now = clock(log, now)
        step = log["step"]

        if step % 25 == 0:
            done = f"{log['seconds'] / 60:.1f} min, step {step}, {log['pictures']} pictures"
            means = " ".join(f"{k} {v:.2f}" for k, v in log["losses"].items())
            print(f"{done}: {means}", flush=True)
        if step % run.measure_every == 0 and step < run.steps:
            measure(held_out)
        stop = interrupted(step)
        if stop or step % 50 == 0 or step == run.steps:
            training.keep(state)
        if stop:
            return False
        now = (time.perf_counter(), time.process_time())  # measuring is not training

    measure(held_out_samples(run.held_out_at_the_end))
    return True


def settings(run):
    """The run's, and what stands at the top of this file."""
    names = ("DENSE_ONLY", "EASY", "SMALL", "CROWDED", "POINTER_LAYER", "ADAMW_RATE", "INNER")
    return asdict(run) | {n.lower(): globals()[n] for n in names}


def main():
    parser = argparse.ArgumentParser(description="Trains tiny/ from nothing, or resumes doing so.")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--control", choices=CONTROLS, help="a control experiment, not tiny/")
    parser.add_argument("--steps", type=int, help=f"({Run.steps}, or what the control has)")
    parser.add_argument("--seed", type=int, help=f"0 to 39 ({Run.seed}, or the control's)")
    args = parser.parse_args()

    run = CONTROLS.get(args.control, Run())
    run = replace(
        run,
        steps=run.steps if args.steps is None else args.steps,
        seed=run.seed if args.seed is None else args.seed,
    )

    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    command = f"python -m lab.train_tiny OUT --steps {run.steps} --seed {run.seed}"
    if args.control:
        command += f" --control {args.control}"
    if not train(args.out, run, lambda step: stop.is_set(), command):
        print(f"interrupted; to go on: the same command ({command})")


if __name__ == "__main__":
    main()
