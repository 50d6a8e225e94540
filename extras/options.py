"""The command line's options: what they are, and what can be wrong with them.

torch is not imported here: --help, and what is wrong, are told at once.
"""

import argparse
import math
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

EXAMPLES = """examples:
  python demo.py photo.jpg "What is on the table?"                  all tokens: the plain model
  python demo.py photo.jpg "What is on the table?" --tokens low     16 % of them on average
  python demo.py photo.jpg "Read it." --tokens tight --box 40,60,200,90   mostly of a region
  python demo.py photo.jpg --tokens low                             asks for questions
  python demo.py before.jpg after.jpg "What changed?"                several pictures
  python demo.py clip.gif "What happens?" --frames 8                a video
  python demo.py --calibrate photos/ --model my-llava               all budgets for another model
"""

# what --calibrate goes by, the last three alone
CALIBRATION = ("calibrate", "model", "pad", "device", "dtype", "threads")
CALIBRATION += ("save", "schedule", "enough")

SCHEDULES = ("constant", "linear", "reverse_linear")  # Appendix B

OUTSIDE = 0.4  # the second stage's tau outside boxes, chosen by lab.peers --choose
NONE = -2.0  # below any cosine: all becomes one token

# what is rather a misspelt file than a question
PICTURE = r"\S+\.(jpe?g|png|gif|webp|bmp|tiff?|mp4|mov|mkv|avi|webm)"

# what is shown without arguments
SAMPLE = Path(__file__).parent.with_name("tiny") / "sample.png"
SHOWCASE = ["what is in the image from left to right?", "--model", "tiny"]
SHOWCASE += ["--tokens", "all", "--show", "merged.png"]

program = "demo.py"  # a command of lab/ puts its own name here


