"""Which tokenizer a data directory is used with: prepared data know theirs, and none replaces it unasked."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from helpers.data import error_of, snapshot

from litgpt_moe.data.prepare import prepare, refresh
from litgpt_moe.data.settings import DEFAULT_TOKENIZER_DIR, PrepareSettings
from litgpt_moe.data.tokenizer_folder import choose_tokenizer, find_tokenizer
from litgpt_moe.files import read_json, write_json


@pytest.fixture
def here(settings: PrepareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareSettings:
    """Data of an earlier version, without a copy of its tokenizer, and no default one."""
    prepare(settings)
    shutil.rmtree(settings.data_dir / "tokenizer")
    monkeypatch.chdir(tmp_path)
    return settings


def test_a_named_tokenizer_folder_that_is_missing_is_refused(
    here: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(here.data_dir)
    for dataset in (), ("--dataset", "tinystories"):  # TinyStories brings one only to data not yet prepared
        status, line = error_of(
            capsys, "--data_dir", here.data_dir, "--tokenizer_dir", "tok/gpt2_ful", *dataset
        )
        assert status == 2 and f"{Path('tok/gpt2_ful/tokenizer.json')}: not found" in line
        assert "--train_tokenizer" in line
    assert snapshot(here.data_dir) == before and not Path("tok").exists()


def test_a_missing_folder_is_the_place_to_train_a_tokenizer_in(here: PrepareSettings) -> None:
    wanted = dataclasses.replace(here, tokenizer_dir=Path("tok/new"), train_tokenizer=330)
    assert prepare(wanted)["tokenizer"]["vocab_size"] == 330


def test_prepared_data_know_their_tokenizer_wherever_it_is(here: PrepareSettings) -> None:
    assert choose_tokenizer(here.data_dir, DEFAULT_TOKENIZER_DIR) == here.tokenizer_dir.resolve()
    before = snapshot(here.data_dir)
    shutil.copytree(here.tokenizer_dir, DEFAULT_TOKENIZER_DIR)
    (DEFAULT_TOKENIZER_DIR / "tokenizer.json").write_bytes(b"{}")  # another one, which is not asked for
    prepare(dataclasses.replace(here, tokenizer_dir=DEFAULT_TOKENIZER_DIR))
    refresh(here.data_dir, DEFAULT_TOKENIZER_DIR)
    assert snapshot(here.data_dir) == before


@pytest.mark.parametrize("has_default", [True, False])
def test_a_tokenizer_that_is_nowhere_is_not_replaced_by_the_default_one(
    here: PrepareSettings, has_default: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_json(here.data_dir / "manifest.json")
    manifest["tokenizer"]["sha256"] = "0" * 64
    write_json(here.data_dir / "manifest.json", manifest)
    if has_default:
        shutil.copytree(here.tokenizer_dir, DEFAULT_TOKENIZER_DIR)
    before = snapshot(here.data_dir)
    status, line = error_of(capsys, "--data_dir", here.data_dir)
    assert status == 2 and "the tokenizer that made it is not in" in line and "delete" in line
    assert snapshot(here.data_dir) == before


def test_a_default_tokenizer_that_was_replaced_in_its_place_makes_the_shards_again(
    here: PrepareSettings, trained_tokenizer_dir: Path
) -> None:
    shutil.copytree(here.tokenizer_dir, DEFAULT_TOKENIZER_DIR)
    shutil.rmtree(here.data_dir / "train" / "train")
    usual = dataclasses.replace(here, tokenizer_dir=DEFAULT_TOKENIZER_DIR)
    manifest = read_json(here.data_dir / "manifest.json")
    manifest["tokenizer"]["folder"] = "../data/tokenizer"  # as if it had made them
    write_json(here.data_dir / "manifest.json", manifest)
    prepare(usual)
    shutil.rmtree(here.data_dir / "tokenizer")  # which such data did not carry
    shutil.copytree(trained_tokenizer_dir, DEFAULT_TOKENIZER_DIR, dirs_exist_ok=True)
    assert prepare(usual)["tokenizer"]["vocab_size"] == 700


@pytest.mark.parametrize("folder", ["/etc", "//server/share", "C:\\tokenizer", 7, None])
def test_a_manifest_cannot_lead_to_an_absolute_place(here: PrepareSettings, folder: object) -> None:
    manifest = read_json(here.data_dir / "manifest.json")
    write_json(
        here.data_dir / "manifest.json", manifest | {"tokenizer": manifest["tokenizer"] | {"folder": folder}}
    )
    with pytest.raises(ValueError, match="the tokenizer that made it is not in"):
        find_tokenizer(here.data_dir, None)


@pytest.mark.parametrize("content", ["{", '{"format_version": 1}'])
def test_a_damaged_manifest_brings_no_other_tokenizer(
    here: PrepareSettings, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = here.data_dir / "manifest.json"
    known = read_json(manifest)["tokenizer"]
    manifest.write_text(content, encoding="utf-8")
    status, line = error_of(capsys, "--data_dir", here.data_dir)
    assert status == 2 and f"{manifest}: damaged; delete it, or name the tokenizer's folder" in line
    write_json(manifest, {"tokenizer": known})  # what else is lost is made again with it
    assert prepare(dataclasses.replace(here, tokenizer_dir=DEFAULT_TOKENIZER_DIR))["tokenizer"] == known
