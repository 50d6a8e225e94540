"""The command line as a user meets it, and one case for each kind of bad input.

Bad input gives one line and exit status 2.
"""

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, QUESTION, clip, make
from PIL import Image
from safetensors.torch import load_file, save_file
from test_load import edit, picture

import demo
from dymu import DyMU
from extras import calibrate, devices, show, video
from extras.anyres import positions
from extras.sampled import spread
from extras.thresholds import read_thresholds
from extras.video import read_frames
from load import load, load_processor
from model import Llava

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    picture("RGB", (90, 60)).save(path)
    return path


@pytest.fixture
def run(capsys):
    """Runs demo.py in this process: -> exit status, standard output, standard error."""

    def run(*argv):
        status = 0
        try:
            demo.main([str(a) for a in argv])
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return run


# ---- what it does ----


def test_it_answers_streams_and_reports(run, saved, photo):
    status, out, err = run(
        photo, QUESTION, "--model", saved, "--device", "cpu", "--max-new-tokens", 12
    )
    llava, processor = load(saved, "cpu")
    answer = processor.decode(
        llava.generate(processor.prompt(QUESTION), processor.image(photo), max_new_tokens=12)
    )
    report = (
        r"visual tokens 16 -> 16 \(100 %\), encoder \S+ s, prefill \S+ s, "
        r"\S+ tokens/s, cache \S+ MiB"
    )
    assert (status, out) == (0, answer.strip() + "\n")
    assert re.fullmatch(report, err.strip())


@pytest.mark.parametrize(
    "options, settings",
    [
        ([], DyMU()),
        (["--tokens", "low", "--vtu", "all"], DyMU(thresholds=(0.5, 0.6, 0.7))),
        (["--tokens", "low", "--method", "tome"], DyMU(r=(5, 4, 4))),
        (
            ["--tokens", "mid", "--method", "tome", "--vtu", "2"],
            DyMU(r=(4, 3, 3), queries=spread(2)),
        ),
        (["--tokens", "low"], DyMU(thresholds=(0.5, 0.6, 0.7))),
        (["--tokens", "low", "--vtu", "off"], DyMU(thresholds=(0.5, 0.6, 0.7), vtu=False)),
        (["--tokens", "{}/list.json", "--vtu", "all"], DyMU(thresholds=(0.8, 0.9, 1.0))),
    ],
)
def test_json_reports_what_the_options_ask_for(run, folder, photo, options, settings):
    (folder / "thresholds.json").write_text(json.dumps({"low": {"thresholds": [0.5, 0.6, 0.7]}}))
    (folder / "list.json").write_text("[0.8, 0.9, 1.0]")
    options = [o.format(folder) for o in options]
    argv = [photo, QUESTION, "--model", folder, "--json", "--max-new-tokens", 6, "--device", "cpu"]
    status, out, err = run(*argv, *options)
    assert (status, err) == (0, "")
    report = json.loads(out)
    llava, processor = load(folder, "cpu")
    pixels, ids = processor.image(photo), processor.prompt(QUESTION)
    x, token_at = llava.vision_tower(pixels, settings)
    assert report["visual_tokens"] == len(x) and report["virtual_tokens"] == len(token_at) == 16
    answer = processor.decode(llava.generate(ids, pixels, settings, max_new_tokens=6))
    assert report["answer"] == answer.strip()
    assert (report["images"], report["question"]) == ([str(photo)], QUESTION)
    assert len(report["tokens_per_layer"]) == 3 and report["tokens_per_layer"][-1] == len(x)
    assert report["cache_bytes"] % (3 * 2 * 2 * 16 * 4) == 0
    assert (report["device"], report["dtype"], report["model"]) == ("cpu", "float32", str(folder))
    assert min(report[k] for k in ("encoder_s", "prefill_s", "decode_tokens_per_s")) > 0


def test_temperature_and_seed(run, saved, photo):
    base = [photo, QUESTION, "--model", saved, "--json", "--max-new-tokens", 12, "--temperature", 3]
    answers = [json.loads(run(*base, "--seed", seed)[1])["answer"] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_characters_of_several_bytes_are_printed_whole(run, saved, photo, monkeypatch):
    text = "zwölf 你好 🙂!"
    ids = load(saved, "cpu")[1].tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(Llava, "decode", lambda *args, **options: iter(ids))  # one id per byte
    assert run(photo, QUESTION, "--model", saved)[1].startswith(text + "\n")
    # ends inside a character
    monkeypatch.setattr(Llava, "decode", lambda *args, **options: iter(ids[:8]))
    assert run(photo, QUESTION, "--model", saved)[1].startswith("zwölf \ufffd\n")


def test_an_expanded_cache(run, saved, photo):
    argv = [photo, QUESTION, "--model", saved, "--tokens", "low", "--method", "tome"]
    argv += ["--json", "--max-new-tokens", 9]
    unique, expanded = (json.loads(run(*argv, *more)[1]) for more in ((), ("--expand-cache",)))
    assert unique["answer"] == expanded["answer"]
    assert unique["cache_bytes"] < expanded["cache_bytes"]


def test_threads(run, saved, photo, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert run(photo, QUESTION, "--model", saved, "--threads", 3, "--max-new-tokens", 1)[0] == 0
    assert chosen == [3]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "transparent palette"])
def test_odd_pictures_are_answered(run, saved, tmp_path, mode):
    image = picture(mode, (40, 90))
    path = tmp_path / ("odd.tif" if mode == "CMYK" else "odd.png")
    image.save(path)
    status, out, _ = run(path, QUESTION, "--model", saved, "--json", "--max-new-tokens", 2)
    assert status == 0 and json.loads(out)["visual_tokens"] == 16


