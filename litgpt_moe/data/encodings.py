"""Guesses the encoding or the format of a file that is not UTF-8 text, for the message about it."""

import re
import unicodedata

FORMATS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip (or docx, epub)",
    b"%PDF": "PDF",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PAR1": "Parquet",
}
ENDINGS = {
    "gzip": ".gz",
    "zstd": ".zst",
    "xz": ".xz",
    "Parquet": ".parquet",
}  # of the names of files to be read
BOMS = {  # UTF-32 before UTF-16, whose mark its own begins with
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# ruff: noqa: RUF001 (letters of several languages)
KANA = "[\u3041-\u30ff\u3001\u3002]"
# name, codec, frequent characters, and the least share that they have of a text's non-ASCII characters. The
# order matters: text in an earlier encoding can often be decoded by a later codec, too.
ENCODINGS = (
    ("EUC-KR", "euc_kr", "[\uac00-\ud7a3]", 0.8),
    ("EUC-JP", "euc_jp", KANA, 0.3),
    ("Shift JIS", "shift_jis", KANA, 0.3),
    ("Windows-1251", "cp1251", "[оеаинтсрвл]", 0.5),
    ("KOI8-R", "koi8_r", "[оеаинтсрвл]", 0.5),
    ("GB18030", "gb18030", "[的一是不了在人有我他这个们来，。]", 0.1),
    ("Big5", "big5", "[的一是不了在人有我他這個們來，。]", 0.1),
)
WESTERN = ("Windows-1252", "cp1252", "[\u00c0-\u00fd\u2013-\u201e\u2026]", 0.6)
RUN_OF_NULS = b"\0" * 8
MAX_NULS = 1e-3  # share of the bytes; a text may hold a stray one


def known_format(start: bytes) -> str | None:
    """Return what a file with these first bytes is and how to convert it, None if it may be UTF-8 text."""
    for mark, name in FORMATS.items():
        if start.startswith(mark):
            rename = f", or end its name with {ENDINGS[name]}" if name in ENDINGS else ""
            return f"{name} data; unpack it to UTF-8 text{rename}"
    names = (name for mark, name in BOMS.items() if start.startswith(mark))
    return next((f"{name} text; save it as UTF-8" for name in names), None)


def nul_problem(chunk: bytes) -> str | None:
    """Return what a block with many NUL bytes is and what to do, None if it has few."""
    n_nuls = chunk.count(0)
    if n_nuls <= 8 + MAX_NULS * len(chunk) and RUN_OF_NULS not in chunk:
        return None
    if RUN_OF_NULS in chunk:
        return f"{n_nuls:,} NUL bytes, as where a download or a disk failed; replace the file"
    high_bytes = ((chunk[3::4], chunk[2::4]), (chunk[::4], chunk[1::4]))  # code points go up to 0x10FFFF
    if any(not any(highest) and max(second, default=0) <= 0x10 for highest, second in high_bytes):
        return "looks like UTF-32 text; save it as UTF-8"
    # of a character's two bytes the high one has few values
    n_even, n_odd = len(set(chunk[::2])), len(set(chunk[1::2]))
    order = "BE" if n_even < n_odd else "LE"
    if 2 * min(n_even, n_odd) < 256 and _is_text(chunk.decode(f"utf-16-{order.lower()}", "ignore")):
        return f"looks like UTF-16 text ({order}); save it as UTF-8"
    return f"{n_nuls:,} NUL bytes: not a text; remove it or replace it by UTF-8 text"


def _is_text(text: str) -> bool:
    """Return whether hardly any character is a control character, or none at all."""
    n_odd = sum(unicodedata.category(char) in ("Cc", "Cn", "Co") and not char.isspace() for char in text)
    return n_odd <= MAX_NULS * len(text)


def _is_ebcdic(sample: bytes) -> bool:
    """Return whether a sample is text in EBCDIC, whose space is 0x40 and whose letters lie above 0x80."""
    words = re.findall(r"[A-Za-z ]", sample.decode("cp037"))
    return sample.count(b" ") < 0.01 * len(sample) and len(words) > 0.8 * len(sample)


def likely_encoding(sample: bytes) -> str | None:
    """Return the name of the encoding of text that is not UTF-8, None if it is none of the usual ones."""
    if _is_ebcdic(sample):
        return "EBCDIC"
    n_high = len(re.findall(rb"[\x80-\xff]", sample))
    is_western = n_high < 0.3 * len(re.findall(rb"[A-Za-z\x80-\xff]", sample))  # some accents
    for name, codec, frequent, least in [WESTERN] if is_western else ENCODINGS:
        others = re.findall(r"[^\x00-\x7f]", sample.decode(codec, "ignore"))
        if others and sum(re.match(frequent, char) is not None for char in others) > least * len(others):
            return name
    return None
