"""Many questions about many pictures: each is answered once, whatever happens in between."""

import json
import signal
from collections import Counter

import pytest
from checkpoints import QUESTION, picture

from dymu import DyMU
from extras.chat import Session
from extras.video import read_frames
from lab import evaluate, questions
from lab.evaluate import VICUNA, Asker
from load import load

SETTINGS = {"full": DyMU(), "low, all": DyMU(r=(5, 4, 4)), "low, off": DyMU(r=(5, 4, 4), vtu=False)}


@pytest.fixture
def run(capsys, saved):
    """Runs the command in this process: -> exit status, standard output, standard error."""

    def run(*argv, model=saved, more=("--tokens", "full,low", "--vtu", "all,off")):
        status = 0
        common = ("--model", model, "--device", "cpu", "--method", "tome", "--max-new-tokens", 3)
        try:
            evaluate.main([str(a) for a in (*argv, *common, *more)])
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return run


def write(file, lines):
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return file


def read(file):
    return [json.loads(text) for text in file.read_text().splitlines()]


def some_questions(folder, pictures, count):
    """In turn about each of the pictures, of which every 20th is broken."""
    for i in range(pictures):
        picture(seed=i).save(folder / f"{i}.png")
        if i % 20 == 7:
            (folder / f"{i}.png").write_bytes(b"broken")
    places = range(count)
    lines = [{"id": i, "image": f"{i % pictures}.png", "question": f"What is {i}?"} for i in places]
    return [one | {"answers": ["a", "b"]} for one in lines]


def without_times(line):
    costs = line.get("answers_of", {}).values()
    return line | {"answers_of": [(cost["answer"], cost["tokens"]) for cost in costs]}


def alone(saved, images, question, system=""):
    """The answer and the number of visual tokens with each setting"""
    llava, processor = load(saved, "cpu")
    pixels = processor.image(images)
    ids = processor.prompt(question, pixels, system=system)
    found = {}
    for name, settings in SETTINGS.items():
        new = list(llava.generate(ids, pixels, settings, max_new_tokens=3))
        tokens = sum(len(x) for x, _ in llava.encode(pixels, settings))
        found[name] = processor.decode(new).strip(), tokens
    return found


def of_line(line):
    return {n: (cost["answer"], cost["tokens"]) for n, cost in line["answers_of"].items()}


# ---- what it does ----


@pytest.mark.parametrize("in_turn", [False, True])
def test_interrupted_twice_it_answers_each_of_200_questions_once(
    run, tmp_path, monkeypatch, in_turn
):
    asked = some_questions(tmp_path, 60, 200)
    if not in_turn:
        asked.sort(key=lambda one: one["image"])
    file = write(tmp_path / "q.jsonl", asked)
    out = tmp_path / "q.answers.jsonl"
    more = ("--tokens", "low", "--vtu", "all")

    # Ctrl-C, while an answer is made; a shell has it ignored where pytest runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = Counter()
    flushed = []
    ask = Asker.ask

    def ask_and_interrupt(self, *args):
        calls["ask"] += 1
        if calls["ask"] == 120:
            flushed.append(out.read_bytes())
            signal.raise_signal(signal.SIGINT)
        return ask(self, *args)

    monkeypatch.setattr(Asker, "ask", ask_and_interrupt)
    status, _, err = run(file, more=more)
    first = out.read_bytes()
    assert status == 130 and "interrupted" in err and first.endswith(b"\n")
    assert flushed == [first]
    before = read(out)
    assert 20 < len(before) < 150

    # killed in the middle of a line
    out.write_bytes(first[:-60])
    status, table, err = run(file, more=more)
    broken = sum(int(one["image"][:-4]) % 20 == 7 for one in asked)
    assert status == 1 and f"{broken} lines have an error, the first: picture" in err
    assert f"to {200 - broken} questions about 57 pictures" in table

    lines = read(out)
    assert [one["id"] for one in lines] == [one["id"] for one in asked]
    assert lines[: len(before) - 1] == before[:-1]
    for one, line in zip(asked, lines):
        assert one.items() <= line.items()
        assert ("error" in line) == (int(one["image"][:-4]) % 20 == 7)
        assert ("answers_of" in line) == ("error" not in line)

    # again: nothing is left to do, and nothing is loaded
    monkeypatch.setattr(Asker, "__init__", None)
    written = out.read_bytes()
    assert run(file, more=more)[:2] == (1, table) and out.read_bytes() == written


def test_wherever_it_is_cut_the_rest_is_done_anew(run, tmp_path):
    file = write(tmp_path / "q.jsonl", some_questions(tmp_path, 2, 5))
    out = tmp_path / "q.answers.jsonl"
    assert run(file)[0] == 0
    whole = out.read_bytes()
    lines = read(out)
    line_ends = [at for at, byte in enumerate(whole) if byte == ord("\n")]
    for left in (0, 5, line_ends[0], line_ends[1] + 1, line_ends[2] - 1, line_ends[3] + 100):
        out.write_bytes(whole[:left])
        assert run(file)[0] == 0
        assert [without_times(one) for one in read(out)] == [without_times(one) for one in lines]