def test_padding_and_a_note_when_thresholds_were_found_with_crops(run, folder, photo):
    provenance = {"preprocessing": "crop", "low": {"thresholds": [0.5, 0.6, 0.7]}}
    (folder / "thresholds.json").write_text(json.dumps(provenance))
    status, _, err = run(
        photo, QUESTION, "--model", folder, "--tokens", "low", "--pad", "--max-new-tokens", 2
    )
    assert status == 0 and "found with preprocessing 'crop', not 'pad'" in err


def test_all_budgets_in_a_table_and_a_picture(run, folder, photo, tmp_path):
    budgets = {
        name: {"thresholds": [tau] * 3} for name, tau in (("low", 0.3), ("mid", 0.6), ("high", 0.9))
    }
    (folder / "thresholds.json").write_text(json.dumps(budgets))
    argv = [photo, QUESTION, "--model", folder, "--tokens", "all", "--max-new-tokens", 4]
    argv += ["--show", tmp_path / "m.png"]
    status, out, err = run(*argv)
    rows = re.findall(
        r"^ *(\w+) +(\d+) of 16 tokens, encoder +\d+ ms, prefill +\d+ ms: ", out, re.M
    )
    assert status == 0 and [name for name, _ in rows] == ["full", "high", "mid", "low"]
    counts = [int(n) for _, n in rows]
    assert counts[0] == 16 and counts == sorted(counts, reverse=True) and "wrote" in err
    assert Image.open(tmp_path / "m.png").width == 1200
    reports = [json.loads(line) for line in run(*argv, "--json")[1].splitlines()]
    assert [r["visual_tokens"] for r in reports] == counts
    assert [r["tokens"] for r in reports] == ["full", "high", "mid", "low"]


def test_calibrate_then_use_what_it_found(run, folder, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, side in enumerate((1, 3, 7, 20, 56, 56)):
        noise = Image.effect_noise((side, side), 90).convert("RGB")
        noise.resize((60, 60), 0).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "notes.txt").write_text("not one either")
    status, out, err = run("--calibrate", pictures, "--model", folder, "--device", "cpu")
    assert status == 0 and "low: " in out and "broken.png" in err and "%|" not in err
    found = json.loads((folder / "thresholds.json").read_text())
    assert (found["preprocessing"], found["schedule"]) == ("crop", "constant")
    assert found["model"] == str(folder)
    llava, processor = load(folder, "cpu")
    for budget, left in (("low", 3), ("mid", 6), ("high", 11)):
        one = found[budget]
        assert sum(one["r"]) == 16 - left and one["images"] == 6 and len(one["thresholds"]) == 3
        settings = DyMU(thresholds=tuple(one["thresholds"]))
        counts = [
            len(llava.vision_tower(processor.image(f), settings)[0])
            for f in sorted(pictures.glob("[0-9].png"))
        ]
        assert one["tokens_mean"] == sum(counts) / 6
    assert found["high"]["tokens_mean"] == 11  # one batch: exactly the budget
    argv = [QUESTION, "--model", folder, "--tokens", "mid", "--max-new-tokens", 2]
    assert run(pictures / "1.png", *argv)[0] == 0
    assert not list(folder.glob(".demo-*"))

    early = ("--schedule", "linear", "--save", tmp_path / "early.json")
    assert run("--calibrate", pictures, "--model", folder, *early)[0] == 0
    linear = json.loads((tmp_path / "early.json").read_text())
    assert linear["schedule"] == "linear" and linear["low"]["r"] == [7, 4, 2]
    assert linear["tight"]["thresholds"] == linear["mid"]["thresholds"]


