"""The guard of a run: steps that are not finite, losses that jump, and what is told of them."""

import csv
import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.runs import assert_same_run, edit_yaml, loss_times, losses, rows, run, weights

from litgpt_moe.checkpoints import writer
from litgpt_moe.training.fabric import TrainingFabric
from litgpt_moe.training.guard import Guard
from litgpt_moe.training.hooks import LoopHooks
from tools import show_batch

pytestmark = pytest.mark.usefixtures("eager", "workspace")


def test_the_guard_counts_bad_steps_and_those_in_a_row() -> None:
    guard = Guard(spike_sigma=6.0)
    steps = [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, 1.0), (math.inf, 1.0)]
    found = [(guard.count_bad(*step), guard.n_in_a_row) for step in steps]
    assert found == [(False, 0), (True, 1), (True, 2), (False, 0), (True, 1)]
    assert guard.n_skipped == 3


def test_a_spike_is_a_loss_that_many_deviations_above_enough_losses_before() -> None:
    before = [3.0, 5.0] * 16  # mean 4, standard deviation 1
    for sigma, loss, expected in ((6.0, 10.1, (4.0, 1.0)), (6.0, 9.9, None), (0.0, 100.0, None)):
        guard = Guard(sigma)
        assert [guard.add_loss(loss) for loss in before[:31]] == [None] * 31
        assert guard.add_loss(before[31]) is None
        assert guard.add_loss(loss) == expected
    few = Guard(6.0)
    assert [few.add_loss(loss) for loss in (*before[:31], 100.0)] == [None] * 32


def test_the_guard_compares_with_the_latest_losses_and_keeps_them_in_a_checkpoint() -> None:
    guard, again = Guard(6.0), Guard(6.0)
    for loss in range(200):
        guard.add_loss(float(loss))
    guard.count_bad(math.nan, 1.0)
    again.load_state_dict(guard.state_dict())
    assert again.losses == [float(loss) for loss in range(72, 200)]
    assert (again.n_skipped, again.n_in_a_row) == (1, 1)


def test_a_step_without_a_finite_loss_changes_no_weight_and_is_counted() -> None:
    flags = ("--train.save_interval", 1, "--micro_batch_size", 2)  # two micro-batches a step
    with loss_times(math.nan, 6):  # the second of step 3
        assert run(*flags) == 0
    before, bad, after = (weights(f"out/step-0000000{step}") for step in (2, 3, 4))
    assert all(torch.equal(before[name], bad[name]) for name in before)
    assert not all(torch.equal(bad[name], after[name]) for name in before)
    assert [row["skipped_steps"] for row in rows() if row["loss"]] == ["0", "0"] + ["1"] * 6
    assert math.isfinite(losses()[-1]) and math.isnan(losses()[2])


def test_a_run_that_gives_up_lets_the_save_in_progress_end_before_any_process_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state, order = writer.write_state, []

    def slow_write(*args: Any) -> Any:
        time.sleep(0.5)
        order.append("written")
        return write_state(*args)

    def barrier(*_: object) -> None:
        order.append("barrier")
        if "written" in order:
            raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(writer, "write_state", slow_write)
    monkeypatch.setattr(TrainingFabric, "barrier", barrier)
    with loss_times(math.nan, 9):  # the first of step 5
        assert run("--guard.max_skipped_steps", 1) == 1
    # once for the name of the checkpoint to go on from, once before the end
    assert order[order.index("written") :] == ["written", "barrier", "barrier"]
    error = capsys.readouterr().err.replace("\\", "/")
    # that another process is dead is no reason to keep quiet
    assert "in 1 steps in a row; lower optimizer.init_args.lr; continue from out/step-00000004" in error


def test_weights_that_are_no_numbers_are_never_saved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step = LoopHooks.on_after_optimizer_step

    def overflow(hooks: LoopHooks, strategy: object, optimizer: torch.optim.Optimizer) -> None:
        after_step(hooks, strategy, optimizer)
        if hooks.step == 3:  # as an update with a finite gradient can, in bf16
            optimizer.param_groups[0]["params"][1].data[0, 0] = math.inf

    monkeypatch.setattr(LoopHooks, "on_after_optimizer_step", overflow)
    assert run("--train.save_interval", 1) == 1
    error = capsys.readouterr().err.replace("\\", "/")
    assert "error: out/step-00000003 could not be saved: model." in error
    assert "holds values that are no numbers" in error and "training goes on" not in error
    saved = sorted(path.name for path in Path("out").iterdir() if path.is_dir())
    assert saved == ["logs", "step-00000001", "step-00000002"]


