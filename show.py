"""A picture of where the visual tokens went: the input, and beside it the same picture as merged by every budget.

Merged patches are filled with the mean colour of their token; a patch that kept a token of its own shows its pixels.
Lines between tokens are strong where the tokens are small, faint where they are large: they gather where detail stayed.
"""

import math
import unicodedata

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from anyres import Video, grids

WIDTH, MARGIN, GAP = 1200, 32, 16  # pixels; GAP is the least space between two pictures
INK, SOFT, TRACK, ACCENT = "#1c2430", "#4d5866", "#e4e8ed", "#e4572e"
LEGEND = "Flat colour: patches merged into one token. Pixels: a patch that kept a token of its own."
WHOLE = " Counted, not drawn: the view of the whole, newlines."
FADED = " Faded: the token stands in an earlier picture."
SPELLED = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "•": "·", "ß": "ss"})


def draw(views: list[Image.Image], panels: list[tuple], question: str) -> Image.Image:
    """The question, below it the input, and a panel for each (title, grids, report), 1200 px wide.

    views: the pictures or frames as the model sees them; grids: the tokens (h, w) at the patches of each, from
    `patches`; report: with answer, visual_tokens and virtual_tokens. One picture has its panels to its right, in one
    row, or where that makes patches too small, as four panels of 24 x 24 would be, in two; several have them below.
    """
    shapes, width, several = [grid.shape for grid in panels[0][1]], WIDTH - 2 * MARGIN, len(views) > 1
    most_h, most_w = (max(side) for side in zip(*shapes))
    beside = (0,) if several else (len(panels), math.ceil(len(panels) / 2))  # panels to the right of the input
    along = math.ceil(len(views) / math.ceil(len(views) / 4))  # views side by side, four at most
    for columns in beside:
        room = (width - columns * GAP) // (columns + 1) - (along - 1) * GAP
        cell = max(min(room // along // most_w, 1000 // most_h), 1)  # pixels per patch, whole: lines are sharp and even
        if cell >= 10:
            break
    box_w, box_h = cell * most_w, cell * most_h
    spots = [((box_w + GAP) * (i % along), (box_h + GAP) * (i // along)) for i in range(len(views))]
    block_w, block_h = spots[along - 1][0] + box_w, spots[-1][1] + box_h
    views = [
        v.convert("RGB").resize((cell * w, cell * h), Image.Resampling.LANCZOS) for v, (h, w) in zip(views, shapes)
    ]

    (h, w), counts = shapes[0], [(report.visual_tokens, report.virtual_tokens) for _, _, report in panels]
    titles = [f"{title}: {n} of {N} tokens" for (title, _, _), (n, N) in zip(panels, counts)]
    answers = [report.answer.strip() or "(no answer)" for _, _, report in panels]
    above = Texts([question], (30, 26, 22, 18), width, most=2)
    heading = f"input: {len(views)} pictures" if several else f"input: {h} x {w} patches"
    headings = Texts([heading, *titles], (20, 18, 16), max(block_w, 200), most=1)
    undrawn = counts[0][1] - sum(h * w for h, w in shapes) > len(views)  # more than a class token or a newline each
    captions = Texts(
        [LEGEND + FADED * several + WHOLE * undrawn, *answers], (17, 16, 15, 14), max(block_w, 200), most=6
    )
    places = [(0, 0)] + [(1 + i % columns, i // columns) if columns else (0, 1 + i) for i in range(len(panels))]
    tops = [MARGIN + above.height(0) + 20]
    for row in range(1 + places[-1][1]):
        texts = max(headings.height(i) + captions.height(i) for i, place in enumerate(places) if place[1] == row)
        tops.append(tops[-1] + block_h + 20 + texts + MARGIN)

    canvas = Image.new("RGB", (WIDTH, tops[-1]), "white")
    pen = ImageDraw.Draw(canvas)
    above.draw(pen, 0, MARGIN, MARGIN - 6, INK)
    for i, (column, row) in enumerate(places):
        x, y = MARGIN + round(column * (width - block_w) / max(columns, 1)), tops[row]
        for (dx, dy), view in zip(spots, merged(views, panels[i - 1][1]) if i else views):
            canvas.paste(view, (x + dx, y + dy))
            pen.rectangle((x + dx - 1, y + dy - 1, x + dx + view.width, y + dy + view.height), outline=TRACK)
        y += block_h + 8
        if i:  # a bar: the share of the tokens that is left
            n, N = counts[i - 1]
            pen.rectangle((x, y, x + block_w - 1, y + 3), fill=TRACK)
            pen.rectangle((x, y, x + math.ceil(block_w * n / N) - 1, y + 3), fill=ACCENT)
        headings.draw(pen, i, x, y + 9, INK)
        captions.draw(pen, i, x, y + 11 + headings.height(i), SOFT)
    return canvas


def patches(config, pixels: list, visual: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """What `Llava.encode` gave for pixels -> the tokens (h, w) at the patches of each picture or frame: of an AnyRes
    picture at its tiles, without padding and newlines, or at the whole where it has no tiles."""
    found = []
    for one, (_, at) in zip(pixels, visual):
        if isinstance(one, Tensor):
            g = config.vision_config.grid
            at = F.pad(at.cpu(), (max(g * g - len(at), 0), 0), value=-1)  # without its first patch, as some drop it
            found.append(at[-g * g :].view(g, g))  # behind the class token, if it is there
            continue
        shapes = grids(one, config)
        parts = [part.view(shape) for part, shape in zip(at.cpu().split([h * w for h, w in shapes]), shapes)]
        tiles = parts[-1][:, :-1]
        found += parts[:-1] if isinstance(one, Video) or not tiles.numel() else [tiles]
    return found


def merged(views: list[Image.Image], tokens: list[Tensor]) -> list[Image.Image]:
    """The views with their tokens (h, w) filled and outlined; what stands in an earlier view too is faded."""
    seen, drawn = torch.zeros(0, dtype=torch.long), []
    for view, at in zip(views, tokens):
        w, h, cell = *view.size, view.width // at.shape[1]
        old = torch.isin(at, seen)
        seen = torch.cat((seen, at.flatten())).unique()
        at = at.unique(return_inverse=True)[1].repeat_interleave(cell, 0).repeat_interleave(cell, 1)  # at every pixel
        pixels = torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8).view(h, w, 3).float()
        area = torch.bincount(at.flatten())
        mean = torch.zeros(len(area), 3).index_add(0, at.flatten(), pixels.view(-1, 3)) / area[:, None]
        size = (area / cell**2)[at]  # in patches
        pixels = torch.where(size[..., None] == 1, pixels, mean[at])

        line, smaller = torch.zeros_like(at, dtype=torch.bool), size.clone()  # at a border, the first pixel behind it
        rows, columns = (line, at, smaller, size), (line.T, at.T, smaller.T, size.T)  # .T is a view: the same pixels
        for a, b, s, t in (rows, columns):
            a[1:] |= b[1:] != b[:-1]
            s[1:] = s[1:].minimum(t[:-1])
        strength = line * (0.65 - 0.1 * smaller.log2()).clamp(min=0.25)  # of the smaller: 1 patch .65, from 16 on .25
        dark = (mean @ torch.tensor([0.299, 0.587, 0.114]) < 75)[at]
        pixels = torch.lerp(pixels, 255.0 * dark[..., None], strength[..., None])  # white lines on dark, else black
        old = old.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        pixels = torch.where(old[..., None], torch.lerp(pixels, torch.tensor(255.0), 0.8), pixels)
        drawn.append(Image.frombytes("RGB", (w, h), bytes(pixels.round().byte().flatten().tolist())))
    return drawn


class Texts:
    """Texts wrapped to one width, in the first of the sizes that needs at most `most` lines for each, else the last."""

    def __init__(self, texts: list[str], sizes: tuple[int, ...], width: int, most: int):
        for size in sizes:
            self.font, self.leading = ImageFont.load_default(size), round(1.35 * size)
            self.lines = [wrap(text, self.font, width) for text in texts]
            if max(map(len, self.lines)) <= most:
                break

    def height(self, i: int) -> int:
        return self.leading * len(self.lines[i])

    def draw(self, pen: ImageDraw.ImageDraw, i: int, x: int, y: int, colour: str) -> None:
        for n, line in enumerate(self.lines[i]):
            pen.text((x, y + n * self.leading), line, colour, self.font)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than width: broken at spaces, inside a word only where the word alone is wider.

    Pillow's own font has ASCII and little more: accents are dropped, and a character it does not have becomes a box.
    """
    text = unicodedata.normalize("NFKD", text.translate(SPELLED))
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c)[0] not in "CM")  # no controls, no marks
    lines, line = [], ""
    for char in " ".join(text.split()):
        while line and font.getlength((line + char).rstrip()) > width:
            before, space, last = line.rpartition(" ")
            lines.append(before if space else line)
            line = last if space else ""
        line = (line + char).lstrip()
    return [*lines, line]
