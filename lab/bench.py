"""What merging saves in time and memory: our model beside transformers'.

Both are on the same weight tensors, in one process.

    python -m lab.bench                          # tiny-llava, 6 to 15 minutes on 2 cores;
                                                 # writes lab/bench-tiny-llava.json
    python -m lab.bench --shape llava-1.5-7b     # 14 GB of weights: for a GPU, or for patience
    python -m lab.bench --shape onevision-0.5b   # a photo in tiles, 7,309 visual tokens
    python -m lab.bench --shape onevision-0.5b --frames 32   # a video of 6,273
    python -m lab.bench --curve                  # first token against visual tokens, 576 to 7,309,
                                                 # at low: a table, and a picture beside the JSON
    python -m lab.bench --shape long             # VTU attention alone: 2880 visual tokens,
                                                 # of which 450 are left
    python -m lab.bench --layers 2 --repeats 2   # a quick look: two decoder layers
    python -m lab.bench --repeats 0              # the first round alone: where one takes minutes
    python -m lab.bench --render                 # only prints the tables of the JSON file;
                                                 # takes the same options

Weights are random at real shapes, so nothing is downloaded, and ToMe's fixed r gives the token
counts. At tight and tightest, of which `leaving` is the second stage, it is mid's. A round asks
transformers (A), then ours at two budgets with each --vtu (B), and so on: A B A B. Ratios are of a
B and the A before it. Both get the same photo and text, run under inference_mode with SDPA, compute
one row of logits, choose greedily, and transformers has its own cache. One more round, the first,
tells the peak memory of each stage and warms up; its times count with `--repeats 0` alone.
transformers runs the whole vision tower, and all crops at once, ours the blocks up to the layer
that is read, crop by crop. The encoder's time has the second stage's in it. The JSON has every raw
time.
"""

import argparse
import gc
import inspect
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import dymu
from dymu import DyMU, attention, best, merge, rotate, vtu_attention
from extras.decoding import prefill_expanded
from extras.options import number
from extras.sampled import spread as queries
from extras.second_stage import most_alike, second_stage
from extras.thresholds import BEHIND, merges
from lab.bench_tables import WAYS, curve_seconds, table
from lab.shapes import IMAGE, PHOTO, SHAPES, TEXT, VIDEO, Prompt, build, find_shape
from lab.timing import clocked, command, peak_on, timed
from model import KVCache, TextConfig, rope_table

