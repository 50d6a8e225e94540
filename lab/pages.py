"""How large the page of `--show FILE.html` is, and how long a step of its slider takes.

    python -m lab.pages            # some minutes on 2 cores, with playwright and a Chromium; writes
                                   # lab/pages.json and prints its table
    python -m lab.pages --render   # only prints the table

Grids, encoder layers and positions are the real ones, four budgets, and an answer of 30 tokens; the
models are narrow and random, since a page has none of their weights. A step is what the page does
at one of the slider, and that the browser has painted it.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from dymu import DyMU
from extras import page
from extras.report import Measured
from extras.thresholds import BUDGETS, merges
from lab.shapes import SIZES, Prompt, build, decoder, find_shape
from lab.tables import head, line, spread
from lab.timing import command
from model import as_list

NARROW = dict(zip(SIZES[:2], (64, 128))) | dict(num_attention_heads=4)
SHOWN = {  # the shape, decoder layers, photos, frames
    "LLaVA-1.5, a photo": ("llava-1.5-7b", 32, 1, 0),
    "LLaVA-NeXT, a photo in tiles": ("llava-next-7b", 4, 1, 0),
    "LLaVA-1.5, eight photos": ("llava-1.5-7b", 4, 8, 0),
    "LLaVA-OneVision, a video of 8 frames": ("onevision-0.5b", 4, 1, 8),
}
STEPS = """async () => {
  const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const times = [];
  const slider = document.getElementById("step");
  for (let step = 0; step <= Number(slider.max); step++) {
    const start = performance.now();
    slider.value = step;
    slider.dispatchEvent(new Event("input"));
    await painted();
    times.push((performance.now() - start) / 1000);
  }
  return times;
}"""


def chromium() -> str | None:
    names = "chromium", "chromium-browser", "google-chrome", "chrome"
    return next(filter(None, map(shutil.which, names)), None)


def measure(a, device, dtype) -> dict:
    """Of each page its bytes, the seconds until it can be used, and those of each step"""
    from playwright.sync_api import sync_playwright

    at = chromium()
    if at is None:
        raise ValueError("there is no Chromium")
    found = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=at, args=["--no-sandbox"])
        for name, (shape, layers, photos, frames) in SHOWN.items():
            print(f"\r{name:<60}", end="", file=sys.stderr, flush=True)
            file = Path(folder) / f"{len(found)}.html"
            positions = write(file, find_shape(shape, layers), photos, frames, device, dtype)
            opened = browser.new_page(viewport=dict(width=1280, height=900), bypass_csp=True)
            start = time.perf_counter()
            opened.goto(file.as_uri())
            opened.wait_for_function("!document.body.inert")
            ready = time.perf_counter() - start
            opened.evaluate(STEPS)  # to warm up
            steps = opened.evaluate(STEPS)
            found[name] = dict(
                positions=positions, bytes=file.stat().st_size, ready=ready, steps=steps
            )
            opened.close()
        browser.close()
    print(file=sys.stderr)
    return dict(pages=found)


def write(file: Path, shape, photos: int, frames: int, device, dtype) -> int:
    """The page of the four budgets -> positions of what is shown"""
    text = shape.text | decoder(shape.text["model_type"], 256, 512, 0, 8, 2)
    text |= {name: shape.text[name] for name in ("num_hidden_layers", "vocab_size")}
    text |= dict(max_position_embeddings=8192)
    models = build(replace(shape, text=text, vision=shape.vision | NARROW), device, dtype)
    prompt = Prompt(models, photos, frames)
    processor = prompt.processor
    processor.prompt = lambda *_: prompt.ids  # words of lab/shapes.py are numbers

    sessions = {}
    reports = {}
    for budget in ("full", *BUDGETS):
        given = {} if budget == "full" else dict(r=merges(budget, prompt.config))
        settings = page.Recording(**vars(DyMU(**given)))
        session = Measured(prompt.ours, processor, as_list(prompt.pixels()), settings)
        sessions[budget] = session
        reports[budget] = session.reply(prompt.ids, 30)

    a = SimpleNamespace(show=file, model="", method="tome", pictures=[], max_new_tokens=30)
    a.temperature, a.seed = 0, 0
    shown = [prompt.shown] if frames else prompt.shown
    page.save(a, shown, None, sessions, reports, "what is this?")
    return prompt.N


def table(r: dict) -> str:
    """From the content of the JSON file alone"""
    out = [
        f"Pages of four budgets; {r['machine']}, {r['date']}. Median [least, most] of the slider's "
        "steps, in milliseconds, each until it is painted.",
        "",
        *head("page", "positions", "MB", "a step", "seconds to open"),
    ]
    for name, one in r["pages"].items():
        size = f"{one['bytes'] / 1e6:.2f}"
        cells = str(one["positions"]), size, spread(one["steps"], 1000), f"{one['ready']:.1f}"
        out.append(line(name, *cells))
    return "\n".join(out)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m lab.pages")
    beside = Path(__file__).with_name("pages.json")
    command(p, lambda *_: beside, measure, lambda r, _: table(r), argv=argv)


if __name__ == "__main__":
    main()
