"""Asks a LLaVA checkpoint about pictures or a video, with the visual tokens of a budget; or finds thresholds."""

import warnings

if __name__ == "__main__":  # torch warns where NumPy is not installed, Pillow of large pictures; neither is needed here
    warnings.simplefilter("ignore")

import argparse
import contextlib
import datetime
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

import budgets
import show
from anyres import Picture, as_list, positions
from budgets import BUDGETS, merges, read_thresholds
from config import one_line
from dymu import DyMU
from load import Processor, choose_device, find, load_model
from pictures import is_video, picture_files, read_frames, read_picture

EXAMPLES = """examples:
  python demo.py photo.jpg "What is on the table?"                      all visual tokens: the plain model
  python demo.py photo.jpg "What is on the table?" --tokens low         16 % of them on average, more if it is busy
  python demo.py photo.jpg "What is on the table?" --tokens low --vtu off    the same without virtual unmerging
  python demo.py before.jpg after.jpg "What changed?"                    several pictures
  python demo.py clip.gif "What happens?" --frames 8                    a video
  python demo.py --calibrate photos/ --model my-llava                   finds low, mid and high for another model
"""


def showcase() -> list[str]:
    """What it does without arguments."""
    sample = os.path.relpath(Path(__file__).with_name("tiny") / "sample.png")
    question = "what is in the image from left to right?"
    return [sample, question, "--model", "tiny", "--tokens", "all", "--show", "merged.png"]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def fail(message: str) -> None:
    note(f"demo.py: {message}")
    sys.exit(2)


def note(message: str, end: str = "\n") -> None:
    print(message, end=end, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(
        usage="demo.py IMAGE ... QUESTION [options] | demo.py --calibrate FOLDER [options]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=110),
    )
    p.add_argument(
        "inputs",
        nargs="*",
        metavar="IMAGE ... QUESTION",
        help="pictures and videos (a GIF, a folder of frames, a film), then the question",
    )
    p.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", metavar="M", help="Hub id or folder (%(default)s)")
    p.add_argument(
        "--tokens", default="full", metavar="T", help="full (default), high, mid, low, all (these four) or a file"
    )
    p.add_argument("--vtu", default="all", metavar="Q", help="queries per token: all (default), 1, 2, ...; off: no VTU")
    p.add_argument("--frames", type=int, default=8, metavar="N", help="of a video, evenly spread (%(default)s)")
    p.add_argument(
        "--temporal", type=float, metavar="TAU", help="join what is more alike than this to the frame before"
    )
    p.add_argument("--method", default="dtome", choices=("dtome", "tome"), help="merge by threshold, or a fixed number")
    p.add_argument("--expand-cache", action="store_true", help="keys and values of all N positions: faster, larger")
    p.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (%(default)s)")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of the sampling; 0 (default): greedy")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling (%(default)s)")
    p.add_argument("--device", metavar="D", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: by checkpoint and device)")
    p.add_argument("--pad", action="store_true", help="pad the picture to a square instead of cropping it")
    p.add_argument("--show", metavar="FILE", help="save a picture (PNG) of which patches were merged")
    p.add_argument("--json", action="store_true", help="print one JSON object per budget and nothing else")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    p.add_argument("--calibrate", metavar="FOLDER", help="find thresholds for low, mid and high on its pictures")
    p.add_argument("--save", metavar="FILE", help="of --calibrate (default: thresholds.json beside the checkpoint)")
    return p.parse_intermixed_args(argv)


def check(a: argparse.Namespace) -> None:
    """What can be wrong with the command line itself."""
    if a.calibrate is not None and a.inputs:
        raise ValueError("--calibrate takes a folder alone")
    if a.calibrate is not None and not Path(a.calibrate).is_dir():
        raise ValueError(f"{a.calibrate} is not a folder")
    if a.calibrate is None and len(a.inputs) < 2:
        raise ValueError("IMAGE and QUESTION are needed, or --calibrate FOLDER; --help shows examples")
    if a.inputs and os.path.isfile(a.inputs[-1]):
        raise ValueError(f"the question is missing: {a.inputs[-1]!r}, in its place, is a file")
    for option, value, good, wanted in (
        ("max-new-tokens", a.max_new_tokens, a.max_new_tokens >= 1, "at least 1"),
        ("frames", a.frames, a.frames >= 1, "at least 1"),
        ("temporal", a.temporal, a.temporal is None or -1 <= a.temporal <= 1, "a cosine, from -1 to 1"),
        ("temperature", a.temperature, a.temperature == 0 or 1e-6 <= a.temperature <= 100, "0 or from 0.000001 to 100"),
        ("threads", a.threads, a.threads is None or 1 <= a.threads <= 1024, "from 1 to 1024"),
        ("show", a.show, a.show is None or a.show.lower().endswith(".png"), "a .png file"),
        ("vtu", a.vtu, re.fullmatch(r"all|off|0*[1-9]\d{0,5}", a.vtu), "all, off or a number from 1 to 999999"),
    ):
        if not good:
            raise ValueError(f"--{option} {value} is not {wanted}")
    for file in map(Path, filter(None, (a.show, a.save))):
        if not file.absolute().parent.is_dir() or (file.exists() and not file.is_file()):
            raise ValueError(f"{file} cannot be written: it is no file, or its folder does not exist")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    a = parse(argv or showcase())
    try:
        check(a)
        if a.threads is not None:
            torch.set_num_threads(a.threads)
        device = choose_device(a.device)
        shown = [read_frames(one, a.frames) if is_video(one) else read_picture(one) for one in a.inputs[:-1]]
        if a.temporal is not None and sum(len(one) if isinstance(one, list) else 1 for one in shown) < 2:
            raise ValueError("--temporal needs a video or several pictures")
        folder = find(a.model, announce=lambda size, where: note(f"downloading {size / 1e9:.1f} GB to {where}"))
        processor = Processor(folder, a.pad)
        if a.calibrate is None:
            answer(a, folder, processor, device, shown)
        else:
            calibrate(a, folder, processor, device)
    except (ValueError, OSError) as e:
        fail(one_line(e))
    except KeyboardInterrupt:
        sys.exit(130)