LONG = dict(heads=32, head_dim=128, N=2880, N_un=450)
STEPS = 5  # tokens decoded
BUDGETS = ("full", "high", "mid", "low", *BEHIND)  # as shown
ORDER = ("full", "mid", "low", "high", *BEHIND)  # as run, A before each two
VTU = {"all": {}, "1": dict(queries=queries(1)), "2": dict(queries=queries(2))}
VTU |= {"off": dict(vtu=False)}
CURVE = {  # visual tokens: the family that sees them in so many photos
    576: ("llava", 1),
    1152: ("llava", 2),
    2340: ("llava_next", 1),
    4680: ("llava_next", 2),
    7309: ("llava_onevision", 1),
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


# ---- one question ----


def ask_theirs(prompt: Prompt, watch):
    stream = {"transformers": partial(stream_theirs, prompt)}
    return ask(watch, prompt.their_pixels, prompt.their_features, stream)


def ask_ours(prompt: Prompt, watch, budget: str, ways, expand: bool):
    """expand: at low, once more with an expanded cache: what the small one costs per token"""
    spent = []
    given = merging(budget, prompt.config, spent)
    streams = {}
    for way in ways if given else ["all"]:  # where nothing merges they are all the same
        name = f"{budget}, `{way}`" if given else budget
        streams[name] = partial(stream_ours, prompt, settings=DyMU(**given, **VTU[way]))
    if expand and budget == "low":
        whole = partial(stream_ours, prompt, settings=DyMU(**given), expand=True)
        streams["low, `all`, expanded cache"] = whole

    encode = partial(prompt.ours.encode, settings=DyMU(**given))
    for name, run in ask(watch, prompt.pixels, encode, streams):
        yield name, dict(run, second_stage=sum(spent))


def ask(watch, pixels, encode, streams):
    """Asks once.

    Yields for each stream that follows the encoder what watch tells of each stage.
    """
    gc.collect()  # what is left of the question before is in no stage's time or peak
    x, preprocess = watch(pixels)
    visual, encoder = watch(lambda: encode(x))
    for name, start in streams.items():
        stream = start(visual)
        cache, prefill = watch(stream.__next__)
        if isinstance(cache, KVCache):
            held = cache.bytes
        else:
            held = sum(c.keys.nbytes + c.values.nbytes for c in cache.layers)
        decode = [watch(stream.__next__)[1] for _ in range(STEPS)]
        stages = dict(preprocess=preprocess, encoder=encoder, prefill=prefill, decode=decode)
        # ours come with their map
        rows = [visual] if isinstance(visual, Tensor) else [x for x, _ in visual]
        yield name, dict(stages, rows=sum(map(len, rows)), cache=held)


def stream_ours(prompt: Prompt, visual, settings: DyMU, expand: bool = False):
    """Prefills; then yields the cache after each token, once that token is known on the host."""
    rows, token_at = prompt.ours.splice(prompt.ids, visual, settings.vtu)
    cache = KVCache()
    if expand:
        rows, token_at = prefill_expanded(prompt.ours, rows, token_at, cache, settings.queries)
    options = dict(max_new_tokens=1 + STEPS, eos=())
    for _ in prompt.ours.decode(rows, token_at, cache, settings.queries, **options):
        yield cache


def stream_theirs(prompt: Prompt, visual: Tensor):
    from transformers import DynamicCache

    theirs = prompt.theirs
    ids = prompt.their_ids
    cache = DynamicCache(config=theirs.config.get_text_config())
    is_visual = (ids == IMAGE) | (ids == VIDEO)
    embeds = theirs.get_input_embeddings()(ids).masked_scatter(is_visual[..., None], visual)
    given = dict(inputs_embeds=embeds)
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


# ---- measuring ----


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


@torch.inference_mode()
def measure(a, prompt: Prompt, budgets) -> dict:
    # Is it the same function of the same input? This warms up, too.
    difference = prompt.difference()
    agreement = prompt.agreement()
    assert difference < 1e-4 and agreement > 0.9, (difference, agreement)

    ours = prompt.ours
    c = prompt.config.text_config
    head = ours.language_model.embed_tokens if prompt.config.tie_word_embeddings else ours.lm_head
    layer, *_ = layers = ours.language_model.layers
    weights, *read = (bytes_of(part) for part in (ours, layers, head))
    per_row = 2 * len(layers) * layer.k_proj.out_features * layer.k_proj.weight.itemsize
    results = dict(vision=vars(prompt.config.vision_config), text=vars(c))
    results |= dict(visual_tokens=prompt.N, text_tokens=TEXT, photo=PHOTO)
    results |= dict(family=prompt.config.model_type)
    results |= dict(photos=len(prompt.shown), frames=prompt.frames)
    results |= dict(weight_bytes=weights, read_per_token=sum(read), cache_per_row=per_row)
    results |= dict(pixel_difference=difference, logit_correlation=agreement)
    return results | take_turns(a, prompt, [b for b in ORDER if b in budgets])


def bytes_of(part: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in part.state_dict().values())


def take_turns(a, prompt: Prompt, budgets: list[str]) -> dict:
    """What each way took in each round, and the most bytes that each stage of it took"""
    pixels = prompt.pixels()
    low = DyMU(r=merges("low", prompt.config))
    prompt.ours.encode(pixels, low)  # what a first call keeps for good is no stage's peak

    share = []
    peaks = {"transformers": {}}
    runs = {"transformers": []}
    for i in range(-1, a.repeats):
        watch = timed if i >= 0 else peak_on(prompt.theirs.device)
        counts = i >= 0 or not a.repeats
        for n, budget in enumerate(budgets):
            step = f"round {i + 1} of {a.repeats}" if i >= 0 else "first round"
            print(f"\r{prompt.N} tokens, {step}: {budget:<8}", end="", file=sys.stderr, flush=True)
            theirs_due = n % 2 == 0 and (counts or n == 0)  # to warm up once is enough
            theirs = ask_theirs(prompt, watch) if theirs_due else ()
            for name, run in (*theirs, *ask_ours(prompt, watch, budget, a.vtu, a.curve is None)):
                if i < 0:
                    peaks[name] = part(run, 1)
                    run = part(run, 0)
                if counts:
                    run["first"] = run["preprocess"] + run["encoder"] + run["prefill"]
                    runs.setdefault(name, []).append(run)
                    run["pair"] = len(runs["transformers"]) - 1  # the A to be compared with
            if budget == "low" and counts:
                share.append(matching_share(lambda: prompt.ours.encode(pixels, low)))
    print(file=sys.stderr)

    names = ["transformers", *(name for b in BUDGETS for name in runs if name.split(",")[0] == b)]
    peaks = {name: peaks[name] for name in names}
    runs = {name: runs[name] for name in names}
    return dict(matching_share_at_low=share, peak_bytes=peaks, runs=runs)


def part(run: dict, i: int) -> dict:
    """Of a run that `peak_on` watched the seconds (0) or the bytes (1) of each stage"""
    stages = {name: run[name][i] for name in ("preprocess", "encoder", "prefill")}
    return dict(run, **stages, decode=[one[i] for one in run["decode"]])


def measure_curve(a, device, dtype) -> dict:
    """The first token with the shape's decoder behind towers of several families"""
    shape = find_shape(a.shape, a.layers)
    text = shape.text | dict(max_position_embeddings=8192)
    found = {}
    built = models = None
    for N, (family, photos) in CURVE.items():
        if a.curve and N not in a.curve:
            continue
        if family != built:
            models = None  # is freed before the next is built
            models = build(replace(shape, family=family, text=text), device, dtype)
            built = family
        prompt = Prompt(models, photos)
        assert prompt.N == N, (prompt.N, N)
        found[str(N)] = measure(a, prompt, ["low"])
    return dict(curve=found)


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


# ---- the command ----


def parse() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lab.bench", description="Measures the speed tables of RESULTS.md."
    )
    p.add_argument("--shape", default="tiny-llava", choices=(*SHAPES, "long"), help="(%(default)s)")
    few = "only so many decoder layers"
    p.add_argument("--layers", type=number(int, 0), default=0, metavar="K", help=few)
    video = "a video, not a photo"
    p.add_argument("--frames", type=number(int, 0), default=0, metavar="F", help=video)
    rounds = "rounds after the first (%(default)s)"
    p.add_argument("--repeats", type=number(int, 0), default=3, help=rounds)
    p.add_argument(
        "--curve",
        nargs="*",
        type=int,
        choices=CURVE,
        metavar="N",
        help=f"first token against visual tokens ({', '.join(map(str, CURVE))})",
    )
    p.add_argument("--tokens", nargs="+", default=BUDGETS, choices=BUDGETS, help="(all six)")
    p.add_argument("--vtu", nargs="+", default=WAYS, choices=WAYS, help="(all four)")
    return p


