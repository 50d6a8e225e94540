"""Drawn scenes with questions, answers and dense labels: what tiny/ is trained and measured on.

    python -m lab.scenes OUT --n 8    # eight held-out scenes, from blank to cluttered, and
                                      # OUT/questions.json

`scene` is a pure function of its arguments. `level` runs from 0 (one object on a plain ground) to 1
(eight objects on a cluttered, textured one). Two variants lie beyond that scale: "small", whose
words and numbers are 12 to 20 pixels high in the place of 28, and "crowded", with nine or ten
objects.

Questions are asked only where the picture leaves one answer: "the circle" needs exactly one circle,
places keep away from the middle lines, and objects keep apart horizontally so that left to right is
an order.
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
LABELS = {  # how many classes each label of a patch has
    "kind": len(SHAPES) + 2,
    "color": len(COLORS) + 1,
    "char": len(CHARS) + 1,
    "text": len(TEXTS) + 1,
}

# the name of one thing, in a question
NAME = re.compile(rf"the (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)}|shape)\b")

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
    # (patches, 6) int16: kind, color, char, text (0: none), then dx, dy to the centre in pixels
    labels: np.ndarray
    corner: tuple[int, int]  # column and row of the window's first patch
    level: float


def scene(seed, level=None, side=GRID, questions=10, variant=""):
    """Draws the picture of this seed and asks its questions.

    level: None for a random one. side < 16 draws one random window of the picture, with all things
    inside it: cheaper, at true positions. The questions of a variant are of kinds of their own:
    "small reading", "crowded counting".
    """
    rng = random.Random(seed)
    if level is None:
        level = rng.random()
    corner = rng.randint(0, GRID - side), rng.randint(0, GRID - side)
    things = place_things(rng, level, side, corner, variant)
    image, owner = draw(rng, level, side, corner, things)

    asked = ask(rng, things, questions)
    if variant:
        asked = [(f"{variant} {kind}", question, answer) for kind, question, answer in asked]

    return Scene(image, things, asked, dense_labels(owner, things, side, corner), corner, level)


def clip(seed, level=0.3, frames=6):
    """Pictures of one scene. Only the last thing moves, from the left to the right."""
    things = scene(seed, level).things
    *still, moves = things
    drawn = []
    for i in range(frames):
        x = moves.w + (SIZE - 2 * moves.w) * i / (frames - 1)
        things = [*still, replace(moves, x=x)]
        frame, _ = draw(random.Random(seed), level, GRID, (0, 0), things)
        drawn.append(frame)

    # one palette for all: in a GIF what is still stays still to the bit
    strip = Image.new("RGB", (SIZE * frames, SIZE))
    for i, frame in enumerate(drawn):
        strip.paste(frame, (SIZE * i, 0))
    palette = strip.quantize(dither=Image.Dither.NONE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in drawn]


def place_things(rng, level, side, corner, variant=""):
    """Random things, none hidden.

    Centres are at least 12 px apart in x, and outlines overlap little, those of text not at all.
    """
    # 2 things in 8 x 8 patches, 4 in 12 x 12, 8 in 16 x 16
    limit = min(1 + int(level * 7.99), side * side // 30)
    narrow = level  # how small the shapes are, and how near to each other
    if variant == "small":
        limit = max(limit, 2)
        texts = ["word", "number"]
    else:
        often = 0.15 if limit == 1 else 0.5
        texts = [t for t in ("word", "number") if rng.random() < often]
        texts = texts[:limit]
    if variant == "crowded":  # of whole pictures only
        limit = rng.randint(9, 10)
        narrow = 1

    left = corner[0] * PATCH
    top = corner[1] * PATCH
    window = side * PATCH
    tries = 600 if variant == "crowded" else 60

    things = []
    for kind in texts + [rng.choice(SHAPES) for _ in range(limit - len(texts))]:
        size = rng.randint(*SMALL_SIZES) if variant == "small" else TEXT_SIZE
        if kind in ("word", "number"):
            color = ""
            text = rng.choice(WORDS) if kind == "word" else str(rng.randint(0, 99))
            w, h = text_outline(text, size)
        else:
            color = rng.choice(COLOR_NAMES)
            text = ""
            w = rng.uniform(16, 42 - 18 * narrow)
            h = w * rng.uniform(0.6, 0.95) if kind == "rectangle" else w

        for _ in range(tries):
            x = rng.uniform(left + w, left + window - w)
            y = rng.uniform(top + h, top + window - h)
            new = Thing(kind, color, text, x, y, w, h, size)
            if all(apart(new, t, 1.05 - 0.15 * narrow) for t in things):
                things.append(new)
                break
    return things


def text_outline(text, size):
    """-> half width and half height, with a margin of one pixel"""
    left, top, right, bottom = font(size).getbbox(text)
    return (right - left) / 2 + 1, (bottom - top) / 2 + 1


def apart(a, b, gap):
    dx = abs(a.x - b.x)
    dy = abs(a.y - b.y)
    if a.text or b.text:
        return dx >= 12 and (dx > a.w + b.w + 2 or dy > a.h + b.h + 2)
    return dx >= 12 and math.hypot(dx, dy) >= gap * (a.w + b.w)


def draw(rng, level, side, corner, things):
    """-> the picture, and the number of the thing (from 1; 0: ground) that shows at each pixel."""
    n = side * PATCH
    image = Image.fromarray(ground(rng, level, n))
    pen = ImageDraw.Draw(image)
    draw_clutter(rng, level, n, pen)

    owner = Image.new("L", (n, n))
    in_order = sorted(enumerate(things, 1), key=lambda pair: bool(pair[1].text))  # text on top
    for number, t in in_order:
        x = t.x - corner[0] * PATCH
        y = t.y - corner[1] * PATCH
        if t.text:
            tone = tuple(rng.randint(0, 50) for _ in range(3))
            pen.text((x, y), t.text, tone, font(t.size), anchor="mm")
            owner.paste(number, [round(v) for v in (x - t.w, y - t.h, x + t.w, y + t.h)])
        else:
            tone = tuple(min(255, max(0, c + rng.randint(-20, 20))) for c in COLORS[t.color])
            stamp = outline(t, rng.uniform(-0.25, 0.25))
            at = (round(x - t.w) - 1, round(y - t.w) - 1)
            image.paste(tone, at, stamp)
            owner.paste(number, at, stamp.point(lambda v: 255 * (v > 127)))
    return image, np.asarray(owner)


def draw_clutter(rng, level, n, pen):
    """Short faint strokes, up to forty of them."""
    for _ in range(int(rng.random() * level * 40)):
        x = rng.uniform(0, n)
        y = rng.uniform(0, n)
        angle = rng.uniform(0, math.tau)
        tone = tuple(rng.randint(175, 235) for _ in range(3))
        end = [x + 14 * math.cos(angle), y + 14 * math.sin(angle)]
        pen.line([x, y, *end], tone, rng.randint(1, 3))


def ground(rng, level, n):
    """-> (n, n, 3) uint8: a light ground, above level 0.15 perhaps graded, noisy or striped."""
    base = np.array([rng.randint(222, 255) for _ in range(3)], np.float32)
    kind = rng.choice(("plain", "graded", "noisy", "striped")) if level > 0.15 else "plain"
    if kind == "plain":
        return np.broadcast_to(base.astype(np.uint8), (n, n, 3)).copy()

    depth = 20 + 50 * level * rng.random()
    if kind == "noisy":
        grain = rng.choice((1, 2, 4))
        coarse = np.random.default_rng(rng.getrandbits(32))
        noise = coarse.random((n // grain + 1, n // grain + 1), np.float32)
        fade = np.kron(noise, np.ones((grain, grain), np.float32))[:n, :n]
    else:
        row, column = np.mgrid[:n, :n].astype(np.float32)
        angle = rng.uniform(0, math.tau)
        along = column * math.cos(angle) + row * math.sin(angle)
        if kind == "graded":
            fade = (along - along.min()) / np.ptp(along)
        else:
            fade = along / rng.uniform(8, 24) % 2 < 1

    tint = np.array([rng.uniform(0.6, 1) for _ in range(3)], np.float32)
    return np.clip(base - depth * fade[..., None] * tint, 0, 255).astype(np.uint8)


def outline(t, angle):
    """The shape as an "L" mask with soft edges, 2 (w + 1) pixels wide.

    It is drawn four times larger, then reduced.
    """
    n = 2 * (math.ceil(t.w) + 1)
    mask = Image.new("L", (4 * n, 4 * n))
    pen = ImageDraw.Draw(mask)
    c = 2 * n  # the centre
    r = 4 * t.w

    def polygon(points):
        """points: (radius, angle) pairs, angle 0 up"""
        corners = []
        for radius, a in points:
            x = c + r * radius * math.sin(a + angle)
            y = c - r * radius * math.cos(a + angle)
            corners.append((x, y))
        pen.polygon(corners, 255)

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
    """One row per patch (Scene.labels), about the thing that covers most of it.

    A thing counts from a sixth of the patch on.
    """
    # how many pixels of each patch each of at most 15 things covers
    patch = np.arange(side * side).reshape(side, side)
    patch = patch.repeat(PATCH, 0).repeat(PATCH, 1)
    count = np.bincount((patch * 16 + owner).ravel(), minlength=side * side * 16)
    count = count.reshape(-1, 16)[:, 1:]
    best = np.where(count.max(1) >= PATCH * PATCH / 6, count.argmax(1), -1)

    labels = np.zeros((side * side, 6), np.int16)
    for p in np.flatnonzero(best >= 0):
        t = things[best[p]]
        x = (corner[0] + p % side + 0.5) * PATCH
        y = (corner[1] + p // side + 0.5) * PATCH

        color = char = text = 0
        if t.text:
            kind = len(SHAPES) + 1
            k = int((x - t.x + t.w) / (2 * t.w) * len(t.text))
            k = min(max(k, 0), len(t.text) - 1)
            char = CHARS.index(t.text[k]) + 1
            text = TEXTS.index(t.text) + 1
        else:
            kind = SHAPES.index(t.kind) + 1
            color = COLOR_NAMES.index(t.color) + 1
        labels[p] = kind, color, char, text, t.x - x, t.y - y
    return labels


# Questions. Each `ask_*` returns (question, answer), or None where the scene does not allow one.


def ask(rng, things, n):
    """The description, then up to n - 1 others, the kinds in turn."""
    ordered = sorted(things, key=lambda t: t.x)
    question = rng.choice(("describe the image.", "what is in the image from left to right?"))
    out = {question: ("description", question, ", ".join(t.name for t in ordered))}

    shapes = [t for t in things if t.color]
    asks = {
        "color": ask_color,
        "shape": ask_shape,
        "existence": ask_existence,
        "counting": ask_counting,
        "place": ask_place,
        "relation": ask_relation,
    }
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
    """Thing -> the ways to name it that name nothing else.

    Its shape alone, its colour and shape.
    """
    kinds = Counter(t.kind for t in shapes)
    pairs = Counter(t.name for t in shapes)
    ways = {t: [] for t in shapes}
    for t in shapes:
        if kinds[t.kind] == 1:
            ways[t].append(t.kind)
        if pairs[t.name] == 1:
            ways[t].append(t.name)
    return ways


def one_alone(rng, shapes, what):
    """One of the things that share their kind, or their color, with no other; or None."""
    count = Counter(getattr(t, what) for t in shapes)
    alone = [t for t in shapes if count[getattr(t, what)] == 1]
    return rng.choice(alone) if alone else None


def ask_color(rng, shapes):
    t = one_alone(rng, shapes, "kind")
    if t is None:
        return None
    what = t.kind
    if len(shapes) == 1:
        what = rng.choice((t.kind, "shape"))
    question = rng.choice(("what color is the {}?", "what is the color of the {}?"))
    return question.format(what), t.color


def ask_shape(rng, shapes):
    t = one_alone(rng, shapes, "color")
    if t is None:
        return None
    if len(shapes) == 1 and rng.random() < 0.5:
        return rng.choice(("what shape is in the image?", "what shape is present?")), t.kind
    question = rng.choice(("what is the {} shape?", "what shape is {}?"))
    return question.format(t.color), t.kind


def ask_existence(rng, shapes):
    """Yes or no by a coin, then a question with that answer.

    A wrong pair has its colour or its shape in the scene.
    """
    if not shapes:
        return None
    kinds = {t.kind for t in shapes}
    colors = {t.color for t in shapes}
    pairs = {(t.color, t.kind) for t in shapes}

    yes = rng.random() < 0.5
    form = rng.randrange(3)
    if form == 0:
        pool = sorted(kinds) if yes else [s for s in SHAPES if s not in kinds]
    elif form == 1:
        pool = [f"{c} shape" for c in COLOR_NAMES if (c in colors) == yes]
    else:
        pool = []
        for c in COLOR_NAMES:
            for s in SHAPES:
                near = c in colors or s in kinds
                if near and ((c, s) in pairs) == yes:
                    pool.append(f"{c} {s}")
    if not pool:
        return None

    what = rng.choice(pool)
    question = rng.choice(("is there a {}?", "does the image contain a {}?"))
    return question.format(what), "yes" if yes else "no"


def ask_counting(rng, shapes):
    """First the number, evenly among those that some question has, then the question."""
    by_number = defaultdict(list)
    for s in SHAPES:
        many = "crosses" if s == "cross" else f"{s}s"
        by_number[sum(t.kind == s for t in shapes)].append(many)
    for c in COLOR_NAMES:
        by_number[sum(t.color == c for t in shapes)].append(f"{c} shapes")
    if rng.random() < 0.4:
        by_number = {len(shapes): ["shapes"]}

    numbers = sorted(by_number)
    if shapes and rng.random() < 0.8:
        numbers = [n for n in numbers if n > 0]
    number = rng.choice(numbers)
    return f"how many {rng.choice(by_number[number])} are there?", str(number)


def ask_place(rng, shapes):
    middle = SIZE / 2
    clear = []
    for t, ways in names(shapes).items():
        to_the_lines = min(abs(t.x - middle), abs(t.y - middle))
        if ways and to_the_lines >= 16:
            clear.append((t, ways))
    if not clear:
        return None

    t, ways = rng.choice(clear)
    row = "top" if t.y < middle else "bottom"
    column = "left" if t.x < middle else "right"
    return f"where is the {rng.choice(ways)}?", f"{row} {column}"


def ask_relation(rng, shapes):
    named = [(t, ways) for t, ways in names(shapes).items() if ways]
    if len(named) < 2:
        return None

    # the order is random, so yes and no are even
    (a, a_ways), (b, b_ways) = rng.sample(named, 2)
    word, gap = rng.choice((("left of", b.x - a.x), ("above", b.y - a.y)))
    if abs(gap) < 24:
        return None

    question = f"is the {rng.choice(a_ways)} {word} the {rng.choice(b_ways)}?"
    return question, "yes" if gap > 0 else "no"


def pointers(question, things):
    """-> [(index in the question behind a name, the one thing that it names)]"""
    shapes = [t for t in things if t.color]
    out = []
    for m in NAME.finditer(question):
        color, kind = m.groups()
        named = [t for t in shapes if color in (None, t.color) and kind in ("shape", t.kind)]
        if len(named) == 1:
            out.append((m.end(), named[0]))
    return out


def easy_pictures(split, kind):
    """The pictures of the public easy-VQA, split "train" or "test".

    -> picture number: (its file, [(kind, question, answer)])
    """
    import easy_vqa  # here, because to draw scenes one needs neither it nor its pictures

    if split == "train":
        files = easy_vqa.get_train_image_paths()
        questions = easy_vqa.get_train_questions()
    else:
        files = easy_vqa.get_test_image_paths()
        questions = easy_vqa.get_test_questions()

    asked = defaultdict(list)
    for question, answer, picture in zip(*questions, strict=True):
        asked[picture].append((kind, question, answer))
    return {picture: (file, asked[picture]) for picture, file in files.items()}


def blind_guess(seen, items):
    """Kind -> accuracy on `items` of the best guess without the picture.

    It is the most frequent answer in `seen` to the very question, or to its kind where the question
    is not among them. Both are lists of (kind, question, answer).
    """
    answers = defaultdict(Counter)
    for kind, question, answer in seen:
        answers[question][answer] += 1
        answers[kind][answer] += 1

    right = defaultdict(list)
    for kind, question, answer in items:
        guess = answers.get(question, answers[kind]).most_common(1)
        right[kind].append(bool(guess) and guess[0][0] == answer)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def main():
    about = "Write held-out scenes as PNG, with their questions."
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("out", type=Path)
    add("--n", type=int, default=8, help="how many scenes, evenly from blank to cluttered")
    add("--seed", type=int, default=HELD_OUT, help="of the first scene")
    add("--variant", default="", choices=VARIANTS, help="small text, or nine to ten objects")
    add("--clip", action="store_true", help="write clip.gif, too: the first scene, one thing moves")
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
