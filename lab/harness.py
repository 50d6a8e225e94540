"""lmms-eval's benchmarks with our model, those of the paper among them.

    pip install lmms-eval==0.7.3 easy-vqa       # 140 packages: in a virtual environment of its own
    python -m lab.harness --tasks easy_vqa --limit 100 --model_args model=tiny,tokens=low
    python -m lab.harness --config lab/paper.yaml      # the paper's, at five settings: RESULTS.md
    torchrun --nproc-per-node=4 -m lab.harness --config lab/paper.yaml

The options are lmms-eval's. In --model_args model, tokens, vtu, method, pad and dtype are what they
are for demo.py, and system=vicuna puts in front of each prompt what LLaVA-1.5 was measured with.
Tasks of our own are in lab/tasks. After each setting a line per task says how many visual tokens
its questions took, mean and standard deviation over all processes; the results file has them under
"throughput". The exit status is 1 if a run failed, 2 for wrong options.

If lmms-eval does not import beside a CPU build of torch ("torchvision::nms does not exist"),
`pip uninstall torchvision` mends it.
"""

import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from extras import options, thresholds
from extras.calibrate import gather, process
from extras.chat import Session
from extras.decoding import sampler
from extras.devices import choose_device
from extras.door import find, one_line
from extras.video import see
from lab.evaluate import VICUNA
from load import load_model, load_processor

try:
    from lmms_eval.api.model import lmms
except (ImportError, RuntimeError):  # `main` tells
    lmms = object

OPTIONS = ("model", "tokens", "vtu", "method", "after", "pad", "dtype", "device")  # of demo.py
SYSTEMS = {"": "", "vicuna": VICUNA}
LONGEST = 1024  # answer, where a task sets no limit, as in lmms-eval's own models


class Harness(lmms):
    """What lmms-eval makes of --model_args, and then asks."""

    def __init__(self, system="", batch_size=1, **args):
        super().__init__()
        try:
            if system not in SYSTEMS:
                raise ValueError(f"system={system} is not known, only vicuna is")
            if int(batch_size) != 1:
                raise ValueError("batch_size is 1: questions are asked one by one")
            self.load(parse(args))
        except (ValueError, OSError) as e:
            fail(one_line(e))

        self.system = SYSTEMS[system]
        self.session = None
        self.pictures = None  # which it is about
        self.start = time.perf_counter()
        self.counts = []  # of each question the task, N_un, N, and how many tokens the answer has

    def load(self, a) -> None:
        """a: demo.py's options"""
        folder = find(a.model)
        self.processor = load_processor(folder, a.pad)
        (self.settings,) = thresholds.settings(a, folder, self.processor).values()
        self.device = choose_device(a.device)  # with torchrun the one that accelerate has set
        self.llava = load_model(folder, self.device, a.dtype)

    def generate_until(self, requests: list) -> list:
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        self.start = time.perf_counter()
        answers = []
        for request in tqdm(requests, desc="answering", disable=process()[0] > 0):
            text, rows, new = self.answer(request)
            answers.append(GenerationResult(text, TokenCounts(rows, new)))
        return answers

    @torch.inference_mode()
    def answer(self, request) -> tuple[str, int, int]:
        """-> the answer, how many rows its prompt has, and how many tokens it has itself

        A prompt that is longer than the decoder's positions gets no answer, and `report` tells.
        """
        context, wanted, doc_to_visual, doc_id, task, split = request.args
        pictures = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if self.session is None or pictures != self.pictures:
            self.pixels = see(self.processor, pictures)
            self.session = Session(self.llava, self.pixels, self.settings)
            self.pictures = pictures

        # pictures stand in front, as in LLaVA's training
        question = context.replace("<image>", "").replace("<video>", "").strip()
        ids = self.processor.prompt(question, self.pixels, system=self.system)

        tokens = sum(len(x) for x, _ in self.session.visual)
        of = sum(len(token_at) for _, token_at in self.session.visual)
        words = len(ids) - len(self.pixels)
        positions = words + (of if self.settings.vtu else tokens)
        text, new = "", 0
        if positions <= self.llava.config.text_config.max_position_embeddings:
            text, new = self.generate(ids, *read(wanted))

        if "__padding_only__" not in request.metadata:  # it gives all processes equally many
            self.counts.append((task, tokens, of, new))
        return text, words + tokens, new

    def generate(self, ids, until: list[str], most: int, temperature: float) -> tuple[str, int]:
        """-> the answer up to any of until, and how many tokens it took, which are at most most"""
        pick = sampler(temperature, seed=len(self.counts), device=self.device)
        new = []
        text = ""
        for id in self.session.ask(ids, most, pick=pick):
            new.append(id)
            text = self.processor.decode(new)
            if any(stop in text for stop in until):
                break

        for stop in until:
            text = text.split(stop)[0]
        return text.strip(), len(new)

    def clean(self):
        """lmms-eval calls it in each process, once, when all is answered."""
        seconds = time.perf_counter() - self.start
        counts = [one for part in gather(self.counts) for one in part]
        if process()[0] == 0:
            report(counts, seconds)
        self.session = None
        super().clean()

    def loglikelihood(self, requests):
        raise NotImplementedError("answers are generated: tasks that score given ones do not run")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("tasks of several rounds do not run")


