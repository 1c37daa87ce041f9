"""The data directory: text to shards, exact ids, staleness, interruption, and the loader of LitGPT's loop."""

import dataclasses
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import alter

import prepare_data
from prepare_data import PrepareSettings, StoryEncoder, TokenStream, prepare, read_tokenizer

SEPARATOR = "<|endoftext|>"
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


def make_text(n_stories: int, seed: int = 0) -> list[str]:
    """Return distinct stories of a few sentences."""
    rng = random.Random(seed)
    words = [
        "the",
        "a",
        "dog",
        "cat",
        "Tom",
        "Lily",
        "ran",
        "saw",
        "red",
        "ball",
        "and",
        "was",
        "happy",
        "home",
    ]
    return [
        f"Story {seed} {i}. " + " ".join(rng.choices(words, k=rng.randint(20, 60))) + "."
        for i in range(n_stories)
    ]


def write_text(path: Path, stories: list[str]) -> Path:
    """Write stories as TinyStories does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{story}\n{SEPARATOR}\n" for story in stories), encoding="utf-8", newline="")
    return path


@pytest.fixture
def settings(tmp_path: Path, tiny_tokenizer_dir: Path) -> PrepareSettings:
    """Settings with 200 train and 20 val stories."""
    data_dir = tmp_path / "text"
    write_text(data_dir / "train" / "a.txt", make_text(200))
    write_text(data_dir / "val" / "b.txt", make_text(20, seed=1))
    return PrepareSettings(data_dir=data_dir, tokenizer_dir=tiny_tokenizer_dir, workers=1)


@pytest.fixture(scope="module")
def trained_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained by prepare_data on the demo corpus."""
    folder = tmp_path_factory.mktemp("demo")
    prepare(
        PrepareSettings(
            folder / "data", "demo", folder / "tokenizer", train_tokenizer=700, workers=1, demo_stories=300
        )
    )
    return folder / "tokenizer"


def stories_of(data_dir: Path, tokenizer_dir: Path, split: str) -> list[str]:
    """Return the stories of a split, decoded by LitGPT's tokenizer from the shards' bytes."""
    from litgpt import Tokenizer

    tokenizer = Tokenizer(tokenizer_dir)
    stream = TokenStream(data_dir, split)
    ids = stream.read(0, len(stream))
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
    return [tokenizer.decode(torch.from_numpy(part)) for part in np.split(ids, ends[:-1])]


def error_of(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Return the status and the one error line of a run of the script."""
    status = prepare_data.main([str(arg) for arg in args])
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return status, line


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


def test_real_stories_get_the_ids_of_litgpt(shared_data: Path) -> None:
    text = (shared_data / "tinystories" / "val.txt").read_text(encoding="utf-8")
    encoder = check_ids(
        shared_data / "llama2-tokenizer", [s.strip() for s in text.split(SEPARATOR)] + [text[:20000]]
    )
    assert encoder.pieces  # the fast way was taken


def test_nasty_strings_get_the_ids_of_litgpt(shared_data: Path) -> None:
    check_ids(shared_data / "llama2-tokenizer", NASTY)


def test_nasty_strings_get_the_ids_of_litgpt_with_a_pre_tokenizer(tiny_tokenizer_dir: Path) -> None:
    assert check_ids(tiny_tokenizer_dir, NASTY).pieces


def test_random_strings_get_the_ids_of_litgpt(shared_data: Path) -> None:
    rng = random.Random(3)
    alphabet = "  \n\tabc.\u2581\u00e9\U0001f600</s>" + "the dog"
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(2000)]
    check_ids(shared_data / "llama2-tokenizer", texts)


def test_a_full_cache_changes_no_id(tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_data, "MAX_CACHED_PIECES", 3)
    assert len(check_ids(tiny_tokenizer_dir, make_text(20)).pieces) <= 3


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}


def change_tokenizer(source: Path, target: Path, **changes: object) -> Path:
    """Copy a tokenizer folder with some keys of tokenizer.json replaced."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    spec = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"] |= changes.pop("model", {})
    (target / "tokenizer.json").write_text(json.dumps(spec | changes), encoding="utf-8")
    return target


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