def progress(items, length: int, text):
    """A bar on standard error; text() says what goes on. Under torchrun the first process has it alone."""
    for i, item in enumerate(items, 1):
        yield item
        if budgets.process()[0] == 0:
            bar = "#" * (24 * i // length)
            note(f"\r{text():<18} [{bar:<24}] {i}/{length}", end="\n" if i == length else "")


def loading(names: list[str]):
    """Shown only where it takes long: from the third second on."""
    start = time.perf_counter()
    for i, name in enumerate(names, 1):
        if time.perf_counter() - start > 3:
            note(f"\rloading {100 * i // len(names)} %", end="\n" if i == len(names) else "")
        yield name


# ---- asking ----


@dataclass
class Report:
    """What --json prints, behind the model and the settings."""

    answer: str
    visual_tokens: int
    virtual_tokens: int
    tokens_per_layer: list[int]  # visual tokens after the merge of each encoder layer
    encoder_s: float
    prefill_s: float
    decode_tokens_per_s: float
    cache_bytes: int
    device: str
    dtype: str

    def __str__(self):
        return (
            f"visual tokens {self.virtual_tokens} -> {self.visual_tokens} "
            f"({100 * self.visual_tokens / self.virtual_tokens:.0f} %), encoder {self.encoder_s:.2f} s, "
            f"prefill {self.prefill_s:.2f} s, {self.decode_tokens_per_s:.1f} tokens/s, "
            f"cache {self.cache_bytes / 2**20:.3g} MiB"
        )

    def row(self, name: str) -> str:
        times = f"encoder {1000 * self.encoder_s:4.0f} ms, prefill {1000 * self.prefill_s:4.0f} ms"
        counts = f"{self.visual_tokens:4} of {self.virtual_tokens} tokens"
        return f"{name:>6} {counts}, {times}: {' '.join(self.answer.split())}"


def answer(a: argparse.Namespace, folder: Path, processor: Processor, device: torch.device, shown: list) -> None:
    """shown: pictures, and videos as lists of frames."""
    settings, (*inputs, question) = read_settings(a, folder, processor), a.inputs
    pixels, views = see(processor, shown)
    ids, c = processor.prompt(question, pixels), processor.config
    if a.vtu != "off":  # so that it is told before a long load; without VTU there are fewer positions
        c.check_length(len(ids) - len(pixels) + positions(pixels, c))
    llava, panels, several = load_model(folder, device, a.dtype, progress=loading), [], len(settings) > 1
    asked = llava, processor, pixels, ids
    options = dict(max_new_tokens=a.max_new_tokens, temperature=a.temperature, seed=a.seed, expand=a.expand_cache)
    stream = None if several or a.json else lambda text: print(text, end="", flush=True)
    if several and not a.json:
        print(f"{' '.join(inputs)}: {question}")
    for name, one in settings.items():
        if several:  # the times are to be compared: each shape is met once before it is timed
            ask(*asked, one, options | dict(max_new_tokens=2))
        report, visual = ask(*asked, one, options, stream)
        if a.json:
            print(json.dumps(dict(model=a.model, tokens=name, method=a.method, vtu=a.vtu) | asdict(report)))
        else:
            print(report.row(name) if several else f"\n{report}")
        # of the four budgets the input itself shows what full is
        if a.show and (name != "full" or not several or a.temporal is not None):
            panels.append((name, show.patches(c, pixels, visual), report))
    if a.show:
        picture = show.draw(list(views), panels, question)
        with whole(Path(a.show)) as part:
            picture.save(part, format="PNG")
        note(f"wrote {a.show}")


def see(processor: Processor, shown: list) -> tuple[list, Iterator[Image.Image]]:
    """Pictures, and videos as lists of frames -> what `Llava.encode` takes; and, made when asked for, what is seen."""
    several = sum(isinstance(one, Image.Image) for one in shown) > 1
    pixels = []
    for one in shown:
        pixels += as_list(processor.video(one) if isinstance(one, list) else processor.image(one, several))
    views = (processor.view(v, several and v is one) for one in shown for v in as_list(one))
    return pixels, views


def ask(llava, processor: Processor, pixels, ids, settings: DyMU, options: dict, stream=None):
    """Answers once -> its Report, what `Llava.encode` gave. stream, if any, is called with each piece of the answer."""
    c, layers = llava.config, llava.vision_tower.layers
    dropped = int(c.vision_config.class_token and c.vision_feature_select_strategy == "default")
    tokens_per_layer = [0] * len(layers)

    def count(i, fc2, args, out):
        tokens_per_layer[i] += len(out) - dropped

    hooks = [layer.fc2.register_forward_hook(partial(count, i)) for i, layer in enumerate(layers)]
    new, shown = [], ""
    with torch.inference_mode():
        start = time.perf_counter()
        visual = llava.encode(pixels, settings)
        if visual[0][0].device.type != "cpu":
            torch.accelerator.synchronize()
        encoded = time.perf_counter()
        rows, token_at = llava.splice(ids, visual, settings.vtu)
        cache = llava.new_cache(len(rows) + options["max_new_tokens"])
        for token in llava.decode(rows, token_at, cache, settings.queries, **options):
            if not new:
                prefilled = time.perf_counter()
            new.append(token)
            if stream and not (text := processor.decode(new)).endswith("\ufffd"):  # else more bytes of it are to come
                stream(text[len(shown) :])
                shown = text
        end = time.perf_counter()
    text = processor.decode(new)
    if stream:
        stream(text[len(shown) :])
    for hook in hooks:
        hook.remove()
    times = encoded - start, prefilled - encoded, (len(new) - 1) / (end - prefilled)
    counts = sum(len(x) for x, _ in visual), sum(len(at) for _, at in visual)
    where = str(rows.device), str(rows.dtype).removeprefix("torch.")
    return Report(text, *counts, tokens_per_layer, *times, cache.bytes, *where), visual


def read_settings(a: argparse.Namespace, folder: Path, processor: Processor) -> dict[str, DyMU]:
    """What --tokens, --method and --vtu ask for, by the name of the budget; with --tokens all, of all four."""
    options = dict(temporal=a.temporal, vtu=a.vtu != "off", queries=int(a.vtu) if a.vtu.isdecimal() else None)
    settings = {}
    for name in ("full", "high", "mid", "low") if a.tokens == "all" else (a.tokens,):
        if name == "full":
            settings[name] = DyMU(**options)
        elif a.method == "tome":
            if name not in BUDGETS:
                raise ValueError("--method tome takes --tokens full, low, mid, high or all")
            settings[name] = DyMU(r=merges(name, processor.config), **options)
        else:
            thresholds, provenance = read_thresholds(name, folder, processor.config)
            found_with, ours = provenance.get("preprocessing"), "pad" if processor.pad else "crop"
            if found_with not in (None, ours):
                note(f"demo.py: note: these thresholds were found with preprocessing {found_with!r}, not {ours!r}")
            settings[name] = DyMU(thresholds=thresholds, **options)
    return settings


# ---- calibrating ----


def calibrate(a: argparse.Namespace, folder: Path, processor: Processor, device: torch.device) -> None:
    save = Path(a.save or folder / "thresholds.json")
    files = sorted(picture_files(Path(a.calibrate)))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first = budgets.process()[0] == 0
    llava = load_model(folder, device, a.dtype or "float32", only="vision_tower.")
    order = {file: i for i, file in enumerate(files)}

    def read(file):  # of a picture in several crops the whole or one of the tiles, in turn
        pixels = processor.image(file)
        return pixels.crops[order[file] % len(pixels.crops)] if isinstance(pixels, Picture) else pixels

    skipped = budgets.unreadable(read, files, progress)
    files = [file for file in files if file not in skipped]
    found = dict(model=a.model, preprocessing="pad" if processor.pad else "crop", schedule="constant")
    found |= dict(date=datetime.date.today().isoformat(), batch_size=budgets.BATCH)
    found |= dict(tower=asdict(llava.config.vision_config))
    for budget, one in budgets.calibrate(llava.vision_tower, read, files, progress):
        found[budget] = one
        if first:
            mean, std = one["tokens_mean"], one["tokens_std"]
            print(f"{budget}: {mean:.1f} +- {std:.1f} of {llava.config.visual_tokens} tokens")
    if first:
        for why in skipped.values():
            note(f"demo.py: skipped: {why}")
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        with whole(save) as part:
            part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"wrote {save}; {len(skipped)} pictures skipped")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def whole(file: Path):
    """A path to write to, which becomes the file once all is written; on an error nothing is left."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".demo-") as folder:
        part = Path(folder) / file.name
        yield part
        part.replace(file)


if __name__ == "__main__":
    main()
