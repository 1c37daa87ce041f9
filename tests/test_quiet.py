"""Progress bars are for terminals: with the output in a file or a pipe, commands write lines and no bars."""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import TINY_CONFIG

import evaluate
import prepare_data
import run_train
import wandb_dataset
from tools import export_hf, import_hf, inspect_routing, upcycle

pytestmark = pytest.mark.usefixtures("eager")
BAR = ("\r", "it/s", "%|", "\N{FULL BLOCK}", "\x1b[")
LASTING = {"prepare_data", "evaluate", "export_hf", "import_hf", "upcycle", "inspect_routing", "run_train"}


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def commands(
    tmp_path: Path,
    tiny_data: Path,
    tiny_checkpoint: Path,
    tiny_tokenizer_dir: Path,
    dense: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, tuple[Callable, list[str]]]:
    """Each long command by name: its main and the arguments, in an order in which they can be run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_data / "train", "text/train", ignore=shutil.ignore_patterns("*.bin", "train"))
    Path("model.yaml").write_text(yaml.dump(TINY_CONFIG), encoding="utf-8")
    settings = {"accelerator": "cpu", "compile": "off", "out_dir": "run", "dataset_dir": str(tiny_data)}
    settings |= {"tokenizer_dir": str(tiny_tokenizer_dir)}
    settings["train"] = {"global_batch_size": 4, "micro_batch_size": 4, "max_tokens": 512}
    Path("train.yaml").write_text(yaml.dump(settings), encoding="utf-8")
    tokenizer = ["--tokenizer_dir", "tokenizer", "--train_tokenizer", "320", "--workers", "1"]
    experts = ["--n_expert", "4", "--n_expert_per_token", "2"]
    checkpoint, data, text = str(tiny_checkpoint), str(tiny_data), str(tiny_data / "train/stories.txt")
    return {
        "prepare_data": (prepare_data.main, ["--data_dir", "text", *tokenizer]),
        "verify": (wandb_dataset.main, ["verify", "--data_dir", data]),
        "run_train": (run_train.main, ["--config", "train.yaml", "--model_config", "model.yaml"]),
        "evaluate": (evaluate.main, ["--ckpt_dir", checkpoint, "--data_dir", data, "--max_batches", "2"]),
        "export_hf": (export_hf.main, [checkpoint, "exported", "--gguf"]),
        "import_hf": (import_hf.main, ["exported", "imported"]),
        "upcycle": (upcycle.main, [str(dense()), "moe", *experts]),
        "inspect_routing": (inspect_routing.main, [checkpoint, text, "--out", "routing"]),
    }


def test_without_a_terminal_no_command_draws_a_bar(
    commands: dict[str, tuple[Callable, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    for name, (main, args) in commands.items():
        assert main(args) == 0, capfd.readouterr().err
        told = capfd.readouterr()
        assert told.out.strip(), name  # what was made
        drawn = [mark for mark in BAR if mark in told.out + told.err]
        assert drawn == [], (name, told.err)


def test_on_a_terminal_long_work_shows_its_progress(
    commands: dict[str, tuple[Callable, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (main, args) in commands.items():
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        assert main(args) == 0, terminal.getvalue()
        assert ("\r" in terminal.getvalue()) is (name in LASTING), (name, terminal.getvalue())
