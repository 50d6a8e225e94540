"""No GPU is needed to see that every tensor names its device."""

import pytest
import torch
from checkpoints import FAMILIES, QUESTION, clip, picture
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dymu import DyMU
from extras.decoding import prefill_expanded, sampler
from extras.sampled import spread
from extras.second_stage import second_stage
from extras.thresholds import find_thresholds
from extras.video import Frames
from load import load
from model import KVCache

MAKES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint"}
MAKES |= {"randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros"}


class EveryTensorNamesItsDevice(TorchFunctionMode):
    """Fails where a tensor is made without one: on a GPU it would be made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        makes = name in MAKES and getattr(torch, name, None) is func
        assert not makes or (kwargs or {}).get("device") is not None, f"{name} without a device"
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_it_should():
    with EveryTensorNamesItsDevice():
        torch.zeros(1, device="cpu").new_zeros(2)
        for make in (lambda: torch.arange(3), lambda: torch.tensor([1]), lambda: torch.zeros(2)):
            with pytest.raises(AssertionError, match="without a device"):
                make()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", *FAMILIES])
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("queries", [None, spread(1)])
def test_merged_generation(checkpoint, saved, name, expand, queries):
    llava, processor = load(saved) if name == "llava" else checkpoint(name)[1:3]
    r = (2,) * llava.config.vision_layers
    frames = processor.video(clip())
    for shown in (
        processor.image([picture((80, 61)), picture((40, 120))]),
        Frames(frames) if isinstance(frames, list) else frames,
    ):
        ids = processor.prompt(QUESTION, shown)  # these start on the CPU
        with EveryTensorNamesItsDevice():
            visual = llava.encode(shown, DyMU(r=r, after=second_stage(0.9)))
            rows, token_at = llava.splice(ids, visual)
            cache = KVCache()
            if expand:
                rows, token_at = prefill_expanded(llava, rows, token_at, cache, queries)
            pick = sampler(1.0, 0, rows.device)
            answer = llava.decode(rows, token_at, cache, queries, 3, eos=(), pick=pick)
            assert len(list(answer)) == 3


class CountWaits(TorchDispatchMode):
    """How often a value is read by the host, for which it would have to wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "_unique2", "is_nonzero")
        self.waits += any(name in str(func) for name in names)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("settings", [DyMU(), DyMU(r=(4, 3, 2)), DyMU(r=(4, 3, 2), vtu=False)])
def test_a_step_waits_once_for_the_chosen_id(llava, ids, images, settings):
    waits = []
    for n in (5, 15):
        with CountWaits() as mode:
            list(llava.generate(ids, images[3], settings, n, eos=()))
        waits.append(mode.waits)
    assert waits[1] - waits[0] == 10


def test_finding_thresholds(llava, images):
    with EveryTensorNamesItsDevice():
        find_thresholds(llava.vision_tower, images, (3, 2, 1), 2)
