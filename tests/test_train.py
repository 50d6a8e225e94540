"""The training of tiny/: interrupted and resumed it is the run that was not interrupted."""

import copy
import json
from dataclasses import replace

import torch
from transformers import LlavaForConditionalGeneration

from lab import train_tiny
from lab.packing import EVERY_KIND, POINTERS, pack, scene_sample
from lab.plot import plot
from lab.scenes import HELD_OUT, VARIANTS, scene
from lab.untrained import build_model, build_tokenizer
from load import load

SHORT = train_tiny.Run(
    steps=10,
    pictures={8: 2, 12: 2, 16: 2},
    measure_every=5,
    held_out=1,
    held_out_at_the_end=1,
)


def test_an_interrupted_run_equals_one_that_was_not(tmp_path):
    whole = tmp_path / "whole"
    parted = tmp_path / "parted"
    assert train_tiny.train(whole, SHORT)
    assert not train_tiny.train(parted, SHORT, interrupted=lambda step: step == 4)
    assert train_tiny.train(parted, SHORT)

    # Losses, accuracies and pictures seen agree at every measurement, so the data did too.
    logs = [json.loads((folder / "training.json").read_text()) for folder in (whole, parted)]
    assert [log["interruptions"] for log in logs] == [[], [4]]
    for log in logs:
        assert log["step"] == 10 and log["pictures"] == 20 and list(log["history"]) == ["5", "10"]
        for measured in log["history"].values():
            del measured["seconds"]
    assert logs[0]["history"] == logs[1]["history"]

    states = [torch.load(tmp_path / f"{name}.state") for name in ("whole", "parted")]
    for part, same in zip(states[0]["parts"], states[1]["parts"]):
        assert part.get("param_groups") == same.get("param_groups")  # with the learning rates
        torch.testing.assert_close(part.get("state", part), same.get("state", same))

    llava, processor = load(whole, "cpu", "float32")
    pixels = processor.image(scene(HELD_OUT).image)
    assert isinstance(processor.decode(llava.generate(processor.prompt("hello"), pixels)), str)


def test_a_batch_follows_from_the_step_alone():
    tokenizer = build_tokenizer()
    assert tokenizer.to_str() == build_tokenizer().to_str()
    first = train_tiny.Batches(SHORT, tokenizer)
    second = train_tiny.Batches(SHORT, tokenizer)
    expected = [first[step] for step in range(SHORT.steps)]
    for step in reversed(range(SHORT.steps)):
        batch = second[step]
        assert all(torch.equal(batch[name], expected[step][name]) for name in batch)


def test_the_learning_rate_rises_stays_and_falls():
    rates = [train_tiny.rate(step, 1000) for step in (0, 49, 100, 600, 800, 999)]
    torch.testing.assert_close(rates, [0.01, 0.5, 1.0, 1.0, 0.5, 0.0025])


def test_packed_questions_are_computed_as_one_prompt_each():
    """Their logits are those that transformers gives for a prompt with that question alone."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build_model(tokenizer).eval()
    sample = scene_sample(HELD_OUT + 1, variant="crowded")
    batch = pack([sample], tokenizer)
    tokens = train_tiny.see(model, batch["pixels"], batch["cells"])["tokens"]
    logits, _ = train_tiny.decode(model, batch, tokens)

    processor = train_tiny.build_processor(tokenizer)
    start = 0
    for _, question, answer in sample.questions:
        told = tokenizer.encode(f" {answer}", add_special_tokens=False).ids
        text = f"USER: <image>\n{question} ASSISTANT: {answer}"
        picture = scene(HELD_OUT + 1, variant="crowded").image
        inputs = processor(images=picture, text=text, return_tensors="pt")
        n = len(told) + 1  # </s> too
        alone = model(**inputs).logits[0, -n:]
        torch.testing.assert_close(logits[start : start + n], alone, rtol=1e-4, atol=1e-4)
        start += n
    assert start == len(logits)


def test_the_projector_control_leaves_the_tower_of_tiny_as_it_is():
    control = train_tiny.CONTROLS["projector"]
    run = replace(control, steps=SHORT.steps, pictures=SHORT.pictures)
    tokenizer = build_tokenizer()
    training = train_tiny.Training(run, tokenizer, "cpu")
    assert set(training.heads) == set(POINTERS)
    first = copy.deepcopy(training.model.state_dict())
    for step in range(2):
        training.step(train_tiny.Batches(run, tokenizer)[step])

    shipped = LlavaForConditionalGeneration.from_pretrained(
        train_tiny.TINY, dtype=torch.float32
    ).state_dict()
    learned = training.model.state_dict()
    averaged = training.average.state_dict()
    assert shipped.keys() == learned.keys()
    for name, value in shipped.items():
        if "vision_tower" in name:
            assert torch.equal(learned[name], value)
            assert torch.equal(averaged[name], value)
        else:
            assert torch.equal(first[name], value) == ("projector" not in name)
            assert not torch.equal(learned[name], first[name])


def test_the_tower_control_reads_dense_labels_from_an_inner_layer():
    run = replace(train_tiny.CONTROLS["tower"], steps=SHORT.steps, pictures=SHORT.pictures)
    tokenizer = build_tokenizer()
    training = train_tiny.Training(run, tokenizer, "cpu")
    batch = train_tiny.Batches(run, tokenizer)[0]
    loss, shown = train_tiny.losses(training.model, training.heads, batch, run, 0.0)
    assert list(shown) == ["dense"]

    loss.backward()
    layers = training.model.model.vision_tower.encoder.layers
    reached = [layer.mlp.fc1.weight.grad is not None for layer in layers]
    assert reached == [True] * 4 + [False] * 4


def test_variants_are_what_they_say():
    for seed in range(20):
        small = scene(HELD_OUT + seed, variant="small")
        texts = [t for t in small.things if t.text]
        assert {t.kind for t in texts} == {"word", "number"}
        assert all(17 <= t.size <= 29 for t in texts)

        crowded = scene(HELD_OUT + seed, variant="crowded")
        assert 8 <= len(crowded.things) <= 10
        for variant, drawn in zip(VARIANTS, (small, crowded)):
            kinds = {kind for kind, _, _ in drawn.questions}
            assert kinds <= set(EVERY_KIND) and all(kind.startswith(variant) for kind in kinds)


def test_the_log_is_drawn(tmp_path):
    accuracy = {"scenes": {"all": 50.0, "color": 40.0}, "easy-VQA": {"all": 60.0, "easy": 60.0}}
    measured = {"pictures": 100, "losses": {"dense": 3.0}, "accuracy": accuracy}
    later = measured | {"pictures": 200, "losses": {"dense": 2.0, "reading": 1.0}}
    figure = plot({"history": {"5": measured, "10": later}})
    left, right = figure.axes
    assert [list(line.get_xdata()) for line in right.lines] == [[100, 200]] * 2
    drawn = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert drawn["dense"] == [3.0, 2.0] and drawn["reading"] == [1.0]
