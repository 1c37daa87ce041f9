"""The servers of this folder's tests, one for each module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.server import Running, serving


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """One thread for the servers, too: two threads wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Iterator[Running]:
    """A server of the tiny checkpoint."""
    with serving(tiny_checkpoint, "--max_tokens=20", "--seed=3") as server:
        yield server


@pytest.fixture(scope="module")
def talker(chatterbox: Path) -> Iterator[Running]:
    """A server whose stories go on for 4,000 tokens."""
    with serving(chatterbox, "--max_tokens=4000") as server:
        yield server
