"""Files that are not UTF-8 text are refused with their likely encoding, before anything is written."""

# ruff: noqa: RUF001 (letters of several languages)

import gzip
from pathlib import Path

import pytest
from helpers.data import error_of, make_text

from litgpt_moe.data.settings import PrepareSettings

ENGLISH = " ".join(make_text(60))
CHINESE = "从前有一个小男孩，他的名字叫小明。他每天都去学校，在路上他看见了一只猫。" * 20
TRADITIONAL = "從前有一個小男孩，他的名字叫小明。他每天都去學校，在路上他看見了一隻貓。" * 20
JAPANESE = "昔々、あるところにおじいさんとおばあさんがいました。" * 20
KOREAN = "옛날 옛적에 호랑이가 살았습니다. 호랑이는 산에서 내려와 마을로 갔습니다." * 20
RUSSIAN = "Жили-были старик со старухой у самого синего моря. Старик ловил неводом рыбу." * 20


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (ENGLISH.encode("utf-16-le"), "UTF-16 text (LE)"),
        (ENGLISH.encode("utf-16-be"), "UTF-16 text (BE)"),
        (CHINESE.encode("utf-16-le"), "UTF-16 text (LE)"),
        (CHINESE.encode("utf-16-be"), "UTF-16 text (BE)"),
        (ENGLISH.encode("utf-16"), "UTF-16 text"),
        (ENGLISH.encode("utf-32"), "UTF-32 text"),
        (ENGLISH.encode("utf-32-be"), "UTF-32 text"),
        (CHINESE.encode("utf-32-le"), "UTF-32 text"),
        (CHINESE.encode("gbk"), "GB18030 text"),
        (TRADITIONAL.encode("big5"), "Big5 text"),
        (JAPANESE.encode("shift_jis"), "Shift JIS text"),
        (JAPANESE.encode("euc_jp"), "EUC-JP text"),
        (KOREAN.encode("euc_kr"), "EUC-KR text"),
        (RUSSIAN.encode("cp1251"), "Windows-1251 text"),
        (RUSSIAN.encode("koi8_r"), "KOI8-R text"),
        (RUSSIAN.encode("cp866"), "not UTF-8 text"),
        (ENGLISH.encode("cp037"), "EBCDIC text"),
        (ENGLISH.encode("cp500"), "EBCDIC text"),
        (CHINESE.replace("。", "。\n").encode("utf-16-le"), "UTF-16 text (LE)"),
        ("".join(f"{word}\0\1\0\2" for word in ENGLISH.split()).encode(), "NUL bytes: not a text"),
        (b"\0\1\2\0\3\4\5" * 2000, "NUL bytes: not a text"),
        (ENGLISH.encode() + b"\0" * 5000, "5,000 NUL bytes, as where a download"),
        (ENGLISH.encode() + bytes(range(256)) * 90, "90 NUL bytes: not a text"),
        (gzip.compress(ENGLISH.encode()), "gzip data; unpack it"),
        (b"%PDF-1.7\n" + ENGLISH.encode(), "PDF data"),
    ],
)
@pytest.mark.parametrize("train", [(), ("--train_tokenizer", 330)])
def test_what_is_no_utf8_text_is_refused_by_name(
    settings: PrepareSettings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    name: str,
    train: tuple[object, ...],
) -> None:
    path = settings.data_dir / "train" / "b.txt"  # after one that is
    path.write_bytes(content)
    tokenizer_dir = tmp_path / "new" if train else settings.tokenizer_dir
    flags = ("--data_dir", settings.data_dir, "--tokenizer_dir", tokenizer_dir, *train)
    status, line = error_of(capsys, *flags)
    assert status == 2 and f"{path}: " in line and name in line
    assert not [p for p in settings.data_dir.rglob("*") if p.is_file() and p.suffix != ".txt"]
    assert not (tmp_path / "new").exists()


def test_letters_with_accents_are_replaced_and_their_encoding_named(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    import prepare_data

    text = "Es war einmal ein König, der hatte eine schöne Tochter, die mochte Bäume sehr. " * 30
    (settings.data_dir / "train" / "b.txt").write_bytes(text.encode("latin-1"))
    flags = ["--data_dir", str(settings.data_dir), "--tokenizer_dir", str(settings.tokenizer_dir)]
    assert prepare_data.main(flags) == 0
    assert "b.txt: looks like Windows-1252 text; save it as UTF-8" in capsys.readouterr().err


def test_a_rare_nul_is_a_character_of_the_text(settings: PrepareSettings) -> None:
    from litgpt_moe.data.prepare import prepare

    (settings.data_dir / "train" / "b.txt").write_text("one\0two " + ENGLISH, encoding="utf-8")
    assert prepare(settings)["splits"]["train"]["n_stories"] == 201
