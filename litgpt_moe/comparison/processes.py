"""Start a script of ours in a process of its own, wait for it, and see how busy the machine is besides."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from litgpt_moe.cli import INTERRUPTED, WorkFailed
from litgpt_moe.words import ROOT

LOW_PRIORITY = 10 if sys.platform != "win32" else psutil.BELOW_NORMAL_PRIORITY_CLASS
POLL_S = 1.0
# in what our commands, torch and the system say of a full disk
DISK_FULL = ("disk is full", "make room", "No space left", "PytorchStreamWriter failed writing", "quota")


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


class Stop:
    """Ctrl-C for a process that is waited for in another thread than the main one, which gets no signals."""

    def __init__(self) -> None:
        self._times = 0

    def ask(self) -> None:
        """Let the process save and end, or kill it the second time."""
        self._times += 1

    def check(self, times: int = 1) -> None:
        """Raise KeyboardInterrupt if the end was asked for so many times."""
        if self._times >= times:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Lane:
    """What one of several runs at once has for itself."""

    environment: dict[str, str]
    """Variables of its processes, besides our own."""
    stop: Stop
    """Ends its process; all lanes share it."""


def run_to_end(
    command: list[str], log: Path, low_priority: bool = False, lane: Lane | None = None
) -> Outcome:
    """Run a command whose output goes to the end of `log`.

    Ctrl-C, SIGTERM and SIGHUP are passed on; the process then saves what it has and ends, and
    KeyboardInterrupt is raised. A second signal kills it. In a thread of a lane the lane's `stop` does that.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lane = lane or Lane({}, Stop())
    with log.open("ab") as output, signals_interrupt():
        start = output.tell()
        # a group of its own: a terminal sends Ctrl-C to a whole group, and a second one would kill it
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        process = subprocess.Popen(command, env={**os.environ, **lane.environment}, **streams, **group)
        try:
            load = _watch(process, low_priority)
            status = _wait(process, lane.stop.check, load)
            return Outcome(status, _last_error(log, start), load and load.cores)
        except KeyboardInterrupt:
            _end(process, lane.stop)
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _watch(process: subprocess.Popen, low_priority: bool) -> OthersLoad | None:
    with contextlib.suppress(psutil.Error):
        seen = psutil.Process(process.pid)
        if low_priority:
            seen.nice(LOW_PRIORITY)
        return OthersLoad(seen)
    return None


def _wait(process: subprocess.Popen, check: Callable[[], None], load: OthersLoad | None = None) -> int:
    """Wait for the end of a process and return its status; `check` may raise KeyboardInterrupt meanwhile."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_S)
        if load is not None:
            load.look()
        check()


def _end(process: subprocess.Popen, stop: Stop) -> None:
    """Ask a process to save and end, and wait for it; a second signal ends the wait."""
    # a program in the background, and what it starts, ignores SIGINT until the training loop handles it
    is_background = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    number = signal.SIGTERM if is_background else signal.SIGINT
    with contextlib.suppress(OSError):
        process.send_signal(signal.CTRL_BREAK_EVENT if sys.platform == "win32" else number)
    with contextlib.suppress(KeyboardInterrupt):
        _wait(process, lambda: stop.check(times=2))


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does; nothing in another thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name == "SIGHUP":
            # a closed terminal sends it several times, and a second signal would kill
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    before = {}
    for name in ("SIGTERM", "SIGHUP") if is_main else ():
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


class RunFailed(WorkFailed):
    """One run of several failed; that says nothing about the others."""


def check_ended(outcome: Outcome, what: str, log: Path) -> None:
    """Raise RunFailed with the reason unless the process ended well; WorkFailed if the disk is full."""
    if outcome.status == INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.status:
        # the system ends a process without a word when memory runs out
        killed = f"ended by signal {-outcome.status}" + " (out of memory?)" * (outcome.status == -9)
        reason = killed if outcome.status < 0 else outcome.last_error
        kind = WorkFailed if any(words in reason for words in DISK_FULL) else RunFailed
        raise kind(f"{what} failed: {reason} (all it said is in {log})")
