"""Several questions about one picture: answers as if each had been asked alone."""

import pytest
import torch
from checkpoints import IMAGE

from dymu import DyMU
from extras.chat import Session
from extras.sampled import spread
from load import load

SETTINGS = {
    "full": DyMU(),
    "merged": DyMU(r=(4, 3, 2)),
    "merged, 1 query": DyMU(r=(4, 3, 2), queries=spread(1)),
    "no VTU": DyMU(r=(4, 3, 2), vtu=False),
}


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


class Likeliest:
    """Picks as `Llava.decode` does, and keeps the logits."""

    def __init__(self):
        self.logits = []

    def __call__(self, logits):
        self.logits.append(logits)
        return logits.argmax()


def alone(llava, ids, pixels, settings, n=6):
    pick = Likeliest()
    answer = list(llava.generate(ids, pixels, settings, n, eos=(), pick=pick))
    return answer, torch.stack(pick.logits)


def asked(session, ids, n=6):
    pick = Likeliest()
    answer = list(session.ask(ids, n, eos=(), pick=pick))
    return answer, torch.stack(pick.logits)


def prompts():
    """Text, a picture, text, a picture; then other questions, one of them longer, one shorter"""
    torch.manual_seed(0)
    first = torch.cat((torch.randint(3, 250, (4,)), torch.tensor([IMAGE]), torch.arange(20, 25)))
    first = torch.cat((first, torch.tensor([IMAGE])))
    tails = [(30, 31, 32, 33), (30, 31, 40, 41, 42, 43, 44), (50,), (30, 31, 32, 33)]
    return [torch.cat((first, torch.tensor(tail))) for tail in tails], len(first)


@pytest.mark.parametrize("expand", [False, True])
def test_questions_that_share_a_prefix_are_answered_as_alone(llava, images, settings, expand):
    pixels = [images[3], images[2]]
    session = Session(llava, pixels, settings, expand)
    more = sum(len(at) for _, at in session.visual) - 2
    asked_before, prefix = prompts()
    shared = [None, prefix + 2, prefix, prefix]
    for ids, same in zip(asked_before, shared):
        answer, logits = asked(session, ids)
        expected, expected_logits = alone(llava, ids, pixels, settings)
        assert answer == expected
        assert torch.allclose(logits, expected_logits, atol=1e-5)
        if settings.vtu and same is not None:
            assert session.reused == same + more
    assert session.ids == [*ids.tolist(), *answer]


@pytest.mark.parametrize("expand", [False, True])
def test_a_conversation_equals_one_long_prompt(llava, images, settings, expand):
    session = Session(llava, images[3], settings, expand)
    ids = torch.cat((torch.tensor([0, IMAGE]), torch.arange(30, 36)))
    for turn in range(3):
        answer, logits = asked(session, ids)
        expected, expected_logits = alone(llava, ids, images[3], settings)
        assert answer == expected
        assert torch.allclose(logits, expected_logits, atol=1e-5)
        if turn:
            # all but what was asked since: the last id of an answer was never read
            assert session.reused == session.cache.positions - 5 - 5
        ids = torch.cat((ids, torch.tensor(answer), torch.arange(60, 64)))


def test_an_answer_may_be_left_and_a_prompt_may_fail(llava, images):
    session = Session(llava, images[3], DyMU(r=(4, 3, 2)))
    first = torch.cat((torch.tensor([0, IMAGE]), torch.arange(30, 36)))
    second = torch.cat((torch.tensor([0, IMAGE]), torch.arange(32, 36)))
    for _, _ in zip(session.ask(first, 9, eos=()), range(3)):
        pass
    with pytest.raises(ValueError, match="placeholders"):
        list(session.ask(torch.arange(30, 36)))
    for ids in (second, first):
        assert asked(session, ids)[0] == alone(llava, ids, images[3], session.settings)[0]


def test_another_beginning_is_read_anew(llava, images):
    session = Session(llava, images[3], DyMU(r=(4, 3, 2)))
    first = torch.tensor([0, 9, IMAGE, 30, 31, 32])
    asked(session, first)
    for ids in (torch.tensor([0, 8, IMAGE, 30, 31, 32]), torch.tensor([0, 8, IMAGE, 30])):
        again = asked(session, ids)
        assert again[0] == alone(llava, ids, images[3], session.settings)[0]
    assert session.reused == 2 + len(session.visual[0][1])
    other = asked(session, first)
    assert session.reused == 0
    assert other[0] == alone(llava, first, images[3], session.settings)[0]


def test_text_alone_is_shared_too(llava):
    session = Session(llava, None)
    for ids in (torch.arange(20, 30), torch.cat((torch.arange(20, 28), torch.arange(5)))):
        assert asked(session, ids)[0] == alone(llava, ids, None, DyMU())[0]
    assert session.reused == 8


def test_tiny_answers_questions_and_converses_as_alone():
    llava, processor = load("tiny", "cpu")
    pixels = processor.image("tiny/sample.png")
    settings = DyMU(r=(30,) * 7, queries=spread(1))
    session = Session(llava, pixels, settings)
    turns = []
    questions = ("what number is written?", "how many things are there?", "what word is written?")
    for question in questions:
        for so_far in ((), tuple(turns)):
            ids = processor.prompt(question, pixels, so_far)
            answer = list(session.ask(ids))
            assert answer == list(llava.generate(ids, pixels, settings))
        turns.append((question, processor.decode(answer).strip()))
    assert session.reused > 256
