"""The tokenizer of a data directory: what is refused, what is trained and what is replaced."""

import _thread
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.data import change_tokenizer, snapshot
from tokenizers import Regex, pre_tokenizers

from litgpt_moe.data import shards, workers
from litgpt_moe.data.inputs import source_of
from litgpt_moe.data.make_tokenizer import WORD, call_interruptibly, train_tokenizer
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.tokenizer import can_split_at_spaces, read_tokenizer_facts
from litgpt_moe.data.tokenizer_folder import find_tokenizer


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not JSON"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}', None),
        ("tokenizer_config.json", '{"bos_token": "<s>", "eos_token": "</s>"}', None),
        ("tokenizer_config.json", '{"tokenizer_class": "X", "bos_token": "<bos>"}', "no BOS id"),
        ("generation_config.json", "[", r"generation_config\.json: not JSON"),
    ],
)
def test_a_tokenizer_that_litgpt_would_trip_over_is_named(
    tiny_tokenizer_dir: Path, tmp_path: Path, name: str, content: str, message: str | None
) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    assert read_tokenizer_facts(folder).bos_id == 1  # and is kept, but not beyond the change of a file
    (folder / name).write_text(content, encoding="utf-8")
    if message is None:
        assert read_tokenizer_facts(folder).bos_id == 1  # from generation_config.json, as LitGPT does
        return
    with pytest.raises(ValueError, match=message):
        read_tokenizer_facts(folder)


@pytest.mark.parametrize("vocab_size", [320, 330])
def test_a_tokenizer_has_no_more_pieces_than_were_asked_for(tmp_path: Path, vocab_size: int) -> None:
    letters = "".join(map(chr, range(0x4E00, 0x4F00)))  # more than a small vocabulary has room for
    (path := tmp_path / "a.txt").write_text(f"{letters} and the rest {letters}", encoding="utf-8")
    settings = PrepareSettings(tmp_path, tokenizer_dir=tmp_path / "tokenizer")
    train_tokenizer(settings, vocab_size, [source_of(path, tmp_path)])
    assert read_tokenizer_facts(tmp_path / "tokenizer").vocab_size == vocab_size


def test_a_tokenizer_folder_without_bos_is_named(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="no BOS id"):
        read_tokenizer_facts(folder)


