"""Pictures, prompts, configurations and thresholds, against transformers where it has them."""

import json
import shutil

import numpy as np
import pytest
import torch
from checkpoints import (
    CHATML,
    CHATML_LINES,
    CHATML_NEXT,
    CLASSES,
    IMAGE,
    LLAMA3,
    LLAVA_15_TEMPLATE,
    MISTRAL,
    make,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dymu import DyMU
from extras import door
from extras.devices import choose_dtype
from extras.families import classes, read_config, to_tuple
from extras.sampled import spread
from load import Processor, load, load_model
from model import TextConfig, VisionConfig


def edit(file, **changes):
    data = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, name = path.split("__")
        part = data
        for parent in parents:
            part = part[parent]
        part[name] = value
    file.write_text(json.dumps(data))


# ---- pictures ----


def picture(mode, size):
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    rgb = Image.fromarray(coarse).resize(size)
    if mode == "I;16":
        return Image.fromarray(np.asarray(rgb)[:, :, 0].astype(np.uint16) * 257)
    if mode in ("RGBA", "LA"):
        rgb.putalpha(rgb.getchannel("G"))
    if mode == "transparent palette":
        rgb = rgb.convert("P")
        rgb.info["transparency"] = 3
        return rgb
    return rgb.convert(mode)


KINDS = ["RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16", "1", "YCbCr", "transparent palette"]
# wide, tall, as is, tiny, very wide, one pixel
SHAPES = [(90, 60), (61, 200), (56, 56), (5, 9), (300, 57), (1, 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_equal_transformers(saved, kind, shape):
    image, crop = picture(kind, shape), {"height": 56, "width": 56}
    reference = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=crop)
    expected = reference(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(Processor(saved).image(image), expected)
    reference = LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=crop, do_pad=True)
    expected = reference(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(Processor(saved, pad=True).image(image), expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(size={"height": 50, "width": 70}),
        dict(resample=2),
        dict(do_resize=False),
        dict(do_normalize=False),
        dict(do_normalize=False, do_rescale=False),
    ],
)
def test_pixels_follow_preprocessor_config(folder, options):
    reference = CLIPImageProcessorPil(
        **{"size": {"shortest_edge": 80}, "crop_size": {"height": 56, "width": 57}, **options}
    )
    image = picture("RGB", (101, 60))
    expected = reference(image, return_tensors="pt")["pixel_values"][0]
    # preprocessor_config.json, which processor_config.json goes before
    reference.save_pretrained(folder)
    assert Processor(folder).image(image).shape != expected.shape
    edit(folder / "processor_config.json", image_processor=None)
    torch.testing.assert_close(Processor(folder).image(image), expected.float(), rtol=0, atol=1e-6)


def test_old_preprocessor_config_with_plain_numbers_and_nulls(folder):
    image = picture("RGB", (90, 56))
    expected = Processor(folder).image(image)
    (folder / "processor_config.json").unlink()
    old = dict(size=56, crop_size=56, do_resize=False, image_mean=None)
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    assert torch.equal(Processor(folder).image(image), expected)
    # nothing at all: CLIP's, at the tower's resolution
    (folder / "preprocessor_config.json").unlink()
    assert torch.equal(Processor(folder).image(image), expected)


@pytest.mark.parametrize(
    "said", [{}, dict(image_processor_type="SiglipImageProcessor", resample=3)]
)
def test_siglips_preprocessing_is_the_default_of_its_tower(tmp_path, said):
    folder = make(
        tmp_path,
        vision=dict(model_type="siglip_vision_model"),
        vision_feature_select_strategy="full",
    )
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    image = picture("RGB", (90, 61))
    theirs = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(Processor(folder).image(image), expected)


def test_exif_orientation_is_applied(saved, tmp_path):
    image, exif = picture("RGB", (90, 60)), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(
        Processor(saved).image(tmp_path / "turned.png"), Processor(saved).image(upright)
    )


# ---- prompts ----

TEMPLATES = {
    "llava-1.5": LLAVA_15_TEMPLATE,
    "mistral": MISTRAL,
    "chatml": CHATML,
    "chatml, lines": CHATML_LINES,
    "chatml, next": CHATML_NEXT,
    "llama 3": LLAMA3,
}


@pytest.mark.parametrize(
    "place", ["chat_template.jinja", "chat_template.json", "processor_config.json"]
)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(
    "question", ["What is it?", "Zwei {} Fragen:\nwas, wo?  Österreich 你好 🙂"]
)
def test_prompt_equals_transformers(folder, template, place, question):
    (folder / "chat_template.jinja").unlink()
    if place.endswith("jinja"):
        (folder / place).write_text(template)
    elif place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": template}))
    else:
        edit(folder / place, chat_template=template)
    reference, processor = AutoProcessor.from_pretrained(folder), Processor(folder)
    for image in (True, False, 2):
        content = [{"type": "image"}] * image + [{"type": "text", "text": question}]
        text = reference.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            chat_template=template,
        )
        ids = processor.prompt(question, image)
        assert ids.tolist() == reference.tokenizer(text).input_ids
        assert ids.tolist().count(IMAGE) == image
        assert processor.decode(ids) == text.replace("<image>", "")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("turns", [0, 2])
def test_conversations_equal_transformers(folder, template, turns):
    def message(role, text, images=0):
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        return {"role": role, "content": content}

    (folder / "chat_template.jinja").write_text(template)
    reference, processor = AutoProcessor.from_pretrained(folder), Processor(folder)
    for system in ("", "You {} help."):
        if system and template == MISTRAL:
            with pytest.raises(ValueError, match="has no system prompt"):
                processor.prompt("And?", system=system)
            continue
        said = [message("system", system)] if system else []
        said += [message("user", "How {} many?", 2), message("assistant", "Two {}.")] * (turns > 0)
        said += [message("user", "Where?"), message("assistant", "Left.")] * (turns > 1)
        said += [message("user", "And?", 0 if turns else 2)]
        text = reference.apply_chat_template(said, add_generation_prompt=True)
        asked = (("How {} many?", "Two {}."), ("Where?", "Left."))[:turns]
        ids = processor.prompt("And?", 2, asked, system)
        assert ids.tolist() == reference.tokenizer(text).input_ids


def test_padding_and_truncation_in_tokenizer_json_are_left_out(folder):
    expected = Processor(folder).prompt("What is it?").tolist()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=200)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert Processor(folder).prompt("What is it?").tolist() == expected


