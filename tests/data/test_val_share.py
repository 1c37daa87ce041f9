"""The share of the text that is set aside for validation, and files that are not read."""

import dataclasses
from pathlib import Path

import pytest
from helpers.data import error_of, make_text, stories_of, write_text

from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings


@pytest.fixture
def alone(settings: PrepareSettings) -> PrepareSettings:
    """Settings of a data directory without text for validation."""
    (settings.data_dir / "val" / "b.txt").unlink()
    return settings


def write_book(path: Path, n_bytes: int) -> str:
    """Write a text without separators, in paragraphs, and return it."""
    text = "\n\n".join(make_text(n_bytes // 180, seed=7))
    path.write_text(text, encoding="utf-8")
    return text


@pytest.mark.parametrize("n_bytes", [30_000, 300_000, 2_500_000])
@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_val_gets_its_share_of_a_book_in_whole_paragraphs(
    alone: PrepareSettings, n_bytes: int, fraction: float, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_book(alone.data_dir / "train" / "a.txt", n_bytes)
    splits = prepare(dataclasses.replace(alone, val_fraction=fraction))["splits"]
    share = splits["val"]["n_bytes"] / (splits["val"]["n_bytes"] + splits["train"]["n_bytes"])
    assert abs(share - fraction) * len(text) < 260  # half a paragraph
    assert f"{share:.2%} of the text was set aside" in capsys.readouterr().err
    val, train = (stories_of(alone.data_dir, alone.tokenizer_dir, split) for split in ("val", "train"))
    assert sorted("\n\n".join(val + train).split("\n\n")) == sorted(text.split("\n\n"))


def test_a_book_without_paragraphs_or_spaces_is_cut_between_characters(alone: PrepareSettings) -> None:
    text = "从前有一个小男孩" * 10_000
    (alone.data_dir / "train" / "a.txt").write_text(text, encoding="utf-8")
    prepare(alone)
    val, train = (stories_of(alone.data_dir, alone.tokenizer_dir, split) for split in ("val", "train"))
    assert "".join(val + train) == text and len(val[0]) == 800


def test_too_few_validation_tokens_are_told_when_they_are_prepared(
    alone: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    text = alone.data_dir / "train/book.txt"
    write_book(text, 20_000)
    n_val = prepare(alone)["splits"]["val"]["n_tokens"]
    few = f"val: {n_val:,} tokens, too few for one sequence of 1,024"
    told = capsys.readouterr().err
    assert 0 < n_val < 1024 and few in told and "larger --val_fraction" in told
    (alone.data_dir / "val").mkdir(exist_ok=True)
    (alone.data_dir / "val/few.txt").write_text("Tom has a red ball.", encoding="utf-8")
    prepare(alone)
    assert "put more text there" in capsys.readouterr().err
    write_book(alone.data_dir / "val/few.txt", 20_000)
    assert prepare(alone)["splits"]["val"]["n_tokens"] > 1024
    assert "too few" not in capsys.readouterr().err


def test_short_stories_stay_whole(alone: PrepareSettings) -> None:
    prepare(dataclasses.replace(alone, val_fraction=0.005))
    assert stories_of(alone.data_dir, alone.tokenizer_dir, "val") == make_text(1)


def test_what_is_not_read_is_counted_and_named(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    train = settings.data_dir / "train"
    for name in ("b.TXT", "c.md", "d.jsonl", "e.txt.bak", "f", "g.parquet"):
        (train / name).write_text("text", encoding="utf-8")
    write_text(train / "more" / "a.txt", make_text(3))
    write_text(settings.data_dir / "valid" / "a.txt", make_text(3))
    (settings.data_dir / "h.txt").write_text("text", encoding="utf-8")
    prepare(settings)
    err = capsys.readouterr().err
    assert f"{train}: 7 not read: b.TXT, c.md, d.jsonl, e.txt.bak, f and 2 more; only *.txt in" in err
    assert f"{settings.data_dir}: 2 not read: h.txt, valid/; only *.txt in the folders train and val" in err
    for path in train.glob("*.txt"):
        path.unlink()
    status, line = error_of(capsys, "--data_dir", settings.data_dir)
    assert status == 2 and "no .txt file there" in line and "b.TXT" in line


def test_a_usual_folder_has_nothing_that_is_not_read(
    tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = PrepareSettings(tmp_path, "demo", tiny_tokenizer_dir, workers=1, demo_stories=200)
    for _ in range(2):
        prepare(demo)
        assert "not read" not in capsys.readouterr().err
