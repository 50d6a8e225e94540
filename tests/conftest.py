import shutil

import pytest
import torch
from checkpoints import make

torch.set_num_threads(1)  # the tests' models are so small that threads only wait for each other


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A small random checkpoint that no test changes."""
    return make(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(saved, tmp_path / "checkpoint")
