"""A picture of where the visual tokens went: the input, and beside it what every budget merged.

For `--show`. Merged patches are filled with the mean colour of their token; a patch that kept a
token of its own shows its pixels. Lines between tokens are strong where the tokens are small, faint
where they are large: they gather where detail stayed.
"""

import math
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from extras.door import atomically
from extras.video import Video, several_pictures
from model import as_list

# pixels; GAP is the least space between two pictures
WIDTH = 1200
MARGIN = 32
GAP = 16

INK = "#1c2430"
SOFT = "#4d5866"
TRACK = "#e4e8ed"
ACCENT = "#e4572e"

LEGEND = "Flat colour: patches merged into one token. Pixels: a patch that kept a token of its own."
WHOLE = " Counted, not drawn: the view of the whole, newlines."
FADED = " Faded: the token stands in an earlier picture."
SPELLED = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "•": "·", "ß": "ss"})


def save(file: Path, processor, shown: list, pixels: list, panels: list[tuple], question: str):
    """shown: pictures, and videos as lists of frames; panels: (title, visual, report), where visual
    is what `Llava.encode` gave for pixels."""
    panels = [
        (title, patches(processor.config, pixels, visual), report)
        for title, visual, report in panels
    ]
    with atomically(file) as part:
        draw(views_of(processor, shown), panels, question).save(part, format="PNG")


def views_of(processor, shown: list) -> list[Image.Image]:
    """What the model sees of pictures, and of videos as lists of frames"""
    several = several_pictures(shown)
    return [processor.view(view, several and view is one) for one in shown for view in as_list(one)]


