"""The command prepare_data.py: its summary, its flags and the upload."""

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

import prepare_data
from litgpt_moe.data import summary
from litgpt_moe.data.settings import PrepareSettings, WandbSettings


@pytest.mark.parametrize("module", ["prepare_data", "litgpt_moe.data.prepare"])
def test_neither_the_script_nor_its_workers_import_torch(module: str) -> None:
    heavy = "{'torch', 'litgpt', 'lightning', 'wandb', 'httpx', 'yaml'}"
    heavy = heavy if module == "prepare_data" else heavy.replace(", 'yaml'", "")
    code = f"import sys, {module}; print({heavy} & set(sys.modules), 'tqdm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set() True\n"


def test_a_whole_preparation_needs_no_torch(tmp_path: Path) -> None:
    flags = ["--dataset=demo", "--demo_stories=200", "--train_tokenizer=400", f"--data_dir={tmp_path}"]
    flags.append(f"--tokenizer_dir={tmp_path / 'tokenizer'}")
    code = f"import sys, prepare_data; prepare_data.main({flags}); print({{'torch'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


@pytest.mark.parametrize(("status", "n_devices", "sees"), [(0, 2, True), (0, 0, False), (100, 2, False)])
def test_the_driver_says_whether_there_is_a_gpu(
    status: int, n_devices: int, sees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(into: Any) -> int:
        into._obj.value = n_devices
        return 0

    driver = SimpleNamespace(cuInit=lambda _: status, cuDeviceGetCount=count)
    monkeypatch.setattr(summary, "version", lambda _: "2.10.0")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert summary.sees_gpu() is sees


def test_ctrl_c_ends_with_status_130_and_says_that_the_shards_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: PrepareSettings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("litgpt_moe.data.prepare.prepare", interrupted)
    assert prepare_data.main([]) == 130
    assert "stopped; finished shards are kept, run again to go on" in capsys.readouterr().err


def test_the_script_says_what_it_made_and_what_is_next(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data-dir", str(settings.data_dir), "--tokenizer-dir", str(settings.tokenizer_dir)]
    assert prepare_data.main(arguments) == 0
    stdout = capsys.readouterr().out
    assert "train  200 stories" in stdout and "0 duplicates" in stdout and "tokens/s" in stdout
    flags = f"--data_dir {settings.data_dir}"
    assert f"uv run python run_train.py {flags}" in stdout
    assert prepare_data.main(arguments) == 0
    captured = capsys.readouterr()
    assert "nothing to do" in captured.err and "tokens/s" not in captured.out


def test_the_data_directory_goes_to_weights_and_biases_on_request(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []

    def push(data_dir: Path, upload: WandbSettings, tokenizer_dir: Path) -> str:
        pushed.append((upload.wandb_project, upload.wandb_alias, data_dir, tokenizer_dir))
        return "pushed"

    monkeypatch.setattr("litgpt_moe.data.artifact.push", push)
    arguments = ["--data-dir", str(settings.data_dir), "--tokenizer-dir", str(settings.tokenizer_dir)]
    assert prepare_data.main(arguments) == 0 and pushed == []
    wandb_flags = ["--log-to-wandb", "--wandb-project", "stories", "--wandb-alias", "new"]
    assert prepare_data.main([*arguments, *wandb_flags]) == 0
    assert pushed == [("stories", ["new"], settings.data_dir, settings.tokenizer_dir)]
    assert "pushed" in capsys.readouterr().out


@pytest.mark.parametrize(("n_tokens", "model"), [(400_000, "demo_model"), (3_000_000, "moe_10m")])
def test_the_next_command_suits_the_amount_of_text(
    n_tokens: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("litgpt_moe.data.summary.sees_gpu", lambda: False)
    part = dict.fromkeys(("n_stories", "n_bytes", "n_duplicates", "n_replaced_bytes"), 0) | {"shards": []}
    manifest = {"splits": {"train": part | {"n_tokens": n_tokens}}, "tokenizer": {"vocab_size": 50_257}}

    def proposed(settings: PrepareSettings) -> str:
        return prepare_data.summary(manifest, settings, None).splitlines()[-1].removeprefix("next   ")

    flags = f"--model_config configs/{model}.yaml --config configs/small_train.yaml"
    mine = PrepareSettings(data_dir=Path("data/mine"))
    folders = f"--data_dir {Path('data/mine')} --out_dir {Path('checkpoints/mine')}"
    assert proposed(mine) == f"uv run python run_train.py {folders} {flags}"
    # of the demo stories, for which the pair is the default
    assert proposed(PrepareSettings()) == "uv run python run_train.py"
    Path("data/custom_text/train").mkdir(parents=True)
    Path("data/custom_text/train/a.txt").touch()
    assert proposed(PrepareSettings()) == f"uv run python run_train.py {flags}"


@pytest.mark.parametrize("flag", ["--no_log_to_wandb", "--no-log-to-wandb", "--no-log_to_wandb"])
def test_the_variable_that_uploads_gives_way_to_a_flag(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_LOG_DATASET", "1")
    assert prepare_data.build_parser().parse_args([]).log_to_wandb is True
    assert prepare_data.build_parser().parse_args([flag]).log_to_wandb is False
