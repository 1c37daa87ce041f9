"""The shards of a data directory: what is in them, and which text and folders are refused."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
from helpers.data import change_tokenizer, error_of, make_text, stories_of, write_text

import litgpt_moe.data.prepare as prepare_module
from litgpt_moe.data.batches import TokenStream
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.locks import FolderInUse, locked_folder


def test_shards_hold_every_story_once_between_bos_and_eos(settings: PrepareSettings) -> None:
    manifest = prepare(settings)
    for split, expected in (("train", make_text(200)), ("val", make_text(20, seed=1))):
        assert stories_of(settings.data_dir, settings.tokenizer_dir, split) == expected
        entry = manifest["splits"][split]
        assert entry["n_stories"] == len(expected) == sum(s["n_stories"] for s in entry["shards"])
        assert entry["n_bytes"] == sum(len(story.encode()) for story in expected)
        assert entry["n_tokens"] == len(TokenStream(settings.data_dir, split))
    assert read_manifest(settings.data_dir) == manifest


def test_special_tokens_in_the_text_itself_are_counted(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(settings)
    assert "special tokens" not in capsys.readouterr().err
    stories = [f"{story} <s> hi </s> and </s> <unk>" for story in make_text(200)]
    write_text(settings.data_dir / "train" / "a.txt", stories)
    prepare(settings)
    words = "text: special tokens stand in the text, which get their ids: '</s>' 400 times, '<s>' 200 times; "
    assert words in capsys.readouterr().err
    ids = TokenStream(settings.data_dir, "train")
    assert (ids.read(0, len(ids)) == 2).sum() == 600


def test_duplicates_are_dropped_within_and_across_splits(settings: PrepareSettings) -> None:
    stories = make_text(200)
    val = make_text(20, seed=1)
    write_text(settings.data_dir / "train" / "a.txt", [*stories, *stories[:7], *val[:3], "", "  "])
    splits = prepare(settings)["splits"]
    assert splits["train"]["n_stories"] == 200 and splits["train"]["n_duplicates"] == 10
    assert splits["val"]["n_stories"] == 20 and splits["val"]["n_duplicates"] == 0


def test_val_is_cut_by_story_where_there_is_no_val_text(settings: PrepareSettings) -> None:
    (settings.data_dir / "val" / "b.txt").unlink()
    prepare(dataclasses.replace(settings, val_fraction=0.05))
    train, val = (stories_of(settings.data_dir, settings.tokenizer_dir, split) for split in ("train", "val"))
    assert len(val) == 10 and sorted(train + val) == sorted(make_text(200))


def test_many_workers_and_one_make_the_same_shards(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litgpt_moe.data.shards.SHARD_BYTES", 4000)
    monkeypatch.setattr("litgpt_moe.data.text.BLOCK_BYTES", 1000)
    one = prepare(settings)
    for path in settings.data_dir.glob("*/*/*.bin"):
        path.unlink()
    assert prepare(dataclasses.replace(settings, workers=2)) == one
    assert len(one["splits"]["train"]["shards"]) > 5


def test_a_large_vocabulary_takes_four_bytes(settings: PrepareSettings, tmp_path: Path) -> None:
    spec = json.loads((settings.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    vocab |= {f"filler{i}": i for i in range(len(vocab), 70_000)}
    folder = change_tokenizer(settings.tokenizer_dir, tmp_path / "large", model={"vocab": vocab})
    manifest = prepare(dataclasses.replace(settings, tokenizer_dir=folder))
    assert manifest["dtype"] == "uint32"
    assert stories_of(settings.data_dir, folder, "val") == make_text(20, seed=1)


def test_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = error_of(capsys, "--data_dir", tmp_path / "none")
    assert status == 2 and f"{tmp_path / 'none'}: no such folder" in line and "--dataset demo" in line
    assert not (tmp_path / "none").exists()


def test_an_empty_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = error_of(capsys, "--data-dir", tmp_path)
    assert status == 2 and f"{tmp_path / 'train'}: no .txt file" in line


def test_an_empty_text_file_is_named(settings: PrepareSettings, capsys: pytest.CaptureFixture[str]) -> None:
    path = settings.data_dir / "train" / "empty.txt"
    path.write_text(" \n", encoding="utf-8")
    status, line = error_of(capsys, "--data_dir", settings.data_dir)
    assert status == 2 and f"{path}: empty" in line


def test_one_story_cannot_be_two_splits(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    write_text(tmp_path / "train" / "a.txt", make_text(1))
    with pytest.raises(ValueError, match="no story for the train split"):
        prepare(PrepareSettings(tmp_path, tokenizer_dir=tiny_tokenizer_dir))


def test_a_train_text_that_val_has_too_is_told_apart_from_one_too_short(settings: PrepareSettings) -> None:
    text = write_text(settings.data_dir / "train" / "a.txt", make_text(20, seed=3))
    for path in (settings.data_dir / "val").glob("*.txt"):
        path.write_bytes(text.read_bytes())
    for path in (settings.data_dir / "train").glob("*.txt"):
        path.write_bytes(text.read_bytes())
    with pytest.raises(ValueError, match="no story for the train split that val does not have too"):
        prepare(settings)


def test_a_corpus_that_is_too_short_leaves_nothing_behind(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    text = write_text(tmp_path / "train" / "a.txt", make_text(1))
    with pytest.raises(ValueError, match="no story for the train split"):
        prepare(PrepareSettings(tmp_path, tokenizer_dir=tiny_tokenizer_dir))
    assert {p for p in tmp_path.rglob("[!.]*") if p.is_file()} == {text}


def test_a_corpus_that_became_too_short_leaves_the_shards_before(settings: PrepareSettings) -> None:
    manifest = prepare(settings)
    before = {path for path in settings.data_dir.rglob("[!.]*") if path.suffix != ".txt"}
    write_text(settings.data_dir / "train" / "a.txt", make_text(1, seed=9))
    (settings.data_dir / "val" / "b.txt").unlink()
    with pytest.raises(ValueError, match="no story for the train split"):
        prepare(settings)
    assert {path for path in settings.data_dir.rglob("[!.]*") if path.suffix != ".txt"} == before
    assert read_manifest(settings.data_dir) == manifest


def test_a_second_prepare_in_one_folder_is_refused(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--data_dir", settings.data_dir, "--tokenizer_dir", settings.tokenizer_dir)
    with locked_folder(settings.data_dir, "prepare", "prepare_data.py is at work", "wait for it"):
        status, line = error_of(capsys, *flags)
    me = f"text: prepare_data.py is at work there (process {os.getpid()} on "
    assert status == 2 and me in line and "wait for it" in line
    assert not (settings.data_dir / "manifest.json").exists()
    prepare(settings)
    assert not (settings.data_dir / ".prepare.json").exists()


def test_two_data_folders_do_not_train_one_tokenizer_at_once(
    settings: PrepareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = dataclasses.replace(settings, tokenizer_dir=tmp_path / "tokenizer", train_tokenizer=400)
    other = dataclasses.replace(one, data_dir=tmp_path / "other")
    write_text(other.data_dir / "train" / "a.txt", make_text(50, seed=2))
    ensure_tokenizer, refused = prepare_module.ensure_tokenizer, []

    def train_for_long(*args: object) -> object:
        monkeypatch.setattr(prepare_module, "ensure_tokenizer", ensure_tokenizer)
        with pytest.raises(FolderInUse, match="tokenizer: another command makes a tokenizer there") as raised:
            prepare(other)
        refused.append(raised.value)
        return ensure_tokenizer(*args)

    monkeypatch.setattr(prepare_module, "ensure_tokenizer", train_for_long)
    prepare(one)
    assert len(refused) == 1 and not (other.data_dir / "manifest.json").exists()
    prepare(dataclasses.replace(other, train_tokenizer=None))
    assert sorted(path.suffix for path in one.tokenizer_dir.iterdir()) == [".json"] * 3


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_prepared_data_on_a_disk_for_reading_alone_is_fresh(settings: PrepareSettings) -> None:
    prepare(settings)
    settings.data_dir.chmod(0o500)
    try:
        assert prepare(settings)["format_version"] == 1
    finally:
        settings.data_dir.chmod(0o700)


def test_a_folder_named_as_a_text_is_refused(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    path = settings.data_dir / "train" / "d.txt"
    path.mkdir()
    status, line = error_of(capsys, "--data_dir", settings.data_dir)
    assert status == 2 and f"{path}: not a file" in line


@pytest.mark.parametrize("name", ["val", "train/train"])
def test_a_file_named_as_a_folder_is_refused(
    settings: PrepareSettings, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (settings.data_dir / "val/b.txt").unlink()
    (settings.data_dir / "val").rmdir()
    (settings.data_dir / name).touch()
    flags = ("--data_dir", settings.data_dir, "--tokenizer_dir", settings.tokenizer_dir)
    status, line = error_of(capsys, *flags)
    assert status == 2 and f"{settings.data_dir / name} is a file, where a folder belongs" in line


def test_a_share_for_validation_below_every_corpus_is_refused(settings: PrepareSettings) -> None:
    with pytest.raises(ValueError, match=r"val_fraction is 1e-320; choose a number from 1e-9 to 0\.5"):
        prepare(dataclasses.replace(settings, val_fraction=1e-320))


def test_a_tokenizer_dir_that_is_a_file_is_refused(
    settings: PrepareSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (settings.tokenizer_dir / "tokenizer.json", tmp_path / "file"):
        place.touch()
        status, line = error_of(capsys, "--data_dir", settings.data_dir, "--tokenizer_dir", place)
        assert status == 2 and f"{place}: a file" in line and "folder" in line


def test_utf16_is_named(settings: PrepareSettings) -> None:
    (settings.data_dir / "train" / "w.txt").write_text("words", encoding="utf-16")
    with pytest.raises(ValueError, match=r"w\.txt: UTF-16 text; save it as UTF-8"):
        prepare(settings)


def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    wrong = PrepareSettings(
        tmp_path, "wiki", val_fraction=0.0, train_tokenizer=10, workers=-1, separator="a\nb"
    )
    with pytest.raises(ValueError) as caught:
        prepare(wrong)
    for name in ("dataset", "val_fraction", "train_tokenizer", "workers", "separator"):
        assert f"{name} is " in str(caught.value)


def test_a_separator_that_is_no_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.txt").write_text("Once upon a time.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"separator is '\\udcff'; choose UTF-8 text"):
        prepare(PrepareSettings(tmp_path, separator="\udcff", train_tokenizer=512))
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize("content", ['{"my": "notes"}', '"mine"', "[1, 2]"])
def test_a_manifest_of_another_program_is_not_overwritten(tmp_path: Path, content: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.txt").write_text("Once upon a time.", encoding="utf-8")
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json: not a file of prepare_data\.py.*; move it away"):
        prepare(PrepareSettings(tmp_path, tokenizer_dir=tmp_path / "tokenizer", train_tokenizer=512))
    assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "train"]
