"""walkthrough.ipynb runs from top to bottom, shows what it gives, and leaves no equation out."""

import os
import re

import nbformat
import pytest

from lab import lesson

STORED = nbformat.read(lesson.FILE, as_version=4).cells


def text(cell) -> str:
    """What a code cell shows, without its pictures. Times are those of the machine."""
    shown = []
    for output in cell.get("outputs", []):
        is_stream = output.output_type == "stream"
        shown.append(output.text if is_stream else output.data["text/plain"])
    return re.sub(r" +[\d.]+ ms", " # ms", "".join(shown))


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def test_it_runs_in_a_fresh_kernel_and_shows_what_is_stored():
    notebook = lesson.executed()
    assert len(notebook.cells) == len(STORED)
    for cell, stored in zip(notebook.cells, STORED):
        assert text(cell) == text(stored), f"run it anew: {lesson.__doc__}"
        assert pictures(cell) == pictures(stored)

    # of processors, not of the clock, which others on the machine make slower
    times = os.times()
    assert times.children_user + times.children_system < 120


def test_it_is_stored_whole_without_warnings_and_small():
    assert lesson.FILE.stat().st_size < 1_500_000
    code = [cell for cell in STORED if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(map(pictures, code)) >= 10
    assert not any("execution" in cell.metadata for cell in code)
    for output in (output for cell in code for output in cell.outputs):
        assert output.get("name") != "stderr" and output.output_type != "error"


def test_each_equation_stands_before_the_line_that_computes_it():
    found = set()
    for cell, behind in zip(STORED, STORED[1:]):
        for first, last in re.findall(r"text\{\(Eq\. (\d+)(?:-(\d+))?\)", cell.source):
            assert cell.cell_type == "markdown" and "lesson.lines_of(" in behind.source
            found |= set(range(int(first), int(last or first) + 1))
    assert found == set(range(1, 12))


def test_lines_that_are_shown_must_be_there():
    with pytest.raises(ValueError, match="unpack"):
        lesson.lines_of(lesson.lines_of, "no such line")


REFERENCES = r"(Eq\.|Fig\.|Table|Exercise|[Cc]hapters?|DyMU:|##) \d+(( to |-|, | and )\d+)*|^\d\."
ELSEWHERE = r"\$\$?.*?\$\$?|`.*?`|\]\(.*?\)|NeurIPS \d+"


def test_no_number_in_the_prose_that_no_cell_shows_or_asserts():
    prose = "\n".join(cell.source for cell in STORED if cell.cell_type == "markdown")
    prose = re.sub(ELSEWHERE, "", re.sub(r"```.*?```", "", prose, flags=re.S), flags=re.S)
    prose = re.sub(REFERENCES, "", prose, flags=re.M)
    code = "\n".join(cell.source + text(cell) for cell in STORED if cell.cell_type == "code")
    known = set(re.findall(r"\d+(?:\.\d+)?", code))
    assert set(re.findall(r"\d+(?:\.\d+)?", prose)) <= known
