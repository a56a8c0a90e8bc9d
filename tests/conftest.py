"""Shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from dinoreg.parallel.mesh import Ranks
from dinoreg.train.checkpoint import CheckpointConfig, Checkpointer

# The models of the tests are far too small to gain from threads, and processes that share two cores lose much by them.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The optional folder of small real data sets; the test skips where it is absent."""
    folder = Path(os.environ.get("DINOREG_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set DINOREG_TEST_DATA to run this test")
    return folder


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[Checkpointer]:
    with closing(Checkpointer(tmp_path, CheckpointConfig(), Ranks.alone())) as checkpointer:
        yield checkpointer
