"""Asks a LLaVA checkpoint about pictures or a video, with the visual tokens of a budget."""

import sys

from extras import options

if __name__ == "__main__":
    import os
    import signal
    import warnings

    # before torch is imported, which takes seconds: Ctrl-C, --help, and what is wrong
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    options.parse(sys.argv[1:])
    sys.stdout.reconfigure(errors="backslashreplace")
    # torch warns where NumPy is not installed, Pillow of large pictures; neither is needed here
    warnings.simplefilter("ignore")

import json
from dataclasses import asdict
from functools import partial

import torch
from huggingface_hub.utils import tqdm

from extras import calibrate, chat, page, show, thresholds, video
from extras.anyres import placeholders, positions
from extras.control import control
from extras.decoding import sampler
from extras.devices import announce_memory, choose_device
from extras.door import announce_download, check_writable, find, one_line
from extras.options import note
from extras.report import Measured, Report
from load import load_model, load_processor


def main(argv: list[str] | None = None) -> None:
    a = options.parse(sys.argv[1:] if argv is None else argv)
    try:
        if a.threads is not None:
            torch.set_num_threads(a.threads)
        if a.calibrate is None:
            answer(a)
        else:
            calibrate.calibrate_folder(a)
    except BrokenPipeError:  # whoever read the answers has gone
        options.hang_up()
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        options.fail(one_line(e))
    except KeyboardInterrupt:
        sys.exit(130)


def answer(a) -> None:
    """a: the options"""
    if a.show:
        check_writable(a.show)
    device = choose_device(a.device)

    # pictures, and videos as lists of frames
    shown = [video.read_any(one, a.frames) for one in a.pictures]
    folder = find(a.model, announce_download)
    processor = load_processor(folder, a.pad)
    settings = thresholds.settings(a, folder, processor)
    pixels = video.see(processor, shown)
    controlled, masks = control(a, processor, shown, pixels)

    # what is wrong with the first prompt is told before a long load
    first, questions = chat.questions(a.question, a.chat)
    ids = processor.prompt(first, pixels)
    if a.vtu != "off":
        config = processor.config
        config.check_length(len(ids) - placeholders(pixels) + positions(pixels, config))

    progress = partial(tqdm, desc="loading", delay=3, disable=None)
    llava = load_model(folder, device, a.dtype, announce_memory, progress)
    new_session = partial(Measured, llava, processor, controlled, expand=a.expand_cache)

    several = len(settings) > 1
    if several:  # the times are to be compared: each shape is met once before it is timed
        for one in settings.values():
            new_session(one).reply(ids, max_new_tokens=2)
    if page.asked(a):
        settings = {name: page.Recording(**vars(one)) for name, one in settings.items()}
    sessions = {name: new_session(one) for name, one in settings.items()}

    for question in questions:
        with chat.unless_stopped(a):
            reports = reply(a, sessions, question)
            if a.chat:
                for name, report in reports.items():
                    sessions[name].turns.append((question, report.answer))
    if a.show:
        save = page.save if page.asked(a) else show.save
        save(a, shown, masks, sessions, reports, question)
        note(f"wrote {a.show}")


def reply(a, sessions: dict[str, Measured], question: str) -> dict[str, Report]:
    """Prints the answer with each budget, and what it cost"""
    several = len(sessions) > 1
    if several and not a.json:
        print(f"{' '.join(a.pictures)}: {question}", flush=True)

    reports = {}
    for name, session in sessions.items():
        ids = session.prompt(question)
        pick = sampler(a.temperature, a.seed, session.visual[0][0].device)
        stream = None if several or a.json else partial(print, end="", flush=True)
        stoppable = chat.a_person_asks(a) and not several
        report = session.reply(ids, a.max_new_tokens, pick, stream, stoppable)
        reports[name] = report

        if a.json:
            told = {"model": a.model, "tokens": name, "method": a.method, "vtu": a.vtu}
            told |= {"images": a.pictures, "question": question}
            print(json.dumps(told | asdict(report)), flush=True)
        elif several:
            print(report.row(name), flush=True)
        else:
            print(flush=True)
            print(report, file=sys.stderr, flush=True)
    return reports


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
