import shutil

import pytest
import torch
import torch.nn.functional as F
from checkpoints import FAMILIES, QUESTION, make, reference_of

from load import load

torch.set_num_threads(1)  # the tests' models are so small that threads only wait for each other


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A small random checkpoint that no test changes."""
    return make(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def llava(saved):
    return load(saved, "cpu")[0]


@pytest.fixture(scope="session")
def ids(saved):
    return load(saved, "cpu")[1].prompt(QUESTION)


@pytest.fixture(scope="session")
def images():
    """Pictures from plain to busy, as pixels (3, 56, 56)."""
    torch.manual_seed(5)
    coarse = [torch.randn(1, 3, side, side) for side in (1, 2, 4, 7, 14, 28)]
    return [
        F.interpolate(c, (56, 56), mode="nearest")[0] + 0.01 * torch.randn(3, 56, 56)
        for c in coarse
    ]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder, model and processor of a family, and transformers' model; each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = make(tmp_path_factory.mktemp("family"), **FAMILIES[name])
            made[name] = folder, *load(folder, "cpu"), reference_of(folder)
        return made[name]

    return get


@pytest.fixture(params=FAMILIES)
def family(request, checkpoint):
    return checkpoint(request.param)


@pytest.fixture(params=["llava_next, Llama", "llava_onevision"])
def anyres(request, checkpoint):
    return checkpoint(request.param)