def note(message: str) -> None:
    """One line for the user, who reads the answer on standard output."""
    print(f"{program}: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> None:
    note(message)
    sys.exit(2)


def hang_up() -> None:
    """Ends as other commands do whose output is no longer read."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed
    sys.exit(141)


def versions() -> str:
    told = []
    for package in ("dymu", "torch"):
        try:
            told.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            told.append(f"{package} is not installed")
    return ", ".join(told)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        if message.endswith("expected one argument"):
            message += ": what begins with - goes with =, as in --box=-3,0,50,50"
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
    if not re.fullmatch(r"auto|all|off|0*[1-9]\d{0,5}", text):
        wanted = "auto, all, off or a number from 1 to 999999"
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
    return text


def of_picture(kind):
    """For argparse: TEXT or NUMBER:TEXT, where kind makes something of the text, and 1 is first"""

    def parse(text: str):
        number, rest = re.fullmatch(r"(?:0*([1-9]\d{0,5}):)?(.*)", text, re.S).groups()
        return int(number or 1), kind(rest)

    parse.__name__ = kind.__name__
    return parse


def box(text: str) -> tuple:
    edges = text.split(",")
    numbers = [int(n) if n.lstrip("-").isdecimal() else float(n) for n in edges]
    if len(numbers) != 4 or not all(math.isfinite(float(n)) for n in edges):
        raise argparse.ArgumentTypeError(f"{text} is not x0,y0,x1,y1")
    x0, y0, x1, y1 = numbers
    if x0 >= x1 or y0 >= y1:
        raise argparse.ArgumentTypeError(f"{text} is empty: x0 < x1 and y0 < y1 are needed")
    return x0, y0, x1, y1


def outside(text: str) -> float:
    return NONE if text == "none" else number(float, -1, 1)(text)


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


def png_or_html(text: str) -> Path:
    if not text.lower().endswith((".png", ".html")):
        raise argparse.ArgumentTypeError(f"{text} is not a .png or .html file")
    return writable(text)


def add_common(add) -> None:
    """What lab/evaluate.py takes, too"""
    where = "Hub id or folder (%(default)s)"
    add("--model", default="llava-hf/llava-1.5-7b-hf", metavar="M", help=where)
    merge_by = "dtome (default): merge by threshold; tome: a fixed number"
    add("--method", default="dtome", choices=("dtome", "tome"), metavar="M", help=merge_by)
    once_more = "behind the projector, merge what is more alike than this once more"
    add("--after", type=number(float, -1, 1), metavar="TAU", help=once_more)
    evenly = "of a video, evenly spread (%(default)s)"
    add("--frames", type=number(int, 1), default=8, metavar="N", help=evenly)
    longest = "longest answer (%(default)s)"
    add("--max-new-tokens", type=number(int, 1), default=128, metavar="N", help=longest)
    add("--pad", action="store_true", help="pad the picture to a square instead of cropping it")
    add("--device", metavar="D", help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", metavar="D", help="float32, bfloat16, float16 (default: by checkpoint, device)")
    add("--threads", type=number(int, 1, 1024), metavar="N", help="CPU threads")


def parse(argv: list[str]) -> argparse.Namespace:
    """Ends with one line and exit status 2 for what is wrong."""
    p = Parser(
        usage="demo.py IMAGE ... [QUESTION] [options] | demo.py --calibrate FOLDER [options]",
        description="Asks a LLaVA checkpoint about pictures or a video, with fewer visual tokens.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=24, width=100
        ),
    )
    add = p.add_argument
    inputs = "pictures, videos (a GIF, a folder of frames, a film); without a question it asks"
    add("inputs", nargs="*", metavar="IMAGE ... QUESTION", help=inputs)
    add_common(add)
    budget = "full (default), high, mid, low, all (these four), tight, tightest, or a file"
    add("--tokens", default="full", metavar="T", help=budget)
    queries = "queries per token: all, 1, ...; auto (default): 1 if long; off: no VTU"
    add("--vtu", type=vtu, default="auto", metavar="Q", help=queries)
    most = "at most so many tokens of each picture or video"
    add("--cap", type=number(int, 1), metavar="K", help=most)
    what = "x0,y0,x1,y1, pixels or shares: where tokens matter; 2:x0,... of picture 2; repeatable"
    add("--box", type=of_picture(box), action="append", default=[], metavar="B", help=what)
    white = "the same from a picture that is white there, or transparent elsewhere"
    add("--mask", type=of_picture(str), action="append", default=[], metavar="FILE", help=white)
    further = f"how far all else merges: --after's TAU there ({OUTSIDE}), or none: to one token"
    add("--outside", type=outside, metavar="TAU", help=further)
    converse = "go on asking: each question after the answers before it"
    add("--chat", action="store_true", help=converse)
    add("--expand-cache", action="store_true", help="a cache of all N positions: faster, larger")
    sampling = "of the sampling; 0 (default): greedy"
    add("--temperature", type=temperature, default=0.0, metavar="T", help=sampling)
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        metavar="S",
        help="of the sampling (%(default)s)",
    )
    merged = "save which patches were merged: a picture (.png) or a page for a browser (.html)"
    add("--show", type=png_or_html, metavar="FILE", help=merged)
    add("--json", action="store_true", help="print one JSON object per budget and nothing else")
    add("--calibrate", metavar="FOLDER", help="find all budgets on its pictures")
    beside = "of --calibrate (default: thresholds.json beside the checkpoint)"
    add("--save", type=writable, metavar="FILE", help=beside)
    early = "of --calibrate: constant (default), linear (more merges early) or reverse_linear"
    add("--schedule", choices=SCHEDULES, default="constant", metavar="K", help=early)
    add("--enough", action="store_true", help="of --calibrate: stop where thresholds have settled")
    add("--version", action="version", version=versions())

    argv = argv or [os.path.relpath(SAMPLE), *SHOWCASE]
    end = argv.index("--") if "--" in argv else len(argv)
    a = p.parse_intermixed_args(argv[:end])
    a.inputs += argv[end + 1 :]
    given = {name for name, value in vars(a).items() if value != p.get_default(name)}
    check(a, given - {"inputs"})
    return a


def check(a: argparse.Namespace, given: set[str]) -> None:
    """Sets a.pictures and a.question (None: it is to be asked for) from a.inputs.

    given: the options that are not as they are by default
    """
    if a.calibrate is not None:
        if a.inputs:
            fail("--calibrate takes a folder alone")
        if not (a.calibrate and Path(a.calibrate).is_dir()):
            fail(f"{a.calibrate!r} is not a folder")
        for name in sorted(given - set(CALIBRATION)):
            fail(f"--{name.replace('_', '-')} goes not with --calibrate")
        return

    for name in sorted(given & set(CALIBRATION[-3:])):
        fail(f"--{name} goes with --calibrate")
    if not a.inputs:
        fail("IMAGE and QUESTION are needed, or IMAGE alone, to be asked; --help shows examples")
    asked = len(a.inputs) > 1 and not os.path.exists(a.inputs[-1])
    a.pictures = a.inputs[:-1] if asked else a.inputs
    a.question = a.inputs[-1] if asked else None
    if asked and re.fullmatch(PICTURE, a.question, re.I):
        fail(f"{a.question} is no question, and there is no such file")
    for name in a.pictures:
        if not name.strip():
            fail("the name of a picture is empty")
        if re.match(r"\w+://", name):
            fail(f"{name} is a URL: save what is there as a file, files are what is read")
    regions = a.box + a.mask
    last = max((picture for picture, _ in regions), default=0)
    if last > len(a.pictures):
        fail(f"a --box or --mask is of picture {last}, {len(a.pictures)} are given")
    if regions and a.tokens == "full" and a.after is None:
        fail("--box and --mask go with fewer --tokens than full, or with --after")
    if a.outside is not None and not regions:
        fail("--outside goes with --box or --mask")
    if a.show and (a.chat or not asked):
        fail("--show needs one question")