# --- shards ------------------------------------------------------------------------------------------------


def test_shards_hold_every_story_once_between_bos_and_eos(settings: PrepareSettings) -> None:
    manifest = prepare(settings)
    for split, expected in (("train", make_text(200)), ("val", make_text(20, seed=1))):
        assert stories_of(settings.data_dir, settings.tokenizer_dir, split) == expected
        entry = manifest["splits"][split]
        assert entry["n_stories"] == len(expected) == sum(s["n_stories"] for s in entry["shards"])
        assert entry["n_bytes"] == sum(len(story.encode()) for story in expected)
        assert entry["n_tokens"] == len(TokenStream(settings.data_dir, split))
    assert prepare_data.read_manifest(settings.data_dir) == manifest


def test_duplicates_are_dropped_within_and_across_splits(settings: PrepareSettings) -> None:
    stories = make_text(200)
    val = make_text(20, seed=1)
    write_text(settings.data_dir / "train" / "a.txt", [*stories, *stories[:7], *val[:3], "", "  "])
    splits = prepare(settings)["splits"]
    assert splits["train"]["n_stories"] == 200 and splits["train"]["n_duplicates"] == 10
    assert splits["val"]["n_stories"] == 20 and splits["val"]["n_duplicates"] == 0


def test_seen_stories_agree_with_a_set() -> None:
    rng = np.random.default_rng(0)
    seen, expected = prepare_data.SeenStories(), set()
    for _ in range(50):
        hashes = rng.integers(0, 3000, size=rng.integers(0, 200)).astype("<u8")
        new = [h not in expected and not expected.add(h) for h in hashes.tolist()]
        assert seen.add(hashes).tolist() == new
    assert len(seen._runs) < 12


def test_val_is_cut_by_story_where_there_is_no_val_text(settings: PrepareSettings) -> None:
    (settings.data_dir / "val" / "b.txt").unlink()
    prepare(dataclasses.replace(settings, val_fraction=0.05))
    train, val = (stories_of(settings.data_dir, settings.tokenizer_dir, split) for split in ("train", "val"))
    assert len(val) == 10 and sorted(train + val) == sorted(make_text(200))


def test_many_workers_and_one_make_the_same_shards(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_data, "SHARD_BYTES", 4000)
    monkeypatch.setattr(prepare_data, "BLOCK_BYTES", 1000)
    one = prepare(settings)
    for path in settings.data_dir.glob("*/*/*.bin"):
        path.unlink()
    assert prepare(dataclasses.replace(settings, workers=2)) == one
    assert len(one["splits"]["train"]["shards"]) > 5


