"""What the experiments' tables have in common.

Rows of Markdown, and JSON files that appear whole or not at all.
"""

import json
from pathlib import Path

from extras.door import atomically


def line(*cells) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells) -> list[str]:
    return [line(*cells), "|---" + "|---:" * (len(cells) - 1) + "|"]


def dump(results, depth: int) -> str:
    """JSON with a line for each key down to that depth.

    So a difference between two files shows where it is.
    """
    if depth == 0 or not isinstance(results, dict):
        return json.dumps(results)
    lines = (f"{json.dumps(k)}: {dump(v, depth - 1)}" for k, v in results.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def save(results: dict, path: Path, depth: int) -> None:
    with atomically(path) as part:
        part.write_text(dump(results, depth) + "\n")
