"""The command line's options: what they are, what can be wrong with them, what they ask for."""

import argparse
import math
import os
import re
import sys
from pathlib import Path

from dymu import DyMU
from extras.door import note
from extras.sampled import spread
from extras.thresholds import BUDGETS, merges, read_thresholds

EXAMPLES = """examples:
  python demo.py photo.jpg "What is on the table?"                  all tokens: the plain model
  python demo.py photo.jpg "What is on the table?" --tokens low     16 % of them on average
  python demo.py photo.jpg "What is on the table?" --tokens low --vtu off    no virtual unmerging
  python demo.py before.jpg after.jpg "What changed?"                several pictures
  python demo.py clip.gif "What happens?" --frames 8                a video
  python demo.py --calibrate photos/ --model my-llava               low, mid, high for another model
"""

# what is shown without arguments
SAMPLE = Path(__file__).parent.with_name("tiny") / "sample.png"
SHOWCASE = ["what is in the image from left to right?", "--model", "tiny"]
SHOWCASE += ["--tokens", "all", "--show", "merged.png"]


def fail(message: str) -> None:
    note(message)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def number(kind, least: float, most: float = math.inf):
    """For argparse: an int or a float from least to most"""

    def parse(text: str):
        value = kind(text)
        if not least <= value <= most:
            wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    parse.__name__ = kind.__name__  # which argparse says of what is no number
    return parse


def vtu(text: str) -> str:
    if not re.fullmatch(r"all|off|0*[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text} is not all, off or a number from 1 to 999999")
    return text


def temperature(text: str) -> float:
    value = float(text)
    if value != 0 and not 1e-6 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or from 0.000001 to 100")
    return value


def writable(text: str) -> Path:
    file = Path(text)
    if not file.absolute().parent.is_dir() or (file.exists() and not file.is_file()):
        raise argparse.ArgumentTypeError(
            f"{text} cannot be written: it is no file, or its folder does not exist"
        )
    return file


def png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} is not a .png file")
    return writable(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """Ends with one line and exit status 2 for what is wrong."""
    p = Parser(
        usage="demo.py IMAGE ... QUESTION [options] | demo.py --calibrate FOLDER [options]",
        description="Asks a LLaVA checkpoint about pictures or a video, with fewer visual tokens.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=24, width=100
        ),
    )
    add = p.add_argument
    inputs = "pictures and videos (a GIF, a folder of frames, a film), then the question"
    add("inputs", nargs="*", metavar="IMAGE ... QUESTION", help=inputs)
    where = "Hub id or folder (%(default)s)"
    add("--model", default="llava-hf/llava-1.5-7b-hf", metavar="M", help=where)
    budget = "full (default), high, mid, low, all (these four) or a file"
    add("--tokens", default="full", metavar="T", help=budget)
    queries = "queries per token: all (default), 1, 2, ...; off: no VTU"
    add("--vtu", type=vtu, default="all", metavar="Q", help=queries)
    evenly = "of a video, evenly spread (%(default)s)"
    add("--frames", type=number(int, 1), default=8, metavar="N", help=evenly)
    joins = "join what is more alike than this to the frame before"
    add("--temporal", type=number(float, -1, 1), metavar="TAU", help=joins)
    merge_by = "merge by threshold (default), or a fixed number"
    add("--method", default="dtome", choices=("dtome", "tome"), help=merge_by)
    add("--expand-cache", action="store_true", help="a cache of all N positions: faster, larger")
    longest = "longest answer (%(default)s)"
    add("--max-new-tokens", type=number(int, 1), default=128, metavar="N", help=longest)
    sampling = "of the sampling; 0 (default): greedy"
    add("--temperature", type=temperature, default=0.0, metavar="T", help=sampling)
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        metavar="S",
        help="of the sampling (%(default)s)",
    )
    add("--device", metavar="D", help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", metavar="D", help="float32, bfloat16, float16 (default: by checkpoint, device)")
    add("--pad", action="store_true", help="pad the picture to a square instead of cropping it")
    merged = "save a picture (PNG) of which patches were merged"
    add("--show", type=png, metavar="FILE", help=merged)
    add("--json", action="store_true", help="print one JSON object per budget and nothing else")
    add("--threads", type=number(int, 1, 1024), metavar="N", help="CPU threads")
    add("--calibrate", metavar="FOLDER", help="find low, mid and high on its pictures")
    beside = "of --calibrate (default: thresholds.json beside the checkpoint)"
    add("--save", type=writable, metavar="FILE", help=beside)
    a = p.parse_intermixed_args(argv or [os.path.relpath(SAMPLE), *SHOWCASE])

    if a.calibrate is not None and a.inputs:
        fail("--calibrate takes a folder alone")
    if a.calibrate is not None and not Path(a.calibrate).is_dir():
        fail(f"{a.calibrate} is not a folder")
    if a.calibrate is None and len(a.inputs) < 2:
        fail("IMAGE and QUESTION are needed, or --calibrate FOLDER; --help shows examples")
    if a.inputs and os.path.isfile(a.inputs[-1]):
        fail(f"the question is missing: {a.inputs[-1]!r}, in its place, is a file")
    return a


def settings(a: argparse.Namespace, folder: Path, processor) -> dict[str, DyMU]:
    """What --tokens, --method and --vtu ask for, by budget: with --tokens all, of all four.

    Raises ValueError where there are no thresholds.
    """
    decoder = {"vtu": a.vtu != "off", "queries": None}
    if a.vtu.isdecimal():
        decoder["queries"] = spread(int(a.vtu))

    found = {}
    for name in ("full", "high", "mid", "low") if a.tokens == "all" else (a.tokens,):
        if name == "full":
            found[name] = DyMU(**decoder)
        elif a.method == "tome" and name in BUDGETS:
            found[name] = DyMU(r=merges(name, processor.config), **decoder)
        elif a.method == "tome":
            raise ValueError("--method tome takes --tokens full, low, mid, high or all")
        else:
            thresholds, provenance = read_thresholds(name, folder, processor.config)
            found_with = provenance.get("preprocessing")
            ours = "pad" if processor.pad else "crop"
            if found_with not in (None, ours):
                note(f"note: thresholds found with preprocessing {found_with!r}, not {ours!r}")
            found[name] = DyMU(thresholds=thresholds, **decoder)
    return found
