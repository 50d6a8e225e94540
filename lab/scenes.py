"""Drawn scenes with questions, answers and dense labels: what tiny/ is trained and measured on.

    python -m lab.scenes OUT --n 8        # eight held-out scenes, from blank to cluttered, and OUT/questions.json

`scene` is a pure function of its arguments. `level` runs from 0 (one object on a plain ground) to 1 (eight objects on a
cluttered, textured one). Two variants lie beyond that scale: "small", whose words and numbers
are 12 to 20 pixels high in the place of 28, and "crowded", with nine or ten objects. Questions are
asked only where the picture leaves one answer: "the circle" needs exactly one
circle, places keep away from the middle lines, and objects keep apart horizontally so that left to right is an order.
"""

import argparse
import functools
import json
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE, PATCH, GRID = 224, 14, 16  # pixels, pixels, patches: a picture is 16 x 16 patches
HELD_OUT = 2_000_000_000  # training draws its seeds below this one, measurements from here on
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "ring")
COLORS = {  # easy-VQA's eight
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
    "teal": (0, 128, 128), "black": (0, 0, 0), "gray": (128, 128, 128), "brown": (165, 42, 42),
}  # fmt: skip
COLOR_NAMES = tuple(COLORS)
WORDS = (
    "cat", "dog", "sun", "car", "bus", "cup", "hat", "key", "map", "box", "bed", "egg",
    "fox", "jam", "pen", "toy", "bee", "owl", "zoo", "ice", "net", "log", "wax", "gum",
)  # fmt: skip
TEXTS = WORDS + tuple(str(n) for n in range(100))
CHARS = "abcdefghijklmnopqrstuvwxyz0123456789"
VARIANTS = ("small", "crowded")
KINDS = ("color", "shape", "existence", "counting", "place", "relation", "reading", "description")
LABELS = {"kind": len(SHAPES) + 2, "color": len(COLORS) + 1, "char": len(CHARS) + 1, "text": len(TEXTS) + 1}  # classes
NAME = re.compile(rf"the (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)}|shape)\b")  # of one thing, in a question
TEXT_SIZE = 40  # of the font: its digits and capitals are 28 px high, two patches
SMALL_SIZES = (17, 29)  # 12 to 20 px
font = functools.cache(ImageFont.load_default)


@dataclass(frozen=True)
class Thing:
    kind: str  # one of SHAPES, or "word", or "number"
    color: str  # "" for text, which is always dark
    text: str  # "" for shapes
    x: float  # centre, pixels of the whole picture
    y: float
    w: float  # half width and half height, pixels
    h: float
    size: int = TEXT_SIZE  # of the font

    @property
    def name(self):
        return f"{self.kind} {self.text}" if self.text else f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    image: Image.Image  # RGB, 224 x 224; or the window of it, `side` patches wide
    things: list[Thing]
    questions: list[tuple[str, str, str]]  # (kind, question, answer)
    labels: np.ndarray  # (patches, 6) int16: kind, color, char, text (0: none), then dx, dy to the centre in pixels
    corner: tuple[int, int]  # column and row of the window's first patch
    level: float


def scene(seed, level=None, side=GRID, questions=10, variant=""):
    """`side` < 16 draws one random window of the picture, with all things inside it: cheaper, at true positions.
    The questions of a variant are of kinds of their own: "small reading", "crowded counting"."""
    rng = random.Random(seed)
    level = rng.random() if level is None else level
    corner = rng.randint(0, GRID - side), rng.randint(0, GRID - side)
    things = place_things(rng, level, side, corner, variant)
    image, owner = draw(rng, level, side, corner, things)
    asked = ask(rng, things, questions)
    if variant:
        asked = [(f"{variant} {kind}", question, answer) for kind, question, answer in asked]
    return Scene(image, things, asked, dense_labels(owner, things, side, corner), corner, level)