@pytest.mark.parametrize(
    "kind, template", [("llama", LLAVA_15_TEMPLATE), ("mistral", MISTRAL), ("qwen2", CHATML)]
)
def test_without_a_template_the_decoder_decides(tmp_path, kind, template):
    folder, ids = make(tmp_path, text=dict(model_type=kind), template=template), []
    for _ in range(2):
        ids.append([Processor(folder).prompt("What is it?", n).tolist() for n in (0, 1, 2)])
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<image>", ""),  # a decoder's own, which knows no pictures
        "{% if loop.first %}{{ '<|im_start|>system\nYou help.<|im_end|>' }}{% endif %}" + CHATML,
    ],
)
def test_templates_that_ask_for_more_are_refused(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="chat template not recognised"):
        Processor(folder).prompt("What is it?")


def test_prompts_that_cannot_be_made(folder):
    processor = Processor(folder)
    for question, message in (
        ("", "is empty"),
        ("  \n", "is empty"),
        ("what \udcff", "surrogates"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.prompt(question)
    with pytest.raises(ValueError, match="<image>"):
        processor.prompt("what is <image>?")
    (folder / "chat_template.jinja").write_text("### Human: {{ messages[0] }}")
    with pytest.raises(ValueError, match="chat template not recognised"):
        Processor(folder).prompt("What is it?")
    (folder / "chat_template.jinja").unlink()  # no template at all: LLaVA-1.5's
    assert Processor(folder).prompt("What?").tolist() == processor.prompt("What?").tolist()


# ---- configurations and weights ----


def config_of(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", **config}))
    return read_config(tmp_path)


SPARSE = [
    {},  # nothing at all: the shapes of LLaVA-1.5-7B and its relatives
    dict(vision_config={"model_type": "clip_vision_model"}, text_config={"model_type": "llama"}),
    dict(
        vision_config={"model_type": "siglip_vision_model"}, text_config={"model_type": "mistral"}
    ),
    dict(text_config={"model_type": "mistral", "sliding_window": None}),
    dict(text_config={"model_type": "qwen2"}),
    dict(
        vision_config={"hidden_size": 64, "num_attention_heads": 4},
        text_config={"hidden_size": 256},
    ),
]


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("family", CLASSES)
def test_defaults_of_a_sparse_config_are_those_of_transformers(tmp_path, family, sparse):
    if "vision_config" in sparse:  # a multiple of it must be in the default grids
        side = {"llava": 224, "llava_next": 336, "llava_onevision": 384}[family]
        sparse = sparse | dict(vision_config=sparse["vision_config"] | dict(image_size=side))
        if family != "llava":  # tiles are square
            default = CLASSES[family][0]().vision_config.model_type
            siglip = sparse["vision_config"].get("model_type", default)[0] == "s"
            sparse["vision_feature_select_strategy"] = "full" if siglip else "default"
    ours, theirs = config_of(tmp_path, model_type=family, **sparse), CLASSES[family][0](**sparse)
    ours_v, theirs_v = ours.vision_config, theirs.vision_config
    ours_t, theirs_t = ours.text_config, theirs.text_config
    for name in VisionConfig.__dataclass_fields__.keys() - {"class_token"}:
        assert getattr(ours_v, name) == getattr(theirs_v, name), name
    assert ours_v.class_token == (theirs_v.model_type == "clip_vision_model")
    apart = {"attention_bias", "output_bias", "mlp_bias", "head_dim"}  # Llama's
    apart |= {"rope_theta", "max_position_embeddings"}
    for name in TextConfig.__dataclass_fields__.keys() - apart:
        assert getattr(ours_t, name) == getattr(theirs_t, name), name
    assert ours_t.head_dim == (
        getattr(theirs_t, "head_dim", None) or theirs_t.hidden_size // theirs_t.num_attention_heads
    )
    assert (ours_t.attention_bias, ours_t.output_bias) == (theirs_t.model_type == "qwen2", False)
    assert ours_t.rope_theta == theirs_t.rope_parameters["rope_theta"]
    window = getattr(theirs_t, "sliding_window", None) or theirs_t.max_position_embeddings
    assert ours_t.max_position_embeddings == min(window, theirs_t.max_position_embeddings)
    eos = theirs_t.eos_token_id
    assert ours.eos_token_id == (() if eos is None else (eos,))
    names = "vision_feature_layer vision_feature_select_strategy projector_hidden_act "
    names += "multimodal_projector_bias image_token_index tie_word_embeddings"
    for name in names.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("video_token_index", "image_grid_pinpoints"):
        assert to_tuple(getattr(ours, name, None)) == to_tuple(getattr(theirs, name, None))
    assert getattr(ours, "anyres_max", None) == (9 if family == "llava_onevision" else None)


def test_llava_has_neither_tiles_nor_a_video_token_whatever_its_config_says(tmp_path):
    more = dict(
        image_grid_pinpoints=[[336, 672]],
        video_token_index=32001,
        vision_aspect_ratio="anyres_max_9",
    )
    assert config_of(tmp_path, **more) == config_of(tmp_path)
    assert config_of(tmp_path).placeholders == (32000,)


def test_derived_settings_are_not_read(tmp_path):
    more = dict(
        vision_config=dict(class_token="x", hidden_size=64, num_attention_heads=4), anyres_max=5
    )
    assert config_of(tmp_path, **more).vision_config.class_token is True
    next_ = config_of(tmp_path, model_type="llava_next", **more | dict(vision_config={}))
    assert next_.anyres_max is None


def test_attention_bias_is_llamas_alone(tmp_path):
    for kind, biases in (
        ("llama", (True, True)),
        ("mistral", (False, False)),
        ("qwen2", (True, False)),
    ):
        c = config_of(tmp_path, text_config=dict(model_type=kind, attention_bias=True)).text_config
        assert (c.attention_bias, c.output_bias) == biases


def test_spellings_of_the_same_configuration(tmp_path):
    for text in (
        dict(rope_theta=5e5),
        dict(rope_parameters=dict(rope_theta=5e5, rope_type="default")),
    ):
        assert config_of(tmp_path, text_config=text).text_config.rope_theta == 5e5
    for name in ("image_token_index", "image_token_id"):
        assert config_of(tmp_path, **{name: 77}).image_token_index == 77
    for places in (dict(eos_token_id=[5, 6]), dict(text_config=dict(eos_token_id=[5, 6]))):
        assert config_of(tmp_path, **places).eos_token_id == (5, 6)
    both = config_of(tmp_path, eos_token_id=5, text_config=dict(eos_token_id=6))
    assert both.eos_token_id == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=9)))
    assert config_of(tmp_path, eos_token_id=5).eos_token_id == (9,)


