"""A picture of where the visual tokens went: the input, and beside it what every budget merged.

For `--show`. Merged patches are filled with the mean colour of their token; a patch that kept a
token of its own shows its pixels. Lines between tokens are strong where the tokens are small, faint
where they are large: they gather where detail stayed.
"""

import contextlib
import math
from unicodedata import category, normalize

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from extras.anyres import AnyResProcessor
from extras.control import plain, unnormalised
from extras.door import atomically
from extras.options import note
from extras.video import Frames, several_pictures
from load import width_height
from model import as_list

# pixels; GAP is the least space between two pictures
WIDTH = 1200
TALLEST = 1600  # a page of several pictures, unless text or hundreds of frames fill it
MARGIN = 32
GAP = 16

INK = "#1c2430"
SOFT = "#4d5866"
TRACK = "#e4e8ed"
ACCENT = "#e4572e"

LEGEND = "Flat colour: patches merged into one token. Pixels: a patch that kept a token of its own."
FADED = " Faded: the token stands in an earlier picture or frame."
WHOLE = " Counted, not drawn: the view of the whole, newlines."

# of Linux, Windows and macOS, for what Pillow's own font does not have
FONTS = (
    "DejaVuSans, NotoSans-Regular, segoeui, tahoma, NotoSansCJK-Regular, wqy-microhei, malgun, "
    "DroidSansFallbackFull, msyh, Arial Unicode, Hiragino Sans GB, Nirmala, Symbola_hint, seguisym"
)
SPELLED = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "•": "·", "ß": "ss"})


def save(a, shown: list, masks, sessions: dict, reports: dict, question: str) -> None:
    """a: the options; shown: pictures, and videos as lists of frames; masks: of each regions to be
    outlined, or None; sessions, reports: of each budget the `Measured` session and what it
    answered"""
    panels = []
    for name, one in sessions.items():
        processor = one.processor
        grids = patches(processor.config, one.pixels, one.visual)
        panels.append((name, grids, reports[name]))
    _, _, first = panels[0]
    if len(panels) > 1 and first.visual_tokens == first.virtual_tokens:
        panels = panels[1:]  # the input itself shows what full is

    views = views_of(processor, shown)
    frames = sum(len(one) for one in shown if isinstance(one, list))
    masks = regions_of(processor, masks)
    with atomically(a.show) as part:
        page = draw(views, panels, question, frames, crops(processor, shown), masks)
        page.save(part, format="PNG")


def views_of(processor, shown: list) -> list[Image.Image]:
    """What the model sees of pictures, and of videos as lists of frames"""
    several = several_pictures(shown)
    return [processor.view(view, several and view is one) for one in shown for view in as_list(one)]


def regions_of(processor, masks: list | None) -> list[Image.Image]:
    """The same of masks, in black and white"""
    return views_of(unnormalised(processor), masks or [])


def crops(processor, shown: list) -> str:
    """Says how large what loses more than a fifth of its area to the centre crop was, if any is."""
    p = processor.pictures
    if isinstance(processor, AnyResProcessor) or processor.pad or not p["do_center_crop"]:
        return ""

    sizes = []
    for picture in [picture for one in shown for picture in as_list(one)]:
        w, h = width_height(p["size"], picture.size) if p["do_resize"] else picture.size
        crop_w, crop_h = width_height(p["crop_size"])
        if min(w, crop_w) * min(h, crop_h) < 0.8 * w * h:
            sizes.append(f"{picture.width} x {picture.height}")
    return f"Cropped from {', '.join(dict.fromkeys(sizes))}. " if sizes else ""