def clip(seed, level=0.3, frames=6):
    """Pictures of one scene in which nothing moves but the last thing, from the left to the right."""
    things = scene(seed, level).things
    *still, moves = things
    xs = [moves.w + (SIZE - 2 * moves.w) * i / (frames - 1) for i in range(frames)]
    drawn = [draw(random.Random(seed), level, GRID, (0, 0), [*still, replace(moves, x=x)])[0] for x in xs]
    strip = Image.new("RGB", (SIZE * frames, SIZE))
    for i, frame in enumerate(drawn):
        strip.paste(frame, (SIZE * i, 0))
    palette = strip.quantize(dither=Image.Dither.NONE)  # one for all: in a GIF what is still stays still to the bit
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in drawn]


def place_things(rng, level, side, corner, variant=""):
    """Random things, none hidden: centres at least 12 px apart in x, outlines overlapping little (text not at all)."""
    limit = min(1 + int(level * 7.99), side * side // 30)  # 2 things in 8 x 8 patches, 4 in 12 x 12, 8 in 16 x 16
    narrow = level  # how small the shapes are, and how near to each other
    if variant == "small":
        limit = max(limit, 2)
        texts = ["word", "number"]
    else:
        texts = [t for t in ("word", "number") if rng.random() < (0.15 if limit == 1 else 0.5)][:limit]
    if variant == "crowded":  # of whole pictures only
        limit = rng.randint(9, 10)
        narrow = 1
    lo_x, lo_y = corner[0] * PATCH, corner[1] * PATCH
    things = []
    for kind in texts + [rng.choice(SHAPES) for _ in range(limit - len(texts))]:
        color = text = ""
        size = rng.randint(*SMALL_SIZES) if variant == "small" else TEXT_SIZE
        if kind in ("word", "number"):
            text = rng.choice(WORDS) if kind == "word" else str(rng.randint(0, 99))
            left, top, right, bottom = font(size).getbbox(text)
            w, h = (right - left) / 2 + 1, (bottom - top) / 2 + 1
        else:
            color, w = rng.choice(COLOR_NAMES), rng.uniform(16, 42 - 18 * narrow)
            h = w * rng.uniform(0.6, 0.95) if kind == "rectangle" else w
        for _ in range(600 if variant == "crowded" else 60):
            x, y = rng.uniform(lo_x + w, lo_x + side * PATCH - w), rng.uniform(lo_y + h, lo_y + side * PATCH - h)
            new = Thing(kind, color, text, x, y, w, h, size)
            if all(apart(new, t, 1.05 - 0.15 * narrow) for t in things):
                things.append(new)
                break
    return things


def apart(a, b, gap):
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    if a.text or b.text:
        return dx >= 12 and (dx > a.w + b.w + 2 or dy > a.h + b.h + 2)
    return dx >= 12 and math.hypot(dx, dy) >= gap * (a.w + b.w)


def draw(rng, level, side, corner, things):
    """-> the picture, and the number of the thing (from 1; 0: ground) that shows at each pixel."""
    n = side * PATCH
    image = Image.fromarray(ground(rng, level, n))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.random() * level * 40)):  # clutter: short faint strokes
        x, y, a = rng.uniform(0, n), rng.uniform(0, n), rng.uniform(0, math.tau)
        tone = tuple(rng.randint(175, 235) for _ in range(3))
        pen.line([x, y, x + 14 * math.cos(a), y + 14 * math.sin(a)], tone, rng.randint(1, 3))
    owner = Image.new("L", (n, n))
    for number, t in sorted(enumerate(things, 1), key=lambda pair: bool(pair[1].text)):  # text on top
        x, y = t.x - corner[0] * PATCH, t.y - corner[1] * PATCH
        if t.text:
            pen.text((x, y), t.text, tuple(rng.randint(0, 50) for _ in range(3)), font(t.size), anchor="mm")
            owner.paste(number, [round(v) for v in (x - t.w, y - t.h, x + t.w, y + t.h)])
        else:
            tone = tuple(min(255, max(0, c + rng.randint(-20, 20))) for c in COLORS[t.color])
            stamp, at = outline(t, rng.uniform(-0.25, 0.25)), (round(x - t.w) - 1, round(y - t.w) - 1)
            image.paste(tone, at, stamp)
            owner.paste(number, at, stamp.point(lambda v: 255 * (v > 127)))
    return image, np.asarray(owner)


