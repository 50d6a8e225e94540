"""The README is true: its files, line counts, functions, tests, commands, outputs and tables."""

import contextlib
import importlib
import json
import re
from pathlib import Path

import pytest
import tomllib

import demo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TESTS = "".join(f.read_text() for f in (ROOT / "tests").glob("test_*.py"))


def test_files_exist_and_line_counts_hold():
    rows = re.findall(r"^\| `([\w./]+)` \| (\d*) \|", README, re.M)
    assert {name for name, _ in rows} >= {f.name for f in ROOT.glob("*.py")}
    for name, lines in rows:
        assert (ROOT / name).exists(), name
        if lines:
            assert len((ROOT / name).read_text().splitlines()) == int(lines), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_equation_names_a_function_and_a_test_that_exist():
    rows = re.findall(r"^\| .+ \| `([\w.]+)` \| `(test_\w+)` \|$", README, re.M)
    modules = [importlib.import_module(name) for name in ("dymu", "model")]
    assert len(rows) >= 10
    for function, test in rows:
        owner, *attribute = function.split(".")
        assert any(hasattr(m, owner) and all(hasattr(getattr(m, owner), a) for a in attribute) for m in modules), (
            function
        )
        assert f"def {test}(" in TESTS, test


def test_the_two_commands_are_those_of_ci_and_the_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "pip install -e . && python demo.py\n" in README
    assert "pip install -e '.[test]' && pytest\n" in README
    assert "-e '.[test]' && pytest" in (ROOT / ".ci" / "run").read_text()
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert extra in project["project"]["optional-dependencies"]


def without_times(text):
    return re.sub(r" +\d+ ms", " # ms", text).split()


def test_the_output_of_the_first_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo.main([])
    shown = re.search(r"python demo\.py\n```.*?```\n(.*?)```", README, re.S)[1]
    got = capsys.readouterr().out.replace(f"{ROOT}/", "")
    assert without_times(got) == without_times(shown)


def test_the_python_example_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_options_that_are_named_exist(capsys):
    options = set(re.findall(r"`?(--[a-z][a-z-]+)", README)) - {"--full", "--shape", "--nproc-per-node"}
    help_text = demo_help(capsys)
    assert all(option in help_text for option in options), options


def demo_help(capsys):
    with contextlib.suppress(SystemExit):
        demo.main(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name, file", [("ablate", "ablate"), ("bench", "bench-tiny-llava"), ("bench", "bench-long")])
def test_tables_are_those_of_the_json(name, file):
    table = importlib.import_module(f"lab.{name}").table
    assert table(json.loads((ROOT / "lab" / f"{file}.json").read_text())) in README