def patches(config, pixels: list, visual: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The tokens (h, w) at the patches of each picture or frame, numbered over all pictures.

    Of an AnyRes picture they are those of its tiles, without padding and newlines, or of the whole
    where it has no tiles.
    """
    found = []
    n = 0  # tokens of the pictures before
    pixels = [
        view for one in plain(pixels) for view in (one.frames if type(one) is Frames else [one])
    ]
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
        found += [tiles] if tiles.numel() else parts[:-1]  # of a video: its frames
    return found


# ---- The page ----


def draw(views, panels, question, frames: int = 0, cropped: str = "", masks=()) -> Image.Image:
    """The question, below it the input, and a panel for each (title, grids, report).

    views: the pictures or frames as the model sees them, and how many of them are frames; grids:
    from `patches`; report: with answer, visual_tokens and virtual_tokens; cropped: from `crops`;
    masks: of regions in the views, or nothing.
    """
    shapes = [grid.shape for grid in panels[0][1]]
    columns, room = arrange(shapes, len(panels))
    titles, captions = words(panels, frames, cropped)
    above = Texts([question], (30, 26, 22, 18), WIDTH - 2 * MARGIN, most=2)
    titles = Texts(titles, (20, 18, 16), room, most=1)
    captions = Texts(captions, (17, 16, 15, 14), room, most=6)
    missing = above.missing | titles.missing | captions.missing
    if missing:
        note(f"note: no font found for {' '.join(sorted(missing))}, drawn as boxes")

    # the input, then the panels: beside it if there are columns for them, else below
    places = [(0, 0)]
    for i in range(len(panels)):
        places.append((1 + i % columns, i // columns) if columns else (0, 1 + i))
    top = MARGIN + above.height(0) + 20
    below = [0] * (1 + places[-1][1])  # what each row needs below its views
    for i, (_, row) in enumerate(places):
        below[row] = max(below[row], 20 + titles.height(i) + captions.height(i) + MARGIN)

    most = 1000 if len(views) == 1 else max((TALLEST - top - sum(below)) // len(below), 100)
    block_h, spots = gallery(shapes, room, most)
    views = [
        view.convert("RGB").resize((cell * w, cell * h), Image.Resampling.LANCZOS)
        for view, (h, w), (_, _, cell) in zip(views, shapes, spots)
    ]

    lines = [outline(mask, view.size) for mask, view in zip(masks, views)]

    canvas = Image.new("RGB", (WIDTH, top + sum(below) + len(below) * block_h), "white")
    pen = ImageDraw.Draw(canvas)
    above.draw(pen, 0, MARGIN, MARGIN - 6, INK)
    for i, (column, row) in enumerate(places):
        x = MARGIN + round(column * (WIDTH - 2 * MARGIN - room) / max(columns, 1))
        y = top + row * block_h + sum(below[:row])
        for (dx, dy, _), view in zip(spots, merged(views, panels[i - 1][1]) if i else views):
            canvas.paste(ImageOps.expand(view, 1, TRACK), (x + dx - 1, y + dy - 1))
        for (dx, dy, _), line in zip(spots, lines):
            canvas.paste(ACCENT, (x + dx, y + dy), line)

        y += block_h + 8
        if i:  # a bar: the share of the tokens that is left
            report = panels[i - 1][2]
            left = math.ceil(room * report.visual_tokens / report.virtual_tokens)
            pen.rectangle((x, y, x + room - 1, y + 3), fill=TRACK)
            pen.rectangle((x, y, x + left - 1, y + 3), fill=ACCENT)
        titles.draw(pen, i, x, y + 9, INK)
        captions.draw(pen, i, x, y + 11 + titles.height(i), SOFT)
    return canvas


def words(panels: list[tuple], frames: int, cropped: str) -> tuple[list[str], list[str]]:
    """-> the titles and the captions of the input and the panels, see `draw`"""
    grids = panels[0][1]
    kinds = {"picture": len(grids) - frames, "frame": frames}
    contents = ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in kinds.items() if n)
    if len(grids) == 1:
        contents = "{} x {} patches".format(*grids[0].shape)

    faded = any(old.any() for _, grids, _ in panels for old in stood_before(grids))
    # more than a class token or a newline for each
    undrawn = panels[0][2].virtual_tokens - sum(grid.numel() for grid in grids) > len(grids)

    titles = [f"input: {contents}"]
    captions = [cropped + LEGEND + FADED * faded + WHOLE * undrawn]
    for title, _, report in panels:
        titles.append(f"{title}: {report.visual_tokens} of {report.virtual_tokens} tokens")
        captions.append(report.answer.strip() or "(no answer)")
    return titles, captions


def arrange(shapes: list[tuple[int, int]], panels: int) -> tuple[int, int]:
    """How many panels stand beside the input (0: they are below), and the width of each, pixels.

    shapes: the patches (h, w) of each view. One view has its panels beside it, in one row or, where
    that makes patches too small, in two; several have them below, unless they are but few.
    """
    width = WIDTH - 2 * MARGIN
    if len(shapes) > 1:
        columns = panels if sum(w / h for h, w in shapes) <= panels else 0
        return columns, (width - columns * GAP) // (columns + 1)

    for columns in (panels, math.ceil(panels / 2)):
        room = (width - columns * GAP) // (columns + 1)
        _, ((_, _, cell),) = gallery(shapes, room)
        if cell >= 10:
            break
    return columns, max(cell * shapes[0][1], 200)


def gallery(shapes: list[tuple[int, int]], room: int, most: int = 1000):
    """Views of these patches (h, w) in rows, all about equally high: large, and with few holes.

    room, most: the width and the height there is, pixels -> the height of all; for each view where
    it is and the side of its patches, (x, y, cell)
    """
    found = []
    for height in range(1, most + 1):
        spots = []
        x = y = bottom = area = 0
        for h, w in shapes:
            # whole pixels, so that lines are sharp and even
            cell = max(min(height // h, room // w), 1)
            if x and x + cell * w > room:
                x, y = 0, bottom + GAP
            spots.append((x, y, cell))
            x += cell * w + GAP
            bottom = max(bottom, y + cell * h)
            area += cell * h * cell * w
        full = area / (room * bottom)
        found.append((min(most - bottom, 0), area * full**2, bottom, spots))
    return max(found)[2:]


# ---- One picture with its tokens ----


def merged(views: list[Image.Image], tokens: list[Tensor]) -> list[Image.Image]:
    """The views with their tokens (h, w) filled and outlined; faded where they stood before"""
    return [merged_view(*one) for one in zip(views, tokens, stood_before(tokens))]


def stood_before(tokens: list[Tensor]) -> list[Tensor]:
    """Of the token at each patch: whether it stands in an earlier view, too"""
    seen = torch.zeros(0, dtype=torch.long)
    before = []
    for at in tokens:
        before.append(torch.isin(at, seen))
        seen = torch.cat((seen, at[at >= 0])).unique()  # -1 is no token
    return before


def merged_view(view: Image.Image, at: Tensor, old: Tensor) -> Image.Image:
    """at, old (h, w): the token at each patch, and whether it is faded"""
    w, h = view.size
    cell = w // at.shape[1]

    at = at.unique(return_inverse=True)[1]
    at, old = (x.repeat_interleave(cell, 0).repeat_interleave(cell, 1) for x in (at, old))
    pixels = torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8).view(h, w, 3).float()
    area = torch.bincount(at.flatten())
    mean = torch.zeros(len(area), 3).index_add(0, at.flatten(), pixels.view(-1, 3)) / area[:, None]
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
    pixels = torch.lerp(pixels, 255.0 * dark[..., None], strength[..., None])  # white or black

    faded = torch.lerp(pixels, torch.tensor(255.0), 0.8)
    pixels = torch.where(old[..., None], faded, pixels)
    return Image.frombytes("RGB", (w, h), bytes(pixels.round().byte().flatten().tolist()))


def outline(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The rim of what is white in a mask, as a mask of this size"""
    white = mask.convert("L").resize(size).point(lambda v: 255 * (v > 127))
    inner = ImageOps.expand(white, 2).filter(ImageFilter.MinFilter(5))
    return ImageChops.subtract(white, ImageOps.crop(inner, 2))


# ---- Text ----


class Texts:
    """Texts wrapped to one width, in the first of the sizes that needs at most `most` lines."""

    def __init__(self, texts: list[str], sizes: tuple[int, ...], width: int, most: int):
        texts = [readable(text) for text in texts]
        self.missing = set().union(*(lacks(*one) for one in texts))
        for size in sizes:
            self.leading = round(1.35 * size)
            self.fonts = [font.font_variant(size=size) for _, font in texts]
            self.lines = [wrap(text, font, width) for (text, _), font in zip(texts, self.fonts)]
            if max(map(len, self.lines)) <= most:
                break

    def height(self, i: int) -> int:
        return self.leading * len(self.lines[i])

    def draw(self, pen: ImageDraw.ImageDraw, i: int, x: int, y: int, colour: str) -> None:
        for n, line in enumerate(self.lines[i]):
            pen.text((x, y + n * self.leading), line, colour, self.fonts[i])


def readable(text: str) -> tuple[str, ImageFont.FreeTypeFont]:
    """A text on one line, and the first font that has its characters: Pillow's own or a system's.

    Where none has all: the one that lacks least, or Pillow's own with the text without accents.
    """
    text = normalize("NFC", " ".join(text.split()))
    # no controls, and nothing that selects an emoji's looks
    text = "".join(c for c in text if category(c)[0] != "C" and c not in "\ufe0e\ufe0f")
    plain = normalize("NFKD", text.translate(SPELLED))
    plain = "".join(c for c in plain if category(c)[0] != "M")

    own = ImageFont.load_default(20)
    choices = [(text, own), (plain, own)]
    for name in FONTS.split(", ") if lacks(text, own) else []:
        with contextlib.suppress(OSError):  # there is none, or none that has any size
            choices.insert(-1, (text, ImageFont.truetype(name, 20)))

    return min(choices, key=lambda one: len(lacks(*one)))


def lacks(text: str, font: ImageFont.FreeTypeFont) -> set[str]:
    """The characters that the font draws like one that no font has"""
    drawn = {c: bytes(font.getmask(c)) for c in {*text, "\uffff"}}
    return {c for c in text if drawn[c] == drawn["\uffff"] and not c.isspace()}


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than width: broken at spaces, inside a word only where it alone is wider."""
    lines = []
    line = ""
    for char in text:
        while line and font.getlength((line + char).rstrip()) > width:
            before, space, last = line.rpartition(" ")
            lines.append(before if space else line)
            line = last if space else ""
        line = (line + char).lstrip()
    return [*lines, line]