def test_another_tokenizer_is_only_replaced_on_request(
    settings: PrepareSettings, trained_tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = change_tokenizer(settings.tokenizer_dir, tmp_path / "tokenizer")
    wanted = dataclasses.replace(settings, tokenizer_dir=folder, train_tokenizer=340)
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        prepare(wanted)
    (folder / "lit_model.pth").touch()
    with pytest.raises(ValueError, match="holds a model, whose tokenizer is not replaced; name another"):
        prepare(dataclasses.replace(wanted, overwrite=True))
    (folder / "lit_model.pth").unlink()
    assert prepare(dataclasses.replace(wanted, overwrite=True))["tokenizer"]["vocab_size"] == 340
    before = snapshot(folder)
    prepare(wanted)
    assert snapshot(folder) == before


def test_a_piece_across_a_space_forbids_splitting_at_spaces(tiny_tokenizer_dir: Path) -> None:
    spec = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    assert can_split_at_spaces(spec)
    for piece in ("of\u2581the", "a\nb", "x\u2581"):
        vocab = spec["model"]["vocab"] | {piece: 9999}
        assert not can_split_at_spaces(spec | {"model": spec["model"] | {"vocab": vocab}})


def test_the_tokenizer_is_found_by_its_hash_in_any_folder_beside(data_dir, tmp_path):
    made_it, data = data_dir.parent / "tokenizer", data_dir.parent
    made_it.rename(data / "tinyllama")  # as in the README: another than the demo's
    for folder in (made_it, data / "another"):
        folder.mkdir()
        (folder / "tokenizer.json").write_text('{"other": 1}', encoding="utf-8")
    assert find_tokenizer(data_dir, None) == data / "tinyllama"
    assert find_tokenizer(data_dir, data / "tinyllama") == data / "tinyllama"


def test_a_folder_beside_that_may_not_be_read_is_passed_over(data_dir, monkeypatch):
    locked = data_dir.parent / "another"
    locked.mkdir()
    (locked / "tokenizer.json").write_text("{}", encoding="utf-8")

    def read(path):  # as root, whom no permission stops, a test cannot lock a file
        if path.parent == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", read)
    (data_dir.parent / "tokenizer").rename(data_dir.parent / "tinyllama")  # after the locked one by name
    assert find_tokenizer(data_dir, None) == data_dir.parent / "tinyllama"
    with pytest.raises(PermissionError):
        find_tokenizer(data_dir, locked)


def test_no_run_of_letters_or_signs_is_longer_than_training_can_bear() -> None:
    split = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    for run in ("x", "\u4f60", "=", "\U0001f600", "\t", " ", "\u2581", "7", "\n", "\u00a0", "x'", "a\u0301"):
        pieces = split.pre_tokenize_str(run * 1000)
        assert max(len(piece) for piece, _ in pieces) <= 82, run
        assert "".join(piece for piece, _ in pieces) == run * 1000
    words = [piece for piece, _ in split.pre_tokenize_str("\u2581don't\u2581stop!!\t\t7")]
    assert words == ["\u2581don't", "\u2581stop", "!!", "\t\t", "7"]


def test_ctrl_c_is_heard_while_a_tokenizer_is_trained() -> None:
    ended = threading.Event()

    def train() -> None:
        _thread.interrupt_main()
        ended.wait(60)

    # a shell starts programs in the background with Ctrl-C ignored, and Python leaves it so
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            call_interruptibly(train)
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()
    with pytest.raises(ValueError, match="invalid literal"):
        call_interruptibly(lambda: int("x"))  # what it raises is raised here


def test_python_does_not_end_before_a_training_that_is_interrupted() -> None:
    # the library would abort the process when it asks for Python's lock at that time
    code = """
import _thread, time
from litgpt_moe.data.make_tokenizer import call_interruptibly
try:
    call_interruptibly(lambda: (_thread.interrupt_main(), time.sleep(60)))
except KeyboardInterrupt:
    print("heard")
"""
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", heard + code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (130, "heard\n")


@pytest.mark.parametrize("text", ["one story alone", "the same\n<|endoftext|>\nthe same", "<|endoftext|>\n"])
def test_no_tokenizer_is_trained_for_a_text_without_enough_stories(
    settings: PrepareSettings, tmp_path: Path, text: str
) -> None:
    (settings.data_dir / "train" / "a.txt").write_text(text, encoding="utf-8")
    (settings.data_dir / "val" / "b.txt").unlink()
    with pytest.raises(ValueError, match="no story for the train split"):
        prepare(dataclasses.replace(settings, tokenizer_dir=tmp_path / "new", train_tokenizer=330))
    assert not (tmp_path / "new").exists()


def test_training_replaces_no_configuration_of_somebody_else(
    settings: PrepareSettings, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    wanted = dataclasses.replace(settings, tokenizer_dir=folder, train_tokenizer=330)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text('{"eos_token_id": 7}', encoding="utf-8")
        before = snapshot(folder)
        with pytest.raises(ValueError, match="there is another tokenizer; --overwrite replaces it"):
            prepare(wanted)
        assert snapshot(folder) == before
        (folder / name).unlink()
    # what a killed training leaves
    (folder / "tokenizer_config.json").write_text('{"trained_vocab_size": 999}', encoding="utf-8")
    assert prepare(wanted)["tokenizer"]["vocab_size"] == 330


def test_a_text_that_gives_fewer_pieces_than_asked_for_is_told(
    settings: PrepareSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Tom has a ball.<|endoftext|>Lily has a hat.", encoding="utf-8")
    settings = dataclasses.replace(settings, tokenizer_dir=tmp_path / "tokenizer")
    train_tokenizer(settings, 2048, [source_of(text, tmp_path)])
    n_pieces = read_tokenizer_facts(settings.tokenizer_dir).vocab_size
    assert 259 < n_pieces < 400
    assert f"the tokenizer has {n_pieces} pieces, not 2,048: " in capsys.readouterr().err
    train_tokenizer(settings, n_pieces, [source_of(text, tmp_path)])
    assert "pieces, not" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold the limit of memory")
def test_too_low_a_limit_of_memory_is_told_before_the_tokenizers_library_aborts(
    settings: PrepareSettings,
) -> None:
    code = (
        "import resource, sys; from prepare_data import main\n"
        "resource.setrlimit(resource.RLIMIT_AS, (300 << 20, resource.RLIM_INFINITY))\n"
        f"sys.exit(main(['--data_dir', {str(settings.data_dir)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    told = "error: a process may use 300 MiB of memory here (ulimit -v), but tokenizing needs 512 MiB; raise "
    assert done.returncode == 2 and done.stderr.startswith(told)


def _abort(*_: object) -> None:
    os.abort()  # as the tokenizers library does when memory ends


def test_a_worker_that_aborts_is_told_even_if_it_is_the_only_one(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "memory_limit", lambda: 1 << 40)
    monkeypatch.setattr(shards, "write_shard", _abort)
    with pytest.raises(OSError, match=r"a worker process ended early .*; free memory or raise its limit"):
        prepare(dataclasses.replace(settings, workers=1))