def check(a) -> None:
    """Raises ValueError"""
    family = None if a.shape == "long" else SHAPES[a.shape].family
    if a.frames and (family != "llava_onevision" or a.curve is not None):
        raise ValueError("--frames is for the shapes of LLaVA-OneVision, and not for --curve")
    if a.curve is not None and family is None:
        raise ValueError("--curve needs a shape with a decoder")
    if a.shape == "long" and not a.repeats:
        raise ValueError("--shape long needs --repeats of at least 1")


def file_of(a, device) -> Path:
    parts = ["bench", a.shape]
    parts += [f"{a.layers}-layers"] * bool(a.layers) + [f"{a.frames}-frames"] * bool(a.frames)
    parts += ["curve"] * (a.curve is not None) + [device.type] * (device.type != "cpu")
    return Path(__file__).with_name("-".join(parts) + ".json")


def run(a, device, dtype) -> dict:
    if a.shape == "long":
        return measure_long(a, device, dtype)
    if a.curve is not None:
        return measure_curve(a, device, dtype)
    models = build(find_shape(a.shape, a.layers), device, dtype)
    return measure(a, Prompt(models, frames=a.frames), a.tokens)


def show(results: dict, path: Path) -> str:
    if "curve" in results:
        from lab import plot  # matplotlib is for this alone

        plot.save(plot.curve(curve_seconds(results)), path.with_suffix(".svg"))
    return table(results)


def main() -> None:
    command(parse(), file_of, run, show, check)


if __name__ == "__main__":
    main()
