"""The page of --show FILE.html: its numbers are those of the run, and a browser shows them."""

import base64
import contextlib
import io
import json
import re
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, SIZES, clip, make, picture
from einops import rearrange

import demo
from dymu import DyMU, best, rope_scores
from extras import page, show, video
from extras.looked import looked, words_of
from extras.options import NONE, SAMPLE
from extras.report import Measured
from extras.sampled import fewer_if_long
from extras.second_stage import second_stage
from extras.thresholds import read_thresholds
from lab.pages import chromium
from load import load
from model import rope_table

QUESTION = "what is in the image from left to right?"
ATTACK = "</script><img src=x onerror=\"document.title='hit'\">'\"&amp;<b>bold</b>"
TYPES = {"uint8": "u1", "uint16": "<u2", "int32": "<i4", "float32": "<f4"}


def run(*argv):
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        demo.main([str(arg) for arg in argv])
    return [json.loads(line) for line in out.getvalue().splitlines()]


def data_of(file):
    text = file.read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    )


def array(packed):
    ((kind, text),) = packed.items()
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(text)), TYPES[kind])
    return torch.tensor(numbers.astype("f8"))


def alike(a, b, within=2e-4):
    """Asserts that two pieces of data are the same, but for rounding in what was packed"""
    if isinstance(a, dict) and a.keys() & TYPES.keys():
        assert a.keys() == b.keys()
        assert torch.allclose(array(a), array(b), rtol=0, atol=within)
    elif isinstance(a, dict | list):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            alike(a[key], b[key], 2 if key == "weight" else 2e-4)
    else:
        assert a == b


def same_groups(a, b):
    """Whether two lists of tokens are the same but for how they are numbered"""
    pairs = {*zip(a.tolist(), b.tolist())}
    return len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", "cpu")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A folder with the page of tiny's sample, of its clip, and what was printed of each"""
    folder = tmp_path_factory.mktemp("pages")
    argv = [QUESTION, "--model", "tiny", "--json", "--show"]
    told = {
        "sample": run(SAMPLE, *argv, folder / "sample.html", "--tokens", "all"),
        "clip": run(
            *(SAMPLE.with_name("clip.gif"), *argv, folder / "clip.html"),
            *("--tokens", "tight", "--frames", 3),
        ),
    }
    return folder, told


# ---- The numbers ----


