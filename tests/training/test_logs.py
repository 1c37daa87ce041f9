"""What a run reports: times, the row of metrics, the line on the terminal and what the log does with both."""

import re
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_CONFIG

from litgpt_moe.config import ModelFacts, MoEConfig
from litgpt_moe.training.csv_log import RunLogs
from litgpt_moe.training.guard import Spike
from litgpt_moe.training.logs import MetricLog, StepFigures, metric_line, metric_row, validation_row
from litgpt_moe.training.run import Run
from litgpt_moe.training.settings import Settings, TrainArgs
from litgpt_moe.training.steps import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which the test moves on."""
    time_s = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: time_s[0])
    return time_s


def a_run(**settings: object) -> Run:
    """A run of 8 steps of 4 sequences, 256 tokens."""
    facts = ModelFacts(total_params=1, active_params=1, flops_per_token=100)
    train = TrainArgs(global_batch_size=4, max_tokens=8 * 256)
    return Run(Settings(train=train, **settings), MoEConfig(**TINY_CONFIG), facts, None, {}, "32-true", 1)


# --- times --------------------------------------------------------------------------------------------------


def test_the_rate_of_a_row_counts_the_steps_since_the_last_without_the_validation_between(
    now: list[float],
) -> None:
    clock = Clock(start_step=4)
    now[0] += 10
    assert clock.steps_per_s(6, clock.seconds) == pytest.approx(2 / 10)
    with clock.pause():
        now[0] += 100
    now[0] += 5
    assert clock.steps_per_s(9, clock.seconds) == pytest.approx(3 / 5)
    now[0] += 1
    assert clock.steps_per_s(10, clock.seconds) == pytest.approx(1.0)


def test_the_seconds_of_a_resumed_run_go_on(now: list[float]) -> None:
    clock = Clock(start_step=4)
    now[0] += 1
    clock.resume(50.0)
    now[0] += 2
    assert clock.seconds == pytest.approx(53.0)
    assert clock.steps_per_s(10, clock.seconds) == pytest.approx(6 / 3)


def test_the_longest_step_is_the_first_only_as_long_as_there_is_no_other(now: list[float]) -> None:
    # Time that is kept free for a step as long as the first, which prepares much, is lost: a run with a limit
    # of 10 minutes that compiles for 3 would end 4.5 minutes early, though its steps take a second.
    clock, found = Clock(start_step=0), []
    now[0] += 180  # building the model, compiling
    clock.begin_steps()
    for seconds in (30.0, 1.0, 2.0, 1.0):
        now[0] += seconds
        clock.end_step()
        found.append(clock.longest_step_s)
    assert found == pytest.approx([30.0, 1.0, 2.0, 2.0])


def test_the_overall_rate_is_from_the_first_step_to_the_last(now: list[float]) -> None:
    clock = Clock(start_step=10)
    assert clock.overall_steps_per_s(10) is None
    now[0] += 60  # reading data, compiling
    clock.end_step()
    assert clock.overall_steps_per_s(11) is None
    for _ in range(4):
        now[0] += 2
        clock.end_step()
    assert clock.overall_steps_per_s(15) == pytest.approx(0.5)


# --- the row and the line -----------------------------------------------------------------------------------


def test_a_row_has_the_work_so_far_and_the_share_of_the_peak() -> None:
    from_litgpt = {"loss": 9.9, "iter": 8, "iter_time": 0.1, "remaining_time": 60.0, "learning_rate": 9.9}
    figures = StepFigures(3.0, 1.5, 0.01)
    row = metric_row(a_run(), 4, 2.0, 2.0, figures, peak_flops=1e6, from_litgpt=from_litgpt)
    assert (row["step"], row["total_tokens"], row["time_s"]) == (4, 1024, 2.0)
    # the step's own figures over all ranks, not LitGPT's of rank 0
    assert (row["loss"], row["grad_norm"], row["learning_rate"]) == (3.0, 1.5, 0.01)
    assert row["tokens_per_s"] == pytest.approx(512.0)
    assert row["mfu"] == pytest.approx(512 * 100 / 1e6) and row["flops"] == 1024 * 100
    assert (row["iter"], row["remaining_time"]) == (8, 60.0)
    # the peak of a CPU is not known, and what is not known is left out
    row = metric_row(a_run(), 4, 2.0, 2.0, figures, peak_flops=None, from_litgpt=from_litgpt)
    assert "mfu" not in row and row["tokens_per_s"] == pytest.approx(512.0)


def test_a_row_of_a_validation_says_when_it_was_and_its_losses() -> None:
    row = validation_row(a_run(), 4, 3.0, {"val_loss": torch.tensor(2.0), "val_ppl": 7.5})
    assert row == {"step": 4, "total_tokens": 1024, "time_s": 3.0, "val_loss": 2.0, "val_ppl": 7.5}


LINE = {
    "step": 4,
    "epoch": 0,
    "loss": 3.14159,
    "learning_rate": 0.001,
    "grad_norm": 1.5,
    "tokens_per_s": 1234.5,
    "mfu": 0.123,
    "remaining_time": 61.9,
}


def test_the_line_says_where_the_run_is() -> None:
    assert metric_line(LINE, 8, None) == (
        "step 4/8 | epoch 1 | loss 3.142 | lr 1.00e-03 | norm 1.50 | 1,234 tokens/s, MFU 12.3% | 0:01:01 left"
    )


def test_the_line_leaves_out_what_is_not_known() -> None:
    line = metric_line({key: value for key, value in LINE.items() if key != "mfu"}, 8, None)
    assert "| 1,234 tokens/s | 0:01:01 left" in line and "MFU" not in line


def test_the_line_names_the_layer_with_the_fullest_expert() -> None:
    loads = {"moe/load_imbalance/layer_00": 1.5, "moe/load_imbalance/layer_03": 2.25}
    dead = {"moe/dead_experts/layer_00": 1.0, "moe/dead_experts/layer_03": 2.0}
    line = metric_line(LINE | loads | dead, 8, 2.5)
    assert "loss 3.142, val 2.500 |" in line and "| load x2.25 in layer 3, 2 dead |" in line
    dead["moe/dead_experts/layer_03"] = 0.0
    assert "| load x2.25 in layer 3 |" in metric_line(LINE | loads | dead, 8, None)


# --- the logger ---------------------------------------------------------------------------------------------


def a_log(tmp_path, **settings: object) -> MetricLog:
    return MetricLog(a_run(**settings), RunLogs(tmp_path, MoEConfig(**TINY_CONFIG)))


def test_a_logged_row_is_in_the_file_and_on_the_terminal(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = a_log(tmp_path)
    log.log_metrics({"step": 4, "val_loss": 2.5, "val_ppl": 12.1825}, step=3)
    assert capsys.readouterr().err == "step 4/8 | validation loss 2.500, perplexity 12.18\n"
    log.log_metrics(LINE, step=4)
    assert "loss 3.142, val 2.500" in capsys.readouterr().err
    assert log.latest == {"loss": 3.14159, "step": 4, "val_loss": 2.5}
    assert len(log.logs.metrics.path.read_text(encoding="utf-8").splitlines()) == 3


def test_a_spike_is_written_down_with_the_first_sequence_of_its_step(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = a_log(tmp_path, out_dir=tmp_path)
    log.report_spike(41, StepFigures(50.0, 3.0, 0.01), Spike(4.0, 1.0))
    (header, row) = log.logs.spikes.path.read_text(encoding="utf-8").splitlines()
    assert header == "step,loss,mean,sigma,grad_norm,first_sequence" and row == "41,50.0,4.0,1.0,3.0,160"
    assert "step 41: the loss 50.000 is far above 4.000 +- 1.000 before" in capsys.readouterr().err


def test_another_process_prints_and_writes_nothing(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    log = a_log(tmp_path)
    log.log_metrics(LINE)
    log.print("hello")
    assert capsys.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_a_bar_on_a_terminal_replaces_the_lines(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    log = a_log(tmp_path)
    log.show("building the model")
    # before the first step: the longest wait of a beginner
    assert "\rbuilding the model:   0%|" in capsys.readouterr().err
    log.advance(1, 0.0)
    log.log_metrics(LINE | {"val_loss": 2.5, "val_ppl": 12.0})
    log.advance(2, 0.0)
    assert log.bar is not None and (log.bar.bar.n, log.bar.bar.total) == (2 * 256, 8 * 256)
    log.finalize("success")
    error = capsys.readouterr().err
    assert "| loss 3.142, val 2.500 [00:00<" in error and "\x1b" not in error
    assert "step 4/8 | validation loss 2.500, perplexity 12\n" in error and "tokens/s, MFU" not in error


def test_a_narrow_terminal_keeps_the_losses_of_the_bar_and_loses_the_times(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    log = a_log(tmp_path)
    log.show("")
    assert log.bar is not None
    log.bar.bar.dynamic_ncols = lambda _: (30, 10)
    capsys.readouterr()
    log.log_metrics(LINE)
    log.show("")
    log.finalize("success")
    lines = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().err).replace("\n", "\r").split("\r")
    # tqdm writes spaces over what stood there before
    assert max(len(line.rstrip()) for line in lines) <= 30 and any("| loss 3.142 [" in line for line in lines)


def test_no_name_of_a_model_or_a_file_can_command_the_terminal_during_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricLog(a_run(), RunLogs(tmp_path, MoEConfig(**TINY_CONFIG)))
    log.print("Resuming from out\x1b[2J/step-00000004")
    assert capsys.readouterr().err == "Resuming from out\\x1b[2J/step-00000004\n"
