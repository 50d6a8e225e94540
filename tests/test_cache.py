"""Rows behind a filled cache, and other places where a mistake would change logits in silence."""

import pytest
import torch
from checkpoints import IMAGE, reference_of

from dymu import DyMU
from extras.anyres import settle
from extras.decoding import prefill_expanded
from extras.sampled import spread
from load import load
from model import KVCache, VisionLayer

MERGED = (4, 3, 2)
SETTINGS = {
    "full": DyMU(),
    "merged": DyMU(r=MERGED),
    "merged, 1 query": DyMU(r=MERGED, queries=spread(1)),
    "merged, 3 queries": DyMU(r=MERGED, queries=spread(3)),
    "no VTU": DyMU(r=MERGED, vtu=False),
}


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


@pytest.fixture
def prompt(ids):
    """Two pictures with text before, between and behind them."""
    text = ids[ids != IMAGE]
    return torch.cat((text[:4], torch.tensor([IMAGE]), text[4:9], torch.tensor([IMAGE]), text[9:]))


def in_parts(llava, rows, token_at, cuts, queries, cache=None):
    """Logits of all rows, read behind one another in parts that end before each of `cuts`."""
    cache = cache or KVCache()
    out = []
    for start, end in zip([0, *cuts], [*cuts, len(rows)]):
        part = token_at[token_at < end]
        out.append(llava.language_model(rows[start:end], part, cache, queries))
    assert (cache.rows, cache.positions) == (len(rows), len(token_at))
    return llava.logits(torch.cat(out))


