"""The tables of lab/bench.py, from its JSON files alone."""

import statistics

from extras.thresholds import BEHIND
from lab.tables import head, line, number, spread
from model import TextConfig

WAYS = ("all", "1", "2", "off")  # --vtu
FAMILIES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
}
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
PAPER = (
    "Table 1 of the paper counts attention in one layer (D = 4096) in millions of multiply-adds: "
    "N² D at full length, 2 N_un² D with VTU. Beside it, per `--vtu`, what is computed: QKᵀ and AV "
    "with the N virtual keys, RoPE, the average of Eq. 11; then the layer with its linear parts. "
    "The causal half, which kernels may skip, is counted, and every token has as many sampled "
    "queries as it may have."
)


def ratios(a, b) -> str:
    return spread([x / y for x, y in zip(a, b)])


def counts() -> list[str]:
    """Table 1 of the paper beside what is really computed.

    Attention in one layer of the 7B shape.
    """
    c, N, out = TextConfig(), TABLE_1["full"][0], []
    D, columns = c.hidden_size, [f"attention, `{way}`" for way in WAYS]
    columns += ["layer, `all`", "layer, `1`", "layer, `off`"]
    for budget, (rows, printed) in TABLE_1.items():
        work = [(1 if budget == "full" else 2) * rows * rows * D]
        for way in WAYS:
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
    if "curve" in results:
        return curve_table(results)
    if results["shape"] == "long":
        return long_table(results)
    m = Measured(results)
    text = [*m.times(), "", *m.ratios(), "", *m.notes()]
    if results["visual_tokens"] == TABLE_1["full"][0] and not results["layers"]:
        text += ["", PAPER, "", *counts()]
    return "\n".join(text)


def by(r: dict) -> str:
    return f"{r['machine']}, {r['threads']} threads, {r['dtype']}, torch {r['torch']}, {r['date']}"


def rounds(r: dict) -> str:
    if r["repeats"] == 0:
        return "in one round"
    if r["repeats"] == 1:
        return "in one round, after one to warm up"
    return f"median [least, most] of {r['repeats']}"


def long_table(r: dict) -> str:
    what = f"{r['N']} visual tokens, {r['N_un']} left, {r['heads']} heads x {r['head_dim']}"
    unit = f"Milliseconds, {rounds(r)}"
    out = [f"Attention of one layer, {what}; {by(r)}. {unit}; ratios pair by pair.", ""]
    out += head("queries per token", "time", "full length / this", "`all` / this")
    runs = r["runs"]
    full = runs["full length"]
    every = runs["`all`"]
    for way, t in runs.items():
        out.append(line(way, spread(t, 1000), ratios(full, t), ratios(every, t)))
    return "\n".join(out)


class Measured:
    """What transformers and ours took for one prompt."""

    def __init__(self, r: dict):
        self.r = r
        self.runs = r["runs"]
        self.ours = [name for name in self.runs if name != "transformers"]

    def of(self, name: str, stage: str) -> list[float]:
        times = (run[stage] for run in self.runs[name])
        return [statistics.median(t) if isinstance(t, list) else t for t in times]

    def pairs(self, name: str, stage: str) -> str:
        """How many times as fast as transformers"""
        theirs = self.of("transformers", stage)
        return ratios([theirs[run["pair"]] for run in self.runs[name]], self.of(name, stage))

    def memory(self, name: str) -> list[str]:
        # what is measured is before the expansion, which makes it as large as at full length
        if "expanded" in name:
            return ["-"] * 3
        one = self.r["peak_bytes"][name]
        peaks = one["preprocess"], one["encoder"], one["prefill"], *one["decode"]
        visual = one["cache"] - self.r["text_tokens"] * self.r["cache_per_row"]
        cells = one["cache"], visual, None if None in peaks else max(peaks)
        return ["?" if cell is None else number(cell / 2**20) for cell in cells]

    def times(self) -> list[str]:
        r = self.r
        out = [
            f"{r['shape']} ({models(r)}), random weights; {by(r)}, transformers "
            f"{r['transformers']}. {r['visual_tokens']} visual tokens and {r['text_tokens']} of "
            f"text. Milliseconds, {rounds(r)}; transformers runs more often. First token: "
            "preprocessing, encoder and prefill.",
            "",
            *head("tokens, `--vtu`", "visual rows", *STAGES.values()),
        ]
        for name, runs in self.runs.items():
            cells = (spread(self.of(name, stage), 1000) for stage in STAGES)
            out.append(line(name, str(runs[0]["rows"]), *cells))
        return out

    def ratios(self) -> list[str]:
        out = [
            "How many times as fast as transformers, pair by pair. Memory in MiB; peak: the most "
            "that any one stage takes beyond what was held before it.",
            "",
            *head("tokens, `--vtu`", *STAGES.values(), "cache", "of it visual", "peak"),
            line("transformers", *"1" * len(STAGES), *self.memory("transformers")),
        ]
        for name in self.ours:
            cells = (self.pairs(name, stage) for stage in STAGES)
            out.append(line(name, *cells, *self.memory(name)))
        return out

    def notes(self) -> list[str]:
        there = spread(self.of("transformers", "preprocess"), 1000)
        here = spread([t for name in self.ours for t in self.of(name, "preprocess")], 1000)
        correlation = self.r["logit_correlation"]
        out = [
            f"- Preprocessing of {shown(self.r)}: transformers {there} ms, ours {here} ms.",
            f"- At full length the logits of both correlate to {correlation:.5f}.",
        ]
        if "full" in self.runs:
            out += self.against_full()
        if share := self.r["matching_share_at_low"]:
            share = spread(share, 100)
            out.append(f"- Matching and merging take {share} % of our encoder's time at low.")
        for budget in BEHIND:
            names = [name for name in self.ours if name.startswith(f"{budget},")]
            if names:
                out.append(self.second_stage(budget, names))
        return out

    def against_full(self) -> list[str]:
        full = self.of("full", "encoder")
        firsts = {name.split(",")[0]: name for name in self.ours if name != "full"}
        own = (f"{b} {ratios(full, self.of(name, 'encoder'))}" for b, name in firsts.items())
        gigabytes = self.r["read_per_token"] / 1e9
        rate = spread([gigabytes / seconds for seconds in self.of("full", "decode")])
        return [
            f"- Our encoder against itself at full length: {', '.join(own)} times as fast.",
            f"- A decoded token reads {gigabytes:.3g} GB of weights: {rate} GB/s.",
        ]

    def second_stage(self, budget: str, names: list[str]) -> str:
        shares = []
        for name in names:
            spent = self.of(name, "second_stage")
            share = [100 * s / t for s, t in zip(spent, self.of(name, "first"))]
            shares.append(f"{name.split()[1]} {spread(share)} %")
        return (
            f"- The second stage takes {spread(spent, 1000)} ms at {budget}, of the time to the "
            f"first token with {', '.join(shares)}."
        )


