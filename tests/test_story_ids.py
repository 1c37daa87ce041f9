"""From text to ids: the stories in a file, and the ids that LitGPT gives them."""

# ruff: noqa: F811 (a fixture is imported, and then the name of an argument)

import json
import random
import re
from pathlib import Path

import pytest
from conftest import ASSETS
from test_prepare_data import (  # noqa: F401
    SEPARATOR,
    change_tokenizer,
    error_of,
    make_text,
    settings,
    trained_tokenizer_dir,
    write_text,
)

import prepare_data
from prepare_data import PrepareSettings, StoryEncoder, read_tokenizer

NASTY = [
    "",
    "one",
    " leading",
    "trailing ",
    "  two  spaces  ",
    "a   b    c     d",
    "line\nline\n\nline \n line\r\n\r",
    "\ttab\tand\u00a0no-break\u2003space",
    "\u2581", "a\u2581b", "a \u2581 b", "\u2581\u2581x",
    "emoji \U0001f600\U0001f469\u200d\U0001f680 e\u0301",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f",
    "\x00\x01\x1f\x7f\u0085\u2028",
    "<s>", "</s> x", "a <s> b </s> c", "<unk>", "x<unk>y", "<s></s>z", "<0x0A>", "<0x41> <s", " </s >",
    "don't \u201cquote\u201d -- 3.14159, 1,000!!! ...?",
    "word" * 30,
    "https://a.b/c?d=e&f=g#h" + "=" * 40,
    " " * 40, "\n" * 20, " \n \n ",
]  # fmt: skip


# --- ids ---------------------------------------------------------------------------------------------------


def check_ids(tokenizer_dir: Path, texts: list[str]) -> StoryEncoder:
    """Assert that every text gets the ids that LitGPT gives it."""
    from litgpt import Tokenizer

    encoder, stock = StoryEncoder(read_tokenizer(tokenizer_dir)), Tokenizer(tokenizer_dir)
    for text in texts * 2:  # the second time from the cache
        expected = stock.encode(text, bos=True, eos=True).tolist()
        # LitGPT drops EOS where the text itself ends with one; a story of ours always ends with EOS
        expected += [] if expected[-1] == stock.eos_id else [stock.eos_id]
        assert encoder.encode(text).tolist() == expected, repr(text)
    return encoder


def test_real_stories_get_the_ids_of_litgpt() -> None:
    text = (ASSETS / "fairytales/val/stories.txt").read_text(encoding="utf-8")
    encoder = check_ids(ASSETS / "tokenizer", [*(s.strip() for s in text.split(SEPARATOR)), text])
    assert encoder.pieces  # the fast way was taken


def test_nasty_strings_get_the_ids_of_litgpt() -> None:
    check_ids(ASSETS / "tokenizer", NASTY)


def test_nasty_strings_get_the_ids_of_litgpt_with_a_pre_tokenizer(tiny_tokenizer_dir: Path) -> None:
    assert check_ids(tiny_tokenizer_dir, NASTY).pieces


def test_random_strings_get_the_ids_of_litgpt() -> None:
    rng = random.Random(3)
    alphabet = "  \n\tabc.\u2581\u00e9\U0001f600</s>" + "the dog"
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(2000)]
    check_ids(ASSETS / "tokenizer", texts)


def test_a_full_cache_changes_no_id(tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_data, "MAX_CACHED_PIECES", 3)
    assert len(check_ids(tiny_tokenizer_dir, make_text(20)).pieces) <= 3


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}},
        {"normalizer": None, "pre_tokenizer": METASPACE},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": {"byte_fallback": False}},
    ],
)  # fmt: skip
def test_other_tokenizers_take_the_plain_way_to_the_same_ids(
    tiny_tokenizer_dir: Path, tmp_path: Path, changes: dict
) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer", **changes)
    assert check_ids(folder, NASTY).pieces is None


def test_a_piece_across_a_space_forbids_splitting_at_spaces(tiny_tokenizer_dir: Path) -> None:
    spec = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    assert prepare_data.can_split_at_spaces(spec)
    for piece in ("of\u2581the", "a\nb", "x\u2581"):
        vocab = spec["model"]["vocab"] | {piece: 9999}
        assert not prepare_data.can_split_at_spaces(spec | {"model": spec["model"] | {"vocab": vocab}})


def test_the_trained_tokenizer_round_trips_any_text(trained_tokenizer_dir: Path) -> None:
    from litgpt import Tokenizer

    encoder = check_ids(trained_tokenizer_dir, NASTY)
    assert encoder.pieces
    stock = Tokenizer(trained_tokenizer_dir)
    assert (stock.bos_id, stock.eos_id, stock.vocab_size) == (1, 2, 700)
    for text in NASTY:
        if not re.search(
            r"<s>|</s>|<unk>|\u2581", text
        ):  # special pieces are not text, and the mark is a space
            assert stock.decode(stock.encode(text, bos=True, eos=False)) == text


# --- text --------------------------------------------------------------------------------------------------


def read_stories(path: Path, separator: str = SEPARATOR, on_bad_utf8: str = "replace") -> list[str]:
    """Return all stories of a file."""
    reader = prepare_data.TextReader(path, separator, on_bad_utf8)
    with prepare_data.tqdm(disable=True) as progress:
        return [story for some in reader.story_lists(progress) for story in some]


def test_small_blocks_give_the_same_stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stories = [*make_text(5), "\u4f60\u597d " * 9, "a\n\nb  \n c", "\U0001f600" * 20]
    path = write_text(tmp_path / "a.txt", stories)
    for n_bytes in (1, 2, 7, 64, 1 << 20):
        monkeypatch.setattr(prepare_data, "BLOCK_BYTES", n_bytes)
        assert read_stories(path) == [story.strip() for story in stories], n_bytes


def test_separator_lines_count_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    first = (
        b"\xef\xbb\xbf<|endoftext|>\r\n <|endoftext|> \r\none\r\n\r\n1\r\n<|endoftext|>\n\n<|endoftext|>\n"
    )
    path.write_bytes(first + b"two <|endoftext|> 2\n<|endoftext|>")
    assert read_stories(path) == ["one\n\n1", "two <|endoftext|> 2"]


def test_an_empty_separator_splits_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n1\n\n \ntwo\n\n\n\nthree")
    assert read_stories(tmp_path / "a.txt", separator="") == ["one\n1", "two", "three"]


def test_a_book_without_separators_is_cut_at_paragraphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_data, "MAX_STORY_CHARS", 1000)
    paragraphs = make_text(40)
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    pieces = read_stories(tmp_path / "book.txt")
    assert "\n\n".join(pieces).split("\n\n") == paragraphs
    assert len(pieces) > 5 and max(map(len, pieces)) <= 1000
    assert "book.txt: stories of over 1,000 characters were cut" in capsys.readouterr().err


def test_bad_utf8_is_reported_by_line_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_data, "BLOCK_BYTES", 16)
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