def test_answers_are_those_of_each_picture_and_question_alone(run, saved, tmp_path):
    asked = some_questions(tmp_path, 3, 6)
    asked += [{"image": ["0.png", "2.png"], "question": QUESTION, "more": {"é": [1, None]}}]
    file = write(tmp_path / "q.jsonl", asked)
    status, _, err = run(file, "--out", tmp_path / "o.jsonl")
    assert status == 0 and str(tmp_path / "o.jsonl") in err
    reused = []
    for one, line in zip(asked, read(tmp_path / "o.jsonl")):
        assert one.items() <= line.items()
        names = one["image"] if isinstance(one["image"], list) else [one["image"]]
        images = [str(tmp_path / name) for name in names]
        assert of_line(line) == alone(saved, images, one["question"])
        costs = line["answers_of"].values()
        assert all(cost["encoder_s"] > 0 and cost["prefill_s"] > 0 for cost in costs)
        reused.append([cost["reused"] > 5 for cost in costs])

    # of the six questions in turn about three pictures the last three, and none about two at once
    assert reused == [[False] * 3] * 3 + [[True] * 3] * 3 + [[False] * 3]


def test_pictures_are_encoded_once_for_all_their_questions(run, tmp_path, monkeypatch):
    encoded = Counter()
    init = Session.__init__

    def count(self, *args):
        encoded["pictures"] += 1
        init(self, *args)

    monkeypatch.setattr(Session, "__init__", count)
    file = write(tmp_path / "q.jsonl", some_questions(tmp_path, 4, 12))
    assert run(file, more=("--tokens", "low"))[0] == 0
    assert encoded["pictures"] == 1 + 4  # one to warm up


def test_a_system_prompt(run, saved, tmp_path):
    asked = some_questions(tmp_path, 1, 2)
    file = write(tmp_path / "q.jsonl", asked)
    for system, text in (("Be brief.", "Be brief."), ("vicuna", VICUNA)):
        out = tmp_path / f"{system}.jsonl"
        assert run(file, "--out", out, "--system", system)[0] == 0
        for one, line in zip(asked, read(out)):
            image = [str(tmp_path / one["image"])]
            assert of_line(line) == alone(saved, image, one["question"], text)


def test_a_folder_of_pictures_and_a_video(run, saved, tmp_path):
    folder = tmp_path / "photos.2024"
    folder.mkdir()
    for name in ("10.png", "9.png"):
        picture(seed=len(name)).save(folder / name)
    frames = [picture(seed=i) for i in range(4)]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    (folder / "notes.txt").write_text("not a picture")

    status, out, _ = run(folder, "--question", QUESTION, "--frames", 2)
    assert (status, out) == (0, "")
    lines = read(tmp_path / "photos.2024.answers.jsonl")
    names = [f"photos.2024/{name}" for name in ("9.png", "10.png", "film.gif")]
    assert [one["image"] for one in lines] == names
    assert of_line(lines[0]) == alone(saved, [folder / "9.png"], QUESTION)
    assert of_line(lines[2]) == alone(saved, read_frames(folder / "film.gif", 2), QUESTION)

    # its lines can be asked again, from a file
    file = write(tmp_path / "again.jsonl", lines)
    assert run(file, "--frames", 2)[0] == 0
    again = read(tmp_path / "again.answers.jsonl")
    assert [without_times(one) for one in again] == [without_times(one) for one in lines]


def test_what_a_prompt_cannot_hold_is_an_error_of_its_line(run, saved, tmp_path):
    asked = some_questions(tmp_path, 1, 3)
    asked[1]["question"] = "What is <image>?"
    file = write(tmp_path / "q.jsonl", asked)
    status, _, err = run(file)
    lines = read(tmp_path / "q.answers.jsonl")
    assert status == 1 and "1 lines have an error" in err
    assert "must not hold the image placeholder" in lines[1]["error"]
    image = [str(tmp_path / "0.png")]
    for i in (0, 2):
        assert of_line(lines[i]) == alone(saved, image, asked[i]["question"])


# ---- the table ----


