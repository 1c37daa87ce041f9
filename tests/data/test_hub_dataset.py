"""Data sets and tokenizers by their names on the hub, here a small one on 127.0.0.1."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from conftest import ROOT as PROJECT
from helpers.data import make_text, stories_of
from helpers.hub import Hub, serve
from pyarrow import parquet

from litgpt_moe.data.hub_dataset import by_names
from litgpt_moe.data.manifest import read_manifest

ROOT = "/datasets/me/stories/resolve/main/"


def table(stories: list[str]) -> bytes:
    """Return a Parquet file with stories in its column `text`."""
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": stories, "n": list(range(len(stories)))}), file)
    return file.getvalue()


@pytest.fixture
def hub(tiny_tokenizer_dir: Path) -> Iterator[tuple[str, type[Hub]]]:
    """A hub with a data set of two subsets, and a tokenizer."""
    files = {
        f"{ROOT}data/train-00000-of-00002.parquet": table(make_text(30)),
        f"{ROOT}data/train-00001-of-00002.parquet": table(make_text(30, seed=1)),
        f"{ROOT}data/validation-00000-of-00001.parquet": table(make_text(5, seed=2)),
        f"{ROOT}old/train-00000-of-00001.parquet": table(make_text(7, seed=3)),
    }
    path = tiny_tokenizer_dir / "tokenizer.json"
    files["/me/tok/resolve/main/tokenizer.json"] = path.read_bytes()
    with serve(files) as (endpoint, handler):
        yield endpoint, handler


def test_a_data_set_and_a_tokenizer_come_by_their_names_and_a_fetch_goes_on(
    hub: tuple[str, type[Hub]], tmp_path: Path, run_script: Callable
) -> None:
    endpoint, handler = hub
    second = f"{ROOT}data/train-00001-of-00002.parquet"
    content = handler.files.pop(second)  # the list names it, and it cannot be fetched
    handler.listed.append(second)
    online = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = ("prepare_data.py", "--dataset", "me/stories", "--tokenizer", "me/tok", "--workers", "1")
    stopped = run_script(*command, env=online, cwd=tmp_path)
    assert stopped.returncode == 1 and "run again to go on where it stopped" in stopped.stderr
    handler.files[second] = content
    done = run_script(*command, env=online, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fetched = [path for path in handler.asked if path.endswith(".parquet")]
    assert sorted(fetched) == [path for path in sorted(handler.files) if "/data/" in path]  # each once
    data_dir, tokenizer = tmp_path / "data/stories", tmp_path / "data/stories/tokenizer"
    assert stories_of(data_dir, tokenizer, "train") == make_text(30) + make_text(30, seed=1)
    assert stories_of(data_dir, tokenizer, "val") == make_text(5, seed=2)
    assert "read   3 files" in done.stdout and "column text" in done.stdout
    assert read_manifest(data_dir)["tokenizer"]["bos_id"] == 1
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    again = run_script(*command, env=away, cwd=tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stderr


def test_what_the_hub_does_not_have_is_named_with_what_it_has(
    hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    import subprocess
    import sys

    endpoint, handler = hub
    del handler.files[f"{ROOT}data/validation-00000-of-00001.parquet"]
    # one process for all: each import of the project takes seconds
    code = """
import sys, prepare_data
for words in sys.argv[1].split(";"):
    prepare_data.main(["--tokenizer", "me/tok", "--dataset", *words.split()])
"""
    wrong = (
        "me/nothing; me/stories --subset new; me/stories --split gold; me/stories --subset old --data_dir d"
    )
    wrong += "; me/stories --data_dir d"
    done = subprocess.run(
        [sys.executable, "-c", code, wrong],
        env={"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(PROJECT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4, done.stderr
    assert "me/nothing: no such data set on" in errors[0] and "hf auth login" in errors[0]
    assert "no subset 'new'; choose one with --subset: default, old" in errors[1]
    assert "subset default: no split 'gold'; choose one with --split: train" in errors[2]
    assert "d: has me/stories old train; name another folder with --data_dir" in errors[3]
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["d"]


@pytest.mark.parametrize(
    ("paths", "layout"),
    [
        (["data/train-00000-of-00001-0123456789abcdef.parquet"], {"default": ["train"]}),
        (["train.parquet", "test.parquet"], {"default": ["train", "test"]}),
        (
            ["en/train/0000.parquet", "de/partial-train/0000.parquet"],
            {"en": ["train"], "de": ["partial-train"]},
        ),
        (["2023.en/train-00000-of-00041.parquet"], {"2023.en": ["train"]}),
        (["shard_00001.parquet", "shard_00002.parquet"], {"default": ["train"]}),
        (["plain_text/stories/0000.parquet"], {"plain_text": ["stories"]}),
    ],
)
def test_subset_and_split_are_told_by_the_names_of_files(
    paths: list[str], layout: dict[str, list[str]]
) -> None:
    assert {subset: list(splits) for subset, splits in by_names(paths).items()} == layout


def test_the_card_of_a_data_set_says_which_files_a_subset_has(
    hub: tuple[str, type[Hub]], tmp_path: Path, run_script: Callable
) -> None:
    endpoint, handler = hub
    pattern = {"split": "train", "path": "ol*/*.parquet"}
    configs = [{"config_name": "small", "data_files": [pattern], "default": True}]
    handler.card["cardData"] = {"configs": configs}
    online = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = ("prepare_data.py", "--dataset", "me/stories", "--tokenizer", "me/tok", "--val_fraction", "0.3")
    done = run_script(*command, env=online, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "data/stories/hub.json").read_text(encoding="utf-8"))
    assert record["subset"] == "small" and record["files"]["train"] == ["old/train-00000-of-00001.parquet"]
    assert "7 stories" in done.stdout