def models(r: dict) -> str:
    v = r["vision"]
    t = r["text"]
    tower = "CLIP" if v.get("class_token", True) else "SigLIP"
    return f"{tower} ViT, {v['num_hidden_layers']} blocks x {v['hidden_size']}; {decoder(t)}"


def decoder(t: dict) -> str:
    name = "Qwen2" if t.get("model_type") == "qwen2" else "Llama"
    return f"{name}, {t['num_hidden_layers']} layers x {t['hidden_size']}"


def shown(r: dict) -> str:
    size = "{} x {}".format(*r["photo"])
    if r.get("frames"):
        return f"{r['frames']} frames of {size}"
    photos = r.get("photos", 1)
    return f"a {size} photo" if photos == 1 else f"{photos} photos of {size}"


# ---- the first token against the number of visual tokens ----


def curve_seconds(r: dict) -> dict[str, dict[int, list[float]]]:
    """Of transformers and of each way at low the seconds to the first token, by visual tokens"""
    found = {}
    for one in r["curve"].values():
        for name in one["runs"]:
            times = found.setdefault(name, {})
            times[one["visual_tokens"]] = Measured(one).of(name, "first")
    return found


def curve_table(r: dict) -> str:
    found = list(r["curve"].values())
    seconds = curve_seconds(r)
    ours = [name for name in seconds if name != "transformers"]
    out = [
        f"The decoder of {r['shape']} ({decoder(found[0]['text'])}) behind the towers of three "
        f"families, random weights; {by(r)}, transformers {r['transformers']}. Seconds to the "
        f"first token, {rounds(r)}; then how many times as fast as transformers, pair by pair. Low "
        "leaves 16 % of each crop's tokens; what of a tile was padding is no visual token, so its "
        "rows are more than 16 % of these.",
        "",
    ]
    columns = [f"{name}, ratio" for name in ours]
    out += head("visual tokens", "of", "rows at low", *seconds, *columns)
    for one in found:
        m = Measured(one)
        cells = [f"{shown(one)}, {FAMILIES[one['family']]}", str(m.runs[ours[0]][0]["rows"])]
        cells += [spread(m.of(name, "first")) for name in seconds]
        cells += [m.pairs(name, "first") for name in ours]
        out.append(line(str(one["visual_tokens"]), *cells))
    return "\n".join(out)


def small_table(results: dict) -> str:
    """The README's: the first token, full and with few tokens."""
    m = Measured(results)
    rows = {
        "full": "full length",
        "low, `all`": "low",
        "low, `1`": "low, one query per token",
        "tightest, `1`": "tightest, one query per token",
    }
    out = head("milliseconds to the first token", "visual rows", "time", "times as fast")
    theirs = spread(m.of("transformers", "first"), 1000)
    out.append(line("transformers", str(results["visual_tokens"]), theirs, "1"))
    for name, label in rows.items():
        time = spread(m.of(name, "first"), 1000)
        out.append(line(label, str(m.runs[name][0]["rows"]), time, m.pairs(name, "first")))
    return "\n".join(out)
