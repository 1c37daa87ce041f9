"""Data sets and tokenizers by their names on the hub, here a small one on 127.0.0.1."""

import io
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from conftest import ROOT as PROJECT
from helpers.data import fingerprint, make_text, stories_of, write_text
from helpers.hub import Hub, serve
from pyarrow import parquet

import prepare_data
from litgpt_moe.data.hub_dataset import by_names
from litgpt_moe.data.manifest import read_manifest, verify

ROOT = "/datasets/me/stories/resolve/main/"


def table(stories: list[str]) -> bytes:
    """Return a Parquet file with stories in its column `text`, beside a column that is much larger."""
    file = io.BytesIO()
    columns = {"text": stories, "image": [random.Random(i).randbytes(2_000) for i in range(len(stories))]}
    parquet.write_table(pyarrow.table(columns), file, row_group_size=150)
    return file.getvalue()


# prepare_data.py, with small parts of files, and a note after each file
IN_SMALL_PARTS = """
import sys, prepare_data
from litgpt_moe.data import hub_file, hub_progress, rows
hub_file.RANGE_BYTES, hub_progress.NOTED_BYTES, rows.LIST_CHARS = 512, 1, 1000
sys.exit(prepare_data.main())
"""


@pytest.fixture
def hub(tiny_tokenizer_dir: Path) -> Iterator[tuple[str, type[Hub]]]:
    """A hub with a data set of two subsets, and a tokenizer."""
    files = {
        f"{ROOT}data/train-00000-of-00002.parquet": table(make_text(300)),
        f"{ROOT}data/train-00001-of-00002.parquet": table(make_text(30, seed=1)),
        f"{ROOT}data/validation-00000-of-00001.parquet": table(make_text(5, seed=2)),
        f"{ROOT}old/train-00000-of-00001.parquet": table(make_text(7, seed=3)),
    }
    path = tiny_tokenizer_dir / "tokenizer.json"
    files["/me/tok/resolve/main/tokenizer.json"] = path.read_bytes()
    with serve(files) as (endpoint, handler):
        yield endpoint, handler


def test_a_data_set_is_read_on_the_hub_and_what_is_done_is_not_fetched_again(
    hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    endpoint, handler = hub
    first, second = (f"{ROOT}data/train-0000{i}-of-00002.parquet" for i in range(2))
    flags = ["--dataset", "me/stories", "--tokenizer", "me/tok", "--workers", "1"]

    def prepare(endpoint: str = endpoint) -> subprocess.CompletedProcess[str]:
        online = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(PROJECT)}
        online["HF_TOKEN"] = handler.token
        command = [sys.executable, "-c", IN_SMALL_PARTS, *flags]
        return subprocess.run(command, env=online, cwd=tmp_path, capture_output=True, text=True)

    handler.token = "hf_of_the_user"
    handler.gone.append(second)  # the list names it, and it cannot be read
    handler.to_break.append(first)  # one answer breaks off, and is asked for again
    stopped = prepare()
    assert stopped.returncode == 1 and "run again to go on where it stopped" in stopped.stderr
    data_dir, tokenizer = tmp_path / "data/stories", tmp_path / "data/stories/tokenizer"
    assert (data_dir / ".hub_progress.npz").is_file() and not (data_dir / "manifest.json").exists()
    meta = parquet.read_metadata(io.BytesIO(handler.files[first]))
    image, end = meta.row_group(0).column(1).data_page_offset, meta.row_group(1).column(0).data_page_offset

    def is_sent(at: int) -> bool:
        return any(path == first and start <= at < stop for path, start, stop in handler.sent)

    # of the columns the text alone
    assert is_sent(end) and not is_sent(image + 100_000)
    handler.gone.clear()
    handler.sent.clear()
    done = prepare()
    assert done.returncode == 0, done.stderr
    assert not is_sent(end)  # only the beginning, which is looked at before anything else
    assert stories_of(data_dir, tokenizer, "train") == make_text(300) + make_text(30, seed=1)
    assert stories_of(data_dir, tokenizer, "val") == make_text(5, seed=2)
    assert "read   3 files" in done.stdout and "column text" in done.stdout
    assert read_manifest(data_dir)["tokenizer"]["bos_id"] == 1 and verify(data_dir) == []
    assert not list(data_dir.rglob("*.parquet")) and not (data_dir / ".hub_progress.npz").exists()
    interrupted = fingerprint(data_dir)
    again = prepare("http://127.0.0.1:9")
    assert again.returncode == 0 and "nothing to do" in again.stderr
    shutil.rmtree(data_dir)
    assert prepare().returncode == 0 and fingerprint(data_dir) == interrupted
    flags[:] = ["--data_dir", "data/stories", "--train_tokenizer", "400", "--tokenizer_dir", "own"]
    assert prepare().returncode == 0  # with another tokenizer, from where the text was before
    assert stories_of(data_dir, tmp_path / "own", "train") == make_text(300) + make_text(30, seed=1)


def test_files_that_an_earlier_version_fetched_are_used(
    hub: tuple[str, type[Hub]], tmp_path: Path, run_script: Callable
) -> None:
    endpoint, handler = hub
    names = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    record = {"repo": "me/stories", "asked_subset": None, "asked_split": None, "subset": "default"}
    record |= {"split": "train", "revision": "0" * 40, "files": {"train": names, "val": []}}
    folder = tmp_path / "data/stories"
    (folder / "train").mkdir(parents=True)
    (folder / "hub.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "train" / names[0].replace("/", "--")).write_bytes(handler.files[ROOT + names[0]])
    online = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = ("prepare_data.py", "--dataset", "me/stories", "--tokenizer", "me/tok", "--val_fraction", "0.1")
    done = run_script(*command, env=online, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path for path in handler.asked if path.endswith(".parquet")] == [ROOT + names[1]]
    assert "330 stories, column text" in done.stdout


def test_what_the_hub_does_not_have_is_named_with_what_it_has(
    hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
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


def test_data_of_a_local_file_of_the_same_name_are_not_replaced(
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "stories.txt", make_text(30))
    tokenizer = ["--tokenizer_dir", str(tiny_tokenizer_dir), "--workers", "1"]
    assert prepare_data.main(["stories.txt", *tokenizer]) == 0
    before = (tmp_path / "data/stories/manifest.json").read_bytes()
    capsys.readouterr()
    assert prepare_data.main(["--dataset", "me/stories", *tokenizer]) == 2
    assert "was prepared from" in capsys.readouterr().err
    assert (tmp_path / "data/stories/manifest.json").read_bytes() == before


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