def test_the_table_counts_right_answers_by_picture():
    lines = []
    for i in range(40):
        full = {"answer": " Red. ", "tokens": 16, "encoder_s": 0.2, "reused": 0}
        low = {"answer": "red" if i % 4 else "green", "tokens": 4 + i % 2, "encoder_s": 0.1}
        of = {
            "full": full | {"prefill_s": 0.3, "reused": 0},
            "low": low | {"prefill_s": 0.05, "reused": 0},
        }
        lines.append({"image": f"{i}", "answers": ["crimson", "red"], "answers_of": of})
        more = {name: cost | {"reused": 20, "prefill_s": 0.02} for name, cost in of.items()}
        lines.append(lines[-1] | {"answers_of": more, "answers": ["RED."]})
        lines.append(lines[-1] | {"answers": [], "answers_of": more})

    table = evaluate.table(lines)
    assert "to 80 questions about 40 pictures" in table
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[-2:]]
    assert rows[0] == ["full", "100.0 [100.0, 100.0]", "", "16 ± 0", "200", "300", "20"]
    assert rows[1][0] == "low" and rows[1][3:] == ["4 ± 0", "100", "50", "20"]

    # both questions about a picture are right or wrong: that is 40 cases, not 80
    least, most = (float(end) for end in rows[1][1].removeprefix("75.0 [")[:-1].split(", "))
    assert 58 < least < 64 and 86 < most < 90
    assert rows[1][2] == f"-25.0 [{least - 100:+.1f}, {most - 100:+.1f}]"


# ---- bad input ----


def assert_refused(result, message):
    status, out, err = result
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert message in err, err


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 3: Expecting"),
        ("[]", "line 3: it is not an object"),
        ('{"question": "Q"}', "line 3: `image` must be a path or a list of paths"),
        ('{"image": [], "question": "Q"}', "line 3: `image` must be"),
        ('{"image": ["a", 1], "question": "Q"}', "line 3: `image` must be"),
        ('{"image": "a.png"}', "line 3: `question` must be a text"),
        ('{"image": "a.png", "question": " "}', "line 3: `question` must be a text"),
        (
            '{"image": "a.png", "question": "Q", "answers": "a"}',
            "line 3: `answers` must be a list of texts",
        ),
        ("[" * 100_000, "line 3: "),
    ],
)
def test_a_wrong_line_is_told_with_its_number_before_anything_is_loaded(
    run, tmp_path, monkeypatch, line, message
):
    monkeypatch.setattr(Asker, "__init__", None)
    good = json.dumps({"image": "a.png", "question": "Q"})
    file = tmp_path / "q.jsonl"
    file.write_text(f"{good}\n\n{line}\n{good}\n")
    assert_refused(run(file), message)
    assert not (tmp_path / "q.answers.jsonl").exists()


def test_answers_of_another_command_are_refused_and_left_as_they_are(run, folder, tmp_path):
    asked = some_questions(tmp_path, 1, 3)
    file = write(tmp_path / "q.jsonl", asked)
    out = tmp_path / "q.answers.jsonl"
    assert run(file)[0] == 0
    written = out.read_bytes()
    for other in (
        dict(model=folder),
        dict(more=("--tokens", "full")),
        dict(more=("--tokens", "full,low", "--vtu", "all,off", "--system", "vicuna")),
    ):
        assert_refused(run(file, **other), f"{out} is from another command")
        assert out.read_bytes() == written

    # other questions, or fewer
    for others in ([asked[0], asked[2]], asked[:2], [asked[0] | {"id": 9}, *asked[1:]]):
        write(file, others)
        assert_refused(run(file), f"{out} is from another command")

    # something else: with a line's end, without one, and the questions themselves
    write(file, asked)
    for text in (b"notes\n", b"notes", b"\xff\n\0", written[:-9] + b"\n", file.read_bytes()):
        out.write_bytes(text)
        assert_refused(run(file), f"{out} is from another command")
        assert out.read_bytes() == text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nothing.jsonl"], "No such file"),
        (["empty.jsonl"], "has no questions"),
        (["latin.jsonl"], "latin.jsonl, line 2: 'utf-8' codec can't decode"),
        (["empty"], "--question goes with a folder of pictures"),
        (["empty", "--question", "Q"], "has no questions, or no pictures"),
        (["q.jsonl", "--question", "Q"], "--question goes with a folder of pictures"),
        (["q.jsonl", "--out", "no/o.jsonl"], "cannot be written"),
        (["q.jsonl", "--out", "empty"], "empty"),
        (["q.jsonl", "--tokens", "full,few"], "--method tome takes --tokens full, low"),
        (["q.jsonl", "--vtu", "all,none"], "none is not auto, all, off"),
        (["q.jsonl", "--model", "nothing"], "nothing"),
    ],
)
def test_bad_options(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\n\xe9\n")
    write(tmp_path / "q.jsonl", some_questions(tmp_path, 1, 1))
    file, *more = argv
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run(file, more=more), message)
    assert sorted(tmp_path.rglob("*")) == before


# ---- how much a session saves ----


def test_many_questions_in_one_session_are_answered_as_alone(tmp_path, capsys):
    argv = "--shape smoke --layers 1 --questions 3 --threads 1 --device cpu --save"
    questions.main([*argv.split(), str(tmp_path / "q.json")])
    results = json.loads((tmp_path / "q.json").read_text())
    assert results["layers"] == 1 and results["questions"] == 3  # it says that it is a partial run
    runs = results["runs"]
    assert runs["float32"]["equal"] == 3
    assert all(len(times) == 3 for times in (runs["float32"]["alone"], runs["float32"]["together"]))
    assert "| float32 | 3 |" in capsys.readouterr().out
