"""lmms-eval's adapter. What needs lmms-eval itself runs where that is installed."""

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dymu import DyMU
from extras.sampled import fewer_if_long
from extras.thresholds import read_thresholds
from lab import harness
from lab.evaluate import VICUNA
from lab.scenes import HELD_OUT, scene
from lab.tasks.easy_vqa import pictures, questions, score
from load import load
from model import VisionTower

ROOT = Path(__file__).parent.parent
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="needs lmms-eval, which brings 140 packages: pip install lmms-eval==0.7.3",
)


# ---- the adapter alone ----


def request(context, doc_id, metadata=(), **wanted):
    """As lmms-eval makes one; the document is a list of pictures, which it reads anew each time."""
    args = (context, wanted, lambda doc: [one.copy() for one in doc], doc_id, "task", "test")
    return SimpleNamespace(args=args, metadata=dict.fromkeys(metadata))


def adapter(*documents, **args):
    made = harness.Harness(model="tiny", device="cpu", **args)
    made.task_dict = {"task": {"test": documents}}
    return made


@pytest.fixture
def encoded(monkeypatch):
    """Grows by each picture that is encoded."""
    seen = []
    plain = VisionTower.forward

    def forward(tower, pixels, settings):
        seen.append(pixels)
        return plain(tower, pixels, settings)

    monkeypatch.setattr(VisionTower, "forward", forward)
    return seen


@pytest.mark.parametrize("args", [dict(tokens="low"), dict(tokens="low", vtu="off"), {}])
def test_answers_are_the_models_and_a_picture_is_encoded_once(args, encoded):
    drawn = [scene(HELD_OUT), scene(HELD_OUT + 1)]
    asked = [(i, q) for i, one in enumerate(drawn) for _, q, _ in one.questions[:4]]
    ours = adapter([drawn[0].image], [drawn[1].image], **args)
    answers = [ours.answer(request(question, i)) for i, question in asked]
    assert len(encoded) == 2

    llava, processor = load("tiny", "cpu")
    settings = DyMU(vtu=False) if "vtu" in args else DyMU(queries=fewer_if_long)
    if args:
        taus, _ = read_thresholds("low", processor.folder, processor.config)
        settings = replace(settings, thresholds=taus)
    assert ours.settings == settings

    for (i, question), (text, rows, new), count in zip(asked, answers, ours.counts):
        pixels = processor.image(drawn[i].image)
        ids = processor.prompt(question)
        expected = list(llava.generate(ids, pixels, settings))
        assert text == processor.decode(expected).strip()
        assert (rows, new) == (len(llava(ids, pixels, settings)), len(expected))
        assert count == ("task", len(llava.encode(pixels, settings)[0][0]), 256, new)


def test_a_task_says_where_an_answer_ends():
    drawn = scene(HELD_OUT)
    ours = adapter([drawn.image])
    question = "what is in the image from left to right?"
    whole, _, n = ours.answer(request(question, 0))
    first, second, _ = whole.split(", ", 2)
    assert n > 6 and second

    assert ours.answer(request(question, 0, until=[", "]))[0] == first
    text, _, few = ours.answer(request(question, 0, until=second))
    assert text == f"{first}," and few < n
    assert ours.answer(request(question, 0, max_new_tokens=3))[2] == 3

    # a placeholder in the text is not asked for twice
    assert ours.answer(request(f"<image>\n{question}", 0))[0] == whole


def test_what_a_task_may_want():
    assert harness.read({}) == ([], 1024, 0)
    assert harness.read({"until": "x", "max_new_tokens": 5}) == (["x"], 5, 0)
    assert harness.read({"temperature": 0.2, "top_p": 1.0}) == ([], 1024, 0.2)
    assert harness.read({"temperature": 0.2, "do_sample": False, "top_p": 0})[2] == 0
    for wanted in ({"num_beams": 3}, {"temperature": 1, "top_p": 0.9}):
        with pytest.raises(ValueError, match="not supported"):
            harness.read(wanted)


