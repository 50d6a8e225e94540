"""The commands behind the README's tables run, and count what they say they count."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from dymu import DyMU
from extras.anyres import AnyResConfig, Picture, positions
from extras.families import NEXT, ONEVISION
from extras.thresholds import schedule
from extras.video import OneVisionConfig
from lab import ablate, bench, control, pages, schedules
from lab.scenes import HELD_OUT, scene
from lab.shapes import PHOTO, SHAPES
from lab.tables import bracket, spread
from load import find, load
from model import VisionConfig

EASY = [("a.png", [("easy-VQA", "is there a circle?", "yes")])] * 4  # as ablate.easy_list


def test_ablations_count_the_tokens_of_the_picture():
    llava, processor = load("tiny")
    settings = {
        "full": DyMU(),
        "ToMe": DyMU(r=(30,) * 7),
        "ToMe, no VTU": DyMU(r=(30,) * 7, vtu=False),
    }
    found = ablate.examine(find("tiny"), settings, "scenes", HELD_OUT)
    assert found["tokens"] == {"full": 256, "ToMe": 46, "ToMe, no VTU": 46}
    questions = [question for _, question, _ in scene(HELD_OUT).questions]
    assert [len(right) for right in found["right"].values()] == [len(questions)] * 3


@pytest.mark.parametrize(
    "which, number",
    [("scenes", HELD_OUT), ("easy-VQA", 3), ("small text", HELD_OUT), ("crowded", HELD_OUT)],
)
def test_ablations_ask_each_set_and_know_what_would_be_answered(which, number):
    if which == "easy-VQA":
        picture, _ = ablate.easy_list("test")[number]
    else:
        picture = scene(number, variant=ablate.VARIANT[which]).image

    llava, processor = load("tiny")
    r = ablate.merges(llava.config, "10 %", "linear")
    settings = {"full": DyMU(), "ToMe": DyMU(r=r), "ToMe, no VTU": DyMU(r=r, vtu=False)}
    found = ablate.examine(find("tiny"), settings, which, number)
    assert found["tokens"] == {"full": 256, "ToMe": 26, "ToMe, no VTU": 26}

    _, kinds = ablate.COLUMNS[which]
    assert {kind for kind, _, _ in found["questions"]} <= set(kinds)

    # a forward pass tells what generation would say
    pixels = processor.image(picture)
    for name, one in settings.items():
        said = []
        for _, question, answer in found["questions"]:
            ids = llava.generate(processor.prompt(question), pixels, one)
            said.append(processor.decode(ids).strip() == answer)
        assert found["right"][name] == said


@pytest.mark.parametrize("kind", ["constant", "linear", "reverse_linear"])
@pytest.mark.parametrize("budget, left", [("low", 41), ("10 %", 26), ("5 %", 13)])
def test_every_schedule_leaves_the_tokens_of_the_budget(budget, left, kind):
    llava, processor = load("tiny")
    pixels = processor.image(scene(HELD_OUT).image)
    r = ablate.merges(llava.config, budget, kind)
    assert len(llava.vision_tower(pixels, DyMU(r=r))[0]) == left

    # and what the plain one would leave is what it does leave
    plain = schedule(256 - left, len(r), kind)
    plainly = len(llava.vision_tower(pixels, DyMU(r=plain))[0])
    assert plainly == ablate.left_by(llava.config, plain)


def as_if_measured(rows, right, bytes_per_pixel):
    """What ablations find in 4 pictures of each set. right: whether a row answers rightly"""
    found = {}
    for which in ablate.SETS:
        if which == "easy-VQA":
            asked = [questions for _, questions in EASY]
        else:
            variant = ablate.VARIANT[which]
            asked = [scene(HELD_OUT + i, variant=variant).questions for i in range(4)]
        found[which] = [
            {
                "questions": questions,
                "bytes_per_pixel": bytes_per_pixel(i),
                "tokens": {name: 10 + i for name in rows},
                "right": {name: [right(name)] * len(questions) for name in rows},
            }
            for i, questions in enumerate(asked)
        ]
    return found


def test_tables_of_ablations_have_all_columns_and_budgets(monkeypatch):
    monkeypatch.setattr(ablate, "BLIND_SCENES", 20)
    monkeypatch.setattr("lab.tables.RESAMPLES", 10)
    monkeypatch.setattr(ablate, "easy_list", lambda split: EASY)
    names = ["full", *ablate.OTHERS]
    for budget in ablate.SHARES:
        for vtu in ablate.VTU:
            names += [f"ToMe {budget}, {vtu}", f"DToMe {budget}, {vtu}"]

    found = as_if_measured(names, lambda name: "no VTU" not in name, lambda i: i)
    results = ablate.summarise(found, names)
    assert results["asked"]["small text"] == sum(len(p["questions"]) for p in found["small text"])
    assert results["rows"]["full"]["accuracy"]["crowded counting"] == [100, 100, 100]
    for which in ablate.VARIANT:
        pairs = results["pairs"][which]
        assert pairs["DToMe, VTU: minus ToMe, VTU"]["5 %"] == [0, 0, 0]
        assert pairs["DToMe: VTU minus no VTU"]["10 %"] == [100, 100, 100]
    assert results["spearman"] == {"low": 1, "10 %": 1, "5 %": 1}

    results["pictures"] = {which: len(pictures) for which, pictures in found.items()}
    config = load("tiny")[0].config
    results["tokens_left"] = {b: ablate.tokens_left(config, b) for b in ablate.SHARES}
    results["left_by_plain_schedules"] = ablate.left_by_plain_schedules(config)
    assert list(results["tokens_left"].values()) == [174, 92, 41, 26, 13]
    tables = re.findall(r"(?:^\|.*\|\n)+", ablate.table(results) + "\n", re.M)
    widths = [{row.count("|") - 2 for row in one.splitlines()} for one in tables]
    assert widths == [{8}, {11}, {5}, {5}, {5}, {3}, {3}]
    assert all(f"| {name} |" in tables[0] and f"| {name} |" in tables[1] for name in names)
    assert ablate.small_table(results).count("\n") == 2 + 5 - 1


def test_taus_leave_a_tenth_and_a_twentieth_of_the_tokens(monkeypatch):
    monkeypatch.setattr(control, "TAU_SEEDS", range(6))
    llava, processor = load("tiny")
    first = DyMU(r=(10,) * 7)
    taus = control.taus_behind(find("tiny"), first)
    assert len(taus) == len(control.FEW)
    for tau, budget in zip(taus, control.FEW):
        second = replace(first, after=control.second_stage(tau))
        pictures = [processor.image(scene(seed).image) for seed in control.TAU_SEEDS]
        counts = [len(llava.encode(pixels, second)[0][0]) for pixels in pictures]
        wanted = 256 * ablate.SHARES[budget]
        assert len(set(counts)) > 1 and abs(sum(counts) / 6 - wanted) <= 1


def test_controls_are_compared_with_their_own_full_length(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("lab.tables.RESAMPLES", 10)
    names = [control.FULL, "mid, then 5 %", "mid, then 5 %, no VTU"]

    # of two models: at full length the second has half, and the last row costs both all they have
    models = {}
    for model, share in (("tiny", 1), ("other", 0.5)):
        pictures = []
        for seed in range(4):
            questions = scene(HELD_OUT + seed).questions[:4]
            right = [i < 4 * share for i in range(4)]
            pictures.append(
                {
                    "questions": questions,
                    "tokens": {name: 10 + seed for name in names},
                    "right": dict(zip(names, (right, right, [False] * 4))),
                }
            )
        models[model] = dict(questions=16, rows=control.summarise(pictures, names))
    assert models["other"]["rows"]["mid, then 5 %"]["accuracy"] == [50, 50, 50]
    assert models["other"]["rows"]["mid, then 5 %"]["minus_full"] == [0, 0, 0]

    file = tmp_path / "control.json"
    file.write_text(json.dumps(dict(scenes=4, models=models)))
    monkeypatch.setattr(sys, "argv", ["control", "--render", "--save", str(file)])
    control.main()
    *_, last = capsys.readouterr().out.splitlines()
    all_lost = ("-100.0 [-100.0, -100.0]", "-50.0 [-50.0, -50.0]")
    cells = " | ".join(f"11.5 ± 1.1 | {lost}" for lost in all_lost)
    assert last == f"| mid, then 5 %, no VTU | {cells} |"


@pytest.mark.parametrize(
    "arguments, why",
    [
        ("--render --save {}/none.json", "there is no"),
        ("--control {} --save {}/new.json", "has no config.json"),
        ("--n 0", "--n must be at least 1"),
    ],
)
def test_controls_say_at_once_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, why):
    argv = ["control", *arguments.replace("{}", str(tmp_path)).split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        control.main()
    assert stop.value.code == 2
    assert why in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def run_benchmark(monkeypatch, file, options: str) -> dict:
    argv = f"bench --repeats 1 --dtype float32 --device cpu --threads 1 --save {file} {options}"
    monkeypatch.setattr(sys, "argv", argv.split())
    bench.main()
    return json.loads(file.read_text())


def test_the_benchmark_counts_the_rows_of_the_decoder(tmp_path, monkeypatch, capsys):
    options = "--shape smoke --tokens low tight tightest --vtu all off"
    runs = run_benchmark(monkeypatch, tmp_path / "b.json", options)["runs"]
    assert {name: run[0]["rows"] for name, run in runs.items()} == {
        "transformers": 576,
        "low, `all`": 93,
        "low, `off`": 93,
        "low, `all`, expanded cache": 93,
        "tight, `all`": 58,
        "tight, `off`": 58,
        "tightest, `all`": 29,
        "tightest, `off`": 29,
    }
    for name, (run, *_) in runs.items():
        spent = run.get("second_stage", 0)
        assert spent < run["encoder"] and (spent > 0) == name.startswith("tight"), name
    printed = capsys.readouterr().out
    assert "| low, `all` | 93 |" in printed
    assert re.search(r"second stage takes \S+ ms at tightest, .* with `all` \S+ %, `off`", printed)


# the whole, 6 x 6, and tiles that were resized to 15 x 20, with newlines; or 3 x 3 of each frame
SEEN = {"": (36 + 15 * 21, 15), "--frames 4": (4 * 9 + 1, 1)}


@pytest.mark.parametrize("frames", SEEN)
def test_the_benchmark_shows_tiles_and_frames(frames, tmp_path, monkeypatch, capsys):
    N, newlines = SEEN[frames]
    rounds = "--repeats 0" if frames else ""
    options = f"--shape smoke-onevision {frames} --tokens full tight --vtu 1 {rounds}"
    found = run_benchmark(monkeypatch, tmp_path / "b.json", options)
    first = {name: run[0] for name, run in found["runs"].items()}
    assert found["visual_tokens"] == first["transformers"]["rows"] == first["full"]["rows"] == N
    assert first["tight, `1`"]["rows"] == round(0.1 * (N - newlines)) + 1

    # both hold the same at full length, and text alike
    assert first["full"]["cache"] == first["transformers"]["cache"]
    merged = first["full"]["cache"] - first["tight, `1`"]["cache"]
    assert merged == (N - first["tight, `1`"]["rows"]) * found["cache_per_row"]
    assert found["pixel_difference"] == 0 and found["logit_correlation"] > 0.999
    what = "4 frames of 1280 x 960" if frames else "a 1280 x 960 photo"
    printed = capsys.readouterr().out
    assert f"Preprocessing of {what}: " in printed
    assert ("in one round; " if frames else "in one round, after one to warm up; ") in printed
    assert first["tight, `1`"]["first"] > 0 and "prefill" in found["peak_bytes"]["full"]


def test_the_curve_of_the_benchmark(tmp_path, monkeypatch, capsys):
    coarse = dict(patch_size=56)
    small = replace(SHAPES["smoke"], vision=SHAPES["smoke"].vision | coarse)
    monkeypatch.setitem(SHAPES, "smoke", small)
    families = {166: ("llava_next", 1), 351: ("llava_onevision", 1)}
    monkeypatch.setattr(bench, "CURVE", {36: ("llava", 1), 72: ("llava", 2)} | families)
    file = tmp_path / "c.json"
    found = run_benchmark(monkeypatch, file, "--shape smoke --vtu all off --curve 72 166 351")
    assert list(found["curve"]) == ["72", "166", "351"]

    first, *_ = found["curve"]["72"]["runs"]["transformers"]
    assert first["first"] == first["preprocess"] + first["encoder"] + first["prefill"]
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.count("|") - 1 for row in rows] == [8] * 3
    assert rows[0].startswith("| 72 | 2 photos of 1280 x 960, LLaVA-1.5 | 12 | ")
    assert f" | {spread([first['first']])} | " in rows[0]
    drawn = file.with_suffix(".svg").read_text()
    assert drawn.startswith("<?xml") and drawn.count("<use") > 15


@pytest.mark.parametrize("N, defaults", [(2340, NEXT), (7309, ONEVISION)])
def test_the_curve_of_the_benchmark_knows_how_many_tokens_there_are(N, defaults):
    tower = dict(image_size=336) if defaults is NEXT else dict(image_size=384, class_token=False)
    grids = tuple(map(tuple, defaults["image_grid_pinpoints"]))
    options = dict(vision_config=VisionConfig(**tower, patch_size=14), image_grid_pinpoints=grids)
    if defaults is NEXT:
        c = AnyResConfig(**options)
    else:
        c = OneVisionConfig(**options, vision_feature_select_strategy="full")
    width, height = PHOTO
    assert positions(Picture(None, (height, width)), c) == N and N in bench.CURVE


@pytest.mark.parametrize(
    "options, said",
    [
        ("--shape tiny-llava --frames 8", "--frames is for"),
        ("--shape smoke-onevision --frames 8 --curve", "--frames is for"),
        ("--shape long --curve", "--curve needs"),
        ("--shape smoke --repeats -1", "at least 0"),
        ("--shape long --repeats 0", "--shape long needs"),
        ("--shape smoke --curve 577", "577"),
    ],
)
def test_the_benchmark_says_what_is_wrong(options, said, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_benchmark(monkeypatch, tmp_path / "b.json", options)
    assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.10, 0.05])
def test_the_second_stage_of_the_benchmark_matches_and_reaches_its_share(share, monkeypatch):
    seen = []

    def most_alike(x):
        seen.append(len(x))
        return real(x)

    real = bench.most_alike
    monkeypatch.setattr(bench, "most_alike", most_alike)
    token_at = torch.arange(576) % 208
    x, at = bench.leaving(share)(torch.randn(208, 8), token_at)
    assert len(x) == round(share * 576) == at.max() + 1
    assert seen[:2] == [208, 208 - (208 - len(x) + 1) // 2]
    assert seen[-2:] == [len(x)] * 2 and len(seen) == 10


def test_schedules_are_timed_beside_what_they_cost(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(schedules, "TOWERS", dict(CLIP="smoke", SigLIP="smoke-onevision"))
    options = ["--repeats", "2", "--threads", "1", "--save", str(tmp_path / "s.json")]
    schedules.main(options)
    head, _, *rows = capsys.readouterr().out.splitlines()[2:]
    budgets = [f"{budget}, {kind}" for budget in ("low", "10 %") for kind in schedules.SCHEDULES]
    assert [row.split(" | ")[0] for row in rows] == [
        f"| {name.replace('_', ' ')}" for name in ("full", *budgets)
    ]
    assert {row.count("|") for row in (head, *rows)} == {7}
    shown = (schedules.Path(schedules.__file__).with_name("ablate.json")).read_text()
    linear = json.loads(shown)["rows"]["DToMe low, VTU, linear schedule"]["accuracy"]["scenes"]
    assert rows[2].endswith(f"| {bracket(linear)} |")
    runs = json.loads((tmp_path / "s.json").read_text())["runs"]
    assert all(len(times) == 2 for of in runs.values() for times in of.values())


def test_pages_are_timed(monkeypatch, tmp_path, capsys):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    monkeypatch.setattr(pages, "SHOWN", {"tiles": ("smoke-onevision", 2, 1, 0)})
    file = tmp_path / "pages.json"
    argv = ["--dtype", "float32", "--device", "cpu", "--threads", "1", "--save", str(file)]
    if pages.chromium() is None:
        with pytest.raises(SystemExit):
            pages.main(argv)
        assert "there is no Chromium" in capsys.readouterr().err
        return
    pages.main(argv)
    (one,) = json.loads(file.read_text())["pages"].values()
    assert one["positions"] == 36 + 15 * 21
    assert one["bytes"] > pages.page.TEMPLATE.stat().st_size and len(one["steps"]) >= 8
    assert capsys.readouterr().out.count("| tiles | 351 |") == 1
