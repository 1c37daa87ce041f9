"""Preparing again: nothing to do, changed text or options, kills, full disks and damage."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from conftest import ROOT, alter, wait_until
from helpers.data import error_of, make_text, snapshot, stories_of, write_text

import prepare_data
from litgpt_moe.data.batches import TokenStream
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.data.prepare import list_inputs, prepare, stale_reasons
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.shards import check_stories
from litgpt_moe.files import write_json


def test_running_again_does_nothing(settings: PrepareSettings, capsys: pytest.CaptureFixture[str]) -> None:
    first = prepare(settings)
    before = snapshot(settings.data_dir)
    assert "nothing to do" not in capsys.readouterr().err
    assert prepare(settings) == first
    assert "nothing to do" in capsys.readouterr().err
    assert snapshot(settings.data_dir) == before


def test_a_touched_file_is_not_a_changed_file(settings: PrepareSettings) -> None:
    prepare(settings)
    path = settings.data_dir / "train" / "a.txt"
    os.utime(path, (1, 1))
    assert stale_reasons(settings.data_dir, settings.tokenizer_dir) == []


def test_data_that_an_older_version_prepared_is_not_prepared_again(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = prepare(settings)
    older = manifest | {"code": {"prepare_data.py": "6aa9", "litgpt": "0.5.12", "tokenizers": "0.21"}}
    write_json(settings.data_dir / "manifest.json", older)
    assert prepare(settings) == older
    assert "nothing to do" in capsys.readouterr().err


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
    (found,) = stale_reasons(settings.data_dir, settings.tokenizer_dir)
    assert found.endswith(reason)
    prepare(settings)
    assert stale_reasons(settings.data_dir, settings.tokenizer_dir) == []


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
    monkeypatch.setattr("litgpt_moe.data.shards.SHARD_BYTES", 4000)
    monkeypatch.setattr("litgpt_moe.data.text.BLOCK_BYTES", 1000)
    before = {s["path"] for s in prepare(settings)["splits"]["train"]["shards"]}
    write_text(settings.data_dir / "train" / "a.txt", make_text(200) + make_text(30, seed=5))
    after = {s["path"] for s in prepare(settings)["splits"]["train"]["shards"]}
    assert len(before - after) <= 1 < len(after - before)
    assert "finished shards" in capsys.readouterr().err


def test_another_tokenizer_makes_the_shards_stale(
    settings: PrepareSettings, trained_tokenizer_dir: Path
) -> None:
    prepare(settings)
    (reason,) = stale_reasons(settings.data_dir, trained_tokenizer_dir)
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
    assert stale_reasons(settings.data_dir, settings.tokenizer_dir) == []


def run_with_small_shards(settings: PrepareSettings) -> subprocess.Popen:
    """Start the script in a process group of its own, with shards of 1 MB."""
    small = "shards.SHARD_BYTES = text.BLOCK_BYTES = 1 << 20"
    imports = "import sys, prepare_data; from litgpt_moe.data import shards, text"
    code = f"{imports}; {small}; sys.exit(prepare_data.main(sys.argv[1:]))"
    arguments = ["--data_dir", settings.data_dir, "--tokenizer_dir", settings.tokenizer_dir, "--workers", "2"]
    root = ROOT
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=root, stderr=subprocess.PIPE, text=True
    )


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
        read_manifest(settings.data_dir)
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
    assert read_manifest(settings.data_dir)["splits"]["train"]["n_stories"] == len(set(stories))


def test_what_a_kill_left_of_small_files_goes_with_the_next_preparation(settings: PrepareSettings) -> None:
    own = [
        settings.data_dir / f"{name}.123.tmp" for name in ("manifest", "hub", "tokenizer/tokenizer_config")
    ]
    others = [settings.data_dir / name for name in ("manifest.old.tmp", "notes.5.tmp")]
    for path in (*own, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    prepare(settings)
    assert [path for path in own if path.exists()] == [] and all(path.exists() for path in others)


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
    read_manifest(settings.data_dir)


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
    (reason,) = stale_reasons(settings.data_dir, settings.tokenizer_dir)
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
        read_manifest(settings.data_dir)
    assert prepare(settings) == before


def test_another_format_is_named(settings: PrepareSettings) -> None:
    manifest = prepare(settings)
    write_json(settings.data_dir / "manifest.json", manifest | {"format_version": 2})
    with pytest.raises(ValueError, match="format_version is 2, not 1"):
        read_manifest(settings.data_dir)


@pytest.mark.parametrize("key", ["n_tokens", "n_duplicates", "n_replaced_bytes"])
def test_a_manifest_without_a_count_is_made_again(settings: PrepareSettings, key: str) -> None:
    before = json.dumps(prepare(settings))
    manifest = json.loads(before)
    del manifest["splits"]["val"][key]
    write_json(settings.data_dir / "manifest.json", manifest)
    arguments = ["--data_dir", str(settings.data_dir), "--tokenizer_dir", str(settings.tokenizer_dir)]
    options = ["--val_fraction", str(settings.val_fraction), "--workers", "1"]
    assert prepare_data.main([*arguments, *options]) == 0
    assert read_manifest(settings.data_dir)["splits"] == json.loads(before)["splits"]


def test_a_users_own_files_beside_the_shards_stay(settings: PrepareSettings) -> None:
    prepare(settings)
    own = settings.data_dir / "train" / "train" / "notes.bin"
    own.write_text("mine", encoding="utf-8")
    write_text(settings.data_dir / "train" / "a.txt", make_text(50, seed=9))
    prepare(settings)
    assert own.read_text(encoding="utf-8") == "mine"


def test_after_a_full_disk_the_tokenizer_is_copied_by_the_same_command(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("litgpt_moe.data.prepare.carry_tokenizer", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(settings)
    prepare(settings)
    assert (settings.data_dir / "tokenizer/tokenizer.json").is_file()


def test_a_look_at_the_beginning_of_many_files_keeps_little_of_them(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    for number in range(100):
        write_text(tmp_path / f"books/{number:03}.txt", [f"Book {number}. " + "word " * 50_000])
    settings = PrepareSettings(
        tmp_path / "data", tokenizer_dir=tiny_tokenizer_dir, paths=(tmp_path / "books",)
    )
    text = list_inputs(settings).text
    tracemalloc.start()
    try:
        assert len(check_stories(settings, text)) == 20
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 20 of 250 KB each, and one more that is being read
    assert peak < 12e6
