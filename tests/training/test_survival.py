"""Runs that are stopped, killed or doubled end as if nothing had happened, or say why not."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import ROOT
from helpers.runs import BALANCED, assert_same_run, rows, run, weights
from torch.utils.data import DataLoader

from litgpt_moe.checkpoints.reader import checkpoint_flaw
from litgpt_moe.checkpoints.writer import CheckpointWriter
from litgpt_moe.data.module import TextShards
from litgpt_moe.training import batches, hooks, loop, progress
from litgpt_moe.training.ending import EarlyEnd
from litgpt_moe.training.fabric import TrainingFabric
from litgpt_moe.training.folder_checks import run_lock
from litgpt_moe.training.run import Run

pytestmark = pytest.mark.usefixtures("eager", "workspace")

# --- exact resume and signals -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_after_its_step_and_resume_gives_the_run_that_never_stopped(
    name: str, at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"{name} is not known here")
    # 93 sequences: 40 steps of 4 reach into the second epoch; 4 micro-batches a step; two worker processes
    common = ["--max_tokens", 40 * 256, "--micro_batch_size", 1, "--data.init_args.num_workers", 2]
    common += [*BALANCED, "--train.log_interval", 2]  # the end comes between two rows
    common += ["--eval.max_new_tokens", 5]
    assert run("--out_dir", "whole", *common) == 0
    capsys.readouterr()
    at_step(26, lambda: signal.raise_signal(getattr(signal, name)))
    assert run("--out_dir", "parts", *common) == 0
    output = capsys.readouterr()
    assert f"Stopped after step 27 of 40 ({name})" in output.out
    assert "run_train.py --config train_config.yaml --out_dir parts" in output.out
    assert output.out.rstrip().endswith("--resume auto")
    assert not Path("parts/final").exists() and Path("parts/step-00000027").is_dir()
    assert run("--out_dir", "parts", *common, "--resume", "auto") == 0
    assert_same_run("parts", "whole")
    assert int(rows("parts")[-1]["epoch"] or 1) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM for another process")
def test_the_workers_of_another_data_module_outlive_a_signal_to_all_processes_too(
    at_step: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = DataLoader([torch.arange(65)] * 64, 2, num_workers=1)
    monkeypatch.setattr(TextShards, "train_dataloader", lambda _: loader)

    def stop_all() -> None:
        for worker in multiprocessing.active_children():
            os.kill(cast(int, worker.pid), signal.SIGTERM)
        time.sleep(0.5)

    at_step(3, stop_all)
    assert run() == 0, capsys.readouterr().err


@pytest.fixture
def at_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Have something happen in the given micro-batch of a process, as a signal does."""

    def schedule(number: int, act: Callable[[], object]) -> None:
        backward, calls = TrainingFabric.backward, []

        def watched(fabric: TrainingFabric, *args: torch.Tensor, **options: object) -> None:
            calls.append(1)
            if len(calls) == number:
                act()
            backward(fabric, *args, **options)

        monkeypatch.setattr(TrainingFabric, "backward", watched)

    return schedule


@pytest.fixture
def long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little is left of a step, it counts as too long to finish."""
    monkeypatch.setattr(progress, "GRACE_S", 0.0)


@pytest.mark.usefixtures("long_steps")
def test_a_signal_amid_a_long_step_drops_it_and_resume_gives_the_run_that_never_stopped(
    at_batch: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--max_tokens", 12 * 256, "--micro_batch_size", 1, "--data.init_args.num_workers", 2]
    common += [*BALANCED, "--train.log_interval", 2, "--eval.max_new_tokens", 5]
    assert run("--out_dir", "whole", *common) == 0
    at_batch(6 * 4 + 2, lambda: signal.raise_signal(signal.SIGTERM))
    capsys.readouterr()
    assert run("--out_dir", "parts", *common) == 0
    output = capsys.readouterr()
    assert "Step 7 takes " in output.err and "Stopped after step 6 of 12 (SIGTERM)" in output.out
    assert checkpoint_flaw(Path("parts/step-00000006")) is None and not Path("parts/final").exists()
    assert run("--out_dir", "parts", *common, "--resume", "auto") == 0
    assert_same_run("parts", "whole")


@pytest.mark.usefixtures("long_steps")
def test_max_time_cuts_off_a_long_step_too(
    at_batch: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed[0])
    common = ["--max_tokens", 12 * 256, "--micro_batch_size", 1, "--train.log_interval", 2, *BALANCED]
    assert run("--out_dir", "whole", *common) == 0
    at_batch(6 * 4 + 2, lambda: passed.append(passed.pop() + 10**6))
    capsys.readouterr()
    assert run("--out_dir", "parts", *common, "--train.max_time", 10**6) == 0
    output = capsys.readouterr()
    assert (
        "Step 7 takes " in output.err
        and "Stopped after step 6 of 12 (train.max_time of 1e+06 s)" in output.out
    )
    assert run("--out_dir", "parts", *common, "--resume", "auto") == 0
    assert_same_run("parts", "whole")
    # in a first step that takes too long nothing is done, and nothing saved
    at_batch(2, lambda: passed.append(passed.pop() + 10**6))
    assert run("--out_dir", "first", *common, "--train.max_time", 10**6) == 0
    assert "(train.max_time of 1e+06 s, in which no step was done: raise it)" in capsys.readouterr().out
    assert list(Path("first").glob("step-*")) == []


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One number, of seconds by which all clocks are ahead."""
    passed = [0.0]
    for name in ("monotonic", "perf_counter"):
        clock = getattr(time, name)
        monkeypatch.setattr(time, name, lambda clock=clock: clock() + passed[0])
    return passed


