"""Files of questions, one JSON object a line, and of answers, which grow line by line.

For lab/evaluate.py, whose first lines say what stands in them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from extras.door import one_line
from extras.video import by_number, picture_files
from model import as_list

OURS = ("options", "answers_of", "error")  # what a line of answers has beside that of the question


def read_questions(file: Path) -> list[dict]:
    """Raises ValueError, with the number of the line, for a wrong one."""
    lines = []
    for number, text in enumerate(file.read_bytes().split(b"\n"), 1):
        if text.strip():
            try:
                lines.append(read_line(text))
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{file}, line {number}: {one_line(e)}") from e
    return lines


def read_line(text: bytes) -> dict:
    said = json.loads(text)
    if not isinstance(said, dict):
        raise ValueError("it is not an object with `image` and `question`")
    if not are_texts(as_list(said.get("image"))):
        raise ValueError("`image` must be a path or a list of paths")
    if not are_texts([said.get("question")]):
        raise ValueError("`question` must be a text")
    if said.get("answers") and not are_texts(said["answers"]):
        raise ValueError("`answers` must be a list of texts")
    return {name: value for name, value in said.items() if name not in OURS}


def are_texts(values) -> bool:
    whole = isinstance(values, list) and len(values) > 0
    return whole and all(isinstance(one, str) and one.strip() for one in values)


def each_picture(folder: Path, question: str) -> list[dict]:
    """Such lines for the pictures of a folder, as a file beside it would have them"""
    files = sorted(picture_files(folder), key=by_number)
    return [{"image": f"{folder.name}/{file.name}", "question": question} for file in files]


def pictures_of(line: dict) -> tuple[str, ...]:
    return tuple(as_list(line["image"]))


class Answers:
    """A file of answers, a line for each of the questions, in their order.

    A line begins with the question's and the options of the command; half a line, left by one that
    was killed, is written anew. done: the lines so far. Raises ValueError for a file that other
    questions or options led to.
    """

    def __init__(self, file: Path, questions: list[dict], options: dict):
        self.file = file
        self.begins = [json.dumps(one | {"options": options})[:-1].encode() for one in questions]

        *whole, half = file.read_bytes().split(b"\n") if file.exists() else [b""]
        pairs = zip([*whole, half], self.begins)
        agree = all(text[: len(begin)] == begin[: len(text)] for text, begin in pairs)
        try:
            if not agree or len(whole) > len(self.begins):
                raise ValueError("other questions, another model or other settings")
            self.done = [json.loads(text) for text in whole]
        except ValueError as e:
            wanted = "delete it, or give another --out"
            raise ValueError(f"{file} is from another command: {wanted} ({one_line(e)})") from e
        self.size = sum(len(text) + 1 for text in whole)  # bytes

    def write(self, told: Iterator[tuple[int, dict]]) -> None:
        """told: (place, what the line tells beside the question), in any order

        A line is written as soon as its turn comes, and until then kept.
        """
        waiting = {}
        with open(self.file, "ab") as out:
            out.truncate(self.size)
            for place, one in told:
                waiting[place] = one
                while len(self.done) in waiting:
                    turn = len(self.done)
                    text = self.begins[turn] + b", " + json.dumps(waiting.pop(turn)).encode()[1:]
                    out.write(text + b"\n")
                    out.flush()
                    self.done.append(json.loads(text))
