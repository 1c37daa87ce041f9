"""From text files to stories: separators, bad UTF-8, overlong stories, duplicates."""

from pathlib import Path

import numpy as np
import pytest
from helpers.data import SEPARATOR, error_of, make_text, write_text
from tqdm import tqdm

from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.text import Reading, SeenStories, TextReader


def read_stories(path: Path, separator: str = SEPARATOR, on_bad_utf8: str = "replace") -> list[str]:
    """Return all stories of a file."""
    reader = TextReader(path, Reading(separator, on_bad_utf8))
    with tqdm(disable=True) as progress:
        return [story for some in reader.story_lists(progress) for story in some]


def test_small_blocks_give_the_same_stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stories = [*make_text(5), "\u4f60\u597d " * 9, "a\n\nb  \n c", "\U0001f600" * 20]
    path = write_text(tmp_path / "a.txt", stories)
    for n_bytes in (1, 2, 7, 64, 1 << 20):
        monkeypatch.setattr("litgpt_moe.data.text.BLOCK_BYTES", n_bytes)
        assert read_stories(path) == [story.strip() for story in stories], n_bytes


def test_separator_lines_count_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    first = (
        b"\xef\xbb\xbf<|endoftext|>\r\n <|endoftext|> \r\none\r\n\r\n1\r\n<|endoftext|>\n\n<|endoftext|>\n"
    )
    path.write_bytes(first + b"two <|endoftext|> 2\n<|endoftext|>")
    assert read_stories(path) == ["one\n\n1", "two", "2"]


def test_the_usual_separator_is_one_inside_a_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a<|endoftext|>b\nc <|endoftext|>\nd<|endoftext|><|endoftext|>", encoding="utf-8")
    for n_bytes in (1, 3, 1 << 20):
        monkeypatch.setattr("litgpt_moe.data.text.BLOCK_BYTES", n_bytes)
        assert read_stories(path) == ["a", "b\nc", "d"]
    assert not capsys.readouterr().err


def test_a_separator_of_one_s_own_is_a_line_and_is_counted_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a --- b\n---\nc---\n---\n", encoding="utf-8")
    assert read_stories(path, separator="---") == ["a --- b", "c---"]
    assert f"{path}: '---' is inside 2 lines, where it separates no stories" in capsys.readouterr().err


def test_an_empty_separator_splits_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n1\n\n \ntwo\n\n\n\nthree")
    assert read_stories(tmp_path / "a.txt", separator="") == ["one\n1", "two", "three"]


def test_a_book_without_separators_is_cut_at_paragraphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("litgpt_moe.data.text.MAX_STORY_CHARS", 1000)
    paragraphs = make_text(40)
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    pieces = read_stories(tmp_path / "book.txt")
    assert "\n\n".join(pieces).split("\n\n") == paragraphs
    assert len(pieces) > 5 and max(map(len, pieces)) <= 1000
    assert "book.txt: stories of over 1,000 characters were cut" in capsys.readouterr().err


def test_bad_utf8_is_reported_by_line_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("litgpt_moe.data.text.BLOCK_BYTES", 16)
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine line one\nfine line two\nbad \xff\xfe here\ncaf\xc3\nlast \xed\xa0\x80.")
    assert read_stories(path) == ["fine line one\nfine line two\nbad \ufffd here\ncaf\ufffd\nlast \ufffd."]
    report = capsys.readouterr().err
    assert (
        f"{path}:3: 2 bytes" in report and f"{path}:4: 1 bytes" in report and f"{path}:5: 3 bytes" in report
    )


def test_bad_utf8_is_refused_on_request(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    path = settings.data_dir / "train" / "bad.txt"
    path.write_bytes(b"one\ntw\xe9\n")
    arguments = ("--data_dir", settings.data_dir, "--tokenizer_dir", settings.tokenizer_dir)
    status, line = error_of(capsys, *arguments, "--on_bad_utf8", "refuse")
    assert (status, f"{path}:2:" in line) == (2, True)
    assert not (settings.data_dir / "manifest.json").exists()


def test_seen_stories_agree_with_a_set() -> None:
    rng = np.random.default_rng(0)
    seen, expected = SeenStories(), set()
    for _ in range(50):
        hashes = rng.integers(0, 3000, size=rng.integers(0, 200)).astype("<u8") << np.uint64(52)
        new = [h not in expected and not expected.add(h) for h in hashes.tolist()]
        assert seen.add(hashes).tolist() == new
    assert max(map(len, seen._runs)) < 12
    assert sorted(np.concatenate(seen.runs()).tolist()) == sorted(expected)
