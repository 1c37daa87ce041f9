"""Text in every form: the same ids from each, and broken files and rows named."""

import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pyarrow
import pytest
from helpers.data import error_of, make_text, stories_of, write_text
from helpers.rows import PACK, write_rows
from pyarrow import parquet
from tqdm import tqdm

from litgpt_moe.data.inputs import source_of
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.data.parquet import reader_of
from litgpt_moe.data.prepare import prepare, stale_reasons
from litgpt_moe.data.rows import is_text
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.text import Reading

# line breaks of every kind, quotes, commas and letters that JSON escapes
STORIES = [*make_text(40), 'He said, "Go;\tnow".\n\nA second, paragraph.', "caf\u00e9 \U0001f600 \u2028 end"]


def read(path: Path, column: str | None = None) -> list[str]:
    """Return the stories of a file."""
    reader = reader_of(source_of(path, path.parent), Reading(text_column=column, scratch=path.parent))
    return [story for some in reader.story_lists(tqdm(disable=True)) for story in some]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("form", [".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".PARQUET"])
def test_each_form_holds_the_same_stories(tmp_path: Path, form: str, packing: str) -> None:
    assert read(write_rows(tmp_path / f"a{form}{packing.upper()}", STORIES)) == STORIES


def test_each_form_gives_the_same_ids_with_a_book_cut_for_val(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    book = "\n\n".join(make_text(200, seed=3))  # long enough to be cut in two
    digests = {}
    for form in (".txt.gz", ".jsonl", ".json.xz", ".csv", ".parquet"):
        path = write_rows(tmp_path / "in" / f"a{form}", [book, *STORIES])
        settings = PrepareSettings(
            tmp_path / form, tokenizer_dir=tiny_tokenizer_dir, workers=1, paths=(path,)
        )
        splits = prepare(settings)["splits"]
        digests[form] = [splits[split]["shards"][0]["sha256"] for split in ("train", "val")]
        assert splits["train"]["text"] == [] and splits["train"]["read"][0]["path"] == f"../in/a{form}"
    assert len({str(digest) for digest in digests.values()}) == 1


def test_a_tree_is_read_and_what_is_not_is_counted(
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import prepare_data

    monkeypatch.chdir(tmp_path)
    tree = Path("corpus.v1")
    write_rows(tree / "train" / "b" / "a.txt", make_text(20))
    write_rows(tree / "train" / "a.jsonl.gz", make_text(20, seed=1))
    write_rows(tree / "val" / "a.parquet", make_text(3, seed=2))
    for name in ("train/b/x.pdf", "train/.git/a.txt", "train/b/tokenizer.json", "test/a.txt"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("no", encoding="utf-8")
    (tree / "train" / "empty.txt").touch()
    if sys.platform != "win32":
        (tree / "train" / "circle").symlink_to(tree.absolute())
        (tree / "train" / "again.txt").symlink_to("b/a.txt")
        (tree / "train" / "gone.txt").symlink_to("nowhere")
    before = {path for path in tree.rglob("*") if not path.is_symlink()}
    flags = ["corpus.v1", "--tokenizer_dir", str(tiny_tokenizer_dir), "--workers", "1"]
    assert prepare_data.main(flags) == 0
    out = capsys.readouterr().out
    assert "read   3 files" in out and "43 stories, column text" in out and "1 empty" in out
    assert {path for path in tree.rglob("*") if not path.is_symlink()} == before
    assert stories_of(Path("data/corpus.v1"), tiny_tokenizer_dir, "val") == make_text(3, seed=2)
    assert stories_of(Path("data/corpus.v1"), tiny_tokenizer_dir, "train") == [
        *make_text(20, seed=1),
        *make_text(20),
    ]
    if sys.platform != "win32":
        assert read_manifest(Path("data/corpus.v1"))["input"]["skipped_files"]["named twice"] == 1
    # the same name for other text would replace what was prepared
    write_rows(Path("other/corpus.v1.jsonl"), STORIES)
    status, line = error_of(capsys, "other/corpus.v1.jsonl")
    assert status == 2 and "data/corpus.v1: was prepared from" in line and "--data_dir" in line


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets few users make links")
@pytest.mark.parametrize("is_own", [True, False])
def test_text_behind_a_link_out_of_its_folder_is_named(
    tmp_path: Path, tiny_tokenizer_dir: Path, is_own: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    big = write_text(tmp_path / "elsewhere/big.txt", make_text(20))
    folder = tmp_path / "own"
    write_text(folder / "train/a.txt", make_text(20, seed=1))
    (folder / "train/within.txt").symlink_to("a.txt" if is_own else write_text(folder / "b.txt", ["b"]))
    (folder / "train/linked.txt").symlink_to(big)
    import prepare_data

    args = ["--data_dir", folder] if is_own else [folder, "--data_dir", tmp_path / "data"]
    flags = ["--tokenizer_dir", tiny_tokenizer_dir, "--workers", "1", "--val_fraction", "0.2"]
    assert prepare_data.main([str(arg) for arg in [*args, *flags]]) == 0
    out, err = capsys.readouterr()
    assert f"1 read through a link that leads out of it: train/linked.txt (to {big})" in err
    assert "link   1 file read through a link out of its folder: linked.txt" in out
    assert "within.txt" not in out + err


def test_text_of_a_path_that_changed_is_read_again_and_that_went_leaves_the_shards(
    tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "in" / "a.csv", STORIES)
    settings = PrepareSettings(tmp_path / "d", tokenizer_dir=tiny_tokenizer_dir, workers=1, paths=(path,))
    first = prepare(settings)
    assert prepare(settings) == first and "nothing to do" in capsys.readouterr().err
    write_rows(path, make_text(50, seed=5))
    assert stale_reasons(tmp_path / "d", tiny_tokenizer_dir) == [f"{path}: changed"]
    # without a PATH: from where it was read before
    again = prepare(PrepareSettings(tmp_path / "d", tokenizer_dir=tiny_tokenizer_dir, workers=1))
    assert again["splits"]["train"]["n_stories"] + again["splits"]["val"]["n_stories"] == 50
    path.unlink()
    path.parent.rmdir()
    assert stale_reasons(tmp_path / "d", tiny_tokenizer_dir) == []


def test_a_folder_of_an_earlier_version_stays_fresh_beside_text_in_other_forms(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = prepare(settings)
    for key in ("text_forms", "input"):
        manifest.pop(key)
    manifest["options"].pop("text_column")
    for split in manifest["splits"].values():
        split.pop("read")
    (settings.data_dir / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    write_rows(settings.data_dir / "train" / "notes.md", ["not read before"])
    assert stale_reasons(settings.data_dir, settings.tokenizer_dir) == []
    assert prepare(settings) == manifest
    err = capsys.readouterr().err
    assert "nothing to do" in err and "train/notes.md; an earlier version" in err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "row 3 is broken"),
        ("a.json", b'[{"text": "x"}, {"text" "y"}]', "row 2 is broken"),
        ("a.json", b'[{"text": "x"}, {"text": "y"', "row 2 is broken"),
        ("a.json", b'{"a":' * 20_000, "row 1 is broken (nested more than 10,000 deep)"),
        ("a.jsonl", b"[" * 200_000, "row 1 is broken"),
        ("a.csv", b"id,text\n1,Hello, world\n", "row 2 (line 2) is broken (3 fields, but 2 in the first row"),
        ("a.csv", b'id,text\n1,a\n2,"never closed\nend\n', "row 3 (line 5) is broken"),
        ("a.tsv", b'id\ttext\n1\t"a" b\n', "row 2 (line 2) is broken"),
        ("a.jsonl", b'{"story": "x", "title": "y", "n": 1}\n', "with strings are 'story', 'title'; name one"),
        ("a.jsonl", b'{"n": 1}\n', "no column holds strings ('n')"),
        ("a.parquet", b"PAR1 and then nothing of the kind PAR1", "is broken"),
        ("a.parquet", b"text", "named .parquet but is not Parquet data"),
        ("a.csv", b"PAR1....", "Parquet data; unpack it to UTF-8 text, or end its name with .parquet"),
        (
            "a.txt",
            gzip.compress(b"text", mtime=0),
            "gzip data; unpack it to UTF-8 text, or end its name with .gz",
        ),
        ("a.txt.gz", lzma.compress(b"text"), "named .gz but is xz data; rename it"),
        ("a.txt.xz", b"plain text", "named .xz but is not xz data; rename it"),
        ("a.txt.gz", gzip.compress(os.urandom(9000))[:-900], "damaged, or cut short"),
        ("a.txt.xz", lzma.compress(os.urandom(9000))[:-900], "damaged, or cut short"),
        ("a.csv.zst", PACK[".zst"](os.urandom(9000))[:-900], "damaged, or cut short"),
        ("a.jsonl", b'{"text": "' + b"a" * (64 << 20), "line 1 is longer than 48 MB"),
        ("a.json.gz", gzip.compress(b'[{"text": "' + b"a" * (64 << 20)), "row 1 is longer than 48 MB"),
        ("a.jsonl.gz", gzip.compress(b"\0" * (64 << 20)), "NUL bytes"),
    ],
)
def test_what_is_broken_is_named_with_file_and_row(
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    name: str,
    content: bytes,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    flags = ("--data_dir", tmp_path / "d", "--tokenizer_dir", tiny_tokenizer_dir)
    status, line = error_of(capsys, tmp_path / name, *flags)
    assert status == 2 and line.startswith(f"error: {tmp_path / name}: ") and sentence in line
    assert not (tmp_path / "d").exists()


def test_rows_without_text_are_counted_and_their_reasons_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "one"}, {"text": None}, {"x": 1}, {"text": 5}, {"text": ["a"]}, {"text": "  "}, 7, "two"]
    text = "\ufeff" + "".join(f"{json.dumps(row)}\r\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(
        text + '{"text": "half \\ud83d\\r\\nend"}', encoding="utf-8", newline=""
    )
    assert read(tmp_path / "a.jsonl") == ["one", "two", "half \ufffd\nend"]
    err = capsys.readouterr().err
    reasons = (
        "1 null, 1 without the column 'text', 2 with text of type int, 1 with text of type list, 1 empty"
    )
    assert f"{reasons}; the first is row 2" in err


def test_the_column_is_the_named_one_or_the_only_one_with_strings(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.csv", STORIES, column="story")
    assert read(path) == STORIES == read(path, "story")
    nested = "".join(json.dumps({"meta": {"t": text}, "lang": "en"}) + "\n" for text in STORIES)
    (tmp_path / "b.jsonl").write_text(nested, encoding="utf-8")
    assert read(tmp_path / "b.jsonl", "meta.t") == STORIES
    rows = [{"meta": {"t": text, "n": 1}, "lang": "en"} for text in STORIES]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet", "meta.t") == STORIES
    for name in ("a.csv", "b.jsonl", "c.parquet"):
        with pytest.raises(ValueError, match=rf"{name}: has no column 'body' but '.*'; name one of those"):
            read(tmp_path / name, "body")


def test_a_path_that_is_the_data_directory_or_would_be_mixed_with_text_there(
    settings: PrepareSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ("--tokenizer_dir", settings.tokenizer_dir)
    status, line = error_of(capsys, tmp_path / "none", "--data_dir", tmp_path / "d", *tokenizer)
    assert status == 2 and "none: no such file or folder" in line
    path = write_rows(tmp_path / "x.csv", STORIES)
    status, line = error_of(capsys, path, "--data_dir", settings.data_dir, *tokenizer)
    assert status == 2 and "text of its own is there" in line and "--data_dir" in line
    (tmp_path / "flat").mkdir()
    status, line = error_of(capsys, tmp_path / "flat", "--data_dir", tmp_path / "flat", *tokenizer)
    assert status == 2 and "a PATH is only read" in line
    status, line = error_of(capsys, tmp_path / "x.csv", "--dataset", "demo", "--data_dir", tmp_path / "e")
    assert status == 2 and "exclude each other" in line
    (tmp_path / "x.docx").touch()
    status, line = error_of(capsys, tmp_path / "x.docx")
    assert status == 2 and "no form that is read; those are .txt .md" in line
    import prepare_data

    assert (
        prepare_data.main(
            [str(settings.data_dir), "--data_dir", str(settings.data_dir), *map(str, tokenizer)]
        )
        == 0
    )
    assert read_manifest(settings.data_dir)["splits"]["train"]["n_stories"] == 200


def test_files_called_train_and_val_are_the_splits_of_a_flat_folder(
    tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "in" / "train-00001.csv", make_text(9, seed=1))
    write_rows(tmp_path / "in" / "train-00000.csv", make_text(9))
    write_rows(tmp_path / "in" / "validation.csv", make_text(3, seed=2))
    write_rows(tmp_path / "in" / "ATTRIBUTION.txt", ["thanks"])
    settings = PrepareSettings(
        tmp_path / "d", tokenizer_dir=tiny_tokenizer_dir, workers=1, paths=(tmp_path / "in",)
    )
    prepare(settings)
    assert stories_of(tmp_path / "d", tiny_tokenizer_dir, "val") == make_text(3, seed=2)
    assert stories_of(tmp_path / "d", tiny_tokenizer_dir, "train") == make_text(9) + make_text(9, seed=1)
    assert "1 not read: ATTRIBUTION.txt; beside the files train and val" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", " 12 ", "\n2024-01-01 \n", "-3.5e-7", "12:30, 13:45", " " * 50_000])
def test_numbers_and_dates_are_no_text(value: str) -> None:
    assert not is_text(value)


@pytest.mark.parametrize("value", ["Once", "1 cat", " " * 50_000 + "Once", "1" + " " * 50_000 + "cat"])
def test_a_text_behind_many_spaces_is_told_at_once(value: str) -> None:
    # with a pattern that tries all divisions of the spaces this takes hours
    assert is_text(value)