@torch.no_grad()
def test_any_rows_behind_cached_ones_equal_one_pass(llava, prompt, images, settings):
    """Also a merged picture behind plain text, whose keys were rotated when they were cached."""
    visual = llava.encode([images[3], images[2]], settings)
    rows, token_at = llava.splice(prompt, visual, settings.vtu)
    n = [len(x) for x, _ in visual]
    whole = llava.logits(llava.language_model(rows, token_at, KVCache(), settings.queries))

    first, second = 4 + n[0], 4 + n[0] + 5 + n[1]
    for cuts in (
        [4],  # the first picture and all that follows behind plain text
        [first],  # text and the second picture behind a merged one
        [first + 2, second],
        [2, 4, first, first + 5, second, second + 1, second + 4],
        [second, *range(second + 1, len(rows))],  # one row at a time
    ):
        stepped = in_parts(llava, rows, token_at, cuts, settings.queries)
        torch.testing.assert_close(stepped, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_prefix_serves_several_questions(llava, prompt, images, settings):
    """A cache that is copied is not changed by what goes on behind the copy."""
    visual = llava.encode([images[3], images[2]], settings)
    rows, token_at = llava.splice(prompt, visual, settings.vtu)
    R = len(rows) - 5
    prefix = KVCache()
    llava.language_model(rows[:R], token_at[token_at < R], prefix, settings.queries)
    for more in (torch.tensor([7, 100, 42]), torch.tensor([9, 8, 7, 6, 5, 4])):
        cache = KVCache()
        cache.kv, cache.rows, cache.positions = dict(prefix.kv), prefix.rows, prefix.positions
        asked = torch.cat((prompt[:-5], more))
        new, at = llava.splice(asked, visual, settings.vtu)
        found = llava.language_model(new[R:], at, cache, settings.queries)
        whole = llava.language_model(new, at, KVCache(), settings.queries)
        torch.testing.assert_close(found, whole[R:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_picture_behind_an_expanded_cache(llava, prompt, images):
    settings = DyMU(r=MERGED)
    visual = llava.encode([images[3], images[2]], settings)
    rows, token_at = llava.splice(prompt, visual)
    R = 4 + len(visual[0][0]) + 5
    before = token_at[token_at < R]
    cache = KVCache()
    last, identity = prefill_expanded(llava, rows[:R], before, cache)
    llava.language_model(last, identity, cache)

    # the rows of the first picture are its positions now
    behind = token_at[len(before) :] - R + len(before)
    found = llava.language_model(rows[R:], torch.cat((identity, behind)), cache)
    whole = llava.language_model(rows, token_at, KVCache())
    torch.testing.assert_close(found, whole[R:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_query_sees_the_future(llava, ids, images, settings):
    rows, token_at = llava.splice(ids, llava.encode(images[3], settings), settings.vtu)
    for changed in (len(rows) - 1, len(rows) - 6, 8):
        position = int((token_at == changed).nonzero()[0])
        past = [t for t in range(len(rows)) if (token_at == t).nonzero().max() < position]
        other = rows.clone()
        other[changed] += 1
        a, b = (
            llava.language_model(x, token_at, KVCache(), settings.queries) for x in (rows, other)
        )
        assert past and torch.equal(a[past], b[past]) and not torch.equal(a, b)


@torch.no_grad()
def test_rows_in_another_order_are_sorted_out_before_the_decoder(llava, ids, images):
    """Where nothing has merged, Llama takes a row to stand at its own position."""
    rows, token_at = llava.splice(ids, llava.encode(images[3]))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    mixed, at = settle(rows[order], order.argsort())
    assert torch.equal(mixed, rows) and torch.equal(at, token_at)
    spare = torch.cat((rows[order], rows[:3]))  # rows that stand nowhere
    mixed, at = settle(spare, order.argsort())
    assert torch.equal(mixed, rows) and torch.equal(at, token_at)


@torch.no_grad()
def test_a_prompt_that_ends_in_a_picture(llava, saved, ids, images, settings):
    text = ids[ids != IMAGE]
    prompt = torch.cat((text, torch.tensor([IMAGE])))
    if settings.merging and settings.vtu:  # of pictures whose last position is not the last row's
        ends = [llava.vision_tower(image, settings)[1][-1] for image in images]
        assert any(end != 16 - sum(MERGED) - 1 for end in ends)
    for image in images:
        check_end(llava, prompt, image, settings)
    if settings == DyMU():
        their_ids = torch.cat((text, torch.full((16,), IMAGE)))[None]
        inputs = dict(input_ids=their_ids, pixel_values=images[3][None])
        theirs = reference_of(saved)(**inputs).logits[0, -1]
        ours = check_end(llava, prompt, images[3], settings)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def check_end(llava, prompt, image, settings):
    visual = llava.encode(image, settings)
    rows, token_at = llava.splice(prompt, visual, settings.vtu)
    x = llava.language_model(rows, token_at, KVCache(), settings.queries)
    expected = llava.logits(x[token_at[-1]])
    seen = []

    def pick(logits):
        seen.append(logits)
        return logits.argmax()

    list(llava.generate(prompt, image, settings, 1, pick=pick))
    torch.testing.assert_close(seen[0], expected)
    return seen[0]


def test_queries_that_leave_a_token_out_are_no_silent_nan(llava, ids, images):
    for wrong in (lambda token_at: spread(1)(token_at)[1:], lambda token_at: torch.tensor([0, 3])):
        with pytest.raises(AssertionError, match="a position of each token"):
            llava(ids, images[3], DyMU(r=MERGED, queries=wrong))


def test_queries_in_any_order_are_taken_in_order(llava, ids, images):
    backwards = DyMU(r=MERGED, queries=lambda token_at: spread(2)(token_at).flip(0))
    found = llava(ids, images[3], backwards)
    torch.testing.assert_close(found, llava(ids, images[3], DyMU(r=MERGED, queries=spread(2))))


def test_a_method_is_not_hidden_by_a_field(llava, ids, images):
    """A subclass may say what merges; a field of that name would win over its method."""

    class Everything(DyMU):
        def choose(self, score, seen):
            return score > -torch.inf

    found = llava(ids, images[3], Everything(rule=min))
    expected = llava(ids, images[3], DyMU(rule=lambda score, seen: score > -9))
    assert torch.equal(found, expected) and len(found) < len(llava(ids, images[3]))


@torch.no_grad()
def test_two_answers_from_one_prefix_do_not_write_into_each_other(llava, ids, images):
    """Also in turns: each copy of a cache that has grown gets room of its own."""
    rows, token_at = llava.splice(ids, llava.encode(images[3], DyMU(r=MERGED)))
    prefix = KVCache()
    list(llava.decode(rows, token_at, prefix, max_new_tokens=3, eos=()))
    at = torch.cat((token_at, torch.arange(len(rows), prefix.rows)))
    caches = [KVCache(), KVCache()]
    answers = []
    for cache, id in zip(caches, (7, 9)):
        cache.kv = {i: tuple(x[:, : prefix.rows] for x in kv) for i, kv in prefix.kv.items()}
        cache.rows, cache.positions = prefix.rows, prefix.positions
        new = llava.language_model.embed_tokens.weight[id][None]
        more = torch.cat((at, torch.tensor([prefix.rows])))
        answers.append(llava.decode(new, more, cache, max_new_tokens=5, eos=()))
    in_turns = [list(ids) for ids in zip(*zip(*answers))]
    alone = []
    for id in (7, 9):
        cache = KVCache()
        cache.kv = {i: tuple(x[:, : prefix.rows] for x in kv) for i, kv in prefix.kv.items()}
        cache.rows, cache.positions = prefix.rows, prefix.positions
        new = llava.language_model.embed_tokens.weight[id][None]
        more = torch.cat((at, torch.tensor([prefix.rows])))
        alone.append(list(llava.decode(new, more, cache, max_new_tokens=5, eos=())))
    assert in_turns == alone


def test_a_step_copies_one_row_not_the_cache(llava):
    cache = KVCache()
    k = torch.randn(2, 40, 16)
    cache.append(0, k, k)
    cache.rows = 40
    moved = 0
    for i in range(100):
        before = cache.kv[0][0].data_ptr()
        new = torch.randn(2, 1, 16)
        found, _ = cache.append(0, new, new)
        assert torch.equal(found[:, :40], k) and torch.equal(found[:, -1:], new)
        cache.rows += 1
        assert found.shape[1] == cache.rows == 41 + i
        moved += cache.kv[0][0].data_ptr() != before
    assert moved == 2  # at 41 rows, and where that room is full


# ---- backward ----


@pytest.mark.parametrize("pixels", [3, None])
def test_gradients_equal_transformers(saved, llava, ids, images, pixels):
    """At full length, of a loss on all logits, for every parameter that both have."""
    ours = load(saved, "cpu")[0].requires_grad_(True)
    theirs = reference_of(saved)
    place = ids.tolist().index(IMAGE)
    their_ids = torch.cat((ids[:place], torch.full((16,), IMAGE), ids[place + 1 :]))[None]
    inputs = dict(input_ids=their_ids, pixel_values=images[3][None])
    if pixels is None:
        ids = ids[ids != IMAGE]
        inputs = dict(input_ids=ids[None])
    logits = ours(ids, None if pixels is None else images[3])
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    (theirs(**inputs).logits[0] * weight).sum().backward()

    pairs = [
        (ours.lm_head.weight, theirs.lm_head.weight),
        (
            ours.language_model.layers[0].k_proj.weight,
            theirs.model.language_model.layers[0].self_attn.k_proj.weight,
        ),
    ]
    if pixels is not None:
        embeddings = theirs.model.vision_tower.embeddings
        pairs.append((ours.vision_tower.patch_embedding.weight, embeddings.patch_embedding.weight))
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4 * float(b.grad.abs().max()))


@pytest.mark.parametrize("queries", [None, spread(1), spread(3)])
def test_gradients_flow_through_merged_tokens(saved, ids, images, queries):
    """A step along the gradient changes the loss by its squared length, to first order."""
    llava = load(saved, "cpu", torch.float64)[0].requires_grad_(True)
    settings = DyMU(r=MERGED, queries=queries)

    def loss():
        return llava(ids, images[3], settings).logsumexp(-1).sum()

    before = loss()
    before.backward()
    used = [p for p in llava.parameters() if p.grad is not None]
    assert all(p.grad.isfinite().all() for p in used)
    assert llava.vision_tower.patch_embedding.weight.grad.abs().max() > 0
    squared = sum(p.grad.square().sum() for p in used)
    with torch.no_grad():
        for p in used:
            p.add_(p.grad, alpha=1e-9 / float(squared) ** 0.5)
        change = (loss() - before) / (1e-9 * squared**0.5)
    assert abs(change - 1) < 1e-2


def test_eq5_reaches_the_next_layers(llava, images, monkeypatch):
    """Their bias is log|P| of the tokens that the layer before left: |P| sums to the positions."""
    seen = []
    attend = VisionLayer.attend

    def watched(self, x, bias):
        seen.append(bias)
        return attend(self, x, bias)

    monkeypatch.setattr(VisionLayer, "attend", watched)
    llava.vision_tower(images[3], DyMU(r=(4, 0, 0)))
    assert seen[0] is None and torch.equal(seen[1], seen[2])
    assert len(seen[1]) == 17 - 4 and float(seen[1].exp().sum()) == pytest.approx(17)
