"""Fixtures of the data's tests: a data directory with text in it, and a tokenizer that we trained."""

from pathlib import Path

import pytest
from helpers.data import make_text, write_data, write_text

from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings


@pytest.fixture
def settings(tmp_path: Path, tiny_tokenizer_dir: Path) -> PrepareSettings:
    """Settings with 200 train and 20 val stories."""
    data_dir = tmp_path / "text"
    write_text(data_dir / "train" / "a.txt", make_text(200))
    write_text(data_dir / "val" / "b.txt", make_text(20, seed=1))
    return PrepareSettings(data_dir=data_dir, tokenizer_dir=tiny_tokenizer_dir, workers=1)


@pytest.fixture(scope="session")
def trained_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained by prepare_data on the demo corpus."""
    folder = tmp_path_factory.mktemp("demo")
    prepare(
        PrepareSettings(
            folder / "data", "demo", folder / "tokenizer", train_tokenizer=700, workers=1, demo_stories=300
        )
    )
    return folder / "tokenizer"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data" / "stories")
