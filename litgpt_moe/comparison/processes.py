"""Start a script of ours in a process of its own, wait for it, and see how busy the machine is besides."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from litgpt_moe.cli import INTERRUPTED, WorkFailed
from litgpt_moe.words import ROOT

LOW_PRIORITY = 10 if sys.platform != "win32" else psutil.BELOW_NORMAL_PRIORITY_CLASS
POLL_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    status: int
    last_error: str
    """The last line of its log that begins with `error:`, without that word."""
    others: float | None
    """Cores that other processes used meanwhile, on average."""


class OthersLoad:
    """Measures how many cores others than one process use, from its start on."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self._before = self._after = self._now()

    def look(self) -> None:
        """Note the times; what a process has used can be read only while it is there."""
        with contextlib.suppress(psutil.Error):
            self._after = self._now()

    @property
    def cores(self) -> float | None:
        """Cores that others used up to the last look, None where no time has passed."""
        (start, idle, own), (end, idle_now, own_now) = self._before, self._after
        if end - start <= 0:
            return None
        busy = (psutil.cpu_count() or 1) - (idle_now - idle) / (end - start)
        return max(0.0, busy - (own_now - own) / (end - start))

    def _now(self) -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), self.process.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        return time.monotonic(), idle, own.user + own.system


def script(name: str, *words: object) -> list[str]:
    """Return the command that starts a script of the top level."""
    return [sys.executable, str(ROOT / name), *map(str, words)]


def run_to_end(command: list[str], log: Path, low_priority: bool = False) -> Outcome:
    """Run a command whose output goes to the end of `log`.

    Ctrl-C, SIGTERM and SIGHUP are passed on; the process then saves what it has and ends, and
    KeyboardInterrupt is raised. A second signal kills it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, _signals_interrupt():
        start = output.tell()
        # a group of its own: a terminal sends Ctrl-C to a whole group, and a second one would kill it
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **group)
        try:
            return _wait(process, log, start, low_priority)
        except KeyboardInterrupt:
            _end(process)
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen, log: Path, start: int, low_priority: bool) -> Outcome:
    load = None
    with contextlib.suppress(psutil.Error):
        seen = psutil.Process(process.pid)
        if low_priority:
            seen.nice(LOW_PRIORITY)
        load = OthersLoad(seen)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(POLL_S)
            return Outcome(status, _last_error(log, start), load and load.cores)
        if load is not None:
            load.look()


def _end(process: subprocess.Popen) -> None:
    """Ask a process to save and end, and wait for it; a second signal ends the wait."""
    with contextlib.suppress(OSError):
        process.send_signal(signal.CTRL_BREAK_EVENT if sys.platform == "win32" else signal.SIGINT)
    with contextlib.suppress(KeyboardInterrupt):
        process.wait()


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # nohup has SIGHUP ignored, and so it stays
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_error(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    # without a sentence of ours, the last line of a traceback
    return (errors or [line for line in lines if line.strip()] or ["it said nothing"])[-1]


def check_ended(outcome: Outcome, what: str, log: Path) -> None:
    """Raise WorkFailed with the reason unless the process ended well."""
    if outcome.status == INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.status:
        killed = f"ended by signal {-outcome.status}" if outcome.status < 0 else outcome.last_error
        raise WorkFailed(f"{what} failed: {killed} (all it said is in {log})")