WRONG = ("x", [], {}, [1], -1, 0, 0.5, 10**12, float("inf"), float("nan"), True, None)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_a_wrong_value_anywhere_is_one_line_that_names_it(tmp_path, family, text):
    """Each field of each part, with each of these values: it is taken, or told."""
    parts = dict(vision_config=VisionConfig, text_config=TextConfig)
    names = {part: set(kind.__dataclass_fields__) for part, kind in parts.items()}
    names["text_config"] |= {"sliding_window", "rope_parameters", "rope_scaling", "eos_token_id"}
    whole = set(classes(family)[0].__dataclass_fields__) | {
        "image_token_id",
        "torch_dtype",
        "eos_token_id",
    }
    told = 0
    for part, name in [(None, n) for n in whole] + [(p, n) for p in parts for n in names[p]]:
        for value in WRONG:
            config = dict(model_type=family, text_config=dict(model_type=text))
            place = config.setdefault(part, {}) if part else config
            place[name] = value
            (tmp_path / "config.json").write_text(json.dumps(config))
            try:
                read_config(tmp_path)
            except ValueError as e:
                assert str(e).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(e)
                told += 1
    assert told > 150


def test_tensors_are_memory_mapped_and_never_on_meta(folder):
    model, _ = load(folder, "cpu")
    assert not any(t.is_meta or t.requires_grad for t in model.state_dict().values())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert load_model(folder, "cpu", "bfloat16").lm_head.weight.dtype == torch.bfloat16
    part = load_model(folder, "cpu", only="vision_tower.")
    assert part.lm_head.weight.is_meta and not part.vision_tower.class_embedding.is_meta