def test_the_numbers_are_the_towers(tiny, shown):
    folder, told = shown
    data = data_of(folder / "sample.html")
    llava, processor = tiny
    pixels = processor.image(SAMPLE)
    for one, report in zip(data["budgets"], told["sample"]):
        assert (one["name"], one["tokens"]) == (report["tokens"], report["visual_tokens"])
        assert one["counts"] == [256, *report["tokens_per_layer"]] and len(one["steps"]) == 8
        if one["name"] == "full":
            for step in one["steps"]:
                assert torch.equal(array(step["token"]), torch.arange(256).double())
            continue

        taus, _ = read_thresholds(one["name"], processor.folder, llava.config)
        assert one["taus"] == list(taus)
        layers = []

        def rule(score, seen, layers=layers, taus=taus):
            layers.append((score, seen.token_at))
            return score > taus[seen.layer]

        _, final = llava.vision_tower(pixels, DyMU(rule=rule))
        before = [at[1:] for _, at in layers]  # without the class token
        after = [*before[1:], final]
        for (score, _), tau, old, new, step in zip(layers, taus, before, after, one["steps"][1:]):
            assert same_groups(array(step["token"]), new)
            found = array(step["score"])
            in_a = old % 2 == 0
            assert torch.equal(found[in_a], score[old[in_a] // 2].double())
            assert (found[~in_a] == -torch.inf).all()
            partner = array(step["partner"])[in_a].long()
            assert (old[partner] % 2 == 1).all()
            # what scored above tau is now one with its partner, and nothing else is
            assert torch.equal(new[in_a] == new[partner], score[old[in_a] // 2] > tau)


def test_a_page_changes_no_answer(tiny, shown):
    llava, processor = tiny
    taus, _ = read_thresholds("low", processor.folder, llava.config)
    session = Measured(llava, processor, [processor.image(SAMPLE)], DyMU(thresholds=taus))
    plain = vars(session.reply(session.prompt(QUESTION)))
    noted = shown[1]["sample"][3]
    for key in ("answer", "tokens_per_layer", "cache_bytes"):
        assert plain[key] == noted[key]
    for settings in (DyMU(), DyMU(thresholds=taus), DyMU(r=(30,) * 7, after=second_stage(0.8))):
        pixels = [processor.image(SAMPLE)] * 2
        a = llava.encode(pixels, settings)
        b = llava.encode(pixels, page.Recording(**vars(settings)))
        for (x, at), (y, too) in zip(a, b):
            assert torch.equal(x, y) and torch.equal(at, too)


@pytest.mark.parametrize("name", ["llava, SigLIP, Qwen2", "llava_next, Llama", "llava_onevision"])
def test_each_patch_has_its_token(tmp_path, name):
    llava, processor = load(make(tmp_path, **FAMILIES[name]), "cpu")
    for sizes in (["wide"], ["large"], ["tall", "square"], []):
        check_patches(llava, processor, [picture(SIZES[size]) for size in sizes] or [clip()])


def check_patches(llava, processor, pictures):
    pixels = video.see(processor, pictures)
    layers = llava.config.vision_layers
    merging = []  # of each layer of each crop: whether the token at a position merges into another

    def rule(score, seen):
        chosen = best(score, 3)
        merges = torch.zeros(len(seen.x), dtype=torch.bool)
        merges[::2] = chosen & (score > -torch.inf)
        merging.append(merges[seen.token_at])
        return chosen

    settings = page.Recording(rule=rule)
    visual = llava.encode(pixels, settings)
    grids, crops = page.sources(llava.config, pixels)
    drawn = show.patches(llava.config, pixels, visual)
    assert [grid.shape for grid in grids] == [grid.shape for grid in drawn]
    at = page.flat(grids)
    steps = page.steps_of(settings, layers, at)
    assert same_groups(steps[-1]["token"], page.flat(drawn))
    assert len(settings.noted) == crops * layers
    for i, step in enumerate(steps[1:]):
        assert torch.equal(step["chosen"].bool(), torch.cat(merging[i::layers])[at])
        token, partner = step["token"], step["partner"]
        paired = (step["score"] > -torch.inf) & (partner < len(at))
        together = token[paired] == token[partner[paired]]
        assert torch.equal(together, step["chosen"][paired].bool())


def test_a_second_stage_is_the_last_step(shown):
    (one,) = data_of(shown[0] / "clip.html")["budgets"]
    last = array(one["steps"][-1]["token"])
    assert len(one["steps"]) == 1 + 7 + 1 == len(one["counts"])
    assert len(last) == 768 and len(last.unique()) == one["counts"][-1] == one["tokens"] == 44
    assert one["counts"][0] == 768 and set(one["steps"][-1]) == {"token"}
    # what stands still shares its token over the frames
    assert len({*last[:256].tolist()} & {*last[512:].tolist()}) > 5


def test_what_limits_the_tokens_is_a_second_stage_too(shown, tmp_path):
    file = tmp_path / ".HTML"
    argv = [SAMPLE, QUESTION, "--model", "tiny", "--json", "--tokens", "all", "--show", file]
    told = run(*argv, "--box", "0.25,0.25,0.75,0.75", "--vtu", "off", "--max-new-tokens", 2)
    full, *budgets = data_of(file)["budgets"]
    assert full["behind"] == "What the model reads"  # which merges nothing, and heeds no region
    assert full["counts"][-2:] == [256, 256] and len(full["steps"]) == len(full["counts"])
    for budget, report in zip(budgets, told[1:]):
        said = "cosine above 0.4000 outside the regions"
        assert budget["behind"] == f"Behind the second stage ({said})"
        assert report["visual_tokens"] == budget["counts"][-1] < budget["counts"][-2]
        assert budget["counts"][-1] == len(array(budget["steps"][-1]["token"]).unique())
    views = [data_of(one)["views"] for one in (file, shown[0] / "sample.html")]
    assert views[0] != views[1]  # the box is drawn


def test_the_other_answer_is_the_default_one(tiny, monkeypatch):
    llava, processor = tiny
    pixels = [processor.image(SAMPLE)]
    queries = []
    monkeypatch.setattr(llava, "decode", lambda *args, pick: queries.append(args[3]) or [])
    for vtu in (False, True):
        session = Measured(llava, processor, pixels, DyMU(r=(9,) * 7, vtu=vtu))
        a = SimpleNamespace(temperature=0, seed=0, max_new_tokens=2)
        page.other_answer(a, session, session.prompt(QUESTION))
    assert queries == [fewer_if_long, None]


def test_the_second_stage_says_what_it_went_by():
    def said(after, *used):
        return page.second_stage_of(
            SimpleNamespace(settings=DyMU(after=after and second_stage(after)), used=used)
        )

    assert said(None, None) == ""
    assert said(0.8, None, None) == "cosine above 0.8000"
    # two pictures, of which a cap made one's fall
    assert said(0.8, (0.5, None), None) == "cosine above 0.5000, cosine above 0.8000"
    outside = "all into one token outside the regions"
    assert said(None, (None, NONE)) == outside
    assert said(None, (0.3, 0.3)) == (
        "cosine above 0.3000, cosine above 0.3000 outside the regions"
    )


def saved_page(file, llava, processor, pictures, budgets):
    """Its data, and the reports; budgets: of each the settings' r"""
    pixels = video.see(processor, pictures)
    sessions = {}
    reports = {}
    for name, r in budgets.items():
        sessions[name] = Measured(llava, processor, pixels, page.Recording(r=r))
        reports[name] = sessions[name].reply(sessions[name].prompt("What?"), 4)
    a = SimpleNamespace(show=file, model="m", method="tome", pictures=[], temperature=0, seed=0)
    a.max_new_tokens = 4
    page.save(a, pictures, None, sessions, reports, "What?")
    return data_of(file), reports


@pytest.mark.parametrize("of", ["clip", "tall"])
def test_a_page_ends_with_what_the_decoder_reads(tmp_path, of):
    llava, processor = load(make(tmp_path, **FAMILIES["llava_onevision"]), "cpu")
    budgets = {"full": None, "low": (4,) * llava.config.vision_layers}
    shown = clip() if of == "clip" else picture(SIZES["tall"])
    data, reports = saved_page(tmp_path / "x.html", llava, processor, [shown], budgets)
    for one in data["budgets"]:
        report = reports[one["name"]]
        assert one["behind"] == "What the model reads" and one["steps"][-1].keys() == {"token"}
        assert one["counts"][-2:] == [report.tokens_per_layer[-1], report.visual_tokens]
        assert len(one["counts"]) == len(one["steps"]) == 2 + llava.config.vision_layers
        assert len(array(one["steps"][-1]["token"]).unique()) <= report.visual_tokens
    assert ("Counted, not drawn" in data["about"]) == (of == "tall")


def test_a_page_of_576_tokens_is_small(tmp_path):
    vision = dict(image_size=336, hidden_size=16, intermediate_size=16, num_hidden_layers=24)
    llava, processor = load(make(tmp_path, vision=vision), "cpu")
    budgets = {str(r): (r,) * llava.config.vision_layers for r in (0, 7, 13, 21)}
    shown = [picture((336, 336))]
    data, _ = saved_page(tmp_path / "x.html", llava, processor, shown, budgets)
    counts = [one["counts"] for one in data["budgets"]]
    assert counts[0] == [576] * 24 and counts[3] == [576 - 21 * i for i in range(24)]
    # with as much attention as may be, where an answer is long
    for one in data["budgets"]:
        one["looked"] = "." * (page.ROOM * 4 // 3)
    assert len(page.filled(data)) < 1_500_000


def test_the_page_in_the_repository_is_what_the_command_writes(shown):
    file = SAMPLE.with_name("merged.html")
    there = data_of(file)
    assert page.filled(there) == file.read_text(encoding="utf-8")  # by today's template
    assert file.stat().st_size < 400_000
    here = data_of(shown[0] / "sample.html")
    alike(there["budgets"], here["budgets"])
    alike([there["colours"], there["position"]], [here["colours"], here["position"]])
    readme = (SAMPLE.parent.parent / "extras/README.md").read_text()
    assert f'python demo.py {there["files"][0]} "{there["question"]}" --model tiny' in readme


# ---- Where the answer looked ----


def answered(llava, processor, shown, **settings):
    session = Measured(llava, processor, shown, DyMU(**settings))
    prompt = session.prompt("What?")
    session.reply(prompt, 5)
    return session, prompt


def test_attention_at_full_length_is_transformers(checkpoint):
    _, llava, processor, reference = checkpoint("llava, CLIP, Qwen2")
    pixels = processor.image(picture())
    session, prompt = answered(llava, processor, pixels)
    ids = session.ids
    words, weight = looked(session, prompt)
    _, ids_of = words_of(processor, ids[len(prompt) :])
    at = prompt.tolist().index(llava.config.image_token_index)
    wide = [*ids[:at], *[ids[at]] * 16, *ids[at + 1 :]]
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        there = reference(
            input_ids=torch.tensor([wide]), pixel_values=pixels[None], output_attentions=True
        ).attentions
    assert weight.shape == (3, len(words), 16)
    start = len(prompt) + 15 - 1  # the position whose output is the answer's first id
    for layer, theirs in zip(weight, there):
        for found, tokens in zip(layer, ids_of):
            wanted = theirs[0].mean(0)[[start + i for i in tokens], at : at + 16].mean(0)
            assert torch.allclose(found, wanted, atol=1e-6)


def test_attention_after_merging_is_eq10_and_the_same_from_an_expanded_cache(llava, saved):
    processor = load(saved, "cpu")[1]
    pixels = [processor.image(picture())]
    session, prompt = answered(llava, processor, pixels, r=(3, 3, 3))
    answer = session.ids[len(prompt) :]
    ids = torch.tensor(session.ids)
    rows, token_at = llava.splice(ids[:-1], session.visual)
    layer = llava.language_model.layers[0]
    c = llava.config.text_config
    normed = layer.input_layernorm(rows)
    q = rearrange(layer.q_proj(normed), "n (h d) -> h n d", d=c.head_dim)
    k = rearrange(layer.k_proj(normed), "n (h d) -> h n d", d=c.head_dim)
    N = len(token_at)
    scores = rope_scores(q, k, token_at, *rope_table(N, c, "cpu")) / c.head_dim**0.5
    scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    wanted = scores.softmax(-1).mean(0)[-len(answer) :]

    at = prompt.tolist().index(llava.config.image_token_index)
    _, ids_of = words_of(processor, answer)
    _, weight = looked(session, prompt)
    for found, tokens in zip(weight[0], ids_of):
        assert torch.allclose(found, wanted[tokens, at : at + 16].mean(0), atol=1e-5)

    session = Measured(llava, processor, pixels, DyMU(r=(3, 3, 3)), expand=True)
    session.reply(prompt, 5)
    assert session.ids[len(prompt) :] == answer
    assert torch.allclose(looked(session, prompt)[1], weight, atol=1e-5)


def test_attention_is_left_out_where_it_is_too_much(llava, saved, monkeypatch):
    processor = load(saved, "cpu")[1]
    session, prompt = answered(llava, processor, [processor.image(picture())])
    monkeypatch.setattr("extras.looked.TOO_MUCH", 100)
    assert looked(session, prompt) is None


def test_words_of_an_answer(tiny):
    _, processor = tiny
    text = "brown ring, number 49"
    ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
    words, ids_of = words_of(processor, [*ids, processor.config.eos_token_id[0]])
    assert words == text.split()
    for word, tokens in zip(words, ids_of):
        assert processor.decode([ids[i] for i in tokens]).strip() == word


def test_differing_words():
    told = page.compared("a red ring, a word", "a ring, a green word")
    assert told == [("a", False), ("red", True), ("ring,", False), ("a", False), ("word", False)]
    assert page.compared(None, "a") is None and page.compared("", "a") == []


# ---- In a browser ----


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = chromium()
    if found is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync.sync_playwright() as p:
        try:  # a container has no sandbox; the page is our own
            started = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync.Error as e:
            pytest.skip(f"{found} does not start: {e.message.splitlines()[0]}")
        yield started


@pytest.fixture(scope="module")
def open_page(browser):
    """Opens a page: what it complains of and what it asks for is in page.seen"""

    def open_(file, width=1280, **options):
        opened = browser.new_page(viewport={"width": width, "height": 900}, **options)
        opened.seen = []
        opened.on("console", lambda message: opened.seen.append(message.text))
        opened.on("pageerror", lambda error: opened.seen.append(str(error)))
        opened.on("dialog", lambda dialog: opened.seen.append("a dialog"))
        opened.on("request", lambda request: opened.seen.append(request.url))
        opened.goto(file.as_uri())
        opened.locator("#told:not(:empty)").wait_for()
        opened.seen[:] = [url for url in opened.seen if not url.startswith("data:")]
        assert opened.seen.pop(0) == file.as_uri()
        return opened

    return open_


@pytest.fixture(scope="module")
def sample(open_page, shown):
    opened = open_page(shown[0] / "sample.html")
    opened.clock.install()
    return opened


def text(opened, id):
    return opened.text_content(f"#{id}")


def drawn(opened, id="picture"):
    return opened.evaluate(f"document.getElementById('{id}').toDataURL()")


def point(opened, row, column):
    picture = opened.locator("#picture")
    cell = picture.bounding_box()["width"] / 16
    picture.hover(position={"x": (column - 0.5) * cell, "y": (row - 0.5) * cell})


def test_a_slider_goes_through_the_layers(sample, shown):
    data = data_of(shown[0] / "sample.html")
    pictures = set()
    for n, count in enumerate(data["budgets"][3]["counts"]):
        sample.locator("#step").fill(str(n))
        assert text(sample, "where").endswith(f": {count} tokens")
        if n:
            tau = f"{data['budgets'][3]['taus'][n - 1]:.4f}"
            assert f"above τ = {tau} they merge" in text(sample, "histogram")
            merged = data["budgets"][3]["counts"][n - 1] - count
            assert text(sample, "pairs").startswith(f"Layer {n}: {merged} of ")
        pictures.add(drawn(sample))
    assert len(pictures) == 8

    # the arrow keys do, too, and a budget is kept at its end
    sample.locator("#step").press("ArrowLeft")
    assert text(sample, "where").startswith("Behind encoder layer 6 of 7")
    sample.locator("body").press("ArrowRight")
    assert text(sample, "where").startswith("Behind encoder layer 7 of 7")
    for name, count in (("full", 256), ("mid", 115), ("low", 56)):
        sample.get_by_label(f"{name} {count}").check(force=True)
        assert text(sample, "where").endswith(f": {count} tokens")
    assert sample.seen == []


def test_play_moves_it(sample):
    sample.locator("#play").click()
    assert text(sample, "where") == "Nothing merged: 256 tokens"
    assert text(sample, "play") == "Pause"
    sample.clock.run_for(600)
    assert text(sample, "where").startswith("Behind encoder layer 1 of 7")
    sample.locator("#step").fill("0")
    assert text(sample, "play") == "Play"
    sample.clock.run_for(1200)
    assert text(sample, "where").startswith("Nothing merged")  # who moves the slider stops it


def test_a_patch_pointed_at_tells_of_its_token(sample, shown):
    data = data_of(shown[0] / "sample.html")
    low = data["budgets"][3]
    for n in (0, 3, 7):
        sample.locator("#step").fill(str(n))
        token = array(low["steps"][n]["token"])
        for row, column in ((1, 1), (9, 5), (16, 16), (12, 2)):
            point(sample, row, column)
            told = text(sample, "told")
            p = 16 * (row - 1) + column - 1
            size = int((token == token[p]).sum())
            own = "a token of its own" if size == 1 else f"one token of {size} patches"
            assert told.startswith(f"Row {row}, column {column}: {own}, at ")
            score = array(low["steps"][n]["score"])[p] if n else -torch.inf
            if score > -torch.inf:
                partner = array(low["steps"][n]["partner"])[p]
                merged = token[p] == token[int(partner)]
                assert f"at position {int(partner)}: similarity {score:.4f}, " in told
                assert told.endswith("they merged." if merged else "it stayed.")
            elif n:
                assert told.endswith("that others are compared with.")
    assert sample.seen == []


def test_the_keyboard_alone_will_do(sample):
    sample.locator("#step").fill("7")
    point(sample, 3, 3)
    before = drawn(sample)
    sample.locator("#picture").focus()
    for key, at in (("ArrowRight", "3, column 4"), ("ArrowDown", "4, column 4")):
        sample.keyboard.press(key)
        assert text(sample, "told").startswith(f"Row {at}")
    sample.keyboard.press("-")
    assert text(sample, "where").startswith("Behind encoder layer 6")
    for key, held in (("-", "ctrlKey"), ("+", "metaKey"), ("ArrowLeft", "altKey")):
        about = f"{{key: '{key}', {held}: true, bubbles: true, cancelable: true}}"
        event = f"new KeyboardEvent('keydown', {about})"
        assert sample.evaluate(f"document.body.dispatchEvent({event})"), key  # the browser's own
    sample.keyboard.press("+")
    assert drawn(sample) != before

    # all that can be worked is reached, in order, and has a name
    reached = []
    for _ in range(32):
        sample.keyboard.press("Tab")
        reached.append(sample.evaluate("document.activeElement.id || document.activeElement.type"))
    order = ["radio", "play", "step", "picture", "submit", "layer"]
    reached = reached[reached.index("radio") :]
    assert list(dict.fromkeys(reached))[:6] == order
    for id in ("step", "picture", "layer", "attention", "histogram", "lines"):
        assert sample.get_attribute(f"#{id}", "aria-label")
    for id in ("told", "where", "share"):
        assert sample.locator(f"[aria-live] #{id}, #{id}[aria-live]").count() == 1


def test_words_of_the_answer_show_where_they_looked(sample, shown):
    low = data_of(shown[0] / "sample.html")["budgets"][3]["looked"]
    assert low["words"][:2] == ["word", "sun,"] and low["layers"] == [1, 2, 3, 4]
    pictures = set()
    for word in (0, 4, 10):
        button = sample.locator("#words button").nth(word)
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        share = array(low["share"]).view(4, -1)[3, word]
        assert f"“{low['words'][word]}” gave {float(f'{100 * share:.2g}'):g} %" in text(
            sample, "share"
        )
        pictures.add(drawn(sample, "attention"))
    sample.locator("#layer").fill("0")
    assert text(sample, "share").startswith("Budget low, decoder layer 1 of 4")
    assert len(pictures | {drawn(sample, "attention")}) == 4
    # "sun" was read where it is written: in the lower left
    weight = array(low["weight"]).view(4, -1, 16, 16)[3, 1]
    assert weight[10:, :8].sum() > 0.5 * weight.sum()


def test_answers_stand_beside_each_other(sample, shown):
    rows = sample.locator("#answers tr").all_text_contents()
    for row, one in zip(rows, data_of(shown[0] / "sample.html")["budgets"]):
        for words in one["answers"]:
            assert words is None or " ".join(word for word, _ in words) in row
    assert "nothing merged" in rows[0]
    marks = sample.locator("#answers mark").all_text_contents()
    assert marks and "differing words" in rows[1]


def test_text_is_never_markup(open_page, shown, tmp_path):
    name = "<img src=x onerror=document.title='hit'>.png"
    shutil.copy(SAMPLE, tmp_path / name)
    file = tmp_path / "attack.html"
    run(tmp_path / name, ATTACK, "--model", "tiny", "--json", "--show", file)
    data = data_of(file)
    assert data["question"] == ATTACK and data["files"] == [str(tmp_path / name)]
    for key in ("model", "method", "about"):
        data[key] = ATTACK
    (one,) = data["budgets"]
    one["name"] = ATTACK
    one["answers"] = [[[ATTACK, False], [ATTACK, True]]] * 2
    one["looked"]["words"][:] = [ATTACK] * len(one["looked"]["words"])
    file.write_text(page.filled(data))
    assert file.read_text().count("</script>") == 2

    opened = open_page(file)
    assert text(opened, "question") == ATTACK and name in text(opened, "about")
    assert opened.locator("img, b b, #answers b").count() == 0
    assert text(opened, "answers").count(ATTACK) == 5 and ATTACK in text(opened, "share")
    assert opened.title() == "Watch a picture merge" and opened.seen == []

    # and what got in all the same would not run, nor load anything
    opened.evaluate(
        "() => { for (const [name, key] of [['script', 'text'], ['img', 'src']])"
        " document.body.append(Object.assign(document.createElement(name),"
        " {[key]: name === 'img' ? 'http://localhost/x.png' : 'document.title = 1'})) }"
    )
    opened.wait_for_timeout(50)
    assert opened.title() == "Watch a picture merge"
    assert sum("The action has been blocked" in told for told in opened.seen) == 2


def test_a_page_without_attention_says_so(open_page, shown, tmp_path):
    data = data_of(shown[0] / "clip.html")
    (one,) = data["budgets"]
    one["looked"] = None
    # and one with pairs of which the other is not drawn, by ToMe
    one["taus"] = None
    one["steps"][2]["partner"] = page.pack(torch.full((768,), 768))
    (tmp_path / "without.html").write_text(page.filled(data))
    opened = open_page(tmp_path / "without.html")
    assert text(opened, "share").startswith("Left out") and opened.seen == []
    assert not opened.locator("#attention").is_visible()

    opened.locator("#step").fill("2")
    merged = one["counts"][1] - one["counts"][2]
    assert merged > 0 and text(opened, "pairs").startswith(f"Layer 2: {merged} of ")


def test_a_browser_that_cannot_show_it_says_so(browser, shown):
    opened = browser.new_page()
    opened.add_init_script("delete window.DecompressionStream")
    opened.goto((shown[0] / "clip.html").as_uri())
    opened.get_by_text("it needs a newer browser").wait_for(timeout=2000)


def test_a_phone_and_the_dark(open_page, shown, tmp_path):
    data = data_of(shown[0] / "clip.html")
    data["question"] = data["files"][0] = data["budgets"][0]["looked"]["words"][0] = "long" * 99
    data["budgets"][0]["answers"][0][0][0] = "long" * 99
    (tmp_path / "long.html").write_text(page.filled(data))
    for folder, name in ((shown[0], "sample"), (tmp_path, "long")):
        opened = open_page(folder / f"{name}.html", width=390, color_scheme="dark")
        assert opened.evaluate("document.documentElement.scrollWidth") == 390
        background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == "rgb(20, 24, 31)"
        if name == "long":
            assert text(opened, "where").startswith("Behind the second stage")
            assert text(opened, "told").startswith("Frame 1, row 1, column 4: one token of 403")
        assert opened.seen == []
