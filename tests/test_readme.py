"""The README is true: its files, line counts, functions, tests, commands, outputs and tables."""

import ast
import contextlib
import importlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from checkpoints import CLASSES

import demo
from extras.anyres import Picture, positions
from extras.families import CHATS
from lab.loading import write_tensors
from load import load_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "RESULTS.md", "DIFFERENCES.md", "extras/README.md", "thresholds/README.md"]
TESTS = "".join(f.read_text() for f in (ROOT / "tests").glob("test_*.py"))


def lines_of_code(path):
    """Without blank lines, comments and docstrings."""
    text = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    code = (line.strip() for i, line in lines if i not in docstrings)
    return sum(bool(line) and not line.startswith("#") for line in code)


def test_files_exist_and_line_counts_hold():
    rows = re.findall(r"^\| \[?`([\w./]+)`(?:\]\(\S+\))? \| (\d+) \|", README, re.M)
    assert {name for name, _ in rows} == {f.name for f in ROOT.glob("*.py")} | {"extras/"}
    for name, lines in rows:
        files = [ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py")
        assert sum(map(lines_of_code, files)) == int(lines), name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_readme_is_short_and_the_code_comes_early():
    assert len(README.encode()) <= 10_000
    assert README[: README.index("## Read it")].count("\n") < 80


def test_every_extra_is_told():
    told = set(re.findall(r"^\*\*(\w+\.py)\*\*", (ROOT / "extras/README.md").read_text(), re.M))
    assert told == {f.name for f in (ROOT / "extras").glob("*.py")} - {"__init__.py"}


LARGE = dict(
    model_type="clip_vision_model", hidden_size=1024, image_size=336, intermediate_size=4096
)
LARGE |= dict(num_attention_heads=16, num_hidden_layers=24, patch_size=14, projection_dim=768)
SO400M = dict(
    model_type="siglip_vision_model", hidden_size=1152, image_size=384, intermediate_size=4304
)
SO400M |= dict(num_attention_heads=16, num_hidden_layers=26, patch_size=14, vision_use_head=False)
VICUNA_7B = dict(
    model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064
)
VICUNA_13B = VICUNA_7B | dict(
    hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=40
)
MISTRAL_7B = dict(
    model_type="mistral", max_position_embeddings=32768, num_key_value_heads=8, rope_theta=1e6
)
MISTRAL_7B |= dict(rms_norm_eps=1e-5, vocab_size=32064, sliding_window=None)
QWEN = dict(model_type="qwen2", max_position_embeddings=32768, rope_theta=1e6)
INTERLEAVE = dict(
    vision_config=SO400M, vision_feature_layer=-1, vision_feature_select_strategy="full"
)


def qwen(
    hidden_size,
    intermediate_size,
    num_attention_heads,
    num_hidden_layers,
    num_key_value_heads,
    vocab_size,
):
    return QWEN | locals()


QWEN_05B = qwen(1024, 2816, 16, 24, 16, 152000) | dict(tie_word_embeddings=True)
# its other sizes are defaults, and left out
QWEN_7B = QWEN | dict(intermediate_size=11008, vocab_size=152000)
QWEN2_05B = qwen(896, 4864, 14, 24, 2, 152000) | dict(tie_word_embeddings=True)
QWEN2_7B = qwen(3584, 18944, 28, 28, 4, 152128)
CHECKPOINTS = {  # the config.json of each, as far as it says something about shapes
    "llava-hf/llava-1.5-7b-hf": ("llava", dict(vision_config=LARGE, text_config=VICUNA_7B)),
    "llava-hf/llava-1.5-13b-hf": ("llava", dict(vision_config=LARGE, text_config=VICUNA_13B)),
    "llava-hf/llava-interleave-qwen-0.5b-hf": ("llava", INTERLEAVE | dict(text_config=QWEN_05B)),
    "llava-hf/llava-interleave-qwen-7b-hf": ("llava", INTERLEAVE | dict(text_config=QWEN_7B)),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (
        "llava_next",
        dict(vision_config=LARGE, text_config=VICUNA_7B),
    ),
    "llava-hf/llava-v1.6-vicuna-13b-hf": (
        "llava_next",
        dict(vision_config=LARGE, text_config=VICUNA_13B),
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": (
        "llava_next",
        dict(vision_config=LARGE, text_config=MISTRAL_7B),
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (
        "llava_onevision",
        dict(vision_config=SO400M, text_config=QWEN2_05B, tie_word_embeddings=True),
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (
        "llava_onevision",
        dict(vision_config=SO400M, text_config=QWEN2_7B),
    ),
}
ROW = (
    r"^\| `(llava-hf/[\w.-]+)` \| (CLIP|SigLIP).* \| (.+) "
    r"\| ([\d.]+) B \| (\d+) \|$"
)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_supported_checkpoint_loads_by_shape(tmp_path, name):
    """transformers' tensors of that config.json, in sparse files, pass our strict loader.

    The README's numbers hold.
    """
    (row,) = [row[1:] for row in re.findall(ROW, README, re.M) if row[0] == name]
    family, config = CHECKPOINTS[name]
    with torch.device("meta"):
        theirs = CLASSES[family][1](CLASSES[family][0](**config))
    tied = config.get("tie_word_embeddings") or config["text_config"].get("tie_word_embeddings")
    tensors = theirs.state_dict()
    if tied:
        tensors.pop("lm_head.weight", None)
    tensors = list(tensors.items())
    starts = range(0, len(tensors), 100)
    shards = {f"model-{i:04}.safetensors": dict(tensors[i : i + 100]) for i in starts}
    for shard, part in shards.items():
        write_tensors(tmp_path / shard, part)
    index = {"weight_map": {key: shard for shard, part in shards.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=family, **config)))
    llava = load_model(tmp_path, "cpu", "bfloat16", only="none")
    n, c = sum(p.numel() for p in llava.parameters()), llava.config
    photo = torch.zeros(3, 1, 1) if family == "llava" else Picture(None, (960, 1280))
    tower = "CLIP" if c.vision_config.class_token else "SigLIP"
    decoders = dict(llama="Vicuna", mistral="Mistral", qwen2="Qwen")
    decoder = decoders[config["text_config"]["model_type"]]
    assert row[0] == tower and row[1].startswith(decoder)
    assert row[2:] == (f"{n / 1e9:.2f}", str(positions(photo, c)))


def test_the_table_of_checkpoints_has_no_other_rows():
    assert len(CHATS) == 5 and "one of the five in `extras/families.py`" in README
    assert [row[0] for row in re.findall(ROW, README, re.M)] == list(CHECKPOINTS)
    assert README.count("| `llava-hf/") == len(CHECKPOINTS)


def test_every_equation_names_a_function_and_a_test_that_exist():
    rows = re.findall(r"^\| .+ \| `([\w.]+)` \| `(test_\w+)` \|$", README, re.M)
    names = "dymu model extras.thresholds extras.sampled extras.anyres extras.video"
    modules = [importlib.import_module(name) for name in names.split()]
    assert len(rows) >= 10
    for function, test in rows:
        owner, *attribute = function.split(".")
        assert any(
            hasattr(m, owner) and all(hasattr(getattr(m, owner), a) for a in attribute)
            for m in modules
        ), function
        assert f"def {test}(" in TESTS, test


def test_the_two_commands_are_those_of_ci_and_the_extras_exist():
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = extras.split("\n\n")[0]
    assert "pip install -e . && python demo.py\n" in README
    assert "pip install -e '.[test]' && pytest\n" in README
    assert "-e '.[test]' && pytest" in (ROOT / ".ci" / "run").read_text()
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert f"\n{extra} = [" in extras


def without_times(text):
    return re.sub(r" +\d+ ms", " # ms", text).split()


def test_the_output_of_the_first_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo.main([])
    shown = re.search(r"python demo\.py\n```.*?```\n(.*?)```", README, re.S)[1]
    got = capsys.readouterr().out.removeprefix(f"{os.path.relpath(ROOT)}/")
    assert without_times(got) == without_times(shown)


@pytest.mark.parametrize("page", ["README.md", "extras/README.md"])
def test_the_python_examples_run(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    codes = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    for code in codes:
        exec(code, {})
        assert capsys.readouterr().out.strip()
    assert codes


@pytest.mark.parametrize("page", PAGES)
def test_options_that_are_named_exist(page, capsys):
    # of lab, torchrun and pip
    others = {"--full", "--shape", "--clip", "--nproc-per-node", "--index-url"}
    others |= {"--layers", "--repeats", "--curve"}
    others |= {"--choose", "--config", "--tasks", "--limit", "--control", "--question"}
    options = set(re.findall(r"`?(--[a-z][a-z-]+)", (ROOT / page).read_text())) - others
    help_text = demo_help(capsys)
    assert all(option in help_text for option in options), options


def demo_help(capsys):
    with contextlib.suppress(SystemExit):
        demo.main(["--help"])
    return capsys.readouterr().out


NAMES = ["ablate", "control", "crops", "pages", "peers", "questions", "schedules", "second"]
FILES = [(name, name) for name in NAMES]
FILES += [("bench_tables", file.stem) for file in sorted((ROOT / "lab").glob("bench-*.json"))]


@pytest.mark.parametrize("name, file", FILES)
def test_tables_are_those_of_the_json(name, file):
    module = importlib.import_module(f"lab.{name}")
    results = json.loads((ROOT / "lab" / f"{file}.json").read_text())
    assert module.table(results) in (ROOT / "RESULTS.md").read_text()
    if file in ("second", "bench-tiny-llava"):
        assert module.small_table(results) in README
