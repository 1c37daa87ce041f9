"""A checkpoint that a test may damage."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny checkpoint, to damage, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "final"))