def patches(config, pixels: list, visual: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The tokens (h, w) at the patches of each picture or frame, numbered over all pictures.

    Of an AnyRes picture they are those of its tiles, without padding and newlines, or of the whole
    where it has no tiles.
    """
    found = []
    n = 0  # tokens of the pictures before
    for one, (x, at) in zip(pixels, visual):
        at = n + at.cpu()
        n += len(x)
        if isinstance(one, Tensor):
            g = config.vision_config.grid
            # a first patch that is dropped has no token; a class token is not drawn
            at = F.pad(at, (max(g * g - len(at), 0), 0), value=-1)
            found.append(at[-g * g :].view(g, g))
            continue

        shapes = one.grids(config)
        parts = at.split([h * w for h, w in shapes])
        parts = [part.view(shape) for part, shape in zip(parts, shapes)]
        tiles = parts[-1][:, :-1]
        if isinstance(one, Video) or not tiles.numel():
            found += parts[:-1]
        else:
            found.append(tiles)
    return found


# ---- The page ----


def draw(views: list[Image.Image], panels: list[tuple], question: str) -> Image.Image:
    """The question, below it the input, and a panel for each (title, grids, report).

    views: the pictures or frames as the model sees them; grids: from `patches`; report: with
    answer, visual_tokens and virtual_tokens. One picture has its panels to its right, in one row
    or, where that makes patches too small, in two; several have them below.
    """
    width = WIDTH - 2 * MARGIN
    shapes = [grid.shape for grid in panels[0][1]]
    several = len(views) > 1
    columns, cell, spots, (block_w, block_h) = arrange(shapes, len(panels), width)
    views = [
        view.convert("RGB").resize((cell * w, cell * h), Image.Resampling.LANCZOS)
        for view, (h, w) in zip(views, shapes)
    ]

    counts = [(report.visual_tokens, report.virtual_tokens) for _, _, report in panels]
    h, w = shapes[0]
    titles = [f"input: {len(views)} pictures" if several else f"input: {h} x {w} patches"]
    titles += [f"{title}: {n} of {N} tokens" for (title, _, _), (n, N) in zip(panels, counts)]

    # more than a class token or a newline for each
    undrawn = counts[0][1] - sum(h * w for h, w in shapes) > len(views)
    captions = [LEGEND + FADED * several + WHOLE * undrawn]
    captions += [report.answer.strip() or "(no answer)" for _, _, report in panels]

    above = Texts([question], (30, 26, 22, 18), width, most=2)
    titles = Texts(titles, (20, 18, 16), max(block_w, 200), most=1)
    captions = Texts(captions, (17, 16, 15, 14), max(block_w, 200), most=6)

    # the input, then the panels: beside it if there are columns for them, else below
    places = [(0, 0)]
    for i in range(len(panels)):
        places.append((1 + i % columns, i // columns) if columns else (0, 1 + i))
    tops = [MARGIN + above.height(0) + 20]
    for row in range(1 + places[-1][1]):
        heights = [
            titles.height(i) + captions.height(i)
            for i, place in enumerate(places)
            if place[1] == row
        ]
        tops.append(tops[-1] + block_h + 20 + max(heights) + MARGIN)

    canvas = Image.new("RGB", (WIDTH, tops[-1]), "white")
    pen = ImageDraw.Draw(canvas)
    above.draw(pen, 0, MARGIN, MARGIN - 6, INK)
    for i, (column, row) in enumerate(places):
        x = MARGIN + round(column * (width - block_w) / max(columns, 1))
        y = tops[row]
        for (dx, dy), view in zip(spots, merged(views, panels[i - 1][1]) if i else views):
            canvas.paste(view, (x + dx, y + dy))
            right = x + dx + view.width
            pen.rectangle((x + dx - 1, y + dy - 1, right, y + dy + view.height), outline=TRACK)

        y += block_h + 8
        if i:  # a bar: the share of the tokens that is left
            n, N = counts[i - 1]
            pen.rectangle((x, y, x + block_w - 1, y + 3), fill=TRACK)
            pen.rectangle((x, y, x + math.ceil(block_w * n / N) - 1, y + 3), fill=ACCENT)
        titles.draw(pen, i, x, y + 9, INK)
        captions.draw(pen, i, x, y + 11 + titles.height(i), SOFT)
    return canvas


def arrange(shapes: list[tuple[int, int]], panels: int, width: int):
    """How views of these patches (h, w) and their panels fill the width.

    -> panels beside the input (0: they are below), pixels of a patch's side, where each view is,
    (width, height) of all views
    """
    most_h = max(h for h, _ in shapes)
    most_w = max(w for _, w in shapes)
    along = math.ceil(len(shapes) / math.ceil(len(shapes) / 4))  # side by side, four at most
    for columns in (0,) if len(shapes) > 1 else (panels, math.ceil(panels / 2)):
        room = (width - columns * GAP) // (columns + 1) - (along - 1) * GAP
        # whole pixels, so that lines are sharp and even
        cell = max(min(room // along // most_w, 1000 // most_h), 1)
        if cell >= 10:
            break

    box_w = cell * most_w
    box_h = cell * most_h
    spots = [
        ((box_w + GAP) * (i % along), (box_h + GAP) * (i // along)) for i in range(len(shapes))
    ]
    block = (spots[along - 1][0] + box_w, spots[-1][1] + box_h)
    return columns, cell, spots, block


# ---- One picture with its tokens ----


def merged(views: list[Image.Image], tokens: list[Tensor]) -> list[Image.Image]:
    """The views with their tokens (h, w) filled and outlined; faded where they stood before"""
    seen = torch.zeros(0, dtype=torch.long)
    drawn = []
    for view, at in zip(views, tokens):
        old = torch.isin(at, seen)
        seen = torch.cat((seen, at.flatten())).unique()
        drawn.append(merged_view(view, at, old))
    return drawn


def merged_view(view: Image.Image, at: Tensor, old: Tensor) -> Image.Image:
    """at, old (h, w): the token at each patch, and whether it is faded"""
    w, h = view.size
    cell = w // at.shape[1]

    def at_pixels(x):
        return x.repeat_interleave(cell, 0).repeat_interleave(cell, 1)

    at = at_pixels(at.unique(return_inverse=True)[1])
    pixels = torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8).view(h, w, 3).float()
    area = torch.bincount(at.flatten())
    mean = torch.zeros(len(area), 3).index_add(0, at.flatten(), pixels.view(-1, 3))
    mean = mean / area[:, None]
    size = (area / cell**2)[at]  # in patches
    pixels = torch.where(size[..., None] == 1, pixels, mean[at])

    # a line is the first pixel behind a border; .T is a view of the same pixels
    line = torch.zeros_like(at, dtype=torch.bool)
    smaller = size.clone()  # of the two sizes at the border
    for a, b, s, t in ((line, at, smaller, size), (line.T, at.T, smaller.T, size.T)):
        a[1:] |= b[1:] != b[:-1]
        s[1:] = s[1:].minimum(t[:-1])
    strength = line * (0.65 - 0.1 * smaller.log2()).clamp(min=0.25)  # 1 patch .65, from 16 on .25
    dark = (mean @ torch.tensor([0.299, 0.587, 0.114]) < 75)[at]
    white_or_black = 255.0 * dark[..., None]
    pixels = torch.lerp(pixels, white_or_black, strength[..., None])

    faded = torch.lerp(pixels, torch.tensor(255.0), 0.8)
    pixels = torch.where(at_pixels(old)[..., None], faded, pixels)
    return Image.frombytes("RGB", (w, h), bytes(pixels.round().byte().flatten().tolist()))


# ---- Text ----


class Texts:
    """Texts wrapped to one width, in the first of the sizes that needs at most `most` lines."""

    def __init__(self, texts: list[str], sizes: tuple[int, ...], width: int, most: int):
        for size in sizes:
            self.font = ImageFont.load_default(size)
            self.leading = round(1.35 * size)
            self.lines = [wrap(text, self.font, width) for text in texts]
            if max(map(len, self.lines)) <= most:
                break

    def height(self, i: int) -> int:
        return self.leading * len(self.lines[i])

    def draw(self, pen: ImageDraw.ImageDraw, i: int, x: int, y: int, colour: str) -> None:
        for n, line in enumerate(self.lines[i]):
            pen.text((x, y + n * self.leading), line, colour, self.font)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than width: broken at spaces, inside a word only where it alone is wider.

    Pillow's own font has ASCII and little more: accents are dropped, and a character that it does
    not have becomes a box.
    """
    text = unicodedata.normalize("NFKD", text.translate(SPELLED))
    # no controls, no marks
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c)[0] not in "CM")

    lines = []
    line = ""
    for char in " ".join(text.split()):
        while line and font.getlength((line + char).rstrip()) > width:
            before, space, last = line.rpartition(" ")
            lines.append(before if space else line)
            line = last if space else ""
        line = (line + char).lstrip()
    return [*lines, line]