def test_a_large_vocabulary_takes_four_bytes(settings: PrepareSettings, tmp_path: Path) -> None:
    spec = json.loads((settings.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    vocab |= {f"filler{i}": i for i in range(len(vocab), 70_000)}
    folder = change_tokenizer(settings.tokenizer_dir, tmp_path / "large", model={"vocab": vocab})
    manifest = prepare(dataclasses.replace(settings, tokenizer_dir=folder))
    assert manifest["dtype"] == "uint32"
    assert stories_of(settings.data_dir, folder, "val") == make_text(20, seed=1)


# --- again, changed, interrupted, damaged ------------------------------------------------------------------


def snapshot(data_dir: Path) -> dict[str, tuple[int, bytes]]:
    """Return time stamp and content of everything under a folder."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in data_dir.rglob("*") if p.is_file()}


def test_running_again_does_nothing(settings: PrepareSettings) -> None:
    first = prepare(settings)
    before = snapshot(settings.data_dir)
    start = time.perf_counter()
    assert prepare(settings) == first
    assert time.perf_counter() - start < 0.5
    assert snapshot(settings.data_dir) == before


def test_a_touched_file_is_not_a_changed_file(settings: PrepareSettings) -> None:
    prepare(settings)
    path = settings.data_dir / "train" / "a.txt"
    os.utime(path, (1, 1))
    assert prepare_data.stale_reasons(settings.data_dir, settings.tokenizer_dir) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: write_text(d / "val" / "b.txt", make_text(20, seed=2)), "b.txt: changed"),
        (lambda d: write_text(d / "train" / "new.txt", make_text(3, seed=3)), "new.txt: new"),
        (lambda d: (d / "val" / "b.txt").unlink(), "b.txt: removed"),
    ],
)
def test_changed_text_is_named(settings: PrepareSettings, change: object, reason: str) -> None:
    prepare(settings)
    change(settings.data_dir)
    (found,) = prepare_data.stale_reasons(settings.data_dir, settings.tokenizer_dir)
    assert found.endswith(reason)
    prepare(settings)
    assert prepare_data.stale_reasons(settings.data_dir, settings.tokenizer_dir) == []


def test_changed_val_text_leaves_the_train_shards(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    before = prepare(settings)
    (train_shard,) = (settings.data_dir / "train" / "train").glob("*.bin")
    stamp = train_shard.stat().st_mtime_ns
    write_text(settings.data_dir / "val" / "b.txt", make_text(20, seed=2))
    after = prepare(settings)
    assert "b.txt: changed" in capsys.readouterr().err
    assert train_shard.stat().st_mtime_ns == stamp
    assert after["splits"]["train"] == before["splits"]["train"]
    assert stories_of(settings.data_dir, settings.tokenizer_dir, "val") == make_text(20, seed=2)
    assert len(list(settings.data_dir.glob("val/val/*"))) == 1  # the old shard is gone


def test_appended_text_keeps_the_finished_shards(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_data, "SHARD_BYTES", 4000)
    monkeypatch.setattr(prepare_data, "BLOCK_BYTES", 1000)
    before = {s["path"] for s in prepare(settings)["splits"]["train"]["shards"]}
    write_text(settings.data_dir / "train" / "a.txt", make_text(200) + make_text(30, seed=5))
    after = {s["path"] for s in prepare(settings)["splits"]["train"]["shards"]}
    assert len(before - after) <= 1 < len(after - before)
    assert "finished shards" in capsys.readouterr().err


def test_another_tokenizer_makes_the_shards_stale(
    settings: PrepareSettings, trained_tokenizer_dir: Path
) -> None:
    prepare(settings)
    (reason,) = prepare_data.stale_reasons(settings.data_dir, trained_tokenizer_dir)
    assert "not the tokenizer that made the shards" in reason
    prepare(dataclasses.replace(settings, tokenizer_dir=trained_tokenizer_dir))
    assert stories_of(settings.data_dir, trained_tokenizer_dir, "val") == make_text(20, seed=1)


def test_another_option_makes_the_shards_stale(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(settings)
    prepare(dataclasses.replace(settings, separator="---"))
    assert "separator is '---', was '<|endoftext|>'" in capsys.readouterr().err


def test_text_removed_to_save_space_leaves_the_shards_usable(settings: PrepareSettings) -> None:
    prepare(settings)
    for path in settings.data_dir.glob("*/*.txt"):
        path.unlink()
    assert prepare_data.stale_reasons(settings.data_dir, settings.tokenizer_dir) == []


def run_with_small_shards(settings: PrepareSettings) -> subprocess.Popen:
    """Start the script in a process group of its own, with shards of 1 MB."""
    small = "p.SHARD_BYTES = p.BLOCK_BYTES = 1 << 20"
    code = f"import sys, prepare_data as p; {small}; sys.exit(p.main(sys.argv[1:]))"
    arguments = ["--data_dir", settings.data_dir, "--tokenizer_dir", settings.tokenizer_dir, "--workers", "2"]
    root = Path(prepare_data.__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=root, stderr=subprocess.PIPE, text=True
    )


def wait_until(condition: object, seconds: float = 20) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_run_leaves_no_half_shard_and_goes_on(settings: PrepareSettings) -> None:
    rng = random.Random(0)
    letters = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(80_000)]  # many words: slow to encode
    stories = [" ".join(letters[i : i + 200]) for i in range(0, len(letters), 8)]
    write_text(settings.data_dir / "train" / "a.txt", stories)
    run = run_with_small_shards(settings)
    wait_until(lambda: len(list(settings.data_dir.glob("train/train/*.json"))) >= 3)
    run.send_signal(signal.SIGKILL)
    run.wait()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: not found; run prepare_data\.py"):
        prepare_data.read_manifest(settings.data_dir)
    time.sleep(0.5)  # the workers end with their parent
    after_kill = snapshot(settings.data_dir)
    time.sleep(0.5)
    assert snapshot(settings.data_dir) == after_kill
    again = run_with_small_shards(settings)
    stderr = again.communicate()[1]
    assert again.returncode == 0 and "finished shards, which are kept" in stderr
    kept = [p for p in settings.data_dir.glob("train/train/*.bin") if str(p) in after_kill]
    assert len(kept) >= 3
    assert {p.suffix for p in settings.data_dir.glob("*/*/*")} == {".bin"}  # own leftovers are cleaned
    assert prepare_data.read_manifest(settings.data_dir)["splits"]["train"]["n_stories"] == len(set(stories))


def test_a_full_disk_ends_with_status_1_and_earlier_data_intact(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(settings)
    before = {p: c for p, (_, c) in snapshot(settings.data_dir).items() if not p.endswith(".txt")}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text(settings.data_dir / "train" / "a.txt", make_text(100, seed=7))
    monkeypatch.setattr(os, "fsync", full)
    arguments = ("--data_dir", settings.data_dir, "--tokenizer_dir", settings.tokenizer_dir)
    status, line = error_of(capsys, *arguments)
    assert status == 1 and "No space left on device" in line
    assert {p: c for p, (_, c) in snapshot(settings.data_dir).items() if not p.endswith(".txt")} == before
    prepare_data.read_manifest(settings.data_dir)


@pytest.mark.parametrize("flag", ["--no_log_to_wandb", "--no-log-to-wandb", "--no-log_to_wandb"])
def test_the_variable_that_uploads_gives_way_to_a_flag(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_LOG_DATASET", "1")
    assert prepare_data.build_parser().parse_args([]).log_to_wandb is True
    assert prepare_data.build_parser().parse_args([flag]).log_to_wandb is False


def test_a_full_disk_leaves_no_folder_where_the_first_shard_was_to_be(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(settings)
    assert not list(settings.data_dir.glob("*/*/"))


def test_a_truncated_shard_is_refused_and_repaired(settings: PrepareSettings) -> None:
    before = prepare(settings)
    (shard,) = settings.data_dir.glob("train/train/*.bin")
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"{shard.name}: {len(content) - 10} bytes, .* says {len(content)}"):
        TokenStream(settings.data_dir, "train")
    assert prepare(settings) == before
    assert shard.read_bytes() == content


def test_a_shard_altered_at_equal_size_and_time_is_found_and_repaired(settings: PrepareSettings) -> None:
    before = prepare(settings)
    (shard,) = settings.data_dir.glob("val/val/*.bin")
    content = shard.read_bytes()
    alter(shard)
    (reason,) = prepare_data.stale_reasons(settings.data_dir, settings.tokenizer_dir)
    assert reason.startswith(f"{shard}: altered since it was made")
    assert prepare(settings) == before
    assert shard.read_bytes() == content


def test_a_finished_shard_that_was_altered_is_not_taken_up_again(settings: PrepareSettings) -> None:
    prepare(settings)
    (shard,) = settings.data_dir.glob("train/train/*.bin")
    content = shard.read_bytes()
    alter(shard)
    write_text(settings.data_dir / "val" / "b.txt", make_text(30, seed=1))  # the train shard is to stay
    prepare(settings)
    assert shard.read_bytes() == content


@pytest.mark.parametrize("content", ["", '{"format_version": 1, "spl', "[]", "{}", '{"format_version": 1}'])
def test_a_damaged_manifest_is_refused_and_repaired(settings: PrepareSettings, content: str) -> None:
    before = prepare(settings)
    (settings.data_dir / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged; run prepare_data\.py"):
        prepare_data.read_manifest(settings.data_dir)
    assert prepare(settings) == before


def test_another_format_is_named(settings: PrepareSettings) -> None:
    manifest = prepare(settings)
    prepare_data.write_json(settings.data_dir / "manifest.json", manifest | {"format_version": 2})
    with pytest.raises(ValueError, match="format_version is 2, not 1"):
        prepare_data.read_manifest(settings.data_dir)


@pytest.mark.parametrize("key", ["n_tokens", "n_duplicates", "n_replaced_bytes"])
def test_a_manifest_without_a_count_is_made_again(settings: PrepareSettings, key: str) -> None:
    before = json.dumps(prepare(settings))
    manifest = json.loads(before)
    del manifest["splits"]["val"][key]
    prepare_data.write_json(settings.data_dir / "manifest.json", manifest)
    arguments = ["--data_dir", str(settings.data_dir), "--tokenizer_dir", str(settings.tokenizer_dir)]
    options = ["--val_fraction", str(settings.val_fraction), "--workers", "1"]
    assert prepare_data.main([*arguments, *options]) == 0
    assert prepare_data.read_manifest(settings.data_dir)["splits"] == json.loads(before)["splits"]


def test_a_users_own_files_beside_the_shards_stay(settings: PrepareSettings) -> None:
    prepare(settings)
    own = settings.data_dir / "train" / "train" / "notes.bin"
    own.write_text("mine", encoding="utf-8")
    write_text(settings.data_dir / "train" / "a.txt", make_text(50, seed=9))
    prepare(settings)
    assert own.read_text(encoding="utf-8") == "mine"


# --- bad input ---------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = error_of(capsys, "--data_dir", tmp_path / "none")
    assert status == 2 and f"{tmp_path / 'none'}: no such folder" in line and "--dataset demo" in line
    assert not (tmp_path / "none").exists()


def test_an_empty_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = error_of(capsys, "--data-dir", tmp_path)
    assert status == 2 and f"{tmp_path / 'train'}: no .txt file" in line


def test_an_empty_text_file_is_named(settings: PrepareSettings, capsys: pytest.CaptureFixture[str]) -> None:
    path = settings.data_dir / "train" / "empty.txt"
    path.write_text(" \n", encoding="utf-8")
    status, line = error_of(capsys, "--data_dir", settings.data_dir)
    assert status == 2 and f"{path}: empty" in line


def test_one_story_cannot_be_two_splits(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    write_text(tmp_path / "train" / "a.txt", make_text(1))
    with pytest.raises(ValueError, match="no story for the train split"):
        prepare(PrepareSettings(tmp_path, tokenizer_dir=tiny_tokenizer_dir))


def test_a_corpus_that_is_too_short_leaves_nothing_behind(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    text = write_text(tmp_path / "train" / "a.txt", make_text(1))
    with pytest.raises(ValueError, match="no story for the train split"):
        prepare(PrepareSettings(tmp_path, tokenizer_dir=tiny_tokenizer_dir))
    assert {p for p in tmp_path.rglob("[!.]*") if p.is_file()} == {text}


def test_a_corpus_that_became_too_short_leaves_the_shards_before(settings: PrepareSettings) -> None:
    manifest = prepare(settings)
    before = {path for path in settings.data_dir.rglob("[!.]*") if path.suffix != ".txt"}
    write_text(settings.data_dir / "train" / "a.txt", make_text(1, seed=9))
    (settings.data_dir / "val" / "b.txt").unlink()
    with pytest.raises(ValueError, match="no story for the train split"):
        prepare(settings)
    assert {path for path in settings.data_dir.rglob("[!.]*") if path.suffix != ".txt"} == before
    assert prepare_data.read_manifest(settings.data_dir) == manifest


def test_a_second_prepare_in_one_folder_is_refused(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--data_dir", settings.data_dir, "--tokenizer_dir", settings.tokenizer_dir)
    with prepare_data.lock_data(settings.data_dir):
        status, line = error_of(capsys, *flags)
    me = f"text: prepare_data.py is at work there (process {os.getpid()} on "
    assert status == 2 and me in line and "wait for it" in line
    assert not (settings.data_dir / "manifest.json").exists()
    prepare(settings)
    assert not (settings.data_dir / ".prepare.json").exists()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_prepared_data_on_a_disk_for_reading_alone_is_fresh(settings: PrepareSettings) -> None:
    prepare(settings)
    settings.data_dir.chmod(0o500)
    try:
        assert prepare(settings)["format_version"] == 1
    finally:
        settings.data_dir.chmod(0o700)


def test_a_folder_named_as_a_text_is_refused(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    path = settings.data_dir / "train" / "d.txt"
    path.mkdir()
    status, line = error_of(capsys, "--data_dir", settings.data_dir)
    assert status == 2 and f"{path}: not a file" in line


def test_a_tokenizer_dir_that_is_a_file_is_refused(
    settings: PrepareSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (settings.tokenizer_dir / "tokenizer.json", tmp_path / "file"):
        place.touch()
        status, line = error_of(capsys, "--data_dir", settings.data_dir, "--tokenizer_dir", place)
        assert status == 2 and f"{place}: a file" in line and "folder" in line


def test_utf16_is_named(settings: PrepareSettings) -> None:
    (settings.data_dir / "train" / "w.txt").write_text("words", encoding="utf-16")
    with pytest.raises(ValueError, match=r"w\.txt: UTF-16 text; save it as UTF-8"):
        prepare(settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not JSON"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}', None),
        ("tokenizer_config.json", '{"bos_token": "<s>", "eos_token": "</s>"}', "no tokenizer_class"),
        ("tokenizer_config.json", '{"tokenizer_class": "X", "bos_token": "<bos>"}', "no BOS id"),
        ("generation_config.json", "[", r"generation_config\.json: not JSON"),
    ],
)
def test_a_tokenizer_that_litgpt_would_trip_over_is_named(
    tiny_tokenizer_dir: Path, tmp_path: Path, name: str, content: str, message: str | None
) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    (folder / name).write_text(content, encoding="utf-8")
    if message is None:
        assert read_tokenizer(folder).bos_id == 1  # from generation_config.json, as LitGPT does
        return
    with pytest.raises(ValueError, match=message):
        read_tokenizer(folder)


def test_a_tokenizer_folder_without_bos_is_named(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="no BOS id"):
        read_tokenizer(folder)


def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    wrong = PrepareSettings(
        tmp_path, "wiki", val_fraction=0.0, train_tokenizer=10, workers=-1, separator="a\nb"
    )
    with pytest.raises(ValueError) as caught:
        prepare(wrong)
    for name in ("dataset", "val_fraction", "train_tokenizer", "workers", "separator"):
        assert f"{name} is " in str(caught.value)


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


# --- demo --------------------------------------------------------------------------------------------------


def test_the_demo_corpus_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, two, other = (
        prepare_data.write_demo_corpus(tmp_path / name, 50, seed).read_bytes()
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert one == two != other
    assert one.count(b"<|endoftext|>") == 50


def test_the_demo_corpus_is_varied_and_well_formed() -> None:
    teller = prepare_data.StoryTeller(prepare_data.GRAMMAR, 0)
    stories = [teller.story() for _ in range(3000)]
    text = "\n".join(stories)
    assert len(set(stories)) == len(stories)
    assert not re.search(r"[{}]|  |\ba [aeiou]|\ban [^aeiou]|\bthe the\b|\ba a\b| [.,]|//|\n-", text)
    sentences = set(re.findall(r"[A-Z][^.!?]*[.!?]", text))
    words = set(re.findall(r"[a-z]+", text.lower()))
    assert len(sentences) > 5000 and 800 < len(words) < 2000
    assert all(story[-1] in '.!?"' and story[0].isupper() for story in stories)


def test_the_demo_corpus_keeps_off_other_text(settings: PrepareSettings) -> None:
    before = snapshot(settings.data_dir)
    with pytest.raises(ValueError, match=r"a\.txt: other text is there already"):
        prepare(dataclasses.replace(settings, dataset="demo"))
    assert snapshot(settings.data_dir) == before


def test_an_edited_demo_corpus_is_only_replaced_on_request(tmp_path: Path) -> None:
    path = prepare_data.write_demo_corpus(tmp_path, 20, 1)
    assert prepare_data.write_demo_corpus(tmp_path, 30, 1).read_text(encoding="utf-8").count("<|end") == 30
    path.write_text("my own story", encoding="utf-8")
    with pytest.raises(ValueError, match=r"demo\.txt: edited since it was written"):
        prepare_data.write_demo_corpus(tmp_path, 20, 1)
    prepare_data.write_demo_corpus(tmp_path, 20, 1, overwrite=True)
    assert path.read_text(encoding="utf-8").count("<|end") == 20


def test_own_text_is_not_mixed_with_the_demo_corpus(tmp_path: Path) -> None:
    prepare_data.write_demo_corpus(tmp_path, 20, 1)
    write_text(tmp_path / "train" / "own.txt", make_text(5))
    with pytest.raises(ValueError, match=r"demo corpus .* is beside other text"):
        prepare_data.list_text(tmp_path)


# --- the script --------------------------------------------------------------------------------------------


def test_importing_the_script_imports_no_torch() -> None:
    code = "import sys, prepare_data; print({'torch', 'litgpt', 'lightning', 'wandb'} & set(sys.modules))"
    root = Path(prepare_data.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_the_script_says_what_it_made_and_what_is_next(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data-dir", str(settings.data_dir), "--tokenizer-dir", str(settings.tokenizer_dir)]
    assert prepare_data.main(arguments) == 0
    stdout = capsys.readouterr().out
    assert "train  200 stories" in stdout and "0 duplicates" in stdout and "tokens/s" in stdout
    flags = f"--dataset_dir {settings.data_dir} --tokenizer_dir {settings.tokenizer_dir}"
    assert f"uv run python run_train.py {flags}" in stdout
    assert prepare_data.main(arguments) == 0
    captured = capsys.readouterr()
    assert "nothing to do" in captured.err and "tokens/s" not in captured.out


def test_the_data_directory_goes_to_weights_and_biases_on_request(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []

    def push(args: object, *folders: Path) -> str:
        pushed.append((args.wandb_project, args.wandb_alias, *folders))
        return "pushed"

    monkeypatch.setattr(prepare_data, "push_from_flags", push)
    arguments = ["--data-dir", str(settings.data_dir), "--tokenizer-dir", str(settings.tokenizer_dir)]
    assert prepare_data.main(arguments) == 0 and pushed == []
    wandb_flags = ["--log-to-wandb", "--wandb-project", "stories", "--wandb-alias", "new"]
    assert prepare_data.main([*arguments, *wandb_flags]) == 0
    assert pushed == [("stories", ["new"], settings.data_dir, settings.tokenizer_dir)]
    assert "pushed" in capsys.readouterr().out


def test_data_arguments_that_could_not_be_honoured_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose FOLDER/train and FOLDER/val"):
        prepare_data.TextShards(tmp_path / "train", tmp_path / "other" / "val")
    with pytest.raises(ValueError, match="num_workers is -1; choose 0 or more"):
        prepare_data.TextShards(tmp_path / "train", num_workers=-1)


def test_a_killed_run_is_not_taken_for_an_edited_demo_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_data.write_demo_corpus(tmp_path, 20, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.write_demo_corpus(tmp_path, 30, 1)
    monkeypatch.undo()
    path = prepare_data.write_demo_corpus(tmp_path, 30, 1)
    assert path.read_text(encoding="utf-8").count("<|end") == 30
