"""The help of run_train.py: short first, with the values in force, and no key that a run refuses."""

import re
from pathlib import Path

import pytest
from helpers.runs import edit_yaml, run

import run_train
from litgpt_moe.training import help as help_module
from litgpt_moe.training.help import in_force

pytestmark = pytest.mark.usefixtures("workspace")


def shown(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert run_train.main([*flags]) == 0
    return capsys.readouterr().out


def test_the_common_flags_come_first_and_the_others_when_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    short, long = shown(capsys, "--help"), shown(capsys, "--help-all")
    assert len(short.splitlines()) < 40
    names = set(re.findall(r"^  --(?:\[no_\])?([\w.]+)", short, re.MULTILINE))
    assert {"model_config", "data_dir", "optimizer.lr", "help_all", "quiet"} <= names
    assert "--guard.spike_sigma" in long and "--guard.spike_sigma" not in short


def test_no_key_is_shown_that_a_run_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help_all")
    assert "--log.project" in text and "Not supported" not in text
    assert not re.search(r"--(train\.max_steps|eval\.evaluate_example|log\.teamspace)\b", text)


def test_the_values_in_force_are_shown_with_where_they_come_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MAX_TOKENS", "1M")
    edit_yaml("train_config.yaml", "dataset_dir", "mine")
    edit_yaml("train_config.yaml", "optimizer.init_args.lr", 0.5)
    text = shown(capsys, "--config", "train_config.yaml", "--help")
    assert "The values in brackets are in force, by train_config.yaml and $MAX_TOKENS." in text
    for words in ("or fewer (now 1M)", "init_args (now mine)", "at its peak (now 0.5)"):
        assert words in text, text
    # a file that cannot be read hides no help
    Path("train_config.yaml").write_text("train: [", encoding="utf-8")
    assert "Tokens to train on, such as 10M;" in shown(capsys, "--config", "train_config.yaml", "--help")


def test_without_a_name_the_driver_decides_whose_values_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_driver, config in ((True, "train_config.yaml"), (False, "demo_train.yaml")):
        monkeypatch.setattr(help_module, "has_driver", lambda found=has_driver: found)
        values, where = in_force(["--data_dir", "mine"])
        assert where.endswith(config) and values["train.global_batch_size"] > 1


@pytest.mark.usefixtures("eager")
def test_a_quiet_run_says_warnings_and_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--quiet", "--train.lr_warmup_steps", 100) == 0
    told = capsys.readouterr()
    assert "Trained    2,048 tokens in 8 steps" in told.out
    assert [line.split()[0] for line in told.err.splitlines()] == ["Warning:"]
    # no later command in this process is quiet for that
    assert run("--overwrite") == 0
    assert "step 8/8 | epoch" in capsys.readouterr().err
