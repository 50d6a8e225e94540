"""What merging saves in time and memory: our model beside transformers'.

Both are on the same weight tensors, in one process.

    python -m lab.bench                          # tiny-llava, about 10 minutes on 2 cores;
                                                 # writes lab/bench-tiny-llava.json
    python -m lab.bench --shape llava-1.5-7b     # 14 GB of weights: for a GPU, or for patience
    python -m lab.bench --shape long             # VTU attention alone: 2880 visual tokens,
                                                 # of which 450 are left
    python -m lab.bench --layers 2 --repeats 2   # a quick look: two decoder layers
    python -m lab.bench --render                 # only prints the tables of the JSON file;
                                                 # takes the same options

Weights are random at real shapes, so nothing is downloaded, and ToMe's fixed r gives the token
counts. At tight and tightest, of which `leaving` is the second stage, it is mid's. A round asks
transformers (A), then ours at two budgets with each --vtu (B), and so on: A B A B. Ratios are of a
B and the A before it. Both get the same photo and text, run under inference_mode with SDPA, compute
one row of logits, choose greedily, and transformers has its own cache. One more round, the first,
warms up and tells the peak memory of each stage. transformers runs the whole vision tower, ours the
blocks up to the layer that is read. The encoder's time has the second stage's in it. The JSON has
every raw time.
"""

import argparse
import ctypes
import datetime
import gc
import inspect
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

import dymu
from dymu import DyMU, attention, best, merge, rotate, vtu_attention
from extras.decoding import prefill_expanded
from extras.devices import choose_device, choose_dtype
from extras.door import one_line, read_json
from extras.sampled import spread as queries
from extras.second_stage import most_alike, second_stage
from extras.thresholds import BEHIND, merges
from lab.tables import head, line, save
from load import KEYS, Processor
from model import KVCache, Llava, TextConfig, rope_table

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
SHAPES = {  # the sizes of CLIP's vision tower (at 336 pixels, in patches of 14), and of Llama
    "tiny-llava": ((1024, 4096, 24, 16), (2048, 5632, 22, 32, 4)),
    "llava-1.5-7b": ((1024, 4096, 24, 16), (4096, 11008, 32, 32, 32)),
    "smoke": ((64, 128, 8, 4), (256, 512, 2, 8, 2)),  # seconds, to see that it runs
}
LONG = dict(heads=32, head_dim=128, N=2880, N_un=450)
IMAGE, TEXT, STEPS = 32000, 40, 5  # image token; tokens of text, tokens decoded
PHOTO = (1280, 960)
BUDGETS = ("full", "high", "mid", "low", *BEHIND)  # as shown
ORDER = ("full", "mid", "low", "high", *BEHIND)  # as run, A before each two
VTU = {way: dict(queries=queries(int(way))) for way in "12"}
VTU = {"all": {}, **VTU, "off": dict(vtu=False)}
STAGES = {
    "encoder": "encoder",
    "prefill": "prefill",
    "decode": "decode, per token",
    "first": "first token",
}
TABLE_1 = {  # as the paper prints
    "full": (576, 1359.0),
    "high": (394, 1272.0),
    "mid": (195, 311.5),
    "low": (89, 64.9),
}


# ---- what is done to the tokens ----


