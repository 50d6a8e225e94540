"""What the experiments' tables have in common.

Rows of Markdown, and JSON files that appear whole or not at all.
"""

from pathlib import Path

from extras.door import atomically, dump


def line(*cells) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells) -> list[str]:
    return [line(*cells), "|---" + "|---:" * (len(cells) - 1) + "|"]


def save(results: dict, path: Path, depth: int) -> None:
    with atomically(path) as part:
        part.write_text(dump(results, depth) + "\n")