def test_dtype_is_chosen_by_checkpoint_and_device(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_dtype(None, cpu, half=False) == torch.float32
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported
        )
        assert choose_dtype(None, cpu, half=True) == expected
    for float16 in ("float16", torch.float16):
        assert choose_dtype(float16, cpu, half=False) == torch.float16
    with pytest.raises(ValueError, match="int8"):
        choose_dtype("int8", cpu, half=False)


def test_a_half_precision_checkpoint_answers(folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    weights = {k: t.bfloat16() for k, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    assert load_model(folder, "cpu").lm_head.weight.dtype == torch.float32  # as config.json says
    edit(folder / "config.json", dtype=None)
    assert load_model(folder, "cpu").lm_head.weight.dtype == torch.bfloat16
    edit(folder / "config.json", torch_dtype="float16")
    assert load_model(folder, "cpu").lm_head.weight.dtype == torch.bfloat16
    exact, processor = load(folder, "cpu", torch.float32)
    rounded, _ = load(folder, "cpu", torch.bfloat16)
    ids, pixels = processor.prompt("What is it?"), processor.image(picture("RGB", (70, 60)))
    for settings in (DyMU(), DyMU(r=(3, 2, 2)), DyMU(r=(3, 2, 2), queries=spread(1))):
        a, b = exact(ids, pixels, settings), rounded(ids, pixels, settings)
        assert b.dtype == torch.bfloat16
        assert (a - b.float()).norm() < 0.1 * a.norm()


def test_a_head_of_its_own_goes_before_tied_embeddings(folder):
    edit(folder / "config.json", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(
        load_model(folder, "cpu").lm_head.weight, weights["language_model.lm_head.weight"]
    )


def test_a_hub_id_in_the_cache_needs_no_connection(folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    announced = []
    found = door.find("owner/name", announce=lambda *said: announced.append(said))
    assert found.samefile(cache / "snapshots" / ("0" * 40))
    assert not announced
    with pytest.raises(ValueError, match=r"not to be had from the Hub: .*LocalEntryNotFoundError"):
        door.find("owner/other", announce=lambda *said: announced.append(said))


def test_a_hub_id_is_downloaded_after_it_was_announced(folder, monkeypatch):
    calls = []

    def snapshot_download(name, allow_patterns, dry_run=False):
        calls.append((name, dry_run))
        assert not any("bin" in p or "py" in p for p in allow_patterns)
        files = [("model.safetensors", 14_000_000_000, True), ("config.json", 900, False)]
        fields = ("filename", "file_size", "will_download")
        return [type("File", (), dict(zip(fields, f))) for f in files] if dry_run else str(folder)

    monkeypatch.setattr(door, "snapshot_download", snapshot_download)
    announced = []
    assert door.find("owner/name", announce=lambda size, where: announced.append(size)) == folder
    assert announced == [14_000_000_000]
    assert calls == [("owner/name", True), ("owner/name", False)]
