"""Where thresholds come from: schedules (Appendix B), Eq. 4, and the files that hold them.

For who needs low, mid and high for another vision tower, or another similarity.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path

from dymu import DyMU, Seen, match, merge, similar_keys, size_bias
from extras.door import atomically, download, dump, one_line, read_json
from extras.families import section
from extras.options import SCHEDULES, note
from extras.sampled import fewer_if_long, spread
from extras.second_stage import second_stage
from model import LlavaConfig, VisionTower, check_layers

# the share of the N tokens that is left, on average over pictures
BUDGETS = {"low": 93 / 576, "mid": 208 / 576, "high": 392 / 576}

# not in the paper: the same, of mid in the encoder and a second stage behind the projector
BEHIND = {"tight": 0.10, "tightest": 0.05}

NAMES = (*BUDGETS, *BEHIND)

# checkpoints of the authors, and a file of thresholds in a repository on the Hub
PICKLES = (".pth", ".pt", ".bin")
ON_THE_HUB = r"([\w-][\w.-]*/[\w.-]+)/(.+\.(?:json|pth|pt|bin))"

# ---- Appendix B and Eq. 4 ----


def schedule(r_total: int, layers: int, kind: str = "constant") -> tuple[int, ...]:
    """Appendix B: spreads r_total merges over the layers that run -> r_i of each

    kind: constant, linear (more merges early) or reverse_linear, which is linear reversed. Shares
    are rounded down, and the remainder goes one each to the first layers (of linear), so that the
    sum is exact. The authors' linear schedule rounds in another way.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}: {', '.join(SCHEDULES)}")
    weights = [1 if kind == "constant" else layers - i for i in range(layers)]

    shares = [r_total * weight // sum(weights) for weight in weights]
    for i in range(r_total - sum(shares)):  # the remainder is smaller than layers
        shares[i] += 1

    if kind == "reverse_linear":
        shares.reverse()
    return tuple(shares)


def merges(budget: str, config: LlavaConfig, kind: str = "constant") -> tuple[int, ...]:
    """The r_i that leave the budget's share of the N tokens at the layer that is read."""
    left = round(config.visual_tokens * BUDGETS[budget])
    return schedule(config.visual_tokens - left, config.vision_layers, kind)


@torch.no_grad()
def find_thresholds(
    tower: VisionTower,
    pictures: Iterable,
    r: tuple[int, ...],
    batch_size: int,
    settings: DyMU = DyMU(),
    floor: float = 0.0,
) -> tuple[float, ...]:
    """Eq. 4: tau_i of every layer that runs, such that r_i pairs per picture are above it.

    pictures: pixels (3, H, W), of which batch_size are held at a time; tau_i is averaged over these
    batches. settings: only their similarity counts. floor: the least tau, 0 as in the authors'
    code; -inf for a similarity that is no cosine.

    The tower should be in float32: bfloat16 keys are coarser than the gaps between scores. Raises
    ValueError for no pictures or a wrong number of r.
    """
    check_layers(DyMU(r=r), len(tower.layers), tower.c.num_hidden_layers)
    pictures = iter(pictures)
    found = []
    while batch := list(islice(pictures, batch_size)):
        found.append(thresholds_of(tower, batch, r, settings, floor))

    if not found:
        raise ValueError("no images to find thresholds with")
    return tuple(sum(taus) / len(found) for taus in zip(*found))


def thresholds_of(
    tower: VisionTower, batch: list, r: tuple[int, ...], settings: DyMU, floor: float
) -> list[float]:
    """This is VisionTower.forward with all pictures of a batch side by side.

    They stay together, since a layer's threshold ranks all their pairs.
    """
    tokens = []  # of each picture x, size, token_at
    for pixels in batch:
        x = tower.embed(pixels)
        once = torch.ones(len(x), device=x.device)
        tokens.append((x, once, torch.arange(len(x), device=x.device)))

    thresholds = []
    for i, (layer, r_i) in enumerate(zip(tower.layers, r)):
        seen = []
        pairs = []
        for x, size, token_at in tokens:
            bias = size_bias(size).to(x.dtype) if len(x) < len(token_at) else None
            x, q, k, v = layer.attend(x, bias)
            seen.append(Seen(i, x, q, k, v, size, token_at, tower.c.class_token))
            pairs.append(match(settings.similarity(seen[-1]), tower.c.class_token))

        ranked = torch.cat([score for score, _ in pairs]).sort(descending=True).values
        first_left_out = ranked[min(r_i * len(batch), len(ranked) - 1)]

        # Eq. 4. All from the first score that is left out to the last that merges would do, and
        # the authors' code takes the first, too
        tau = max(float(first_left_out), floor)
        if r_i == 0:  # nothing must merge
            tau = max(1.0, float(ranked[0]))
        thresholds.append(tau)

        tokens = []
        for one, (score, partner) in zip(seen, pairs):
            x, size, token_at = merge(one.x, one.size, one.token_at, partner, score > tau)
            tokens.append((layer.feed_forward(x), size, token_at))

    return thresholds


# ---- Files ----


def settings(a: Namespace, folder: Path, processor) -> dict[str, DyMU]:
    """What --tokens, --method and --vtu ask for, by budget: with --tokens all, of all four.

    a: the options. Raises ValueError where there are no thresholds.
    """
    decoder = {"vtu": a.vtu != "off"} | second(a.after)
    if a.vtu == "auto":
        decoder["queries"] = fewer_if_long
    elif a.vtu.isdecimal():
        decoder["queries"] = spread(int(a.vtu))

    found = {}
    preprocessing = set()
    for name in ("full", "high", "mid", "low") if a.tokens == "all" else (a.tokens,):
        if name == "full":
            found[name] = DyMU(**decoder)
        elif a.method == "tome" and name in BUDGETS:
            found[name] = DyMU(r=merges(name, processor.config), **decoder)
        elif a.method == "tome":
            raise ValueError("--method tome takes --tokens full, low, mid, high or all")
        else:
            thresholds, provenance = read_thresholds(name, folder, processor.config)
            preprocessing.add(provenance.get("preprocessing"))
            after = provenance.get("after") if a.after is None else a.after
            found[name] = DyMU(thresholds=thresholds, **decoder | second(after))

    ours = "pad" if processor.pad else "crop"
    for other in preprocessing - {None, ours}:
        note(f"note: thresholds found with preprocessing {other!r}, not {ours!r}")
    return found


def second(tau: float | None) -> dict:
    """A second stage among the settings, if there is one"""
    return {} if tau is None else {"after": second_stage(tau)}


def read_thresholds(
    spec: str, folder: Path, config: LlavaConfig, similarity: Callable = similar_keys
) -> tuple[tuple[float, ...], dict]:
    """The tau_i that spec names, and the provenance that came with them.

    spec: low, mid, high, tight or tightest, looked for in the checkpoint's folder, then among those
    shipped for its vision tower; or a file, or OWNER/REPO/FILE on the Hub: a JSON list, one that
    `demo.py --calibrate` wrote (FILE:mid, FILE:high name another budget than low), or a checkpoint
    of the authors (.pth), of which the thresholds alone are read. The provenance's "after" is the
    tau of a second stage, or None. Raises ValueError for thresholds that were found with another
    similarity.
    """
    file, budget = find_file(spec, folder, config)
    data = read_pth(file) if file.suffix in PICKLES else read_json(file, (dict, list))
    if isinstance(data, list):
        data = {"thresholds": data}

    values = data
    if "thresholds" not in data:
        budget = budget or next((b for b in BUDGETS if b in data), "low")
        values = data.get(budget)
    after = None
    if isinstance(values, dict):
        after = values.get("after")
        values = values.get("thresholds")

    name = name_of(similarity)
    found_with = data.get("similarity", "similar_keys")
    if found_with != name:
        raise ValueError(f"{file}: found with the similarity {found_with!r}, not {name!r}")

    most = 1 if similarity is similar_keys else 1e9
    if not isinstance(values, list) or not all(is_number(tau, most) for tau in values):
        raise ValueError(f"{file}: thresholds must be a list of numbers from -{most} to {most}")
    if after is not None and not is_number(after, 1):
        raise ValueError(f"{file}: after is {after!r}, not a number from -1 to 1")
    thresholds = tuple(float(tau) for tau in values)
    tower = config.vision_config.num_hidden_layers
    check_layers(DyMU(thresholds=thresholds), config.vision_layers, tower)
    return thresholds, data | {"after": after}


def find_file(spec: str, folder: Path, config: LlavaConfig) -> tuple[Path, str]:
    """Where spec's thresholds are, and under which budget if spec says so"""
    if spec in NAMES:
        return known_file(spec, folder, config), spec

    name, _, budget = spec.rpartition(":")
    if budget not in NAMES:
        name, budget = spec, ""
    if Path(name).is_file():
        return Path(name), budget
    if there := re.fullmatch(ON_THE_HUB, name):
        return hub_file(there[1], there[2]), budget
    known = f"none of full, {', '.join(NAMES)} and all"
    raise ValueError(f"--tokens {spec!r} is {known}, and not a file, here or on the Hub")


def known_file(budget: str, folder: Path, config: LlavaConfig) -> Path:
    tower = asdict(config.vision_config)
    shipped = sorted((Path(__file__).parent.parent / "thresholds").glob("*.json"))
    for file in (folder / "thresholds.json", *shipped):
        data = read_json(file)
        of = section(data, "tower")
        if budget in data and all(tower.get(name) == value for name, value in of.items()):
            return file

    raise ValueError(
        f"no {budget!r} thresholds are known for this vision tower; thresholds/README.md names the "
        "authors' files for --tokens OWNER/REPO/FILE, and this finds them, and says how long it "
        f"takes: python demo.py --calibrate IMAGES_FOLDER --model {folder}"
    )


def hub_file(repo: str, name: str) -> Path:
    """A file on the Hub, in the cache. Of a .pth the thresholds are kept there as a file of ours.

    So the next run reads no gigabyte.
    """
    if not name.endswith(PICKLES):
        return download(repo, name)
    kept = Path(cached_assets_path("dymu", repo)) / f"{name.replace('/', '--')}.json"
    if not kept.is_file():
        told = {"model": f"{repo}/{name}", "thresholds": read_pth(download(repo, name))}
        with atomically(kept) as part:
            part.write_text(dump(told, depth=1) + "\n")
    return kept


def read_pth(file: Path) -> list[float]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        names = {name: re.search(r"\.(\d+)\.threshold$", name) for name in state}
        found = sorted((int(m[1]), float(state[name])) for name, m in names.items() if m)
    except Exception as e:  # UnpicklingError, RuntimeError, EOFError; or no dictionary of tensors
        why = one_line(e)[:200]
        raise ValueError(f"{file}: not a checkpoint of plain tensors ({why})") from e

    layers = [i for i, _ in found]
    if layers != list(range(len(layers))):
        raise ValueError(f"{file}: the layers that have a threshold are {layers}")
    return [tau for _, tau in found]


def name_of(similarity: Callable) -> str:
    """By which a file says what it was found with: a function's own"""
    return getattr(similarity, "__name__", repr(similarity))


def is_number(value, most: float) -> bool:
    return type(value) in (int, float) and -most <= value <= most