def test_calibration_over_two_processes_gives_the_same(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("extras.calibrate.BATCH", 2)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(7):
        Image.effect_noise((4 + 9 * i, 60), 90).convert("RGB").save(pictures / f"{i}.png")
    (pictures / "3.png").write_bytes(b"broken")
    assert run("--calibrate", pictures, "--model", folder, "--device", "cpu")[0] == 0
    alone = json.loads((folder / "thresholds.json").read_text())
    script = "import sys, demo; from extras import calibrate; calibrate.BATCH = 2; "
    script += f"demo.main({['--calibrate', str(pictures)]} + sys.argv[1:])"
    (tmp_path / "two.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [
        tmp_path / "two.py",
        "--model",
        folder,
        "--device",
        "cpu",
        "--save",
        tmp_path / "two.json",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1 and "1 pictures skipped" in done.stdout
    two = json.loads((tmp_path / "two.json").read_text())
    for budget in ("low", "mid", "high"):
        assert two[budget]["thresholds"] == pytest.approx(alone[budget]["thresholds"], abs=1e-12)
        assert two[budget]["tokens_mean"] == alone[budget]["tokens_mean"]
        assert two[budget]["images"] == 6


def test_a_calibration_that_fails_leaves_nothing(run, folder, photo, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    before = sorted(p.name for p in folder.iterdir())
    assert_one_line(run("--calibrate", tmp_path / "empty", "--model", folder), "no images")
    assert_one_line(run("--calibrate", tmp_path / "nowhere", "--model", folder), "not a folder")
    nowhere = tmp_path / "no" / "t.json"
    assert_one_line(
        run("--calibrate", tmp_path, "--model", folder, "--save", nowhere), "cannot be written"
    )
    photo.rename(tmp_path / "empty" / "photo.png")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    status, _, err = run("--calibrate", tmp_path / "empty", "--model", folder)
    assert status == 2 and err.endswith("No space left on device\n")
    assert sorted(p.name for p in folder.iterdir()) == before


# ---- several pictures, video, AnyRes ----


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A LLaVA-NeXT and a OneVision."""
    folder = tmp_path_factory.mktemp("families")
    for name in ("llava_next, Llama", "llava_onevision"):
        make(folder / FAMILIES[name]["family"], **FAMILIES[name])
    return folder


@pytest.fixture
def gif(tmp_path):
    first, *rest = clip(5)
    first.save(tmp_path / "clip.gif", save_all=True, append_images=rest)
    return tmp_path / "clip.gif"


def test_two_pictures_and_a_question(run, saved, photo, tmp_path):
    other = tmp_path / "other.png"
    picture("RGB", (40, 80)).save(other)
    status, out, err = run(
        photo, other, "what changed?", "--model", saved, "--json", "--max-new-tokens", 9
    )
    report, (llava, processor) = json.loads(out), load(saved)
    answer = llava.generate(
        processor.prompt("what changed?", 2), processor.image([photo, other]), max_new_tokens=9
    )
    assert (status, err) == (0, "") and report["answer"] == processor.decode(answer)
    assert report["virtual_tokens"] == report["visual_tokens"] == 32
    assert report["tokens_per_layer"] == [32, 32, 32]
    status, out, _ = run(
        photo, other, "what changed?", "--model", saved, "--tokens", "all", "--method", "tome"
    )
    assert status == 0 and out.startswith(f"{photo} {other}: what changed?\n")
    assert out.count("of 32 tokens") == 4


def test_several_pictures_are_seen_whole_by_onevision(run, families, photo):
    argv = [photo, photo, "Q", "--model", families / "llava_onevision"]
    argv += ["--json", "--max-new-tokens", 1]
    assert json.loads(run(*argv)[1])["virtual_tokens"] == 2 * (49 + 1)


@pytest.mark.parametrize(
    "family, virtual", [("llava", 48), ("llava_next", 51), ("llava_onevision", 49)]
)
def test_a_video_its_frames_and_the_second_stage(
    run, saved, families, gif, tmp_path, family, virtual
):
    model = saved if family == "llava" else families / family
    argv = [gif, "what happens?", "--model", model, "--frames", 3, "--max-new-tokens", 2]
    counts = []
    joined, tome = ["--after", 0.999], ["--method", "tome", "--tokens"]
    for more in ([], joined, [*joined, *tome, "mid"]):
        status, out, err = run(*argv, *more, "--json")
        report = json.loads(out)
        assert (status, err, report["virtual_tokens"]) == (0, "", virtual)
        counts.append(report["visual_tokens"])
    assert counts[0] == virtual > max(counts[1:])
    shown = tmp_path / "shown.png"
    assert run(*argv, *joined, *tome, "all", "--show", shown)[0] == 0
    assert Image.open(shown).size[0] == 1200


def test_a_film_and_a_picture_in_one_prompt(run, families, photo, gif):
    status, out, err = run(
        gif, photo, "Q", "--model", families / "llava_onevision", "--json", "--max-new-tokens", 2
    )
    llava, processor = load(families / "llava_onevision")
    shown = [processor.video(read_frames(gif)), processor.image(photo)]
    answer = processor.decode(llava.generate(processor.prompt("Q", shown), shown, max_new_tokens=2))
    assert (status, err) == (0, "") and json.loads(out)["answer"] == answer


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_anyres_pictures_are_answered_shown_and_calibrated(run, families, photo, tmp_path, family):
    folder, shown, pictures = families / family, tmp_path / "shown.png", tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        picture("RGB", (40 + 31 * i, 120 - 7 * i)).save(pictures / f"{i}.png")
    status, out, err = run("--calibrate", pictures, "--model", folder)
    assert status == 0 and "wrote" in out
    argv = [photo, QUESTION, "--model", folder, "--max-new-tokens", 2, "--tokens"]
    assert run(*argv, "all", "--show", shown)[0] == 0
    assert Image.open(shown).size[0] == 1200
    reports = []
    for tokens in ("full", "low"):
        status, out, _ = run(*argv, tokens, "--json")
        reports.append(json.loads(out))
    full, low = reports
    processor = load(folder)[1]
    pixels = processor.image(photo)
    assert full["visual_tokens"] == full["virtual_tokens"] == positions(pixels, processor.config)
    crops = len(pixels.crops) * processor.config.visual_tokens
    assert full["tokens_per_layer"] == [crops] * processor.config.vision_layers
    assert low["virtual_tokens"] == full["virtual_tokens"]
    assert low["visual_tokens"] < 0.5 * full["visual_tokens"]
    assert low["tokens_per_layer"][-1] < 0.3 * crops
    assert_one_line(run(photo, QUESTION, "--model", folder, "--pad"), "AnyRes pads its tiles")


def test_calibration_takes_the_crops_of_anyres_pictures_in_turn(
    run, families, tmp_path, monkeypatch
):
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        picture("RGB", (112, 112 + i)).save(tmp_path / "pictures" / f"{i}.png")
    seen = []
    monkeypatch.setattr(
        "extras.calibrate.find_thresholds",
        lambda tower, images, *_: seen.append(list(images)) or (1.0,) * 3,
    )
    assert run("--calibrate", tmp_path / "pictures", "--model", families / "llava_next")[0] == 0
    processor = load_processor(families / "llava_next")
    for i, crop in enumerate(seen[0]):
        crops = processor.image(tmp_path / "pictures" / f"{i}.png").crops
        assert len(crops) == 5 and torch.equal(crop, crops[i])


def test_a_tower_whose_first_patch_is_dropped(run, photo, tmp_path):
    """Whatever it is good for: a sparse config.json says so of SigLIP, and transformers does it."""
    folder = make(tmp_path / "model", vision=dict(model_type="siglip_vision_model"))
    argv = [photo, "Q", "--model", folder, "--max-new-tokens", 1]
    assert json.loads(run(*argv, "--json")[1])["virtual_tokens"] == 48
    assert run(*argv, "--method", "tome", "--tokens", "mid", "--show", tmp_path / "s.png")[0] == 0
    # what calibration counts is what the decoder gets
    (tmp_path / "pictures").mkdir()
    for n in range(4):
        picture("RGB", (40 + 9 * n, 60)).save(tmp_path / "pictures" / f"{n}.png")
    assert run("--calibrate", tmp_path / "pictures", "--model", folder)[0] == 0
    llava, processor = load(folder)
    for budget in ("low", "mid", "high"):
        one = json.loads((folder / "thresholds.json").read_text())[budget]
        settings = DyMU(thresholds=tuple(one["thresholds"]))
        shown = [processor.image(tmp_path / "pictures" / f"{n}.png") for n in range(4)]
        assert one["tokens_mean"] == sum(len(x) for x, _ in llava.encode(shown, settings)) / 4


def test_what_is_shown_is_what_the_model_sees(families):
    processor = load_processor(families / "llava_onevision")
    wide = Image.new("RGB", (160, 40), "red")
    shown = [[wide, wide], wide, wide]
    pixels = video.see(processor, shown)
    views = show.views_of(processor, shown)
    # frames are squeezed, pictures padded
    assert [view.size for view in views] == [(160, 40)] * 2 + [(160, 160)] * 2
    assert [type(one).__name__ for one in pixels] == ["Video", "Picture", "Picture"]


def test_the_picture_tells_frames_and_what_was_cropped(run, saved, gif, tmp_path, monkeypatch):
    told = []
    draw = show.draw
    monkeypatch.setattr(show, "draw", lambda *args: told.extend(args[3:5]) or draw(*args))
    Image.new("RGB", (400, 20)).save(tmp_path / "wide.png")
    argv = [gif, tmp_path / "wide.png", "Q", "--model", saved, "--max-new-tokens", 1]
    assert run(*argv, "--show", tmp_path / "shown.png")[0] == 0
    frames = len(read_frames(gif))
    assert told == [frames, "Cropped from 400 x 20. "] and frames > 1


def test_options_may_stand_before_the_question(run, saved, photo):
    assert run(photo, "--model", saved, "--max-new-tokens", 1, QUESTION)[0] == 0


def test_help_fits_one_screen(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "") and "examples:" in out
    assert len(out.splitlines()) <= 48 and max(map(len, out.splitlines())) <= 120


def test_the_script_by_itself_prints_no_warnings(saved, photo, tmp_path):
    (tmp_path / "junk.pth").write_bytes(pickle.dumps([1]))  # torch warns of it
    command = [sys.executable, "demo.py", photo, QUESTION]
    command += ["--model", saved, "--tokens", tmp_path / "junk.pth"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert_one_line((done.returncode, done.stdout, done.stderr), "plain tensors")


# ---- several questions, and the ways in which a command ends ----


def script(*argv, **options):
    command = [sys.executable, "demo.py", *map(str, argv)]
    options = dict(cwd=REPOSITORY, capture_output=True, text=True) | options
    return subprocess.run(command, **options)


TINY = ("tiny/sample.png", "--model", "tiny", "--device", "cpu", "--tokens", "low")
ASKED = ["what number is written?", "how many things are there?", "what word is written?"]


@pytest.mark.parametrize("options", [[], ["--vtu", "1"], ["--vtu", "off"], ["--expand-cache"]])
def test_questions_from_a_pipe_are_answered_as_alone(run, monkeypatch, options):
    alone = [json.loads(run(TINY[0], q, *TINY[1:], "--json", *options)[1]) for q in ASKED]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([ASKED[0], "", *ASKED[1:]])))
    status, out, err = run(*TINY, "--json", *options)
    reports = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [r["question"] for r in reports] == ASKED
    assert [r["answer"] for r in reports] == [r["answer"] for r in alone]
    assert [r["encoder_s"] > 0 for r in reports] == [True, False, False]
    assert reports[0]["reused"] == 0 < reports[1]["reused"]
    assert len({tuple(r["tokens_per_layer"]) for r in reports + alone}) == 1


def test_a_conversation_is_one_long_prompt(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(ASKED[1:])))
    status, out, err = run(TINY[0], ASKED[0], *TINY[1:], "--chat")
    llava, processor = load("tiny", "cpu")
    taus, _ = read_thresholds("low", processor.folder, processor.config)
    pixels = processor.image(TINY[0])
    turns = []
    for question in ASKED:
        ids = processor.prompt(question, pixels, turns)
        answer = processor.decode(llava.generate(ids, pixels, DyMU(thresholds=taus))).strip()
        turns.append((question, answer))
    assert (status, out.splitlines()) == (0, [answer for _, answer in turns])
    assert err.count("positions reused, encoder 0.00 s") == 2


def test_budgets_side_by_side_for_each_question(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(ASKED[:2])))
    _, out, _ = run(*TINY[:-1], "all")
    assert [line.split()[0] for line in out.splitlines()] == [
        *("tiny/sample.png:", "full", "high", "mid", "low") * 2
    ]


def test_no_question_at_all(run, monkeypatch):
    monkeypatch.setattr(demo, "load_model", None)  # it is said before a long load
    for text in ("", "\n \n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert_one_line(run(*TINY), "the question is missing")


def test_in_a_terminal_one_may_be_stopped_be_wrong_and_go_on(run, monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    said = ["what is <image>?", KeyboardInterrupt, "stop this", "  ", ASKED[1], EOFError]

    def typed(prompt):
        one = said.pop(0)
        if isinstance(one, type):
            raise one
        return one

    decode = Llava.decode
    stopped_at = []

    def decode_or_stop(self, *args, **options):
        for n, id in enumerate(decode(self, *args, **options)):
            if len(said) == 3 and n == len(stopped_at):  # before the first piece, or after it
                stopped_at.append(n)
                raise KeyboardInterrupt
            yield id

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(Llava, "decode", decode_or_stop)
    said.insert(0, ASKED[0])
    said.insert(3, "stop it at once")
    status, out, err = run(*TINY)
    alone = [run(TINY[0], q, *TINY[1:])[1] for q in (ASKED[0], ASKED[1])]
    assert status == 0 and said == []
    assert out.startswith(alone[0]) and out.endswith(alone[1] + "\n")
    assert "must not hold the image placeholder" in err and "demo.py: stopped" in err


@pytest.mark.parametrize("options", [[], ["--json", "--tokens", "all"]])
def test_an_interrupt_ends_an_answer_that_nobody_can_go_on_from(run, monkeypatch, options):
    def stopped(self, *args, **more):
        yield 300
        raise KeyboardInterrupt

    monkeypatch.setattr(Llava, "decode", stopped)
    monkeypatch.setattr(sys, "stdin", io.StringIO("what?\nwhy?"))
    for question in ([ASKED[0]], []):
        assert run(TINY[0], *question, *TINY[1:-1], "low", *options)[0] == 130


def test_inputs_behind_two_dashes_and_names_that_are_not_ascii(run, tmp_path, monkeypatch):
    picture("RGB", (60, 60)).save(tmp_path / "-dash.jpg")
    picture("RGB", (60, 60)).save(tmp_path / "bild ß.jpg")
    monkeypatch.chdir(tmp_path)
    argv = ("--model", "tiny", "--max-new-tokens", 2, "--json")
    assert run(*argv, "--", "-dash.jpg", "what?")[0] == 0
    name = tmp_path / "bild ß.jpg"
    done = script(
        name, "what?", *argv[:-1], "--tokens", "all", env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0 and "bild \\xdf.jpg: what?" in done.stdout


def test_version_and_help_do_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for argv, expected in ((["--version"], "dymu "), (["--help"], "examples:")):
        done = script(*argv, env=environment)
        assert done.returncode == 0 and expected in done.stdout
    assert "--frobnicate" in script("a.png", "what?", "--frobnicate", env=environment).stderr


@pytest.mark.parametrize("after", [0.3, 1.0])
def test_an_interrupt_is_silent(after):
    command = [sys.executable, "demo.py", *TINY, "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=-1, stderr=-1, text=True
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "")
    assert process.returncode == 130


def test_a_reader_who_goes_away_hears_nothing():
    head = f"{sys.executable} demo.py {' '.join(TINY[:-1])} all --json 2>&1 >&3 | cat >&2"
    command = f"{{ yes '{ASKED[0]}' | {head}; }} 3>&1 | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert json.loads(done.stdout)["tokens"] == "full" and done.stderr == ""


def test_what_cannot_be_written_is_told_before_the_work(run, folder, photo, tmp_path, monkeypatch):
    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)  # a mode of 555 does not stop root
    monkeypatch.setattr(demo, "load_model", None)
    monkeypatch.setattr(calibrate, "load_model", None)
    target = tmp_path / "a.png"
    assert_one_line(
        run(photo, QUESTION, "--model", folder, "--show", target),
        f"{target} cannot be written: Permission denied",
    )
    assert_one_line(
        run("--calibrate", tmp_path, "--model", folder),
        f"{folder}/thresholds.json cannot be written: Permission denied",
    )


def test_overwriting_thresholds_beside_the_checkpoint_is_noted(run, folder, tmp_path):
    (folder / "thresholds.json").write_text("{}")
    status, _, err = run("--calibrate", tmp_path, "--model", folder)
    assert status == 2 and "thresholds.json will be overwritten; --save FILE" in err
    assert (folder / "thresholds.json").read_text() == "{}"  # there were no pictures


def test_thresholds_that_cannot_be_written_after_all_are_printed(
    run, folder, tmp_path, monkeypatch
):
    (tmp_path / "pictures").mkdir()
    picture("RGB", (60, 60)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "film.mp4").write_text("")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    target = tmp_path / "t.json"
    argv = ("--calibrate", tmp_path / "pictures", "--model", folder, "--save", target)
    status, out, err = run(*argv)
    assert status == 2 and f"{target} cannot be written: No space left on device" in err
    assert len(json.loads(out[out.index("{") :])["low"]["thresholds"]) == 3
    assert "1 files that are no pictures were passed over" in err
    assert "1 pictures are few" in err


def test_a_16_bit_grey_picture_is_noted(run, saved, tmp_path):
    Image.new("I;16", (60, 60), 30000).save(tmp_path / "grey.png")
    argv = (QUESTION, "--model", saved, "--max-new-tokens", 2)
    assert "has 16 bits of grey" in run(tmp_path / "grey.png", *argv)[2]


def test_one_note_for_all_budgets(run, folder, photo):
    budgets = {name: {"thresholds": [0.5] * 3} for name in ("low", "mid", "high")}
    (folder / "thresholds.json").write_text(json.dumps(budgets | {"preprocessing": "crop"}))
    argv = (photo, QUESTION, "--model", folder, "--tokens", "all", "--pad", "--max-new-tokens", 2)
    assert run(*argv)[2].count("note: thresholds found with preprocessing") == 1


def test_memory_is_told_and_refused_only_if_it_cannot_fit(run, saved, photo, monkeypatch):
    argv = (photo, QUESTION, "--model", saved, "--max-new-tokens", 2, "--device", "cpu")
    monkeypatch.setattr("extras.devices.memory", lambda device: (10**8, 10**9))
    assert run(*argv)[0] == 0
    monkeypatch.setattr("extras.devices.memory", lambda device: (100, 1000))
    assert_one_line(run(*argv), "the weights take 0.0 GB, cpu has 0.0 GB")
    devices.announce_memory(2 * 10**9, 3 * 10**9)
    devices.announce_memory(10**8, 3 * 10**9)


# ---- bad input ----


def assert_one_line(result, message):
    status, out, err = result
    assert status == 2, (status, out, err)
    assert out == "" and err.startswith("demo.py: ")
    assert err.count("\n") == 1 and "Traceback" not in err
    assert message in err, err


def bad_pictures(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.jpg", quality=95)
    picture("RGB", (300, 300)).save(tmp_path / "noise.png")
    content = (tmp_path / "noise.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    Image.new("1", (2_000_000, 20)).save(tmp_path / "narrow.png")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.jpg", "No such file"),
        (".", "cannot be read"),
        ("truncated.png", "truncated.png' cannot be read: image file is truncated"),
        ("text.jpg", "cannot identify"),
        ("empty.png", "cannot identify"),
        ("bomb.png", "decompression bomb"),
        ("narrow.png", "too narrow to crop"),
        ("pipe", "it is not a file"),
    ],
)
def test_bad_picture(run, saved, tmp_path, name, message):
    assert_one_line(run(bad_pictures(tmp_path) / name, QUESTION, "--model", saved), message)


def test_a_picture_too_narrow_to_pad(run, saved, tmp_path):
    assert_one_line(
        run(bad_pictures(tmp_path) / "narrow.png", QUESTION, "--model", saved, "--pad"),
        "too narrow to pad",
    )


def test_bad_videos(run, saved, photo, gif, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    picture("RGB", (60, 60)).save(tmp_path / "one.gif")
    (tmp_path / "broken.gif").write_text("this is no video")
    (tmp_path / "film.mp4").write_text("nor is this")
    for name, message in (
        ("one.gif", "it has 1 frame, a video has two or more"),
        ("folder", "it has 0 frames, a video"),
        ("broken.gif", "cannot identify"),
        ("missing.gif", "No such file"),
        ("film.mp4", "cannot be read"),
    ):
        assert_one_line(run(tmp_path / name, "what happens?", "--model", saved), message)
    os.mkfifo(tmp_path / "pipe.gif")
    for name in ("pipe.gif", "missing.mp4"):
        assert_one_line(run(tmp_path / name, "Q", "--model", saved), "No such file or folder")
    monkeypatch.setitem(sys.modules, "av", None)
    assert_one_line(
        run(tmp_path / "film.mp4", "Q", "--model", saved), "needs PyAV: pip install -e '.[video]'"
    )
    assert_one_line(run(gif, "Q", "--model", saved, "--frames", 0), "--frames: 0 is not at least 1")
    assert_one_line(
        run(gif, "Q", "--model", saved, "--after", 1.5), "--after: 1.5 is not from -1 to 1"
    )
    assert_one_line(run(gif, "Q", "--model", saved, "--after", "often"), "often")


def test_more_pictures_than_positions(run, saved, photo, monkeypatch):
    message = "the prompt takes 2212 positions, the model has 2048: fewer pictures or frames"
    pictures = [photo] * 129
    monkeypatch.setattr(demo, "load_model", None)  # it is said before a long load
    assert_one_line(run(*pictures, "Q", "--model", saved), message)


def test_unreadable_picture(run, saved, photo, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", denied)  # a mode of 000 does not stop root
    assert_one_line(run(photo, QUESTION, "--model", saved), "Permission denied")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["", "Q"], "the name of a picture is empty"),
        (["https://example.org/a.jpg", "Q"], "is a URL"),
        (["PHOTO", "Q", "--save", "a.json"], "--save goes with --calibrate"),
        (["PHOTO", "no-such.png"], "no-such.png is no question, and there is no such file"),
        (["--calibrate", ""], "'' is not a folder"),
        (["PHOTO", "Q", "--enough"], "--enough goes with --calibrate"),
        (["PHOTO", "Q", "--schedule", "linear"], "--schedule goes with --calibrate"),
        (["--calibrate", ".", "--schedule", "late"], "--schedule: invalid choice: 'late'"),
        (["--calibrate", ".", "--expand-cache"], "--expand-cache goes not with --calibrate"),
        (["--calibrate", ".", "--tokens", "low"], "--tokens goes not with --calibrate"),
        (["PHOTO", "--show", "a.png"], "--show needs one question"),
        (["PHOTO", "Q", "--chat", "--show", "a.png"], "--show needs one question"),
        (["PHOTO", "Q", "--seed", "9" * 23], "--seed"),
        *((["PHOTO", "Q", "--cap", k], "--cap: ") for k in ("0", "-1", "1.5", "few")),
        (["--calibrate", ".", "--cap", "9"], "--cap goes not with --calibrate"),
        (["--calibrate", ".", "--box", "0,0,9,9"], "--box goes not with --calibrate"),
        (["PHOTO", "Q", "--box", "0,0,9,9"], "--box and --mask go with fewer --tokens than full"),
        (["PHOTO", "Q", "--mask", "m.png"], "--box and --mask go with fewer --tokens than full"),
        (["PHOTO", "Q", "--outside", "0.5"], "--outside goes with --box or --mask"),
        (["PHOTO", "Q", "--outside", "none"], "--outside goes with --box or --mask"),
        *(
            (["PHOTO", "Q", "--after", "0.9", *region], message)
            for region, message in (
                (["--box", "9,9,0,0"], "--box: 9,9,0,0 is empty: x0 < x1 and y0 < y1"),
                (["--box", "0,9,9,9"], "--box: 0,9,9,9 is empty"),
                (["--box", "0,0,9"], "--box: 0,0,9 is not x0,y0,x1,y1"),
                (["--box", "0,0,nan,9"], "is not x0,y0,x1,y1"),
                (["--box", "0,0,a,9"], "--box: invalid box value: '0,0,a,9'"),
                (["--box", ""], "--box: invalid box value: ''"),
                (["--box", "0:0,0,9,9"], "--box: invalid box value"),
                (["--box", "2:0,0,9,9"], "a --box or --mask is of picture 2, 1 are given"),
                (["--mask", "2:m.png"], "a --box or --mask is of picture 2, 1 are given"),
                (["--box", "2:0,0,5,5", "--mask", "2:m.png"], "is of picture 2, 1 are given"),
                (["--box", f"0,0,1,{'9' * 400}"], "99 is not x0,y0,x1,y1"),
                (["--box", f"0,0,1,{'9' * 5000}"], "invalid box value"),
                (["--box", "-3,0,50,50"], "--box: expected one argument: what begins with - goes"),
                (["--box", "99,0,1e300,9"], "--box 99,0,1e+300,9 lies outside"),
                (["--box", "90,0,99,9"], "--box 90,0,99,9 lies outside the picture, which is 90"),
                (["--box=-9,0,0,9"], "--box -9,0,0,9 lies outside"),
                (["--box", "0,0,9,60"], "nothing of --box 0,0,9,60 is in what the model sees"),
                (["--mask", "m.png"], "picture 'm.png' cannot be read"),
                (["--mask", ""], "cannot be read"),
                (["--box", "30,0,60,60", "--outside", "2"], "--outside: 2 is not from -1 to 1"),
                (["--box", "30,0,60,60", "--outside", "far"], "--outside: "),
                (["--box", "30,0,60,60", "--cap", "1"], "--cap 1 cannot be kept: 2 tokens are"),
            )
        ),
        (["PHOTO", "Q", "--device", "gpu"], "device 'gpu' is not cuda, mps, cpu"),
        pytest.param(
            ["PHOTO", "Q", "--device", "mps"],
            "there is no mps here",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one"),
        ),
        (["PHOTO", "Q", "--calibrate", "."], "--calibrate takes a folder alone"),
        (["--json"], "IMAGE and QUESTION are needed"),
        (["PHOTO", ""], "question is empty"),
        (["PHOTO", "  "], "question is empty"),
        (["PHOTO", "why " * 700], "positions, the model has 2048"),
        (["PHOTO", "is <image> here?"], "image placeholder"),
        (["PHOTO", "Q", "--device", "abacus"], "'abacus'"),
        (["PHOTO", "Q", "--device", "meta"], "'meta' cannot be used"),
        pytest.param(
            ["PHOTO", "Q", "--device", "cuda"],
            "'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["PHOTO", "Q", "--dtype", "int4"], "'int4'"),
        (["PHOTO", "Q", "--vtu", "0"], "--vtu: 0 is not auto, all, off or a number"),
        (["PHOTO", "Q", "--vtu", "some"], "--vtu: some is not auto, all, off or a number"),
        (["PHOTO", "Q", "--method", "magic"], "magic"),
        (["PHOTO", "Q", "--frobnicate"], "--frobnicate"),
        (["PHOTO", "Q", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["PHOTO", "Q", "--max-new-tokens", "many"], "many"),
        *(
            (["PHOTO", "Q", "--temperature", t], "--temperature")
            for t in ("-1", "nan", "inf", "1e-45", "warm")
        ),
        *((["PHOTO", "Q", "--threads", t], "--threads") for t in ("0", "1000000", "all")),
        (["PHOTO", "Q", "--vtu", "99999999999999999999"], "--vtu"),
        (["PHOTO", "Q", "--show", "no/where.png"], "cannot be written"),
        (["PHOTO", "Q", "--show", "a.htm"], "--show: a.htm is not a .png or .html file"),
        (["PHOTO", "Q", "--show", "no/where.html"], "cannot be written"),
        (["PHOTO", "--show", "a.html"], "--show needs one question"),
        (["PHOTO", "Q", "--show", "."], "--show: . is not a .png or .html file"),
        (["PHOTO", "Q", "--show", "/dev/null"], "is not a .png or .html file"),
        (
            ["PHOTO", "Q", "--tokens", "tiny"],
            "none of full, low, mid, high, tight, tightest and all, and not a file",
        ),
        (["PHOTO", "Q", "--tokens", "low"], "python demo.py --calibrate IMAGES_FOLDER --model"),
        (["PHOTO", "Q", "--tokens", "x.json", "--method", "tome"], "--method tome takes"),
    ],
)
def test_bad_arguments(run, saved, photo, argv, message):
    argv = [str(photo) if a == "PHOTO" else a for a in argv]
    assert_one_line(run(*argv, "--model", saved), message)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[0.5, 0.5]", "2 thresholds given, the vision tower runs 3 of its 4 layers"),
        ("[0.5, 0.5, 1.5]", "numbers from -1 to 1"),
        ("[0.5, 0.5, NaN]", "numbers from -1 to 1"),
        ('[0.5, 0.5, "0.5"]', "numbers from -1 to 1"),
        ("[0.5, 0.5, true]", "numbers from -1 to 1"),
        ('{"low": {"thresholds": 0.5}}', "numbers from -1 to 1"),
        ('{"a": 1}', "numbers from -1 to 1"),
        ("[" * 100_000, "not readable as JSON"),
        ("[0.5, 0.5,", "not readable as JSON"),
        ("0.5", "not an object"),
        ("\0\1\2", "not readable as JSON"),
    ],
)
def test_bad_thresholds(run, saved, photo, tmp_path, content, message):
    (tmp_path / "t.json").write_text(content)
    assert_one_line(
        run(photo, QUESTION, "--model", saved, "--tokens", tmp_path / "t.json"), message
    )


@pytest.mark.filterwarnings("ignore:Detected pickle")
def test_bad_thresholds_in_a_pth(run, saved, photo, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code was run",))

    torch.save({"a.0.threshold": Evil()}, tmp_path / "evil.pth")
    torch.save({"weight": torch.ones(2)}, tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a.0.threshold": None, 3: 4}, tmp_path / "odd.pth")
    (tmp_path / "junk.pth").write_bytes(pickle.dumps([1])[:5])
    for name, message in (
        ("evil", "plain tensors"),
        ("none", "0 thresholds given"),
        ("junk", "plain"),
        ("list", "plain"),
        ("odd", "plain"),
    ):
        assert_one_line(
            run(photo, QUESTION, "--model", saved, "--tokens", tmp_path / f"{name}.pth"), message
        )


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def index(shard):
    def break_it(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        shards = {"a": "model-00001-of-00002.safetensors", "b": shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    return break_it


def weights(change):
    def break_it(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return break_it


def config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


NORM = "language_model.model.norm.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "model_type": (config(model_type="blip"), "model_type 'blip' is not implemented, only 'llava'"),
    "vision model_type": (
        config(vision_config__model_type="vit_mae"),
        "'vit_mae' is not implemented",
    ),
    "text model_type": (
        config(text_config__model_type="mamba"),
        "'mamba' is not implemented, only 'llama'",
    ),
    "rope_type": (
        config(text_config__rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        "rope_type 'yarn'",
    ),
    "old rope_scaling": (
        config(text_config__rope_scaling={"type": "linear"}, text_config__rope_parameters=None),
        "'linear'",
    ),
    "activation": (
        config(vision_config__hidden_act="mish"),
        "hidden_act 'mish' is not implemented",
    ),
    "text activation": (config(text_config__hidden_act="relu6"), "text hidden_act 'relu6'"),
    "projector activation": (config(projector_hidden_act="tanh"), "projector_hidden_act 'tanh'"),
    "zero": (config(text_config__hidden_size=0), "hidden_size is 0"),
    "no number": (
        config(text_config__hidden_size="x"),
        "'hidden_size' expected int, got str (value: 'x')",
    ),
    "not whole": (
        config(vision_config__patch_size=14.0),
        "'patch_size' expected int, got float (value: 14.0)",
    ),
    "infinite": (config(text_config__rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
    "endless layers": (
        config(text_config__num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000",
    ),
    "heads": (config(vision_config__num_attention_heads=5), "hidden_size % num_attention_heads 3"),
    "kv heads": (
        config(text_config__num_key_value_heads=3),
        "num_attention_heads % num_key_value_heads 1",
    ),
    "no object": (config(text_config=[1]), "text_config is [1], not an object"),
    "no rope": (config(text_config__rope_parameters="x"), "rope_parameters is 'x', not an object"),
    "eos": (lambda f: edit(f / "generation_config.json", eos_token_id="x"), "eos_token_id"),
    "dtype": (config(dtype="float8"), "dtype 'float8'"),
    **{
        f"preprocessing {key} {value}": (
            lambda f, key=key, value=value: edit(
                f / "processor_config.json", **{f"image_processor__{key}": value}
            ),
            "preprocessor_config.json cannot be followed",
        )
        for key, value in (
            ("size", "x"),
            ("size", {}),
            ("crop_size", 10**6),
            ("image_mean", [1]),
            ("image_std", [0] * 3),
        )
    },
    "preprocessor": (
        lambda f: edit(f / "processor_config.json", image_processor=5),
        "cannot be followed",
    ),
    "layer": (config(vision_feature_layer=-9), "vision_feature_layer -9"),
    "layers": (
        config(vision_feature_layer=[-2, -5]),
        "'vision_feature_layer' expected int, got tuple",
    ),
    "strategy": (config(vision_feature_select_strategy="cls"), "'cls'"),
    "pickle only": (only_pickle, "pytorch_model.bin is a pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated safetensors": (truncated, "not a whole safetensors file"),
    "empty safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "not a whole safetensors file",
    ),
    "missing shard": (
        index("model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors is missing",
    ),
    "shard elsewhere": (
        index("../elsewhere.safetensors"),
        "'../elsewhere.safetensors' points outside the folder",
    ),
    "index": (index(["a list"]), "weight_map is missing or malformed"),
    "missing tensor": (
        weights(lambda t: t.pop(NORM)),
        'Missing key(s) in state_dict: "language_model.norm.weight"',
    ),
    "extra tensor": (
        weights(lambda t: t.update(odd=torch.ones(1))),
        'Unexpected key(s) in state_dict: "odd"',
    ),
    "tensor twice": (weights(lambda t: t.update({f"model.{NORM}": t[NORM] + 1})), "is there twice"),
    "misshapen tensor": (
        weights(lambda t: t.update({NORM: torch.ones(65)})),
        "size mismatch for language_model.norm.weight",
    ),
    "quantised tensor": (
        weights(lambda t: t.update({NORM: torch.ones(64).to(torch.int8)})),
        "is I8; quantised",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json cannot be read"),
    "no image token": (
        config(image_token_index=12),
        "the id of <image> is 259, config.json says 12",
    ),
    "chat template": (
        lambda f: (f / "chat_template.jinja").write_text("### {{ m }}"),
        "chat template not recognised",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_checkpoint(run, folder, photo, case):
    break_it, message = BROKEN[case]
    break_it(folder)
    assert_one_line(run(photo, QUESTION, "--model", folder), message)


@pytest.mark.parametrize(
    "model, message",
    [("no/such-model", "not to be had from the Hub"), ("./nowhere", "neither a folder")],
)
def test_unknown_model_without_a_network(run, photo, tmp_path, monkeypatch, model, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_one_line(run(photo, QUESTION, "--model", model), message)
