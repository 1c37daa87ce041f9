"""From stories to ids: those that LitGPT gives them."""

import random
import re
from pathlib import Path

import pytest
from conftest import ASSETS
from helpers.data import SEPARATOR, change_tokenizer, make_text

from litgpt_moe.data.tokenizer import StoryEncoder, read_tokenizer_facts

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


def check_ids(tokenizer_dir: Path, texts: list[str]) -> StoryEncoder:
    """Assert that every text gets the ids that LitGPT gives it."""
    from litgpt import Tokenizer

    encoder, stock = StoryEncoder(read_tokenizer_facts(tokenizer_dir)), Tokenizer(tokenizer_dir)
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
    monkeypatch.setattr("litgpt_moe.data.tokenizer.MAX_CACHED_PIECES", 3)
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