def test_a_loss_spike_is_written_down_with_the_place_of_its_batch(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with loss_times(50.0, 41 * 2):  # the second micro-batch of step 41
        assert run("--max_tokens", 45 * 256, "--train.lr_warmup_steps", 20, "--optimizer.lr", 0.001) == 0
    assert "step 41: the loss" in capsys.readouterr().err
    with Path("out/logs/spikes.csv").open(encoding="utf-8", newline="") as file:
        (spike,) = csv.DictReader(file)
    assert (spike["step"], spike["first_sequence"]) == ("41", "160")
    assert float(spike["loss"]) > float(spike["mean"]) + 6 * float(spike["sigma"])
    assert show_batch.main(["out", "--step", "41"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- step 41, sequence") == 4 and " liked that." in shown


def test_the_stories_of_a_step_are_shown_from_any_folder(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_data, "data/mine")
    assert run("--max_tokens", 256, "--out_dir", "runs/one", "--dataset_dir", "data/mine") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert show_batch.main(["../runs/one", "--step", "1"]) == 0
    assert capsys.readouterr().out.count("--- step 1, sequence") == 4
    for step in ("0", "2"):
        assert show_batch.main(["../runs/one", "--step", step]) == 2
        assert f"error: --step is {step}; choose 1 to 1, the steps of " in capsys.readouterr().err
    (tmp_path / "runs/one").rename(tmp_path / "moved")
    assert show_batch.main(["../moved", "--step", "1"]) == 2
    error = capsys.readouterr().err.replace("\\", "/")
    assert error.startswith("error: data/mine/manifest.json: not found; ") and "--data_dir" in error
    assert show_batch.main(["../moved", "--step", "1", "--data_dir", "../data/mine"]) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("data", 5), ("data.init_args", [1]), ("data.init_args.train_data_path", 5), ("train", [1])],
        *[("dataset_dir", 5), ("out_dir", 5), ("seed", "x"), ("data.init_args.seed", "x")],
        *[("train.max_tokens", "x"), ("train.max_tokens", None), ("train.max_seq_length", 0)],
    ],
)
def test_settings_of_others_whose_stories_cannot_be_found_are_told_in_one_sentence(
    key: str, value: object, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("out/final")
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "checkpoint.json").unlink(missing_ok=True)
    data = {"class_path": "prepare_data.TextShards"}
    path = folder / "train_config.yaml"
    path.write_text(yaml.dump({"data": data, "seed": 1, "train": {"max_tokens": 512}}), encoding="utf-8")
    edit_yaml(str(path), key, value)
    assert show_batch.main(["out", "--step", "1"]) == 2
    assert f"{path}: {key} is " in capsys.readouterr().err


def test_a_resumed_run_goes_on_with_the_losses_and_counts_of_its_guard(at_step: Callable) -> None:
    flags = ("--max_tokens", 45 * 256, "--train.lr_warmup_steps", 20, "--optimizer.lr", 0.001)
    with loss_times(math.nan, 30), loss_times(50.0, 41 * 2):
        assert run("--out_dir", "whole", *flags) == 0
    at_step(37, lambda: signal.raise_signal(signal.SIGTERM))
    with loss_times(math.nan, 30):
        assert run("--out_dir", "parts", *flags) == 0
    with loss_times(50.0, (41 - 38) * 2):
        assert run("--out_dir", "parts", *flags, "--resume", "auto") == 0
    assert_same_run("parts", "whole")
    spikes = [Path(name, "logs/spikes.csv").read_text(encoding="utf-8") for name in ("whole", "parts")]
    assert spikes[0] == spikes[1] and spikes[0].count("\n") == 2


def test_a_validation_loss_too_large_for_its_exponential_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from litgpt import pretrain

    monkeypatch.setattr(pretrain, "validate", lambda *_, **__: torch.tensor(1e6))
    assert run("--max_tokens", 4 * 256) == 0
    validations = [(row["val_loss"], row["val_ppl"]) for row in rows() if row["val_loss"]]
    assert validations == [("1000000.0", "inf")] * 2
    output = capsys.readouterr()
    assert "Warning: the validation loss is 1e+06 at step 4." in output.err
    assert "700.0" not in output.out + output.err and "1000000.000 in validation" in output.out