def test_documents_without_a_picture_and_with_too_many(encoded):
    picture = scene(HELD_OUT).image
    ours = adapter([], [picture] * 4, [picture] * 2)
    words = len(ours.processor.prompt("what is it?", 0))
    assert ours.answer(request("what is it?", 0))[1] == words
    text, rows, new = ours.answer(request("what is it?", 1))
    assert rows > 4 * 256 and (text, new) == ("", 0)
    assert ours.answer(request("what is it?", 2))[2] > 0
    assert [count[3] == 0 for count in ours.counts] == [False, True, False]
    assert len(encoded) == 4 + 2

    # without VTU only what is left takes positions
    ours = adapter([picture] * 4, tokens="low", vtu="off")
    assert ours.answer(request("what is it?", 0))[2] > 0


def test_what_only_fills_up_a_process_is_not_counted():
    ours = adapter([scene(HELD_OUT).image])
    ours.answer(request("what is it?", 0, metadata=["__padding_only__"]))
    assert ours.counts == []


def test_model_args_are_the_command_lines(capsys):
    ours = adapter([scene(HELD_OUT).image], pad=True, system="vicuna", vtu=1, method="tome")
    assert ours.processor.pad and ours.settings.queries is not None
    plain = adapter([scene(HELD_OUT).image])
    added = len(plain.processor.tokenizer.encode(f"{VICUNA} ", add_special_tokens=False).ids)
    rows = [one.answer(request("what is it?", 0))[1] for one in (ours, plain)]
    assert rows[0] == rows[1] + added


@pytest.mark.parametrize(
    "args, complaint",
    [
        (dict(tokens="lo"), "none of full, low, mid, high"),
        (dict(tokens="all"), "--config takes a list"),
        (dict(vtu=0), "argument --vtu"),
        (dict(pad="yes"), "argument --pad"),
        (dict(system="vicunna"), "only vicuna"),
        (dict(show="x.png"), "--model_args show"),
        (dict(batch_size="8"), "one by one"),
        (dict(dtype="int8"), "dtype 'int8'"),
    ],
)
def test_wrong_model_args_are_one_line(args, complaint, capsys):
    with pytest.raises(SystemExit) as e:
        adapter(**args)
    assert e.value.code == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1


def test_without_lmms_eval_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(SystemExit) as e:
        harness.main([])
    assert e.value.code == 2
    told = capsys.readouterr().err
    assert "pip install lmms-eval==" in told and told.count("\n") == 1


# ---- files ----


def test_easy_vqa_is_the_same_as_jsonl():
    asked = questions()
    assert len(asked) == 9673
    assert len({one["image"] for one in asked[:100]}) < 30  # neighbours share a picture
    command = [sys.executable, "-m", "lab.tasks.easy_vqa", "100"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in out.splitlines()] == asked[:100]


RESULTS = (ROOT / "RESULTS.md").read_text()


def test_the_papers_settings_and_tasks():
    runs = yaml.safe_load((ROOT / "lab" / "paper.yaml").read_text())
    found = []
    for run in runs:
        args = dict(arg.split("=") for arg in run["model_args"].split(","))
        assert (args.pop("system"), args.pop("pad")) == ("vicuna", "true")
        a = harness.parse(args)
        found.append((a.tokens, a.vtu))
    wanted = [("high", "all"), ("mid", "all"), ("low", "all"), ("low", "off"), ("full", "all")]
    assert found == wanted

    # each of its tasks is a row of the table, which ends with those that need a judge
    rows = re.findall(r"^\| .+ \| `(\w+)`, .+ \| +\|$", RESULTS, re.M)
    tasks = runs[0]["tasks"].split(",")
    assert list(dict.fromkeys(rows)) == [*tasks, "mmvet", "llava_in_the_wild"]
    assert all(run["tasks"].split(",") == tasks for run in runs)
    assert len({run["output_path"] for run in runs}) == len(runs)


