"""Output that cannot be written, to a pipe without a reader or on a full disk, touches no training."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OFFLINE, ROOT
from helpers.runs import rows, run

from litgpt_moe.checkpoints.reader import checkpoint_flaw
from litgpt_moe.training.output import lasting_output
from litgpt_moe.training.steps import StopSignals

pytestmark = pytest.mark.usefixtures("eager", "workspace")


class FullDisk(io.StringIO):
    """A stream into a file for which there is no room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        self.write("")


@pytest.mark.skipif(sys.platform == "win32", reason="the pipes of Windows raise other errors")
def test_a_run_whose_reader_goes_away_trains_to_its_end() -> None:
    flags = ["--config", "train_config.yaml", "--max_tokens", str(40 * 256), "--train.log_interval", "1"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_train.py"), *flags],
        env={**os.environ, **OFFLINE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    while b"step 1/40" not in process.stdout.readline():
        pass
    process.stdout.close()
    assert process.wait(120) == 0
    assert [row["step"] for row in rows() if row["loss"]][-1] == "40"
    assert checkpoint_flaw(Path("out/final")) is None and checkpoint_flaw(Path("out/step-00000040")) is None


def test_messages_that_do_not_fit_on_the_disk_end_no_run_and_no_save(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", FullDisk())
    assert run("--checkpoints.on_full_disk", "stop") == 0
    assert len([row for row in rows() if row["loss"]]) == 8
    assert all(checkpoint_flaw(Path("out", name)) is None for name in ("final", "step-00000004"))
    assert "Trained    2,048 tokens in 8 steps" in capsys.readouterr().out


def test_a_report_that_does_not_fit_on_the_disk_is_told_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk())
    with lasting_output():
        print("the report")
    assert "Warning: stdout could not be written (No space left on device)" in capsys.readouterr().err
    assert isinstance(sys.stdout, FullDisk)


def test_what_can_be_written_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with lasting_output():
        print("out")
        print("err", file=sys.stderr)
        assert sys.stderr.isatty() is False
    assert capsys.readouterr() == ("out\n", "err\n")


def test_a_signal_that_cannot_be_reported_raises_nothing_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(os, "write", closed)
    with StopSignals() as stops:
        signal.raise_signal(signal.SIGTERM)
    assert stops.reason == "SIGTERM"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_a_terminal_that_is_closed_ends_the_run_as_other_signals_do_and_nohup_keeps_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopSignals() as stops:
            # the kernel and the shell send one each
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
        assert stops.reason == "SIGHUP"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as stops:
            signal.raise_signal(signal.SIGHUP)
        assert stops.reason == ""
    finally:
        signal.signal(signal.SIGHUP, before)
