"""What a run makes of its data and tokenizer: missing, altered, too little, or another model's."""

import hashlib
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import alter
from helpers.data import make_text, snapshot, write_text
from helpers.runs import assert_same_run, edit_yaml, history, run

from litgpt_moe.data import freshness, manifest
from litgpt_moe.data.batches import TokenStream
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.tokenizer import read_tokenizer_facts
from litgpt_moe.training import batches
from litgpt_moe.training.hooks import LoopHooks
from litgpt_moe.training.run import Run


def error_in(capsys: pytest.CaptureFixture[str]) -> str:
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


pytestmark = pytest.mark.usefixtures("eager")


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_yaml("model_config.yaml", "padded_vocab_size", 100)
    edit_yaml("model_config.yaml", "vocab_size", 100)
    assert run() == 2
    assert "pieces but padded_vocab_size in model_config.yaml is 100" in capsys.readouterr().err
    assert not Path("out").exists()


def test_rows_that_no_piece_of_the_tokenizer_uses_are_told_where_they_are_most(
    workspace: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = read_tokenizer_facts(tiny_tokenizer_dir).vocab_size
    warning = f"Warning: {tiny_tokenizer_dir}: the tokenizer has {size} pieces but padded_vocab_size"
    for rows_of_model, is_told in ((2 * size, False), (3 * size, True)):
        edit_yaml("model_config.yaml", "padded_vocab_size", rows_of_model)
        edit_yaml("model_config.yaml", "vocab_size", rows_of_model)
        assert run("--max_tokens", 1024, "--overwrite") == 0
        assert (warning in (err := capsys.readouterr().err)) is is_told
    assert f"in model_config.yaml is {3 * size}" in err and f"set that and vocab_size to {size}" in err
    # now the model is what it is
    for flags in (("--resume", "auto"), ("--initial_checkpoint_dir", "out/final", "--out_dir", "other")):
        assert run("--max_tokens", 2048, *flags) == 0
        assert warning not in capsys.readouterr().err


def test_too_little_text_for_one_batch_is_told_before_anything_is_written_with_what_would_do(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--micro_batch_size", 4096, "--global_batch_size", 4096, "--max_tokens", 4096 * 64) == 2
    told = re.search(
        r"sequences of 64, but 4096 are needed; choose a micro_batch_size of (\d+) or less,", error_in(capsys)
    )
    assert not Path("out").exists()
    size = int(told[1])
    assert run("--micro_batch_size", size, "--global_batch_size", size, "--max_tokens", size * 64) == 0


def test_too_little_validation_text_is_no_matter_of_the_micro_batch(
    workspace: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, "copy", ignore=shutil.ignore_patterns("*.txt"))
    content = json.loads(Path("copy/manifest.json").read_text(encoding="utf-8"))
    content["splits"]["val"]["n_tokens"] = 40
    (entry,) = content["splits"]["val"]["shards"]
    shard = Path("copy", entry["path"])
    shard.write_bytes(shard.read_bytes()[: 2 * 40])
    entry |= {"n_tokens": 40, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
    Path("copy/manifest.json").write_text(json.dumps(content), encoding="utf-8")
    assert run("--dataset_dir", "copy") == 2
    told = error_in(capsys)
    assert (
        "the val split has 40 tokens, 0 sequences of 64, but 1 are needed; choose a max_seq_length of 39"
        in told
    )
    assert "micro_batch_size" not in told
    assert run("--dataset_dir", "copy", "--max_seq_length", 39, "--max_tokens", 1024) == 0


def test_without_a_tokenizer_and_the_hub_the_two_ways_on_are_named(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("--tokenizer_dir", "absent") == 2
    error = capsys.readouterr().err
    assert "--tokenizer_dir" in error and "--train_tokenizer" in error
    assert not Path("out").exists() and not Path("absent").exists()


def test_a_run_on_a_mix_that_is_interrupted_goes_on_bit_for_bit(
    workspace: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, n_stories, seed in (("large", 200, 0), ("small", 20, 1)):
        write_text(Path("data", name, "train/a.txt"), make_text(n_stories, seed=seed))
        prepare(PrepareSettings(Path("data", name), tokenizer_dir=tiny_tokenizer_dir, workers=1))
    prepare(PrepareSettings(Path("data/mix"), mix=("large=0.8", "small=0.2")))
    n_steps = len(TokenStream(Path("data/mix"), "train")) // 256 + 20  # into the second epoch
    flags = ("--dataset_dir", "data/mix", "--max_tokens", n_steps * 256)
    assert run(*flags, "--out_dir", "whole") == 0
    count_step = LoopHooks.on_after_optimizer_step

    def interrupt(hooks: LoopHooks, **options: Any) -> None:
        count_step(hooks, **options)
        if hooks.step in (7, n_steps - 5):  # the step that follows is the last
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(LoopHooks, "on_after_optimizer_step", interrupt)
    for stopped_at in (8, n_steps - 4):
        assert run(*flags, "--out_dir", "parts", "--resume", "auto") == 0
        assert not Path("parts/final").exists() and Path(f"parts/step-{stopped_at:08d}").is_dir()
    assert run(*flags, "--out_dir", "parts", "--resume", "auto") == 0
    assert_same_run("parts", "whole")
    assert history("parts") == history("whole")


def test_a_mistyped_data_folder_is_not_filled_with_demo_stories(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--dataset_dir", "data/custom_txt") == 2
    assert "custom_txt" in capsys.readouterr().err
    assert not Path("data").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_with_tokens_above_the_vocabulary_is_told_though_all_hashes_agree(
    workspace: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    shutil.copytree(tiny_data, "copy")
    manifest = json.loads(Path("copy/manifest.json").read_text(encoding="utf-8"))
    for entry in manifest["splits"]["train"]["shards"]:
        shard = Path("copy", entry["path"])
        shard.write_bytes(b"\xff\x7f" * entry["n_tokens"])
        entry["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    Path("copy/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert run("--dataset_dir", "copy", "--data.init_args.num_workers", num_workers) == 1
    err = capsys.readouterr().err
    assert "damaged: token 32767 of a vocabulary of" in err and "error: copy/train/train" in err


def test_a_shard_altered_at_equal_size_and_time_is_made_again(
    workspace: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, "copy")
    shard = next(Path("copy/train/train").glob("*.bin"))
    whole = shard.read_bytes()
    alter(shard)
    assert run("--dataset_dir", "copy", "--max_tokens", 256) == 0
    assert "altered since it was made" in capsys.readouterr().err
    assert shard.read_bytes() == whole


def test_a_shard_altered_where_the_text_is_gone_is_refused(
    workspace: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, "copy", ignore=shutil.ignore_patterns("*.txt"))
    alter(next(Path("copy/train/train").glob("*.bin")))
    assert run("--dataset_dir", "copy", "--max_tokens", 256) == 2
    err = capsys.readouterr().err
    assert "altered since it was made" in err and "no text to make it again from" in err


@pytest.mark.parametrize("pattern", ["*/*/*.bin", "**/*.*"])
def test_data_that_are_emptied_after_their_checks_are_one_sentence(
    workspace: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pattern: str,
) -> None:
    shutil.copytree(tiny_data, "copy", ignore=shutil.ignore_patterns("*.txt"))
    prepare_data_of = batches.prepare_data_of

    def prepare_and_empty(prepared: Run) -> None:
        prepare_data_of(prepared)
        for path in Path("copy").glob(pattern):
            path.write_bytes(b"")

    monkeypatch.setattr(batches, "prepare_data_of", prepare_and_empty)
    assert run("--dataset_dir", "copy") == 1
    told = error_in(capsys)
    assert told.startswith("error: copy/") and told.endswith("continue with --resume auto")


def test_shards_are_hashed_once_in_a_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    check = manifest.altered_shards
    monkeypatch.setattr(freshness, "altered_shards", lambda *args: hashed.append(1) or check(*args))
    assert run("--max_tokens", 256) == 0
    assert len(hashed) == 1


def test_missing_data_of_the_user_s_own_is_told_with_its_place(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine/train").mkdir(parents=True)
    Path("mine/train/a.txt").touch()
    assert run("--dataset_dir", "mine") == 2
    assert "mine" in capsys.readouterr().err


def test_a_mistyped_tokenizer_folder_is_not_filled_and_the_run_goes_on_without_the_flag(
    workspace: Path, tiny_data: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, "mine")
    assert run("--dataset_dir", "mine", "--max_tokens", 512) == 0
    before = snapshot(Path())
    mistyped = ("--dataset_dir", "mine", "--resume", "auto", "--tokenizer_dir", "mine/tokeniser")
    assert run(*mistyped, "--max_tokens", 1024) == 2
    sentence = f"{Path('mine/tokeniser/tokenizer.json')}: not found; name a folder that has it"
    assert sentence in capsys.readouterr().err
    assert snapshot(Path()) == before
    edit_yaml("train_config.yaml", "tokenizer_dir", "data/tokenizer")  # the default, which is not there
    assert run("--dataset_dir", "mine", "--resume", "auto", "--max_tokens", 1024) == 0
    assert "tokenizing again" not in capsys.readouterr().err