def test_the_papers_figures_have_its_averages():
    table = RESULTS[RESULTS.index("| benchmark |") :].split("\n\n")[0].splitlines()[2:]
    rows = {}
    for row in table:
        name, _, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1::2] == [""] * 5  # for one's own
        rows[name] = cells[::2]

    of_nine = [name for name in list(rows)[:-2] if name != "MME, perception"]
    for i, average in enumerate(rows["average"]):
        figures = {name: float(rows[name][i]) for name in of_nine}
        figures["MME, all"] /= 28
        assert sum(figures.values()) / 9 == pytest.approx(float(average), abs=0.051)


def test_the_table_of_easy_vqa():
    asked = questions()[:100]
    documents = [pictures(one) for one in asked]
    rows = re.findall(r"^\| (model=tiny\S*) \| ([\d.]+) ± ([\d.]+) \| ([\d.]+) \|$", RESULTS, re.M)
    assert len(rows) == 3
    for args, mean, std, right in rows:
        ours = adapter(*documents, **dict(arg.split("=") for arg in args.split(",")[1:]))
        answers = [ours.answer(request(one["question"], i))[0] for i, one in enumerate(asked)]
        scores = [score(one, [answer])["exact_match"] for one, answer in zip(asked, answers)]
        tokens = [count[1] for count in ours.counts]
        assert f"{statistics.fmean(scores):.2f}" == right
        assert f"{statistics.fmean(tokens):.1f}" == mean
        assert f"{statistics.pstdev(tokens):.1f}" == std


# ---- lmms-eval itself ----


def rows_of_benchmarks() -> dict[str, list[dict]]:
    """A few rows in the schemas of four benchmarks, about drawn scenes"""
    drawn = [scene(HELD_OUT + i) for i in range(3)]
    yes_no = []
    for i, one in enumerate(drawn):
        kinds = {answer: q for kind, q, answer in one.questions if kind == "existence"}
        pair = [(kinds[answer], answer) for answer in ("yes", "no") if answer in kinds]
        yes_no += [(i, q, answer) for q, answer in (pair * 2)[:2]]

    words = [next((q, a) for kind, q, a in one.questions if kind == "color") for one in drawn]
    texts = dict(ocr_tokens=["sun", "49"], image_id="0")
    return {
        "pope": [
            dict(question_id=f"{n}", question=q, answer=a, image=drawn[i].image, category="popular")
            for n, (i, q, a) in enumerate(yes_no)
        ],
        "mme": [
            dict(question_id=f"{i}", question=q, answer=a.title(), image=drawn[i].image)
            | dict(category="count" if i else "code_reasoning")
            for i, q, a in yes_no
        ],
        "gqa": [
            dict(id=f"{i}", imageId=f"{i}", question=q, answer=a, image=drawn[i].image)
            for i, (q, a) in enumerate(words)
        ],
        "textvqa_ocr": [
            dict(question_id=i, question=q, answers=[a] * 10, image=drawn[i].image) | texts
            for i, (q, a) in enumerate(words)
        ],
    }


def write_tasks(folder: Path) -> None:
    """The original task files, with their rows from a folder"""
    import lmms_eval.tasks
    from datasets import Dataset, DatasetDict

    theirs = Path(lmms_eval.tasks.__file__).parent
    splits = dict(pope="test", mme="test", gqa="testdev", textvqa_ocr="validation")
    for name, rows in rows_of_benchmarks().items():
        DatasetDict({splits[name]: Dataset.from_list(rows)}).save_to_disk(folder / f"{name}-rows")
        original = theirs / name / f"{name}.yaml"
        if name == "textvqa_ocr":
            original = ROOT / "lab" / "tasks" / "textvqa_ocr.yaml"
        local = dict(include=str(original), dataset_name=None, process_docs=None)
        local |= dict(task=f"local_{name}", dataset_path=str(folder / f"{name}-rows"))
        local |= dict(dataset_kwargs=dict(load_from_disk=True))
        if name != "textvqa_ocr":  # tiny/ was never asked for a word or phrase
            local["lmms_eval_specific_kwargs"] = dict(default=dict(pre_prompt="", post_prompt=""))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(local))


def run(*argv, processes=0):
    """python -m lab.harness -> exit status, what it printed"""
    command = [sys.executable, "-m", "lab.harness", *map(str, argv)]
    if processes:
        command[1:2] = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    env = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def results(folder: Path) -> dict:
    (file,) = folder.rglob("*_results.json")
    return json.loads(file.read_text())


