"""Data sets and tokenizers fetched from a hub, here a small one on 127.0.0.1."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.data import make_text, stories_of
from helpers.hub import Hub, serve

from litgpt_moe.data.make_tokenizer import TOKENIZER_REPO
from litgpt_moe.data.settings import PrepareSettings

TRAIN = "/datasets/roneneldan/TinyStories/resolve/main/TinyStories-train.txt"


@pytest.fixture
def hub(settings: PrepareSettings) -> Iterator[tuple[str, type[Hub]]]:
    """A hub on this machine with TinyStories of ours and a tokenizer; the first download breaks off."""
    files = {
        # 25 MB, since an interrupted download goes on from its last whole 10 MB
        TRAIN: (settings.data_dir / "train" / "a.txt").read_bytes() * 660,
        TRAIN.replace("train.txt", "valid.txt"): (settings.data_dir / "val" / "b.txt").read_bytes(),
    }
    for path in settings.tokenizer_dir.iterdir():
        files[f"/{TOKENIZER_REPO}/resolve/main/{path.name}"] = path.read_bytes()
    with serve(files) as (endpoint, handler):
        handler.to_break.append(TRAIN)
        yield endpoint, handler


def test_tinystories_and_its_tokenizer_come_from_the_hub_and_downloads_resume(
    hub: tuple, tmp_path: Path, run_script: object, tiny_tokenizer_dir: Path
) -> None:
    endpoint, handler = hub
    arguments = ("--dataset", "tinystories", "--data_dir", tmp_path / "d", "--tokenizer_dir", tmp_path / "t")
    environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = run_script("prepare_data.py", *arguments, env=environment)
    if done.returncode:  # whether one run tries again by itself is huggingface_hub's to decide
        assert done.returncode == 1 and "run again to go on" in done.stderr
        done = run_script("prepare_data.py", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    assert handler.ranges == [f"bytes={10 << 20}-"]
    assert (tmp_path / "d/train/TinyStories-train.txt").read_bytes() == handler.files[TRAIN]
    assert (tmp_path / "t/tokenizer.json").read_bytes() == (
        tiny_tokenizer_dir / "tokenizer.json"
    ).read_bytes()
    assert stories_of(tmp_path / "d", tmp_path / "t", "train") == make_text(200)
    assert not list((tmp_path / "d").rglob(".litgpt_moe*"))
    again = run_script("prepare_data.py", *arguments, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert again.returncode == 0 and "nothing to do" in again.stderr


@pytest.mark.parametrize(
    "environment",
    [{}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}],
    ids=["offline", "refused"],
)
def test_without_the_hub_both_ways_on_are_named(
    settings: PrepareSettings, run_script: object, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = run_script("prepare_data.py", "--data_dir", settings.data_dir, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "--tokenizer_dir" in line and "--train_tokenizer" in line
    assert ("(no connection to it)" in line) == bool(environment)  # not what the hub's client makes of it
    assert not (tmp_path / "data/tokenizer").exists()


def test_a_download_that_failed_leaves_no_empty_folder(run_script: object, tmp_path: Path) -> None:
    arguments = ("--dataset", "tinystories", "--data_dir", tmp_path / "new")
    assert run_script("prepare_data.py", *arguments).returncode == 1
    assert not (tmp_path / "new").exists()
