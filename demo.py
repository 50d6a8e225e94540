"""Asks a LLaVA checkpoint about pictures or a video, with the visual tokens of a budget."""

import warnings

if __name__ == "__main__":
    # torch warns where NumPy is not installed, Pillow of large pictures; neither is needed here
    warnings.simplefilter("ignore")

import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch
from huggingface_hub.utils import tqdm
from PIL import Image

from dymu import DyMU
from extras import options, show, thresholds, video
from extras.anyres import positions
from extras.decoding import prefill_expanded, sampler
from extras.door import announce_download, choose_device, find, note, one_line, read_picture
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
    shown = [read(one, a.frames) for one in inputs]  # pictures, and videos as lists of frames
    folder = find(a.model, announce_download)
    processor = load_processor(folder, a.pad)
    settings = options.settings(a, folder, processor)

    # what is wrong with the prompt is told before a long load
    pixels = see(processor, shown)
    ids = processor.prompt(question, pixels)
    config = processor.config
    if a.vtu != "off":
        config.check_length(len(ids) - len(pixels) + positions(pixels, config))
    if a.temporal is not None and sum(len(as_list(one)) for one in shown) < 2:
        raise ValueError("--temporal needs a video or several pictures")

    progress = partial(tqdm, desc="loading", delay=3, disable=None)
    llava = load_model(folder, device, a.dtype, progress=progress)
    several = len(settings) > 1
    if several and not a.json:
        print(f"{' '.join(inputs)}: {question}")

    panels = []
    for name, one in settings.items():
        if several:  # the times are to be compared: each shape is met once before it is timed
            ask(llava, processor, pixels, ids, one, a, max_new_tokens=2)
        report, visual = ask(
            llava, processor, pixels, ids, one, a, a.max_new_tokens, stream=not (several or a.json)
        )
        if a.json:
            told = {"model": a.model, "tokens": name, "method": a.method, "vtu": a.vtu}
            print(json.dumps(told | asdict(report)))
        else:
            print(report.row(name) if several else report)

        # of the four budgets the input itself shows what full is
        if name != "full" or not several or a.temporal is not None:
            panels.append((name, visual, report))

    if a.show:
        show.save(a.show, processor, shown, pixels, panels, question)
        note(f"wrote {a.show}")


def read(path: str, frames: int) -> Image.Image | list[Image.Image]:
    return video.read_frames(path, frames) if video.is_video(path) else read_picture(path)


def see(processor, shown: list) -> list:
    """Pictures, and videos as lists of frames -> what `Llava.encode` takes"""
    several = sum(isinstance(one, Image.Image) for one in shown) > 1
    pixels = []
    for one in shown:
        seen = processor.video(one) if isinstance(one, list) else processor.image(one, several)
        pixels += as_list(seen)
    return pixels


def ask(llava, processor, pixels, ids, settings: DyMU, a, max_new_tokens: int, stream=False):
    """Answers once, and prints the answer as it comes if it is to stream.

    a: the options -> its Report, and what `Llava.encode` gave
    """
    tokens_per_layer, hooks = count_tokens(llava)
    new = []  # ids of the answer
    shown = ""
    with torch.inference_mode():
        start = time.perf_counter()
        visual = video.encode(llava, pixels, settings, a.temporal)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        encoded = time.perf_counter()

        rows, token_at = llava.splice(ids, visual, settings.vtu)
        cache = KVCache()
        pick = sampler(a.temperature, a.seed, rows.device)
        if a.expand_cache:
            rows, token_at = prefill_expanded(llava, rows, token_at, cache, settings.queries)
        for id in llava.decode(
            rows, token_at, cache, settings.queries, max_new_tokens=max_new_tokens, pick=pick
        ):
            if not new:
                prefilled = time.perf_counter()
            new.append(id)
            text = processor.decode(new) if stream else ""
            if not text.endswith("\ufffd"):  # else more bytes of the last character are to come
                print(text[len(shown) :], end="", flush=True)
                shown = text
        end = time.perf_counter()

    text = processor.decode(new)
    if stream:
        print(text[len(shown) :])
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


def count_tokens(llava) -> tuple[list[int], list]:
    """Counts what each encoder layer's MLP gets -> the counts of all crops, and hooks to remove"""
    c = llava.config
    first = int(c.vision_config.class_token and c.vision_feature_select_strategy == "default")
    layers = llava.vision_tower.layers
    counts = [0] * len(layers)

    def count(i, fc2, args, out):
        counts[i] += len(out) - first

    hooks = [layer.fc2.register_forward_hook(partial(count, i)) for i, layer in enumerate(layers)]
    return counts, hooks


@dataclass
class Report:
    """What --json prints, behind the model and the settings."""

    answer: str
    visual_tokens: int
    virtual_tokens: int
    tokens_per_layer: list[int]  # visual tokens after the merge of each encoder layer
    encoder_s: float
    prefill_s: float
    decode_tokens_per_s: float
    cache_bytes: int
    device: str
    dtype: str

    def __str__(self):
        return (
            f"visual tokens {self.virtual_tokens} -> {self.visual_tokens} "
            f"({100 * self.visual_tokens / self.virtual_tokens:.0f} %), "
            f"encoder {self.encoder_s:.2f} s, prefill {self.prefill_s:.2f} s, "
            f"{self.decode_tokens_per_s:.1f} tokens/s, cache {self.cache_bytes / 2**20:.3g} MiB"
        )

    def row(self, name: str) -> str:
        counts = f"{self.visual_tokens:4} of {self.virtual_tokens} tokens"
        times = f"encoder {1000 * self.encoder_s:4.0f} ms, prefill {1000 * self.prefill_s:4.0f} ms"
        return f"{name:>6} {counts}, {times}: {' '.join(self.answer.split())}"


if __name__ == "__main__":
    main()