@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_the_time_of_setting_up_is_not_that_of_a_step(
    micro_batch_size: int, passed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_model = hooks.prepare_model

    def prepare_for_long(*args: Any) -> bool:
        passed[0] += 1000.0  # as compiling does, in the check before the first step
        return prepare_model(*args)

    monkeypatch.setattr(hooks, "prepare_model", prepare_for_long)
    assert run("--micro_batch_size", micro_batch_size, "--train.max_time", 1500) == 0
    assert checkpoint_flaw(Path("out/final")) is None


def test_a_first_step_that_leaves_no_time_for_another_is_saved(
    at_batch: Callable, passed: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    at_batch(1, lambda: passed.append(passed.pop() + 1000.0))
    assert run("--micro_batch_size", 4, "--train.max_time", 2000) == 0
    assert "Stopped after step 1 of 8 (train.max_time of 2000 s)" in capsys.readouterr().out
    assert checkpoint_flaw(Path("out/step-00000001")) is None


@pytest.mark.usefixtures("long_steps")
def test_a_save_that_failed_is_tried_again_when_the_next_step_is_left(
    at_batch: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--micro_batch_size", 1, *BALANCED]
    assert run("--out_dir", "whole", *common) == 0
    usage, is_full = shutil.disk_usage("."), [False]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000) if is_full[0] else usage)
    write, n_saves = CheckpointWriter._write, []

    def write_first_to_a_full_disk(writer: CheckpointWriter, *args: Any) -> None:
        n_saves.append(1)
        is_full[0] = len(n_saves) == 1  # then somebody makes room
        write(writer, *args)

    monkeypatch.setattr(CheckpointWriter, "_write", write_first_to_a_full_disk)
    at_batch(4 * 4 + 2, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*common) == 0
    output = capsys.readouterr()
    assert "step-00000004 could not be saved" in output.err
    assert "Stopped after step 4 of 8 (SIGTERM)" in output.out
    assert checkpoint_flaw(Path("out/step-00000004")) is None
    assert run(*common, "--resume", "auto") == 0
    assert_same_run("out", "whole")


@pytest.mark.usefixtures("long_steps")
@pytest.mark.parametrize(("batch", "saved"), [(2, []), (4 * 4 + 1, ["step-00000004"])])
def test_a_dropped_step_after_which_nothing_is_new_saves_nothing(
    batch: int, saved: list[str], at_batch: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--micro_batch_size", 1]
    assert run("--out_dir", "whole", *common) == 0
    at_batch(batch, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*common) == 0
    error = capsys.readouterr().err
    assert error.count("Saved out") == len(saved)
    assert sorted(path.name for path in Path("out").glob("step-*")) == saved
    assert run(*common, "--resume", "auto") == 0
    assert_same_run("out", "whole")


@pytest.mark.usefixtures("long_steps")
def test_a_signal_amid_a_long_validation_cuts_it_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--micro_batch_size", 1, "--train.save_interval", 100, "--eval.interval", 4]
    assert run("--out_dir", "whole", *common) == 0
    between, calls = EarlyEnd.between_val_batches, []

    def watched(end: EarlyEnd, n_done: int, n_batches: float) -> None:
        if end.hooks.step == 4 and not calls:
            calls.append(n_done)
            signal.raise_signal(signal.SIGTERM)
        between(end, n_done, n_batches)

    monkeypatch.setattr(EarlyEnd, "between_val_batches", watched)
    assert run(*common) == 0
    output = capsys.readouterr()
    assert "The validation at step 4 is cut off." in output.err and "Stopped after step 4 of 8" in output.out
    assert calls == [1] and checkpoint_flaw(Path("out/step-00000004")) is None
    assert run(*common, "--resume", "auto") == 0
    one, other = weights("whole/final"), weights("out/final")
    assert all(torch.equal(one[name], other[name]) for name in one)
    steps = [[row["step"] for row in rows(out) if row["val_loss"]] for out in ("whole", "out")]
    assert steps == [["4", "8", "8"], ["8", "8"]]


def test_a_step_that_is_soon_done_is_finished(at_batch: Callable) -> None:
    at_batch(2 * 4 + 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert run("--micro_batch_size", 1) == 0
    assert [path.name for path in Path("out").glob("step-*")] == ["step-00000003"]


def test_final_is_resumed_as_exactly_as_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--schedule.name", "constant", "--train.save_interval", 100)
    assert run("--out_dir", "whole", "--max_tokens", 12 * 256, *flags) == 0
    assert run("--out_dir", "parts", "--max_tokens", 8 * 256, *flags) == 0
    assert run("--out_dir", "more", "--max_tokens", 12 * 256, *flags, "--resume", "parts/final") == 0
    one, other = weights("whole/final"), weights("more/final")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_keeps_its_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--max_tokens", 1024) == 0
    shutil.copytree("out", "other")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(loop, "usable_cores", lambda: 2)
    torch.set_num_threads(2)
    assert run("--max_tokens", 2048, "--resume", "auto") == 0
    assert torch.get_num_threads() == 1 and "threads" not in capsys.readouterr().err
    # what the user says wins, and is told
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert run("--max_tokens", 2048, "--resume", "auto", "--out_dir", "other") == 0
    assert torch.get_num_threads() == 2
    told = "The run had 1 threads so far, now it has 2: it goes on, but not bit for bit"
    assert told in capsys.readouterr().err
    assert torch.load("other/final/lit_model.pth", weights_only=True)["run"]["n_threads"] == 2


def test_rows_that_a_killed_process_wrote_after_its_last_checkpoint_come_once(at_step: Callable) -> None:
    assert run("--out_dir", "whole") == 0
    shutil.copytree("whole", "parts")
    shutil.rmtree("parts/final")
    shutil.rmtree("parts/step-00000008")
    with Path("parts/logs/csv/metrics.csv").open("a", encoding="utf-8") as file:
        file.write("9,23")  # torn by the kill
    assert run("--out_dir", "parts", "--resume", "auto") == 0
    assert_same_run("parts", "whole")


def test_max_time_saves_and_ends_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--max_tokens", 10**6 * 256, "--train.max_time", 6, "--train.log_interval", 100) == 0
    output = capsys.readouterr().out
    assert "(train.max_time of 6 s)" in output and "--resume auto" in output
    step = max(Path("out").glob("step-*"))
    assert checkpoint_flaw(step) is None


# --- one folder, one run ------------------------------------------------------------------------------------


def test_a_second_run_into_a_live_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with run_lock(Path("out")):
        for flags in ([], ["--resume", "auto"], ["--overwrite"]):
            assert run(*flags) == 2
            assert f"out: a run is live there (process {os.getpid()} on " in capsys.readouterr().err
    assert run("--max_tokens", 256) == 0


def test_the_refusal_of_a_second_run_says_nothing_of_what_lies_in_the_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 0
    capsys.readouterr()
    with run_lock(Path("out")):
        assert run("--resume", "auto", "--max_tokens", 1024) == 2  # fewer tokens than it has been trained on
    (told,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Settings from")]
    assert told.startswith("error: out: a run is live there")


def test_a_folder_is_locked_before_its_checks_and_the_preparation_of_the_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, statuses = batches.prepare_data_of, []

    def prepare_for_long(first: Run) -> None:
        monkeypatch.setattr(batches, "prepare_data_of", prepare)
        # a second run that would be finished before the first begins to train
        statuses.append(run("--max_tokens", 256))
        prepare(first)

    monkeypatch.setattr(batches, "prepare_data_of", prepare_for_long)
    assert run("--max_tokens", 1024) == 0
    assert statuses == [2]
    assert f"error: out: a run is live there (process {os.getpid()} on " in capsys.readouterr().err
    assert [row["step"] for row in rows() if row["loss"]] == ["1", "2", "3", "4"]


def test_a_run_that_is_refused_leaves_no_folder_and_no_lock() -> None:
    assert run("--out_dir", "some/where", "--seed", -1) == 2
    assert not Path("some/where").exists()
    assert run("--max_tokens", 256) == 0
    assert not Path("out/.run.lock").exists() and not Path("out/.run.json").exists()


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up_and_the_next_run_tells_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from litgpt_moe.training.folder_checks import run_lock\n"
        "lock = run_lock(Path('out')); lock.__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    if sys.platform == "win32":
        code = code.replace("os.kill(os.getpid(), signal.SIGKILL)", "os._exit(9)")
    assert subprocess.run([sys.executable, "-c", code, str(ROOT)]).returncode != 0
    assert Path("out/.run.lock").exists() or sys.platform == "win32"
    for is_told in (True, False):
        assert run("--max_tokens", 256, "--overwrite") == 0
        assert ("The last run in out was killed." in capsys.readouterr().err) is is_told