@needs_lmms_eval
def test_easy_vqa_alone_and_in_two_processes(tmp_path):
    asked = questions()[:21]
    figures = []
    for processes in (0, 2):
        out = tmp_path / str(processes)
        argv = ["--tasks", "easy_vqa", "--limit", 21, "--output_path", out]
        argv += ["--model_args", "model=tiny,tokens=low,vtu=off,device=cpu"]
        status, told = run(*argv, processes=processes)
        assert status == 0, told
        assert "easy_vqa: 21 questions, " in told
        found = results(out)
        figures.append((found["results"]["easy_vqa"]["exact_match,none"], found["throughput"]))

    llava, processor = load("tiny", "cpu")
    taus, _ = read_thresholds("low", processor.folder, processor.config)
    settings = DyMU(thresholds=taus, vtu=False)
    right = tokens = 0
    for one in asked:
        pixels = processor.image(one["image"])
        said = processor.decode(
            llava.generate(processor.prompt(one["question"]), pixels, settings, 16)
        )
        right += said.strip().lower() in one["answers"]
        tokens += len(llava.encode(pixels, settings)[0][0])

    for accuracy, throughput in figures:
        assert accuracy == pytest.approx(right / 21)
        assert throughput["avg_easy_vqa_visual_tokens_mean"] == pytest.approx(tokens / 21)
        assert throughput["total_gen_tokens"] == figures[0][1]["total_gen_tokens"]


@needs_lmms_eval
def test_functions_of_the_original_tasks_at_two_settings(tmp_path):
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    tasks = [f"local_{name}" for name in ("pope", "mme", "gqa", "textvqa_ocr")]
    settings = dict(full="model=tiny", low="model=tiny,tokens=low,pad=true,system=vicuna")
    config = []
    for name, args in settings.items():
        out = str(tmp_path / name)
        one = dict(tasks=",".join(tasks), model_args=args, output_path=out, log_samples=True)
        config.append(one)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    status, told = run("--config", tmp_path / "config.yaml", "--include_path", tmp_path / "tasks")
    assert status == 0, told
    assert "local_pope: 6 questions, 256.0 ± 0.0 of 256 visual tokens" in told
    for name, most in (("full", 256), ("low", 80)):
        found = results(tmp_path / name)
        scores = found["results"]
        assert scores["local_pope"]["pope_accuracy,none"] == 1
        assert scores["local_mme"]["mme_perception_score,none"] == 200
        assert scores["local_mme"]["mme_cognition_score,none"] == 200
        assert scores["local_gqa"]["exact_match,none"] == 1
        means = [found["throughput"][f"avg_{task}_visual_tokens_mean"] for task in tasks]
        assert all(5 < mean <= most for mean in means)

    ours = adapter([scene(HELD_OUT).image])
    (file,) = (tmp_path / "full").rglob("*_samples_local_textvqa_ocr.jsonl")
    sample = json.loads(file.read_text().splitlines()[0])
    ocr = "\nReference OCR token: sun, 49\nAnswer the question using a single word or phrase."
    assert sample["input"].endswith(ocr)
    assert sample["filtered_resps"] == ours.answer(request(sample["input"], 0))[0]


@needs_lmms_eval
@pytest.mark.parametrize("processes", [0, 2])
def test_a_failed_run_does_not_exit_0(tmp_path, processes):
    (tmp_path / "broken.yaml").write_text(
        (ROOT / "lab/tasks/easy_vqa.yaml")
        .read_text()
        .replace("easy_vqa.", f"{ROOT}/lab/tasks/easy_vqa.", 1)
        .replace("!function easy_vqa.", "!function lab.tasks.easy_vqa.")
        .replace("max_new_tokens: 16", "num_beams: 3")
    )
    argv = ["--tasks", "easy_vqa", "--include_path", tmp_path, "--limit", 4]
    status, told = run(*argv, "--model_args", "model=tiny", processes=processes)
    assert status == 1, told
    assert "num_beams is not supported" in told
