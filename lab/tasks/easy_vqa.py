"""The questions of easy-VQA's test split, picture by picture: for lmms-eval, and as JSONL.

    python -m lab.tasks.easy_vqa 100 > easy-vqa.jsonl    # those that --limit 100 asks

They and their pictures come with the package easy-vqa, so no network is needed.
"""

import json
import sys

from extras.door import read_picture
from lab.evaluate import plain
from lab.scenes import easy_pictures


def questions() -> list[dict]:
    found = []
    for _, (file, asked) in sorted(easy_pictures("test", "easy-VQA").items()):
        for _, question, answer in asked:
            found.append({"image": file, "question": question, "answers": [answer]})
    return found


def dataset(_):
    """What lmms-eval asks, in the place of what it loaded."""
    from datasets import Dataset  # here, because JSONL needs none

    return Dataset.from_list(questions())


def pictures(doc: dict) -> list:
    return [read_picture(doc["image"])]


def score(doc: dict, results: list[str]) -> dict:
    """1 if the answer is the right one, as lab.evaluate compares them."""
    return {"exact_match": float(plain(results[0]) in doc["answers"])}


if __name__ == "__main__":
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else None
    for one in questions()[:limit]:
        print(json.dumps(one))
