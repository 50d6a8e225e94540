"""A picture of where the visual tokens went: the input, and beside it the same picture as merged by every budget.

Merged patches are filled with the mean colour of their token; a patch that kept a token of its own shows its pixels.
Lines between tokens are strong where the tokens are small, faint where they are large: they gather where detail stayed.
"""

import math
import unicodedata

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, MARGIN, GAP = 1200, 32, 16  # pixels; GAP is the least space between two pictures
INK, SOFT, TRACK, ACCENT = "#1c2430", "#4d5866", "#e4e8ed", "#e4572e"
LEGEND = "Flat colour: patches merged into one token. Pixels: a patch that kept a token of its own."
SPELLED = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "•": "·", "ß": "ss"})


def draw(picture: Image.Image, panels: list[tuple[str, Tensor, str]], question: str) -> Image.Image:
    """The question, below it the input, and to its right a panel for each (title, token_at (N,), answer): 1200 px wide.

    picture: square, as the model sees it. token_at: the token at each of N = g x g patches, row by row; of g x g + 1
    positions the first is the class token's and left out. The panels stand in one row, or where that makes patches
    too small, as four panels of 24 x 24 would be, in two.
    """
    grids = [grid(token_at) for _, token_at, _ in panels]
    g, width = len(grids[0]), WIDTH - 2 * MARGIN
    for columns in (len(panels), math.ceil(len(panels) / 2)):  # beside the input
        cell = (width - columns * GAP) // (columns + 1) // g  # pixels per patch, whole: so lines are sharp and even
        if cell >= 10:
            break
    side = cell * g
    step = (width - side) / columns  # from one picture to the next
    picture = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)

    counts = [int(at.max()) + 1 for at in grids]
    titles = [f"{title}: {n} of {g * g} tokens" for (title, _, _), n in zip(panels, counts)]
    answers = [answer.strip() or "(no answer)" for _, _, answer in panels]
    above = Texts([question], (30, 26, 22, 18), width, most=2)
    headings = Texts([f"input: {g} x {g} patches", *titles], (20, 18, 16), side, most=1)
    captions = Texts([LEGEND, *answers], (17, 16, 15, 14), side, most=6)
    places = [(0, 0)] + [(1 + i % columns, i // columns) for i in range(len(panels))]  # column, row
    tops = [MARGIN + above.height(0) + 20]
    for row in range(1 + places[-1][1]):
        texts = max(headings.height(i) + captions.height(i) for i, place in enumerate(places) if place[1] == row)
        tops.append(tops[-1] + side + 20 + texts + MARGIN)

    canvas = Image.new("RGB", (WIDTH, tops[-1]), "white")
    pen = ImageDraw.Draw(canvas)
    above.draw(pen, 0, MARGIN, MARGIN - 6, INK)
    for i, (column, row) in enumerate(places):
        x, y = MARGIN + round(column * step), tops[row]
        canvas.paste(merged(picture, grids[i - 1]) if i else picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline=TRACK)
        y += side + 8
        if i:  # a bar: the share of the tokens that is left
            pen.rectangle((x, y, x + side - 1, y + 3), fill=TRACK)
            pen.rectangle((x, y, x + math.ceil(side * counts[i - 1] / g**2) - 1, y + 3), fill=ACCENT)
        headings.draw(pen, i, x, y + 9, INK)
        captions.draw(pen, i, x, y + 11 + headings.height(i), SOFT)
    return canvas


def grid(token_at: Tensor) -> Tensor:
    """token_at (N,) -> (g, g), its tokens numbered from 0."""
    N, g = len(token_at), math.isqrt(len(token_at))
    if g == 0 or N - g * g not in (0, 1):
        raise ValueError(f"token_at has {N} positions, wanted a square number of patches, or one more (class token)")
    return token_at[N - g * g :].cpu().unique(return_inverse=True)[1].view(g, g)


def merged(picture: Image.Image, at: Tensor) -> Image.Image:
    """The picture with the tokens of at (g, g) filled and outlined; its sides are a multiple of g."""
    side, cell = picture.width, picture.width // len(at)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(side, side, 3).float()
    at = at.repeat_interleave(cell, 0).repeat_interleave(cell, 1)  # the token at every pixel
    area = torch.bincount(at.flatten())
    mean = torch.zeros(len(area), 3).index_add(0, at.flatten(), pixels.view(-1, 3)) / area[:, None]
    size = (area / cell**2)[at]  # in patches
    pixels = torch.where(size[..., None] == 1, pixels, mean[at])

    line, smaller = torch.zeros_like(at, dtype=torch.bool), size.clone()  # the first pixel right of a border, or below
    for a, b, s, t in ((line, at, smaller, size), (line.T, at.T, smaller.T, size.T)):  # .T is a view: the same pixels
        a[1:] |= b[1:] != b[:-1]
        s[1:] = s[1:].minimum(t[:-1])
    strength = line * (0.65 - 0.1 * smaller.log2()).clamp(min=0.25)  # of the smaller token: 1 patch .65, from 16 on .25
    dark = (mean @ torch.tensor([0.299, 0.587, 0.114]) < 75)[at]
    pixels = torch.lerp(pixels, 255.0 * dark[..., None], strength[..., None])  # white lines on dark tokens, else black
    return Image.frombytes("RGB", (side, side), bytes(pixels.round().byte().flatten().tolist()))


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
