"""Pictures with their questions -> tensors of one batch.

All questions about a picture stand in one sequence behind it. Each sees the picture and itself,
and its positions continue the picture's, so the sequence computes exactly what one prompt per
question would:

    sequence   <s> USER:   picture   what color is the ring? red   is there a star? no
    segment    0 0 0 0     0 0 0 0   1 1 1 1 1 1 1 1 1 1 1         2 2 2 2 2 2 2
    place                            0 1 2 3 4 5 6 7 8 9 10        0 1 2 3 4 5 6
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from lab.scenes import GRID, KINDS, SIZE, VARIANTS, easy_pictures, pointers, scene
from lab.untrained import ANSWER, PREFIX, QUESTION

END = 2  # </s>
EVERY_KIND = (*KINDS, "easy", *(f"{variant} {kind}" for variant in VARIANTS for kind in KINDS))
POINTERS = ("named", "apart", "next")  # see `point`


@dataclass
class Sample:
    pixels: np.ndarray  # (n, n, 3) uint8, a whole picture or a window of it
    cells: np.ndarray  # which of the 16 x 16 patches these are
    labels: np.ndarray  # (patches, 6), as Scene.labels
    things: list  # [] where they are not known
    questions: list  # of (kind, question, answer)


def scene_sample(seed, level=None, side=GRID, questions=10, variant=""):
    drawn = scene(seed, level, side, questions, variant)
    column, row = drawn.corner
    rows = np.arange(row, row + side)[:, None]
    cells = (rows * GRID + np.arange(column, column + side)).ravel()
    return Sample(np.asarray(drawn.image), cells, drawn.labels, drawn.things, drawn.questions)


def easy_sample(path, questions):
    """A picture of easy-VQA. Nothing is known of its patches: kind -1."""
    picture = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    labels = np.full((GRID**2, 6), -1, np.int16)
    return Sample(np.asarray(picture), np.arange(GRID**2), labels, [], questions)


def easy_list(split):
    return list(easy_pictures(split, "easy").values())


def pack(samples, tokenizer):
    """-> tensors of B pictures (V patches each) and of the T text tokens behind each of them.

    pixels, cells, labels: as in Sample, stacked
    prefix: (P,) ids before the picture
    ids, segment, place: (B, T) as above; segment 0 is padding
    answers: (answer tokens, 6): picture, column in T of the token before, id, kind, number of the
        answer in the batch, its length
    named, apart, next: (so many, 4): picture, column, and the x, y that this token should know
    """
    rows = []  # of each picture, one (kind, question, answer, pointers) per question, encoded
    for sample in samples:
        row = []
        for kind, question, answer in sample.questions:
            asked = tokenizer.encode(QUESTION.format(question), add_special_tokens=False)
            told = tokenizer.encode(ANSWER.format(answer), add_special_tokens=False)
            pointed = point(question, kind.split()[-1], asked, told, sample.things)
            row.append((EVERY_KIND.index(kind), asked.ids, told.ids + [END], pointed))
        rows.append(row)

    T = max(sum(len(asked) + len(told) - 1 for _, asked, told, _ in row) for row in rows)
    ids = np.zeros((len(samples), T), np.int64)
    segment = np.zeros_like(ids)
    place = np.zeros_like(ids)
    answers = []
    places = {name: [] for name in POINTERS}

    count = 0
    for b, row in enumerate(rows):
        t = 0
        for number, (kind, asked, told, pointed) in enumerate(row, 1):
            n = len(asked) + len(told) - 1  # </s> is never read, only foretold
            ids[b, t : t + n] = asked + told[:-1]
            segment[b, t : t + n] = number
            place[b, t : t + n] = np.arange(n)

            for i, target in enumerate(told):
                answers.append((b, t + len(asked) - 1 + i, target, kind, count, len(told)))
            for name, column, x, y in pointed:
                places[name].append((b, t + column, x, y))

            t += n
            count += 1

    arrays = {
        "pixels": np.stack([s.pixels for s in samples]),
        "cells": np.stack([s.cells for s in samples]),
        "labels": np.stack([s.labels for s in samples]),
        "prefix": np.array(tokenizer.encode(PREFIX).ids),  # with <s>
        "ids": ids,
        "segment": segment,
        "place": place,
        "answers": np.array(answers),
    }
    for name in POINTERS:
        arrays[name] = np.array(places[name], np.float32).reshape(-1, 4)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def point(question, kind, asked, told, things):
    """Which tokens should know where something is -> [(pointer, index of the token, x, y)]

    named: the last token of an object's name, where the object is (pixels from the centre)
    apart: the last token of "is the circle left of the star?", how far the star is from the circle
    next: the token of a description before which an object's name begins, where that object is
    """
    here = {t: (t.x - SIZE / 2, t.y - SIZE / 2) for t in things}
    ends = [end for _, end in asked.offsets]  # where each token ends in "\n" + question
    last = len(ends) - 1

    named = [(ends.index(end + 1), t) for end, t in pointers(question, things)]
    out = [("named", i, *here[t]) for i, t in named]

    if kind == "relation":
        (_, a), (_, b) = named
        out.append(("apart", last, b.x - a.x, b.y - a.y))

    if kind == "description":
        answer_ends = [end for _, end in told.offsets]  # where each token ends in " " + answer
        before = last
        end = 1
        for t in sorted(things, key=lambda t: t.x):
            end += len(t.name)
            name = len(ends) + answer_ends.index(end)  # the last token of the name
            out += [("next", before, *here[t]), ("named", name, *here[t])]
            before = name + 1  # the comma
            end += 2
    return out
