"""The commands behind the README's tables run, and count what they say they count."""

import json
import sys

from dymu import DyMU
from lab import ablate, bench
from lab.scenes import HELD_OUT, scene
from load import find, load


def test_ablations_count_the_tokens_of_the_picture():
    llava, processor = load("tiny")
    settings = {
        "full": DyMU(),
        "ToMe": DyMU(r=(30,) * 7),
        "ToMe, no VTU": DyMU(r=(30,) * 7, vtu=False),
    }
    found = ablate.examine(find("tiny"), settings, HELD_OUT)
    assert found["tokens"] == {"full": 256, "ToMe": 46, "ToMe, no VTU": 46}
    questions = [question for _, question, _ in scene(HELD_OUT).questions]
    assert [len(right) for right in found["right"].values()] == [len(questions)] * 3


def test_the_benchmark_counts_the_rows_of_the_decoder(tmp_path, monkeypatch, capsys):
    argv = "bench --shape smoke --tokens low --vtu all --repeats 1 "
    argv += "--dtype float32 --device cpu --threads 1 --save"
    monkeypatch.setattr(sys, "argv", [*argv.split(" "), str(tmp_path / "b.json")])
    bench.main()
    runs = json.loads((tmp_path / "b.json").read_text())["runs"]
    assert {name: run[0]["rows"] for name, run in runs.items()} == {
        "transformers": 576,
        "low, `all`": 93,
        "low, `all`, expanded cache": 93,
    }
    assert "| low, `all` | 93 |" in capsys.readouterr().out
