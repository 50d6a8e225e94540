"""Many questions about many pictures, with several settings: answers as lines of JSON, and a table.

    python -m lab.evaluate questions.jsonl --model tiny --tokens full,low --vtu all,off
    python -m lab.evaluate photos/ --question "What is on the table?" --tokens low

A line of FILE has `image` (the path of a picture or a video from FILE's folder, or a list of paths)
and `question`, and may have `id`, `answers` and more. A line of OUT repeats it, in FILE's order,
with the answer of each setting and what it cost, or with `error`. The same command goes on where it
was interrupted. What had an error is not tried again, unless its line and all that follow are
deleted.

Questions about the same pictures are asked together, so that what their prompts begin with is read
once (extras/chat.py). If others stand between them in FILE, their answers wait in memory for their
turn. Each setting encodes the pictures anew, so that its times are its own.

An answer is right if it is one of `answers`, whatever its capitals, without a full stop at its end.
Intervals are 95 % bootstrap intervals over pictures. All settings answer the same questions, so
differences between them are resampled in pairs.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from dymu import DyMU
from extras import options, thresholds, video
from extras.chat import Session
from extras.devices import announce_memory, choose_device
from extras.door import announce_download, check_writable, find, one_line
from lab.lines import Answers, each_picture, pictures_of, read_questions
from lab.tables import bracket, head, interval, line, mean_and_std, mean_std, number, resample
from lab.timing import timed
from load import Processor, load_model, load_processor

# the system prompt that LLaVA-1.5 was trained and measured with; llava-hf's format leaves it out
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

FAILURES = (ValueError, OSError, torch.OutOfMemoryError)

# ---- asking ----


class Asker:
    """A model, and all the settings with which it is asked.

    a: the options. Raises ValueError for what is wrong with them, before the long load.
    """

    def __init__(self, a: argparse.Namespace):
        self.a = a
        device = choose_device(a.device)
        folder = find(a.model, announce_download)
        self.processor = load_processor(folder, a.pad)
        self.settings = all_settings(a, folder, self.processor)
        self.system = VICUNA if a.system == "vicuna" else a.system
        self.processor.prompt("?", system=self.system)

        progress = partial(tqdm, desc="loading", delay=3, disable=None)
        self.llava = load_model(folder, device, a.dtype, announce_memory, progress)

    def about(self, pictures: tuple[str, ...], questions: list[str]) -> Iterator[dict]:
        """Yields of each question about these pictures what its line of OUT tells"""
        try:
            paths = [self.a.file.parent / one for one in pictures]
            shown = [video.read_any(path, self.a.frames) for path in paths]
            pixels = video.see(self.processor, shown)
            sessions = {}
            for name, settings in self.settings.items():
                sessions[name] = timed(partial(Session, self.llava, pixels, settings))
        except FAILURES as e:
            yield from [{"error": one_line(e)}] * len(questions)
            return

        for question in questions:
            try:
                ids = self.processor.prompt(question, pixels, system=self.system)
                told = {"answers_of": {n: self.ask(ids, *one) for n, one in sessions.items()}}
            except FAILURES as e:
                told = {"error": one_line(e)}
            yield told

    def ask(self, ids: torch.Tensor, session: Session, encoder_s: float) -> dict:
        stream = session.ask(ids, self.a.max_new_tokens)
        first, prefill_s = timed(stream.__next__)
        answer = self.processor.decode([first, *stream])
        return {
            "answer": answer.strip(),
            "tokens": sum(len(rows) for rows, _ in session.visual),
            "encoder_s": round(encoder_s, 6),
            "prefill_s": round(prefill_s, 6),
            "reused": session.reused,
        }


def all_settings(a, folder: Path, processor: Processor) -> dict[str, DyMU]:
    """What each of --tokens asks for with each of --vtu, which full has no use for"""
    found = {}
    for tokens in a.tokens:
        for vtu in a.vtu:
            one = argparse.Namespace(tokens=tokens, vtu=vtu, method=a.method, after=a.after)
            for name, settings in thresholds.settings(one, folder, processor).items():
                plain = not settings.merging and settings.after is None
                found[name if plain else f"{name}, {vtu}"] = settings
    return found


def answer_rest(a, questions: list[dict], answers: Answers) -> None:
    """Asks what has no answer yet, all about the same pictures together."""
    among = {}
    for place in range(len(answers.done), len(questions)):
        among.setdefault(pictures_of(questions[place]), []).append(place)

    def told():
        for pictures, places in among.items():
            asked = [questions[place]["question"] for place in places]
            yield from zip(places, asker.about(pictures, asked))

    asker = Asker(a)
    # what a first call costs, reading the weights for one, is no picture's
    list(asker.about(next(iter(among)), ["?"]))
    answers.write(tqdm(told(), "asking", len(questions), initial=len(answers.done), disable=None))


# ---- showing ----


def table(answered: list[dict]) -> str:
    """answered: lines of OUT without an error; those without `answers` count for the costs alone"""
    among = {}
    for one in answered:
        among.setdefault(pictures_of(one), []).append(one)
    names = list(answered[0]["answers_of"])

    asked = []
    right = []
    for about in among.values():
        judged = [one for one in about if one.get("answers")]
        asked.append(float(len(judged)))
        right.append([float(sum(is_right(one, name) for one in judged)) for name in names])
    shares = resample(torch.tensor(right), torch.tensor(asked)).T

    columns = ("right answers", "minus the first", "tokens", "encoder", "prefill", "further ones")
    out = [
        f"Right answers in % to {sum(asked):.0f} questions about {len(asked)} pictures, and "
        "differences in points, with 95 % bootstrap intervals over pictures. Visual tokens: mean ± "
        "standard deviation over pictures. Mean milliseconds of the encoder, of the prefill of a "
        "first question about a picture and of further ones.",
        "",
        *head("", *columns),
    ]
    for name, share in zip(names, shares):
        difference = bracket(interval(share - shares[0]), "+") if name != names[0] else ""
        tokens = mean_std([about[0]["answers_of"][name]["tokens"] for about in among.values()])
        times = mean_times([one["answers_of"][name] for one in answered])
        out.append(line(name, bracket(interval(share)), difference, mean_and_std(tokens), *times))
    return "\n".join(out)


def is_right(one: dict, name: str) -> bool:
    wanted = [plain(answer) for answer in one["answers"]]
    return plain(one["answers_of"][name]["answer"]) in wanted


def plain(answer: str) -> str:
    return answer.strip().lower().removesuffix(".")


def mean_times(costs: list[dict]) -> Iterator[str]:
    first = [cost for cost in costs if not cost["reused"]]
    further = [cost for cost in costs if cost["reused"]]
    for some, time in ((first, "encoder_s"), (first, "prefill_s"), (further, "prefill_s")):
        yield number(1000 * statistics.fmean(cost[time] for cost in some)) if some else ""


# ---- the command ----


def parse(argv: list[str]) -> argparse.Namespace:
    about = "Answers many questions about many pictures, and goes on where it was interrupted."
    p = options.Parser(prog="python -m lab.evaluate", description=about)
    add = p.add_argument
    path = lambda text: Path(os.path.abspath(text))  # noqa: E731
    add("file", metavar="FILE", type=path, help="JSON lines, or a folder of pictures")
    add("--question", metavar="TEXT", help="about each picture of a folder")
    add("--out", type=Path, metavar="OUT", help="(FILE.answers.jsonl)")
    budgets = "with commas between them: full (default), high, mid, low, all (these four) or files"
    add("--tokens", type=lambda text: text.split(","), default="full", metavar="T", help=budgets)
    queries = "with commas between them: auto (default), all, 1, 2, ...; off: no VTU"
    each = lambda text: [options.vtu(one) for one in text.split(",")]  # noqa: E731
    add("--vtu", type=each, default="auto", metavar="Q", help=queries)
    system = "before each question; vicuna: that with which LLaVA-1.5 was measured"
    add("--system", default="", metavar="TEXT", help=system)
    options.add_common(add)
    a = p.parse_args(argv)
    if a.file.is_dir() != (a.question is not None):
        options.fail("--question goes with a folder of pictures, and only with that")
    return a


def evaluate(a) -> list[str]:
    """Answers what is left, prints the table -> the errors"""
    if a.file.is_dir():
        questions = each_picture(a.file, a.question)
        out = a.out or Path(f"{a.file}.answers.jsonl")
    else:
        questions = read_questions(a.file)
        out = a.out or a.file.with_suffix(".answers.jsonl")
    if out.resolve() == a.file.resolve():
        raise ValueError(f"--out {out} is the file of questions")
    if not questions:
        raise ValueError(f"{a.file} has no questions, or no pictures")

    given = {name: v for name, v in vars(a).items() if name not in ("file", "out", "question")}
    answers = Answers(out, questions, given)
    if len(answers.done) < len(questions):
        check_writable(out)
        answer_rest(a, questions, answers)

    answered = [one for one in answers.done if "answers_of" in one]
    if any(one.get("answers") for one in answered):
        print(table(answered))
    options.note(f"{len(questions)} answers are in {out}")
    return [one["error"] for one in answers.done if "error" in one]


def main(argv: list[str] | None = None) -> None:
    a = parse(sys.argv[1:] if argv is None else argv)
    try:
        if a.threads is not None:
            torch.set_num_threads(a.threads)
        errors = evaluate(a)
    except FAILURES as e:
        options.fail(one_line(e))
    except KeyboardInterrupt:
        options.note("interrupted, the same command goes on")
        sys.exit(130)
    if errors:
        options.note(f"{len(errors)} lines have an error, the first: {errors[0]}")
        sys.exit(1)


if __name__ == "__main__":
    options.program = "lab.evaluate"
    main()
