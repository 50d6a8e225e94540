"""Twenty questions about one picture at low: in one session, or each in a run of its own.

    python -m lab.questions            # tiny-llava, some 4 minutes on 2 cores; writes
                                       # lab/questions.json and prints its table
    python -m lab.questions --render   # only prints the table

Shapes, random weights, photo and lengths are lab/bench.py's; ToMe's r gives the token counts. Time
is that of the encoder and of all prefills: loading, preprocessing and further tokens are in
neither. A run of its own encodes the picture and reads the whole prompt. The session encodes once,
then reads behind the picture alone, where the questions differ from their first token on. The two
take turns, question by question.

All is done in the dtype that suits the device, and the first four questions again in float32, since
answers are to be equal: in bfloat16 the two likeliest of 32,064 random logits are often nearer to
each other than two orders of the same sums.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from dymu import DyMU
from extras.chat import Session
from extras.thresholds import merges
from lab.shapes import IMAGE, PHOTO, SHAPES, TEXT, build, find_shape, photo
from lab.tables import head, line, number
from lab.timing import command, timed
from model import Llava

FEW = 4  # questions in float32
ANSWER = 8  # tokens


def measure(a, device, dtype) -> dict:
    """Of each dtype the seconds of both ways, question by question, and how many answers agree"""
    llava, theirs, processor = build(find_shape(a.shape, a.layers), device, dtype)
    del theirs
    settings = DyMU(r=merges("low", processor.config))
    pixels = processor.image(photo())

    before = torch.cat((torch.randint(3, IMAGE, (5,)), torch.tensor([IMAGE])))
    questions = torch.randint(3, IMAGE, (a.questions, TEXT - 5))
    prompts = [torch.cat((before, question)) for question in questions]

    runs = {}
    for one in dict.fromkeys((dtype, torch.float32)):
        name = str(one).removeprefix("torch.")
        print(f"in {name}", file=sys.stderr)
        some = prompts if one == dtype else prompts[:FEW]
        runs[name] = compare(llava.to(one), pixels, settings, some)
    tokens = len(llava.encode(pixels, settings)[0][0])
    return dict(visual_tokens=tokens, text_tokens=TEXT, photo=PHOTO, runs=runs)


def compare(llava: Llava, pixels: Tensor, settings: DyMU, prompts: list[Tensor]) -> dict:
    def new_session():
        return Session(llava, pixels, settings)

    ask(new_session(), prompts[0])  # warms up
    session, encoder = timed(new_session)
    alone = []
    together = []
    equal = 0
    for i, ids in enumerate(prompts, 1):
        one, encoder_alone = timed(new_session)
        answer_alone, prefill_alone = ask(one, ids)
        answer, prefill = ask(session, ids)
        alone.append(encoder_alone + prefill_alone)
        together.append(prefill if i > 1 else encoder + prefill)
        equal += answer == answer_alone
        print(f"\r{i} of {len(prompts)} questions", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return dict(alone=alone, together=together, equal=equal)


def ask(session: Session, ids: Tensor) -> tuple[list[int], float]:
    """The answer, and the seconds to its first token"""
    stream = session.ask(ids, ANSWER, eos=())
    first, prefill = timed(stream.__next__)
    return [first, *stream], prefill


def table(r: dict) -> str:
    """From the content of the JSON file alone."""
    out = [
        f"{r['shape']}, random weights, {r['visual_tokens']} visual tokens at low; {r['machine']}, "
        f"{r['threads']} threads, torch {r['torch']}, {r['date']}. Seconds to the first token of "
        "all questions.",
        "",
        *head("", "questions", "each alone", "one session", "ratio", "equal answers"),
    ]
    for dtype, found in r["runs"].items():
        alone = sum(found["alone"])
        together = sum(found["together"])
        cells = [number(alone), number(together), f"{together / alone:.3f}", str(found["equal"])]
        out.append(line(dtype, str(len(found["alone"])), *cells))
    return "\n".join(out)


def parse() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m lab.questions")
    p.add_argument("--shape", default="tiny-llava", choices=SHAPES, help="(%(default)s)")
    p.add_argument("--layers", type=int, default=0, metavar="K", help="only so many decoder layers")
    p.add_argument("--questions", type=int, default=20, metavar="N", help="(%(default)s)")
    return p


def main(argv: list[str] | None = None) -> None:
    beside = Path(__file__).with_name("questions.json")
    command(parse(), lambda *_: beside, measure, lambda r, _: table(r), argv=argv)


if __name__ == "__main__":
    main()
