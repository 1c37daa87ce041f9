"""Tokenizers that cut texts, fail on them, or are written in another manner than ours."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.data import change_tokenizer, make_text, stories_of

from litgpt_moe.checkpoints.reader import load_tokenizer
from litgpt_moe.checkpoints.tokenizer_files import read_tokenizer_files
from litgpt_moe.data.prepare import prepare, stale_reasons
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.tokenizer import StoryEncoder, read_tokenizer_facts
from litgpt_moe.files import read_json, sha256_file, write_json

TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 40},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<unk>",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": TRUNCATION},
        {"truncation": TRUNCATION | {"stride": 16}},  # the library panics
        {"padding": PADDING},
        {"truncation": TRUNCATION, "padding": PADDING, "pre_tokenizer": None},
    ],
)
def test_truncation_and_padding_of_a_tokenizer_change_no_story(
    settings: PrepareSettings, tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = change_tokenizer(settings.tokenizer_dir, tmp_path / "tokenizer", **changes)
    manifest = prepare(PrepareSettings(settings.data_dir, tokenizer_dir=folder, workers=1))
    assert stories_of(settings.data_dir, folder, "train", load_tokenizer) == make_text(200)
    # the checkpoint's copy has neither, and counts as the same tokenizer
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in read_tokenizer_files(folder).items():
        (copy / name).write_bytes(content)
    spec = read_json(copy / "tokenizer.json")
    assert spec["truncation"] is None and spec["padding"] is None
    assert manifest["tokenizer"]["sha256"] == sha256_file(copy / "tokenizer.json")
    assert not stale_reasons(settings.data_dir, copy)
    # data of before has the digest of the file itself
    manifest["tokenizer"]["sha256"] = sha256_file(folder / "tokenizer.json")
    write_json(settings.data_dir / "manifest.json", manifest)
    capsys.readouterr()
    assert not stale_reasons(settings.data_dir, folder)
    assert "tokenizer.json cut or padded the stories; delete manifest.json" in capsys.readouterr().err


def test_the_digest_of_a_usual_tokenizer_is_the_one_of_its_file(
    tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    spec = read_json(tiny_tokenizer_dir / "tokenizer.json")
    vocab = spec["model"]["vocab"] | {"truncation": len(spec["model"]["vocab"])}
    for folder in (
        tiny_tokenizer_dir,
        change_tokenizer(tiny_tokenizer_dir, tmp_path / "t", model={"vocab": vocab}),
    ):
        assert read_tokenizer_facts(folder).sha256 == sha256_file(folder / "tokenizer.json")


def gpt2_like(tiny_tokenizer_dir: Path, folder: Path) -> Path:
    """Write a byte-level BPE as GPT-2's folder on the hub has it: no model.type, no tokenizer_class."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(make_text(50), trainer)
    spec = json.loads(tokenizer.to_str())
    del spec["model"]["type"]
    folder.mkdir()
    write_json(folder / "tokenizer.json", spec)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1024})
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    return folder


def test_a_tokenizer_as_gpt2_s_on_the_hub_works(
    settings: PrepareSettings, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = gpt2_like(tiny_tokenizer_dir, tmp_path / "gpt2")
    prepare(PrepareSettings(settings.data_dir, tokenizer_dir=folder, workers=1))
    tokenizer = load_tokenizer(folder)
    ids = StoryEncoder(read_tokenizer_facts(folder)).encode("A cat.")
    assert ids[0] == ids[-1] == 0 and tokenizer.processor.decode(ids.tolist()) == "A cat."
    # LitGPT itself reads the checkpoint's copy
    from litgpt import Tokenizer

    for name, content in read_tokenizer_files(folder).items():
        (folder / name).write_bytes(content)
    assert Tokenizer(folder).eos_id == 0


def test_ids_that_leave_some_out_are_counted_to_the_highest(
    settings: PrepareSettings, tmp_path: Path
) -> None:
    vocab = read_json(settings.tokenizer_dir / "tokenizer.json")["model"]["vocab"]
    moved = {piece: i if i < 300 else i + 70_000 for piece, i in vocab.items()}
    folder = change_tokenizer(settings.tokenizer_dir, tmp_path / "tokenizer", model={"vocab": moved})
    manifest = prepare(PrepareSettings(settings.data_dir, tokenizer_dir=folder, workers=1))
    assert manifest["tokenizer"]["vocab_size"] == max(moved.values()) + 1
    assert manifest["dtype"] == "uint32"
    assert stories_of(settings.data_dir, folder, "train") == make_text(200)


@pytest.mark.parametrize("value", ["-1", "[1, 2]", "1e400", "4e9", "4000000000", "true", '"1"', "null", "{}"])
@pytest.mark.parametrize("key", ["bos", "eos"])
def test_ids_that_are_none_are_refused(
    tiny_tokenizer_dir: Path, tmp_path: Path, key: str, value: str
) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").unlink()
    ids = {"bos": "1", "eos": "2"} | {key: value}
    text = ", ".join(f'"{name}_token_id": {number}' for name, number in ids.items())
    (folder / "generation_config.json").write_text(f"{{{text}}}", encoding="utf-8")
    with pytest.raises(ValueError, match=f"no {key.upper()} id; {key}_token must name a piece"):
        read_tokenizer_facts(folder)


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "normalizer",
    [
        replace({"String": "e"}, "e" * 1_000_000),
        {"type": "Sequence", "normalizers": [replace({"String": "e"}, "ee")] * 60},
        {"type": "Sequence", "normalizers": [replace({"Regex": ""}, "ab")] * 60},
        {"type": "Prepend", "prepend": "x" * 1_000_000},
    ],
)
def test_a_normalizer_that_multiplies_text_is_refused(
    tiny_tokenizer_dir: Path, tmp_path: Path, normalizer: dict[str, Any]
) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer", normalizer=normalizer)
    with pytest.raises(ValueError, match="its normalizer makes a text over 64 times as long"):
        read_tokenizer_facts(folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_that_fails_on_a_story_is_named(
    settings: PrepareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    hard = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    folder = change_tokenizer(settings.tokenizer_dir, tmp_path / "tokenizer", pre_tokenizer=hard)
    text = settings.data_dir / "train" / "a.txt"
    text.write_text("x" * 60 + "\n<|endoftext|>\nshort\n", encoding="utf-8")
    monkeypatch.setattr("litgpt_moe.data.shards.SHARD_BYTES", 10)
    with pytest.raises(ValueError, match=r"tokenizer\.json: it fails on a story .*; use another tokenizer"):
        prepare(PrepareSettings(settings.data_dir, tokenizer_dir=folder, workers=workers))
    assert not (settings.data_dir / "manifest.json").exists()


def test_a_tokenizer_that_is_replaced_while_it_is_in_use_is_noticed(
    tiny_tokenizer_dir: Path, trained_tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    facts = read_tokenizer_facts(folder)
    (folder / "tokenizer.json").write_bytes((trained_tokenizer_dir / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="replaced while it was in use"):
        StoryEncoder(facts)


@pytest.mark.parametrize("changes", [{"normalizer": {"type": "Lowercase"}}, {"decoder": None}, {}])
def test_a_tokenizer_that_changes_texts_is_told_with_an_example(
    settings: PrepareSettings, tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = change_tokenizer(settings.tokenizer_dir, tmp_path / "tokenizer", **changes)
    prepare(PrepareSettings(settings.data_dir, tokenizer_dir=folder, workers=1))
    told = f"{folder / 'tokenizer.json'}: changes texts ('Story 0 0. "
    assert (told in capsys.readouterr().err) == bool(changes)
