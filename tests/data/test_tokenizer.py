"""The tokenizer of a data directory: what is refused, what is trained and what is replaced."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.data import change_tokenizer, snapshot

from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.tokenizer import can_split_at_spaces, read_tokenizer_facts
from litgpt_moe.data.tokenizer_folder import find_tokenizer


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not JSON"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}', None),
        ("tokenizer_config.json", '{"bos_token": "<s>", "eos_token": "</s>"}', None),
        ("tokenizer_config.json", '{"tokenizer_class": "X", "bos_token": "<bos>"}', "no BOS id"),
        ("generation_config.json", "[", r"generation_config\.json: not JSON"),
    ],
)
def test_a_tokenizer_that_litgpt_would_trip_over_is_named(
    tiny_tokenizer_dir: Path, tmp_path: Path, name: str, content: str, message: str | None
) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    assert read_tokenizer_facts(folder).bos_id == 1  # and is kept, but not beyond the change of a file
    (folder / name).write_text(content, encoding="utf-8")
    if message is None:
        assert read_tokenizer_facts(folder).bos_id == 1  # from generation_config.json, as LitGPT does
        return
    with pytest.raises(ValueError, match=message):
        read_tokenizer_facts(folder)


def test_a_tokenizer_folder_without_bos_is_named(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="no BOS id"):
        read_tokenizer_facts(folder)


def test_another_tokenizer_is_only_replaced_on_request(
    settings: PrepareSettings, trained_tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = change_tokenizer(settings.tokenizer_dir, tmp_path / "tokenizer")
    wanted = dataclasses.replace(settings, tokenizer_dir=folder, train_tokenizer=340)
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        prepare(wanted)
    assert prepare(dataclasses.replace(wanted, overwrite=True))["tokenizer"]["vocab_size"] == 340
    before = snapshot(folder)
    prepare(wanted)
    assert snapshot(folder) == before


def test_a_piece_across_a_space_forbids_splitting_at_spaces(tiny_tokenizer_dir: Path) -> None:
    spec = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    assert can_split_at_spaces(spec)
    for piece in ("of\u2581the", "a\nb", "x\u2581"):
        vocab = spec["model"]["vocab"] | {piece: 9999}
        assert not can_split_at_spaces(spec | {"model": spec["model"] | {"vocab": vocab}})


def test_the_tokenizer_is_found_by_its_hash_in_any_folder_beside(data_dir, tmp_path):
    made_it, data = data_dir.parent / "tokenizer", data_dir.parent
    made_it.rename(data / "tinyllama")  # as in the README: another than the demo's
    for folder in (made_it, data / "another"):
        folder.mkdir()
        (folder / "tokenizer.json").write_text('{"other": 1}', encoding="utf-8")
    assert find_tokenizer(data_dir, None) == data / "tinyllama"
    assert find_tokenizer(data_dir, data / "tinyllama") == data / "tinyllama"


def test_a_folder_beside_that_may_not_be_read_is_passed_over(data_dir, monkeypatch):
    locked = data_dir.parent / "another"
    locked.mkdir()
    (locked / "tokenizer.json").write_text("{}", encoding="utf-8")

    def read(path):  # as root, whom no permission stops, a test cannot lock a file
        if path.parent == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", read)
    (data_dir.parent / "tokenizer").rename(data_dir.parent / "tinyllama")  # after the locked one by name
    assert find_tokenizer(data_dir, None) == data_dir.parent / "tinyllama"
    with pytest.raises(PermissionError):
        find_tokenizer(data_dir, locked)