def parse(args: dict):
    """--model_args -> demo.py's options, which end with one line for what is wrong

    Raises ValueError for a name that means nothing here.
    """
    argv = ["picture", "?"]
    for name, value in args.items():
        if name not in OPTIONS:
            raise ValueError(f"--model_args {name}: only system, {', '.join(OPTIONS)} are known")
        if value is not False:
            argv.append(f"--{name}" if value is True else f"--{name}={value}")
    a = options.parse(argv)
    if a.tokens == "all":
        raise ValueError("tokens=all is four settings, and --config takes a list of such")
    return a


def read(wanted: dict) -> tuple[list[str], int, float]:
    """A task's generation_kwargs -> what ends an answer, its most tokens, its temperature"""
    until = wanted.get("until") or []
    until = [until] if isinstance(until, str) else until
    most = wanted.get("max_new_tokens") or LONGEST
    temperature = wanted.get("temperature") or 0
    if not wanted.get("do_sample", True):
        temperature = 0  # some tasks say both

    if (wanted.get("num_beams") or 1) > 1:
        raise ValueError("num_beams is not supported")
    if temperature and wanted.get("top_p") not in (None, 1):
        raise ValueError("top_p is not supported, temperature is")
    return until, most, temperature


def report(counts: list[tuple], seconds: float) -> None:
    """Prints a line for each task, and leaves the figures for lmms-eval's results file."""
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    figures = {}
    for task in sorted({task for task, *_ in counts}):
        _, tokens, of, new = zip(*(count for count in counts if count[0] == task))
        mean = statistics.fmean(tokens)
        std = statistics.pstdev(tokens)
        share = f"{mean:.1f} ± {std:.1f} of {statistics.fmean(of):.0f} visual tokens"
        print(f"{task}: {len(new)} questions, {share}")
        if 0 in new:
            print(f"{task}: {new.count(0)} NOT answered, as longer than the model's positions")

        figures[f"{task}_visual_tokens_mean"] = mean
        figures[f"{task}_visual_tokens_std"] = std
        figures[f"{task}_not_answered"] = new.count(0)

    answers = sum(new for *_, new in counts)
    log_metrics(seconds, answers, answers / seconds, figures)


def fail(message: str, status: int = 2) -> None:
    print(f"lab.harness: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def main(argv: list[str]) -> None:
    try:
        from lmms_eval import __main__ as lmms_eval
        from lmms_eval.models import MODEL_REGISTRY_V2, ModelManifest
    except (ImportError, RuntimeError) as e:
        how = "in a virtual environment of its own, pip install lmms-eval==0.7.3 easy-vqa"
        fail(f"lmms-eval does not import ({one_line(e)[-99:]}): {how}")

    evaluate = lmms_eval.cli_evaluate_single
    failed = []

    def watched(args):
        """lmms-eval goes on after a failure, and would exit 0."""
        if not args.tasks:
            fail("--tasks is needed; --tasks list shows which there are")
        try:
            return evaluate(args)
        except Exception:
            failed.append(args.model_args)
            if process()[1] > 1:  # the others wait for this one
                traceback.print_exc()
                sys.exit(1)
            raise

    ours = ModelManifest("dymu", simple_class_path="lab.harness.Harness")
    MODEL_REGISTRY_V2.register_manifest(ours, overwrite=True)
    tasks = str(Path(__file__).with_name("tasks"))
    lmms_eval.cli_evaluate_single = watched
    sys.argv = ["lab.harness", "--model", "dymu", "--include_path", tasks, *argv]
    lmms_eval.cli_evaluate()
    if failed:
        fail(f"failed: {'; '.join(failed)}", status=1)


if __name__ == "__main__":
    main(sys.argv[1:])
