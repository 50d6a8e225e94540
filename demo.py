"""Asks a LLaVA checkpoint about pictures or a video, with the visual tokens of a budget."""

import warnings

if __name__ == "__main__":
    # torch warns where NumPy is not installed, Pillow of large pictures; neither is needed here
    warnings.simplefilter("ignore")

import json
import sys
import time
from dataclasses import asdict
from functools import partial

import torch
from huggingface_hub.utils import tqdm

from dymu import DyMU
from extras import options, show, thresholds, video
from extras.anyres import positions
from extras.decoding import prefill_expanded, sampler
from extras.door import announce_download, choose_device, find, note, one_line
from extras.report import Report, count_tokens
from load import load_model, load_processor
from model import KVCache, as_list


def main(argv: list[str] | None = None) -> None:
    a = options.parse(sys.argv[1:] if argv is None else argv)
    try:
        if a.threads is not None:
            torch.set_num_threads(a.threads)
        if a.calibrate is None:
            answer(a)
        else:
            thresholds.calibrate_folder(a)
    except (ValueError, OSError) as e:
        options.fail(one_line(e))
    except KeyboardInterrupt:
        sys.exit(130)


def answer(a) -> None:
    """a: the options"""
    *inputs, question = a.inputs
    device = choose_device(a.device)

    # pictures, and videos as lists of frames
    shown = [video.read_any(one, a.frames) for one in inputs]
    if a.temporal is not None and sum(len(as_list(one)) for one in shown) < 2:
        raise ValueError("--temporal needs a video or several pictures")

    folder = find(a.model, announce_download)
    processor = load_processor(folder, a.pad)
    settings = options.settings(a, folder, processor)

    # what is wrong with the prompt is told before a long load
    pixels = video.see(processor, shown)
    ids = processor.prompt(question, pixels)
    config = processor.config
    if a.vtu != "off":
        config.check_length(len(ids) - len(pixels) + positions(pixels, config))

    progress = partial(tqdm, desc="loading", delay=3, disable=None)
    llava = load_model(folder, device, a.dtype, progress=progress)

    several = len(settings) > 1
    stream = not several and not a.json
    if several and not a.json:
        print(f"{' '.join(inputs)}: {question}")

    panels = []
    for name, one in settings.items():
        if several:  # the times are to be compared: each shape is met once before it is timed
            ask(llava, processor, pixels, ids, one, a, max_new_tokens=2)
        report, visual = ask(llava, processor, pixels, ids, one, a, a.max_new_tokens, stream)

        if a.json:
            told = {"model": a.model, "tokens": name, "method": a.method, "vtu": a.vtu}
            print(json.dumps(told | asdict(report)))
        else:
            print(report.row(name) if several else report)

        # of the four budgets the input itself shows what full is
        if a.show and (name != "full" or not several or a.temporal is not None):
            panels.append((name, visual, report))

    if a.show:
        show.save(a.show, processor, shown, pixels, panels, question)
        note(f"wrote {a.show}")


def ask(llava, processor, pixels, ids, settings: DyMU, a, max_new_tokens: int, stream=False):
    """Answers once, and prints the answer as it comes if it is to stream.

    a: the options -> its Report, and what `Llava.encode` gave
    """
    tokens_per_layer, hooks = count_tokens(llava)
    new = []  # ids of the answer
    printed = ""
    with torch.inference_mode():
        start = time.perf_counter()
        visual = video.encode(llava, pixels, settings, a.temporal)
        where = visual[0][0].device
        if where.type != "cpu":
            torch.accelerator.synchronize(where)
        encoded = time.perf_counter()

        rows, token_at = llava.splice(ids, visual, settings.vtu)
        cache = KVCache()
        pick = sampler(a.temperature, a.seed, rows.device)
        if a.expand_cache:
            rows, token_at = prefill_expanded(llava, rows, token_at, cache, settings.queries)

        more = dict(max_new_tokens=max_new_tokens, pick=pick)
        for id in llava.decode(rows, token_at, cache, settings.queries, **more):
            if not new:
                prefilled = time.perf_counter()
            new.append(id)

            text = processor.decode(new) if stream else ""
            if text and not text.endswith("\ufffd"):  # else more bytes of a character are to come
                print(text[len(printed) :], end="", flush=True)
                printed = text
        end = time.perf_counter()

    text = processor.decode(new)
    if stream:
        print(text[len(printed) :])
    for hook in hooks:
        hook.remove()

    report = Report(
        answer=text,
        visual_tokens=sum(len(x) for x, _ in visual),
        virtual_tokens=sum(len(at) for _, at in visual),
        tokens_per_layer=tokens_per_layer,
        encoder_s=encoded - start,
        prefill_s=prefilled - encoded,
        decode_tokens_per_s=(len(new) - 1) / (end - prefilled),
        cache_bytes=cache.bytes,
        device=str(rows.device),
        dtype=str(rows.dtype).removeprefix("torch."),
    )
    return report, visual


if __name__ == "__main__":
    main()
