"""A run tells what it takes: before it, by --plan, and once after its first steps."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.runs import run

from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.training import run as runs
from litgpt_moe.training.forecast import forecast

pytestmark = pytest.mark.usefixtures("workspace", "eager")


def test_a_run_tells_time_passes_and_disk_once(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Plan ")]
    n_tokens = read_manifest(tiny_data)["splits"]["train"]["n_tokens"]
    in_pass = (n_tokens - 1) // 64 * 64
    passes = f"{2048 / in_pass:.2g} passes through {in_pass:,} tokens"
    told = re.fullmatch(r"Plan    about \d+ s for 6 more steps; (.*) \((.*)\); \d+ MB of checkpoints", line)
    assert told is not None and told.groups() == (passes, str(tiny_data))


def test_the_time_is_that_of_the_steps_and_validations_that_are_left() -> None:
    planned = runs.set_up(["--config", "train_config.yaml", "--max_tokens", str(1002 * 256)])
    # 1,000 steps of 9 s, each of two micro-batches; 251 validations of two micro-batches, a third of the time
    assert forecast(planned, 2, 9.0).startswith("Plan    about 2.7 hours for 1,000 more steps;")
    short = replace(planned.settings.train, max_time=60.0)
    limited = replace(planned, settings=replace(planned.settings, train=short))
    assert "(train.max_time ends the run after 60 s);" in forecast(limited, 2, 9.0)


def test_a_plan_trains_and_writes_nothing(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--plan", "--max_tokens", "auto", "--optimizer.lr", "auto") == 0
    told = capsys.readouterr().out
    assert re.search(r"^Model   MoE-tiny: 21,712 parameters, .*, vocabulary 512$", told, re.MULTILINE)
    assert re.search(r"^Memory  micro-batch of 2: weights .* GB of [\d.]+$", told, re.MULTILINE)
    assert re.search(r"^        smaller ones, in GB: 1: [\d.]+$", told, re.MULTILINE)
    assert re.search(r"^Time    about \d+ s for \d+ steps, [\d,]+ tokens, at", told, re.MULTILINE)
    assert "Data    4 passes through" in told and f"({tiny_data})" in told
    assert "Rate    0.003; the rule gives 0.003 (arxiv.org/abs/2502.05172" in told
    assert re.search(
        r"^Disk    \d+ MB a checkpoint, \d+ MB at most at a time; .* are free$", told, re.MULTILINE
    )
    assert sorted(path.name for path in Path().iterdir()) == ["model_config.yaml", "train_config.yaml"]


def test_a_plan_needs_no_data_and_no_free_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert run("--plan", "--max_tokens", 4096, "--resume", "auto") == 0
    told = capsys.readouterr().out
    assert re.search(r"for 8 steps, 2,048 tokens, at [\d,]+ tokens a second, measured so far", told)
    assert run("--plan", "--dataset_dir", "nowhere", "--max_tokens", "auto") == 0
    told = capsys.readouterr().out
    assert "Time    known when the data are prepared" in told and "Data    not prepared yet" in told