class leaving(second_stage):  # noqa: N801
    """A second stage that leaves the share tau of a picture's positions, whatever its rows are.

    Random rows are never alike. So a round of the real matching merges the best pairs, half of what
    there is to merge. Of 208 rows that takes 10 rounds, where the two last find nothing; on tiny/
    with its own thresholds it took 5 to 10.
    """

    def once(self, x, size, token_at):
        score, partner = most_alike(x)
        too_many = len(x) - round(self.tau * len(token_at))
        if too_many <= 0:
            return None
        return merge(x, size, token_at, partner, best(score, (too_many + 1) // 2))


def merging(budget: str, config, spent: list) -> dict:
    """DyMU's settings of a budget; spent gets the seconds of each call of its second stage"""
    if budget == "full":
        return {}
    if budget in BEHIND:
        after = clocked(leaving(BEHIND[budget]), spent)
        return dict(r=merges("mid", config), after=after)
    return dict(r=merges(budget, config))


# ---- two models, one set of weights ----


def build(a, device, dtype):
    """transformers' model with random weights, ours with the same tensors, and the processor."""
    # here and below, because to print the tables one needs no transformers
    from tokenizers import Tokenizer, models
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    vision, text = (dict(zip(SIZES, sizes)) for sizes in SHAPES[a.shape])
    vision |= dict(model_type="clip_vision_model", image_size=336, patch_size=14)
    text |= dict(model_type="llama", vocab_size=32064)
    if a.layers:
        text |= dict(num_hidden_layers=a.layers)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    with no_init_weights(), torch.device(device):
        theirs = LlavaForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    tensors = {}
    for key, tensor in theirs.eval().requires_grad_(False).state_dict().items():
        if tensor.ndim > 1:
            # so that the variance is one over the number of inputs
            bound = (3 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound)
        else:
            tensor.fill_("norm" in key and key.endswith("weight"))
        for pattern, replacement in KEYS:
            key = re.sub(pattern, replacement, key)
        tensors[key] = tensor
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        Tokenizer(models.WordLevel({"<image>": IMAGE}, "<image>")).save(f"{folder}/tokenizer.json")
        processor = Processor(Path(folder))
    with torch.device("meta"):
        ours = Llava(processor.config).eval().requires_grad_(False)
    ours.load_state_dict({name: tensors[name] for name in ours.state_dict()}, assign=True)
    for name, tensor in ours.state_dict().items():
        assert tensor.data_ptr() == tensors[name].data_ptr(), "a tensor was copied"
    return ours, theirs, processor


def stream_ours(ours, ids, visual, settings, expand=False):
    """Prefills; then yields the cache after each token, once that token is known on the host."""
    rows, token_at = ours.splice(ids, visual, settings.vtu)
    cache = KVCache()
    if expand:
        rows, token_at = prefill_expanded(ours, rows, token_at, cache, settings.queries)
    options = dict(max_new_tokens=1 + STEPS, eos=())
    for _ in ours.decode(rows, token_at, cache, settings.queries, **options):
        yield cache


def stream_theirs(theirs, ids, visual):
    from transformers import DynamicCache

    cache = DynamicCache(config=theirs.config.get_text_config())
    embeds = theirs.get_input_embeddings()(ids)
    given = dict(inputs_embeds=embeds.masked_scatter((ids == IMAGE)[..., None], visual[0]))
    # as an index, which is faster: after the slice that logits_to_keep=1 takes, as in generate, a
    # matmul on CPU copies the weights of the whole head
    last = torch.tensor([-1], device=ids.device)
    # the older name is deprecated, and removed in transformers 5.40
    name = "cache" if "cache" in inspect.signature(theirs.forward).parameters else "past_key_values"
    options = {name: cache, "use_cache": True, "logits_to_keep": last}
    while True:
        logits = theirs(**given, **options).logits
        token = int(logits[0, -1].argmax())
        yield cache
        given = dict(input_ids=torch.tensor([[token]], device=ids.device))


def ask(watch, pixels, encode, streams):
    """Asks about the photo once.

    Yields for each stream that follows the encoder what watch tells of each stage.
    """
    x, preprocess = watch(pixels)
    visual, encoder = watch(lambda: encode(x))
    for name, start in streams.items():
        stream = start(visual)
        cache, prefill = watch(stream.__next__)
        if hasattr(cache, "bytes"):
            held = cache.bytes
        else:
            held = sum(c.keys.nbytes + c.values.nbytes for c in cache.layers)
        decode = [watch(stream.__next__)[1] for _ in range(STEPS)]
        stages = dict(preprocess=preprocess, encoder=encoder, prefill=prefill, decode=decode)
        # ours come with their map
        rows = visual[0][0] if isinstance(visual[0], tuple) else visual[0]
        yield name, dict(stages, rows=len(rows), cache=held)


# ---- what watches a stage: run() -> its result, and what it took ----


def timed(run):
    """Seconds."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    start, out = time.perf_counter(), run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return out, time.perf_counter() - start


def clocked(function, spent: list):
    """The same function; spent gets the seconds of each call."""

    def call(*args, **options):
        out, seconds = timed(lambda: function(*args, **options))
        spent.append(seconds)
        return out

    return call


def peak_on(device):
    def peak(run):
        """The most bytes held beyond those held before, None where that cannot be told.

        On CPU: resident set.
        """
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before, out = torch.cuda.memory_allocated(), run()
            return out, torch.cuda.max_memory_allocated() - before
        status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if device.type != "cpu" or not reset.exists():
            return run(), None
        # memory freed before must not be there to be used again
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        reset.write_text("5")  # the peak starts anew
        before, out = status.read_text(), run()
        most = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        least = re.search(r"VmRSS:\s+(\d+)", before)
        return out, 1024 * (int(most[1]) - int(least[1]))

    return peak


def matching_share(encode) -> float:
    """The part of the encoder's time that matching and merging take.

    By a clock around each of their calls.
    """
    spent = []
    names = ("cosine", "match", "merge")
    functions = {name: clocked(getattr(dymu, name), spent) for name in names}
    with (
        mock.patch.multiple(dymu, **functions),
        mock.patch.object(DyMU, "choose", clocked(DyMU.choose, spent)),
    ):
        _, seconds = timed(encode)
    return sum(spent) / seconds


# ---- measuring ----


@torch.inference_mode()
def measure(a, device, dtype) -> dict:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ours, theirs, processor = build(a, device, dtype)
    config, c = processor.config, processor.config.text_config
    side = config.vision_config.image_size
    clip = CLIPImageProcessorPil(
        size=dict(shortest_edge=side), crop_size=dict(height=side, width=side)
    )
    photo = Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3 * 40 * 30)).resize(PHOTO)
    N, text = config.visual_tokens, torch.randint(3, IMAGE, (TEXT,))
    ids, their_ids = (
        torch.cat((text[:5], torch.full((n,), IMAGE), text[5:])).to(device) for n in (1, N)
    )
    their_ids = their_ids[None]

    def their_pixels():
        return clip(photo, return_tensors="pt")["pixel_values"]

    def their_encode(pixels):
        return theirs.get_image_features(pixel_values=pixels.to(device, dtype)).pooler_output

    def ask_theirs(watch):
        stream = {"transformers": lambda x: stream_theirs(theirs, their_ids, x)}
        return ask(watch, their_pixels, their_encode, stream)

    def ask_ours(watch, budget):
        spent, streams = [], {}
        given = merging(budget, config, spent)
        for way in a.vtu if given else ["all"]:  # where nothing merges they are all the same
            settings = DyMU(**given, **VTU[way])
            name = f"{budget}, `{way}`" if given else budget
            streams[name] = lambda x, s=settings: stream_ours(ours, ids, x, s)
        if budget == "low":  # what the small cache costs per token
            streams["low, `all`, expanded cache"] = lambda x: stream_ours(
                ours, ids, x, DyMU(**given), expand=True
            )
        see, encode = lambda: processor.image(photo), lambda x: ours.encode(x, DyMU(**given))
        for name, run in ask(watch, see, encode, streams):
            yield name, dict(run, second_stage=sum(spent))

    # Is it the same function of the same input? This warms up, too.
    pixels, there = processor.image(photo), their_pixels()
    difference = float((pixels - there[0]).abs().max())
    there = theirs(input_ids=their_ids, pixel_values=there.to(device, dtype), logits_to_keep=1)
    there = there.logits[0, -1].float()
    here = ours(ids, pixels)[-1].float()
    agreement = float(torch.corrcoef(torch.stack((here, there)))[0, 1])
    assert difference < 1e-4 and agreement > 0.9, (difference, agreement)

    low = DyMU(r=merges("low", config))
    ours.encode(pixels, low)  # what a first call keeps for good is no stage's peak
    order, share, first, runs = [b for b in ORDER if b in a.tokens], [], {}, {"transformers": []}
    for i in range(-1, a.repeats):  # the first round is the warm-up
        watch = timed if i >= 0 else peak_on(device)
        for n, budget in enumerate(order):
            step = f"round {i + 1} of {a.repeats}" if i >= 0 else "warm-up"
            print(f"\r{step}: {budget:<8}", end="", file=sys.stderr, flush=True)
            theirs_due = n % 2 == 0 and (i >= 0 or n == 0)  # to warm up once is enough
            for name, run in (*(ask_theirs(watch) if theirs_due else ()), *ask_ours(watch, budget)):
                if i < 0:
                    first[name] = run
                else:
                    run["first"] = run["preprocess"] + run["encoder"] + run["prefill"]
                    runs.setdefault(name, []).append(run)
                    run["pair"] = len(runs["transformers"]) - 1  # the A to be compared with
            if budget == "low" and i >= 0:
                share.append(matching_share(lambda: ours.encode(pixels, low)))
    print(file=sys.stderr)
    names = ["transformers", *(name for b in BUDGETS for name in runs if name.split(",")[0] == b)]
    weights, *read = (
        sum(t.nbytes for t in part.state_dict().values())
        for part in (ours, ours.language_model.layers, ours.lm_head)
    )
    per_row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize
    results = dict(vision=vars(config.vision_config), text=vars(c))
    results |= dict(visual_tokens=N, text_tokens=TEXT, photo=PHOTO)
    results |= dict(weight_bytes=weights, read_per_token=sum(read), cache_per_row=per_row)
    results |= dict(pixel_difference=difference, logit_correlation=agreement)
    results |= dict(matching_share_at_low=share)
    return results | dict(peak_bytes={n: first[n] for n in names}, runs={n: runs[n] for n in names})


@torch.inference_mode()
def measure_long(a, device, dtype) -> dict:
    """One layer's causal attention over N tokens, and over N_un that stand for N positions."""
    H, d, N, N_un = LONG.values()
    c = TextConfig(hidden_size=H * d, num_attention_heads=H)
    cos, sin = (t.to(dtype) for t in rope_table(N, c, device))
    q, k, v = torch.randn(3, H, N, d).to(device, dtype)
    token_at = torch.cat((torch.arange(N_un), torch.randint(N_un, (N - N_un,))))
    token_at = token_at[torch.randperm(N)].to(device)
    few = *(t[:, :N_un].contiguous() for t in (q, k, v)), token_at, cos, sin
    ways = {
        "full length": lambda: attention(rotate(q, cos, sin), rotate(k, cos, sin), v, causal=True)
    }
    everywhere = torch.arange(N, device=device)
    sampled = {"`all`": lambda _: everywhere, "`2`": queries(2), "`1`": queries(1)}
    ways |= {way: lambda s=s: vtu_attention(*few, s(token_at)) for way, s in sampled.items()}
    warm_up, *runs = [[timed(run)[1] for run in ways.values()] for _ in range(1 + a.repeats)]
    return dict(LONG, runs=dict(zip(ways, zip(*runs))))


# ---- showing ----


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def spread(values, scale: float = 1) -> str:
    return "{} [{}, {}]".format(*(number(scale * f(values)) for f in (statistics.median, min, max)))


def ratios(a, b) -> str:
    return spread([x / y for x, y in zip(a, b)])


def counts() -> list[str]:
    """Table 1 of the paper beside what is really computed.

    Attention in one layer of the 7B shape.
    """
    c, N, out = TextConfig(), TABLE_1["full"][0], []
    D, columns = c.hidden_size, [f"attention, `{way}`" for way in VTU]
    columns += ["layer, `all`", "layer, `1`", "layer, `off`"]
    for budget, (rows, printed) in TABLE_1.items():
        work = [(1 if budget == "full" else 2) * rows * rows * D]
        for way in VTU:
            q = rows if way == "off" else N if way == "all" else min(int(way) * rows, N)
            k = rows if way == "off" else N
            remerge = q * D if q > rows else 0
            # QK^T and AV; RoPE; the average of Eq. 11
            work.append(2 * q * k * D + 2 * (q + k) * D + remerge)
        linear = rows * (4 * D * D + 3 * D * c.intermediate_size)
        cells = *work, *(linear + work[i] for i in (1, 2, 4))
        millions = (f"{x / 1e6:.{int(x < 1e10)}f}" for x in cells)
        out.append(line(budget, str(rows), f"{printed:.1f}", *millions))
    return [*head("", "tokens", "printed", "its formula", *columns), *out]


def table(results: dict) -> str:
    """The tables of RESULTS.md, from the content of the JSON file alone."""
    r, runs = results, results["runs"]
    by = f"{r['machine']}, {r['threads']} threads, {r['dtype']}, torch {r['torch']}, {r['date']}"
    unit = f"Milliseconds, median [least, most] of {r['repeats']}"
    if r["shape"] == "long":
        what = f"{r['N']} visual tokens, {r['N_un']} left, {r['heads']} heads x {r['head_dim']}"
        out = [f"Attention of one layer, {what}; {by}. {unit}; ratios pair by pair.", ""]
        out += head("queries per token", "time", "full length / this", "`all` / this")
        full, every = runs["full length"], runs["`all`"]
        for way, t in runs.items():
            out.append(line(way, spread(t, 1000), ratios(full, t), ratios(every, t)))
        return "\n".join(out)

    def of(name, stage):
        times = (run[stage] for run in runs[name])
        return [statistics.median(t) if isinstance(t, list) else t for t in times]

    def faster(name, stage):
        theirs = of("transformers", stage)
        return ratios([theirs[run["pair"]] for run in runs[name]], of(name, stage))

    def memory(name):
        # what is measured is before the expansion, which makes it as large as at full length
        if "expanded" in name:
            return "-", "-", "-"
        one = r["peak_bytes"][name]
        peaks = one["preprocess"], one["encoder"], one["prefill"], *one["decode"]
        visual = one["cache"] - r["text_tokens"] * r["cache_per_row"]
        cells = one["cache"], visual, None if None in peaks else max(peaks)
        return ("?" if cell is None else number(cell / 2**20) for cell in cells)

    v, t, ours = r["vision"], r["text"], [name for name in runs if name != "transformers"]
    shape = f"CLIP ViT, {v['num_hidden_layers']} blocks x {v['hidden_size']}; "
    shape += f"Llama, {t['num_hidden_layers']} layers x {t['hidden_size']}"
    out = [
        f"{r['shape']} ({shape}), random weights; {by}, transformers {r['transformers']}. "
        f"{r['visual_tokens']} visual tokens and {r['text_tokens']} of text. {unit}; transformers "
        "runs more often. First token: preprocessing, encoder and prefill.",
        "",
        *head("tokens, `--vtu`", "visual rows", *STAGES.values()),
        *(
            line(n, str(runs[n][0]["rows"]), *(spread(of(n, stage), 1000) for stage in STAGES))
            for n in runs
        ),
        "",
        "How many times as fast as transformers, pair by pair. Memory in MiB; peak: the most that "
        "any one stage takes beyond what was held before it.",
        "",
        *head("tokens, `--vtu`", *STAGES.values(), "cache", "of it visual", "peak"),
        line("transformers", *"1" * len(STAGES), *memory("transformers")),
        *(line(n, *(faster(n, stage) for stage in STAGES), *memory(n)) for n in ours),
    ]
    width, height = r["photo"]
    there = spread(of("transformers", "preprocess"), 1000)
    here = spread([t for n in ours for t in of(n, "preprocess")], 1000)
    notes = [
        "",
        f"- Preprocessing of a {width} x {height} photo: transformers {there} ms, ours {here} ms.",
        f"- At full length the logits of both correlate to {r['logit_correlation']:.5f}.",
    ]
    if "full" in runs:
        firsts = {n.split(",")[0]: n for n in ours if n != "full"}
        own = (f"{b} {ratios(of('full', 'encoder'), of(n, 'encoder'))}" for b, n in firsts.items())
        notes.append(
            f"- Our encoder against itself at full length: {', '.join(own)} times as fast."
        )
        rate = [r["read_per_token"] / seconds / 1e9 for seconds in of("full", "decode")]
        notes.append(
            f"- A decoded token reads {r['read_per_token'] / 1e9:.3g} GB of weights: "
            f"{spread(rate)} GB/s."
        )
    if share := r["matching_share_at_low"]:
        notes.append(
            f"- Matching and merging take {spread(share, 100)} % of our encoder's time at low."
        )
    for b in BEHIND:
        shares = []
        for name in [name for name in ours if name.startswith(f"{b},")]:
            spent = of(name, "second_stage")
            share = [100 * s / t for s, t in zip(spent, of(name, "first"))]
            shares.append(f"{name.split()[1]} {spread(share)} %")
        if shares:
            notes.append(
                f"- The second stage takes {spread(spent, 1000)} ms at {b}, of the time to the "
                f"first token with {', '.join(shares)}."
            )
    paper = (
        "Table 1 of the paper counts attention in one layer (D = 4096) in millions of "
        "multiply-adds: N² D at full length, 2 N_un² D with VTU. Beside it, per `--vtu`, what is "
        "computed: QKᵀ and AV with the N virtual keys, RoPE, the average of Eq. 11; then the layer "
        "with its linear parts. The causal half, which kernels may skip, is counted, and every "
        "token has as many sampled queries as it may have."
    )
    return "\n".join([*out, *notes, "", paper, "", *counts()])


def small_table(results: dict) -> str:
    """The README's: the first token, full and at low."""
    theirs = [run["first"] for run in results["runs"]["transformers"]]
    out = head("milliseconds to the first token", "visual rows", "time", "times as fast")
    out.append(line("transformers", str(results["visual_tokens"]), spread(theirs, 1000), "1"))
    shown = {"full": "full length", "low, `all`": "low", "low, `1`": "low, one query per token"}
    for name, label in shown.items():
        runs = results["runs"][name]
        ours = [run["first"] for run in runs]
        faster = ratios([theirs[run["pair"]] for run in runs], ours)
        out.append(line(label, str(runs[0]["rows"]), spread(ours, 1000), faster))
    return "\n".join(out)


# ---- the command ----


def machine(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m lab.bench", description="Measures the speed tables of the README."
    )
    p.add_argument("--shape", default="tiny-llava", choices=(*SHAPES, "long"), help="(%(default)s)")
    p.add_argument("--layers", type=int, default=0, metavar="K", help="only so many decoder layers")
    p.add_argument("--tokens", nargs="+", default=BUDGETS, choices=BUDGETS, help="(all six)")
    p.add_argument("--vtu", nargs="+", default=tuple(VTU), choices=VTU, help="(all four)")
    p.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    p.add_argument(
        "--dtype", help="(bfloat16 where the device does that well, else float32 or float16)"
    )
    p.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the CPU (%(default)s)"
    )
    p.add_argument("--repeats", type=int, default=3, help="rounds (%(default)s)")
    p.add_argument("--save", type=Path, metavar="FILE", help="the JSON file (lab/bench-NAME.json)")
    p.add_argument(
        "--render", action="store_true", help="measure nothing, print the tables of the JSON file"
    )
    a = p.parse_args()
    try:
        device = choose_device(a.device)
        dtype = choose_dtype(a.dtype, device, half=True)
        if min(a.repeats, a.threads, a.layers + 1) < 1:
            raise ValueError("--repeats and --threads must be at least 1, --layers at least 0")
        name = a.shape, f"{a.layers}-layers" * bool(a.layers), device.type * (device.type != "cpu")
        path = a.save or Path(__file__).with_name(
            "-".join(filter(None, ("bench", *name))) + ".json"
        )
        if not (path.is_file() if a.render else path.parent.is_dir()):
            raise ValueError(f"there is no {path if a.render else path.parent}")
        if not a.render:
            torch.set_num_threads(a.threads)
            torch.manual_seed(0)
            start, today = time.perf_counter(), datetime.date.today().isoformat()
            results = dict(shape=a.shape, date=today)
            results |= dict(
                machine=machine(device), cores=os.cpu_count(), threads=a.threads, device=device.type
            )
            results |= dict(dtype=str(dtype).removeprefix("torch."), repeats=a.repeats)
            results |= {name: version(name) for name in ("torch", "transformers", "pillow")}
            results |= (measure_long if a.shape == "long" else measure)(a, device, dtype)
            results |= dict(seconds=round(time.perf_counter() - start))
            save(results, path, depth=1)
        print(table(read_json(path)))
    except (ValueError, OSError) as e:
        p.error(one_line(e))


if __name__ == "__main__":
    main()
