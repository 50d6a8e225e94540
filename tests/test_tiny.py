"""The built-in checkpoint.

transformers answers the same, merging follows the picture, and the demo runs on it.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import demo
from dymu import DyMU
from extras import options, thresholds
from extras.second_stage import second_stage
from extras.thresholds import read_thresholds
from extras.video import Frames, read_frames
from lab.scenes import HELD_OUT, scene
from load import load

TINY = Path(__file__).parent.parent / "tiny"
SAMPLE = Image.open(TINY / "sample.png")


@pytest.fixture(scope="module")
def tiny():
    return load(TINY, "cpu", "float32")


@pytest.fixture(scope="module")
def budgets(tiny):
    return {
        b: DyMU(thresholds=read_thresholds(b, TINY, tiny[0].config)[0])
        for b in ("low", "mid", "high")
    }


def say(tiny, picture, question, settings=None):
    llava, processor = tiny
    ids = llava.generate(processor.prompt(question), processor.image(picture), settings or DyMU())
    return processor.decode(ids).strip()


def test_it_is_small_and_of_the_shape_of_llava():
    assert sum(f.stat().st_size for f in TINY.glob("*.safetensors")) <= 8e6
    config = json.loads((TINY / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    assert (config["model_type"], config["vision_feature_layer"]) == ("llava", -2)
    assert (vision["image_size"] // vision["patch_size"]) ** 2 >= 256
    assert vision["num_hidden_layers"] >= 8 and text["num_hidden_layers"] >= 4
    assert text["num_key_value_heads"] < text["num_attention_heads"]


def test_transformers_gives_the_same_answers(tiny):
    reference = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(TINY)
    for seed, level in ((1, 0.2), (2, 0.5), (3, 0.9)):
        drawn = scene(HELD_OUT + seed, level)
        for _, question, _ in drawn.questions[:4]:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = processor(images=drawn.image, text=prompt, return_tensors="pt")
            ids = reference.generate(**inputs, max_new_tokens=128, do_sample=False)[0]
            ids = ids[inputs["input_ids"].shape[1] :]
            expected = processor.decode(ids, skip_special_tokens=True).strip()
            assert say(tiny, drawn.image, question) == expected


@pytest.mark.parametrize(
    "question, answer",
    [
        ("what number is written?", "49"),
        ("Read the word", "sun"),
        ("what is the color of the ring?", "brown"),
        ("what shape is green?", "triangle"),
        ("where is the green triangle?", "bottom right"),
        ("is the brown triangle above the green triangle?", "yes"),
        ("does the image contain a yellow shape?", "no"),
    ],
)
def test_fixed_questions_have_fixed_answers(tiny, budgets, question, answer):
    for settings in (None, *budgets.values()):
        assert say(tiny, SAMPLE, question, settings) == answer


def test_token_counts_grow_from_the_blank_scene_to_the_cluttered_one(tiny, budgets):
    llava, processor = tiny
    for settings in budgets.values():
        mean = []
        for level in (0.0, 0.5, 1.0):
            pictures = [scene(HELD_OUT + seed, level).image for seed in range(5)]
            visual = (llava.vision_tower(processor.image(p), settings) for p in pictures)
            mean.append(sum(len(x) for x, _ in visual) / 5)
        assert mean[0] < mean[1] < mean[2]


def test_its_thresholds_leave_what_the_presets_say():
    found = json.loads((TINY / "thresholds.json").read_text())
    for budget, left in (("low", 41), ("mid", 92), ("high", 174)):
        assert found[budget]["images"] >= 500
        assert abs(found[budget]["tokens_mean"] - left) < 0.05 * left


def test_the_demo_without_arguments(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo.main([])
    out = capsys.readouterr().out
    counts = [int(n) for n in re.findall(r"^ *\w+ +(\d+) of 256 tokens", out, re.M)]
    assert len(counts) == 4 and counts[0] == 256 and counts == sorted(counts, reverse=True)
    picture = Image.open(tmp_path / "merged.png")
    picture.load()
    assert picture.format == "PNG" and picture.width == 1200


def test_a_question_in_any_script_is_accepted(tiny):
    assert isinstance(say(tiny, SAMPLE, "Wie viele Kreise? 多少个圆? 🙂"), str)


def test_the_clip_of_the_readme(tiny):
    llava, processor = tiny
    taus, provenance = read_thresholds("tight", TINY, llava.config)
    settings = DyMU(thresholds=taus, after=second_stage(provenance["after"]))
    video = Frames(processor.video(read_frames(TINY / "clip.gif", 3)))
    new = [len(x) for x, _ in llava.encode(video, settings)]
    readme = (TINY.parent / "extras/README.md").read_text()
    more = f"{new[1]} and {new[2]} more for the second and third"
    assert f"{new[0]} tokens of the first frame, {more}, {sum(new)} in the\nplace of" in readme


def test_tight_is_mid_and_a_second_stage(tiny):
    a = options.parse([str(SAMPLE), "what?", "--tokens", "tight"])
    (found,) = thresholds.settings(a, TINY, tiny[1]).values()
    told = json.loads((TINY / "thresholds.json").read_text())
    assert list(found.thresholds) == told["mid"]["thresholds"]
    assert found.after == second_stage(told["tight"]["after"])
    a.after = 0.5
    assert thresholds.settings(a, TINY, tiny[1])["tight"].after == second_stage(0.5)