def ground(rng, level, n):
    """-> (n, n, 3) uint8: a light ground, plain below level 0.15, else perhaps graded, noisy or striped."""
    base = np.array([rng.randint(222, 255) for _ in range(3)], np.float32)
    kind = rng.choice(("plain", "graded", "noisy", "striped")) if level > 0.15 else "plain"
    if kind == "plain":
        return np.broadcast_to(base.astype(np.uint8), (n, n, 3)).copy()
    depth, (row, col) = 20 + 50 * level * rng.random(), np.mgrid[:n, :n].astype(np.float32)
    if kind == "noisy":
        grain = rng.choice((1, 2, 4))
        noise = np.random.default_rng(rng.getrandbits(32)).random((n // grain + 1, n // grain + 1), np.float32)
        fade = np.kron(noise, np.ones((grain, grain), np.float32))[:n, :n]
    else:
        angle = rng.uniform(0, math.tau)
        along = col * math.cos(angle) + row * math.sin(angle)
        fade = (along - along.min()) / np.ptp(along) if kind == "graded" else along / rng.uniform(8, 24) % 2 < 1
    tint = np.array([rng.uniform(0.6, 1) for _ in range(3)], np.float32)
    return np.clip(base - depth * fade[..., None] * tint, 0, 255).astype(np.uint8)


def outline(t, angle):
    """The shape as an "L" mask with soft edges, 2 (w + 1) pixels wide: drawn four times larger, then reduced."""
    n = 2 * (math.ceil(t.w) + 1)
    mask, c, r = Image.new("L", (4 * n, 4 * n)), 2 * n, 4 * t.w
    pen = ImageDraw.Draw(mask)

    def polygon(points):  # (radius, angle) pairs, angle 0 up
        pen.polygon([(c + r * p * math.sin(a + angle), c - r * p * math.cos(a + angle)) for p, a in points], 255)

    if t.kind == "rectangle":
        pen.rectangle([c - r, c - 4 * t.h, c + r, c + 4 * t.h], 255)
    elif t.kind == "triangle":
        polygon([(1, k * math.tau / 3) for k in range(3)])
    elif t.kind == "star":
        polygon([((1, 0.42)[k % 2], k * math.tau / 10) for k in range(10)])
    elif t.kind == "cross":
        for turn in (0, math.pi / 2):
            polygon([(1, turn + a) for a in (-0.33, 0.33, math.pi - 0.33, math.pi + 0.33)])
    else:
        pen.ellipse([c - r, c - r, c + r, c + r], 255)
        if t.kind == "ring":
            pen.ellipse([c - 0.55 * r, c - 0.55 * r, c + 0.55 * r, c + 0.55 * r], 0)
    return mask.reduce(4)


def dense_labels(owner, things, side, corner):
    """One row per patch (Scene.labels): about the thing that covers most of it, from a sixth of the patch on."""
    patch = np.arange(side * side).reshape(side, side).repeat(PATCH, 0).repeat(PATCH, 1)
    count = np.bincount((patch * 16 + owner).ravel(), minlength=side * side * 16).reshape(-1, 16)[:, 1:]
    best = np.where(count.max(1) >= PATCH * PATCH / 6, count.argmax(1), -1)
    labels = np.zeros((side * side, 6), np.int16)
    for p in np.flatnonzero(best >= 0):
        t = things[best[p]]
        x, y = (corner[0] + p % side + 0.5) * PATCH, (corner[1] + p // side + 0.5) * PATCH
        char = text = 0
        if t.text:
            k = int((x - t.x + t.w) / (2 * t.w) * len(t.text))
            char, text = CHARS.index(t.text[min(max(k, 0), len(t.text) - 1)]) + 1, TEXTS.index(t.text) + 1
        kind = SHAPES.index(t.kind) + 1 if t.color else len(SHAPES) + 1
        labels[p] = kind, COLOR_NAMES.index(t.color) + 1 if t.color else 0, char, text, t.x - x, t.y - y
    return labels


# Questions. Each `ask_*` returns (question, answer), or None where the scene does not allow one.


def ask(rng, things, n):
    """The description, then up to n - 1 others, the kinds in turn."""
    ordered = sorted(things, key=lambda t: t.x)
    question = rng.choice(("describe the image.", "what is in the image from left to right?"))
    out = {question: ("description", question, ", ".join(t.name for t in ordered))}
    shapes = [t for t in things if t.color]
    asks = {"color": ask_color, "shape": ask_shape, "existence": ask_existence, "counting": ask_counting}
    asks |= {"place": ask_place, "relation": ask_relation}
    for _ in range(2):
        for kind in rng.sample(list(asks), len(asks)):
            pair = asks[kind](rng, shapes)
            if pair and len(out) < n:
                out.setdefault(pair[0], (kind, *pair))
        for t in things:
            if t.text and len(out) < n:
                question = rng.choice((f"what {t.kind} is written?", f"read the {t.kind}."))
                out.setdefault(question, ("reading", question, t.text))
    return list(out.values())


def names(shapes):
    """Thing -> the ways to name it that name nothing else: its shape alone, its colour and shape."""
    kinds, pairs = Counter(t.kind for t in shapes), Counter(t.name for t in shapes)
    return {t: [t.kind] * (kinds[t.kind] == 1) + [t.name] * (pairs[t.name] == 1) for t in shapes}


def one_alone(rng, shapes, what):
    """One of the things that share their kind, or their color, with no other; or None."""
    count = Counter(getattr(t, what) for t in shapes)
    alone = [t for t in shapes if count[getattr(t, what)] == 1]
    return rng.choice(alone) if alone else None


def ask_color(rng, shapes):
    t = one_alone(rng, shapes, "kind")
    if t is None:
        return None
    what = rng.choice((t.kind, "shape")) if len(shapes) == 1 else t.kind
    return rng.choice(("what color is the {}?", "what is the color of the {}?")).format(what), t.color


def ask_shape(rng, shapes):
    t = one_alone(rng, shapes, "color")
    if t is None:
        return None
    if len(shapes) == 1 and rng.random() < 0.5:
        return rng.choice(("what shape is in the image?", "what shape is present?")), t.kind
    return rng.choice(("what is the {} shape?", "what shape is {}?")).format(t.color), t.kind


def ask_existence(rng, shapes):
    """Yes or no by a coin, then a question with that answer; a wrong pair has its colour or its shape in the scene."""
    if not shapes:
        return None
    kinds, colors, pairs = {t.kind for t in shapes}, {t.color for t in shapes}, {(t.color, t.kind) for t in shapes}
    yes, form = rng.random() < 0.5, rng.randrange(3)
    if form == 0:
        pool = sorted(kinds) if yes else [s for s in SHAPES if s not in kinds]
    elif form == 1:
        pool = [f"{c} shape" for c in COLOR_NAMES if (c in colors) == yes]
    else:
        pool = [f"{c} {s}" for c in COLOR_NAMES for s in SHAPES
                if ((c, s) in pairs) == yes and (yes or c in colors or s in kinds)]  # fmt: skip
    if not pool:
        return None
    what = rng.choice(pool)
    return rng.choice(("is there a {}?", "does the image contain a {}?")).format(what), "yes" if yes else "no"


def ask_counting(rng, shapes):
    """First the number, evenly among those that some question has, then the question."""
    by_number = defaultdict(list)
    for s in SHAPES:
        by_number[sum(t.kind == s for t in shapes)].append(f"{s}s" if s != "cross" else "crosses")
    for c in COLOR_NAMES:
        by_number[sum(t.color == c for t in shapes)].append(f"{c} shapes")
    if rng.random() < 0.4:
        by_number = {len(shapes): ["shapes"]}
    number = rng.choice(sorted(n for n in by_number if n) if shapes and rng.random() < 0.8 else sorted(by_number))
    return f"how many {rng.choice(by_number[number])} are there?", str(number)


def ask_place(rng, shapes):
    middle = SIZE / 2
    clear = [(t, n) for t, n in names(shapes).items() if n and min(abs(t.x - middle), abs(t.y - middle)) >= 16]
    if not clear:
        return None
    t, ways = rng.choice(clear)
    answer = f"{'top' if t.y < middle else 'bottom'} {'left' if t.x < middle else 'right'}"
    return f"where is the {rng.choice(ways)}?", answer


def ask_relation(rng, shapes):
    named = [(t, n) for t, n in names(shapes).items() if n]
    if len(named) < 2:
        return None
    (a, a_ways), (b, b_ways) = rng.sample(named, 2)  # the order is random, so yes and no are even
    word, gap = rng.choice((("left of", b.x - a.x), ("above", b.y - a.y)))
    if abs(gap) < 24:
        return None
    return f"is the {rng.choice(a_ways)} {word} the {rng.choice(b_ways)}?", "yes" if gap > 0 else "no"


def pointers(question, things):
    """-> [(index in the question behind a name, the one thing that it names)]"""
    out = []
    for m in NAME.finditer(question):
        named = [t for t in things if t.color and m[1] in (None, t.color) and m[2] in ("shape", t.kind)]
        out += [(m.end(), t) for t in named if len(named) == 1]
    return out


def easy_pictures(split, kind):
    """The public easy-VQA, "train" or "test": picture number -> (its file, [(kind, question, answer)])."""
    import easy_vqa  # here, because to draw scenes one needs neither it nor its pictures

    asked, files = defaultdict(list), getattr(easy_vqa, f"get_{split}_image_paths")()
    for question, answer, picture in zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True):
        asked[picture].append((kind, question, answer))
    return {picture: (file, asked[picture]) for picture, file in files.items()}


def blind_guess(seen, items):
    """Kind -> accuracy on `items` of the best guess without the picture: the most frequent answer in `seen` to the very
    question, or to its kind where the question is not among them. Both are lists of (kind, question, answer)."""
    answers, right = defaultdict(Counter), defaultdict(list)
    for kind, question, answer in seen:
        answers[question][answer] += 1
        answers[kind][answer] += 1
    for kind, question, answer in items:
        guess = answers.get(question, answers[kind]).most_common(1)
        right[kind].append(bool(guess) and guess[0][0] == answer)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def main():
    parser = argparse.ArgumentParser(description="Write held-out scenes as PNG, with their questions.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, default=8, help="how many scenes, evenly from blank to cluttered")
    parser.add_argument("--seed", type=int, default=HELD_OUT, help="of the first scene")
    parser.add_argument("--variant", default="", choices=VARIANTS, help="small text, or nine to ten objects")
    parser.add_argument("--clip", action="store_true", help="write clip.gif too, the first scene with one thing moving")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = {}
    for i in range(args.n):
        drawn = scene(args.seed + i, level=i / max(args.n - 1, 1), variant=args.variant)
        drawn.image.save(args.out / f"scene{i}.png")
        keys = ("kind", "question", "answer")
        record[f"scene{i}.png"] = [dict(zip(keys, item, strict=True)) for item in drawn.questions]
    if args.clip:
        first, *rest = clip(args.seed)
        first.save(args.out / "clip.gif", save_all=True, append_images=rest, duration=200, loop=0)
    (args.out / "questions.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
