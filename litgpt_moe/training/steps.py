"""Decisions at each optimizer step (does it count, does the run go on), and how long steps take."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple, Self

from litgpt_moe.cli import WorkFailed
from litgpt_moe.training.guard import Guard, Spike
from litgpt_moe.training.settings import Settings

# seconds that finishing a step may take after a signal; `docker stop` kills after 10, Slurm after 30
GRACE_S = 5.0


class Ending(Exception):
    """Leaves LitGPT's loop between two micro-batches, once the last whole step is saved."""


class RunFailed(WorkFailed):
    """The run cannot go on; the text says why and what to do."""


# `uv run` passes on what systemd, Slurm or a shell has sent to the whole process group, us included
ECHO_S = 1.0


class StopSignals:
    """While active, a first signal asks the run to save and end, and a second one ends it at once."""

    # from Ctrl-C; Slurm and systemd; Slurm; Ctrl-Break; a terminal or connection that is closed
    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK", "SIGHUP")

    def __init__(self) -> None:
        self.reason = ""
        """Why the run is to end: a signal, or what others have written here."""
        self._first, self._first_at = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in self.NAMES:
            if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
                number = getattr(signal, name)
                # nohup has SIGHUP ignored, and so it stays
                if name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._first:
            is_echo = number == self._first and time.monotonic() - self._first_at < ECHO_S
            # a closed terminal sends SIGHUP several times
            if name != "SIGHUP" and not is_echo:
                # safe at any time: a checkpoint gets its name only when it is whole
                os._exit(128 + number)
            return
        self._first, self._first_at = number, time.monotonic()
        self.reason = self.reason or name
        text = f"\n{name}: saving the last whole step; once more leaves at once.\n"
        # print is not reentrant: the signal may have interrupted it; the terminal may be gone
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


class Clock:
    """The time that training takes, summed over the processes of a run that resumed each other."""

    def __init__(self, start_step: int) -> None:
        self.start_step, self.began = start_step, time.perf_counter()
        # seconds of the processes before this one
        self.earlier_s = 0.0
        self.longest_step_s = 0.0
        """Of the steps but the first, which prepares much, or of the first as long as there is no other."""
        self._n_steps = 0
        self.first_step_at, self.last_step_at = 0.0, self.began
        self._row_step, self._row_s = start_step, 0.0
        self._paused_s = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including validation and saving."""
        return self.earlier_s + time.perf_counter() - self.began

    def resume(self, earlier_s: float) -> None:
        """Continue from the seconds in a checkpoint."""
        self.earlier_s = self._row_s = earlier_s

    def begin_steps(self) -> None:
        """Note that the first step begins: what came before, such as compiling, is no part of it."""
        self.last_step_at = time.perf_counter()

    def end_step(self) -> None:
        """Note that an optimizer step has ended."""
        now = time.perf_counter()
        step_s = now - self.last_step_at
        self.longest_step_s = max(self.longest_step_s, step_s) if self._n_steps > 1 else step_s
        self._n_steps += 1
        self.last_step_at = now
        self.first_step_at = self.first_step_at or now

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude a validation from the rate of the next row."""
        started = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - started

    def steps_per_s(self, step: int, seconds: float) -> float:
        """Return the steps per second since the last call, without validation; nan if no time has passed."""
        n_steps, elapsed = step - self._row_step, seconds - self._row_s - self._paused_s
        self._row_step, self._row_s, self._paused_s = step, seconds, 0.0
        return n_steps / elapsed if elapsed > 0 else math.nan

    def overall_steps_per_s(self, step: int) -> float | None:
        """Return the steps per second from this process's first step to its last, None for fewer than two."""
        n_steps, seconds = step - self.start_step - 1, self.last_step_at - self.first_step_at
        return n_steps / seconds if n_steps > 0 and seconds > 0 else None


class Verdict(NamedTuple):
    """What becomes of a step; it is the same on every rank."""

    fail: str = ""
    """Why the run fails at once, with its earlier checkpoints."""
    end: str = ""
    """Why the run saves and ends after this step, to be resumed later."""
    skip: bool = False
    """The loss or gradient is not finite: the weights must not change."""
    overflow: bool = False
    """The skip is the loss scaling's: the gradient overflows in fp16, and a lower scale will help."""
    give_up: bool = False
    """Too many steps in a row were skipped: the run fails."""
    spike: Spike | None = None


class Judge:
    """Decides what becomes of each step by its loss and gradient, signals, time limit and failed saves."""

    def __init__(self, settings: Settings, began: float, stops: StopSignals, world_size: int) -> None:
        self.settings, self.began, self.stops, self.world_size = settings, began, stops, world_size
        self.guard = Guard(settings.guard.spike_sigma)

    def vote(self, now: float, step_s: float, save_s: float, must_fail: bool = False) -> int:
        """Return this rank's vote for the end of the run; `verdict` takes the sum over all ranks.

        `now` is on the clock of `began`; the longest step took `step_s` seconds, a save takes `save_s`;
        `must_fail`: the latest save failed, and the run must not go on without it.
        """
        if must_fail:
            # a sum over world_size means fail: votes for an end add up to world_size at most
            return self.world_size + 1
        # a run whose learning rate follows the clock ends by its TimeBudget
        if self.settings.schedule.progress != "time":
            # 1.5: a step may take longer than the longest so far
            self.check_time(now, 1.5 * step_s + save_s)
        return int(bool(self.stops.reason))

    def check_time(self, now: float, needed_s: float) -> None:
        """Ask for the end of the run if train.max_time leaves less than `needed_s` seconds."""
        limit_s = self.settings.train.max_time
        if limit_s is not None and now - self.began + needed_s >= limit_s and not self.stops.reason:
            self.stops.reason = f"train.max_time of {limit_s:g} s"

    def verdict(
        self,
        loss: float,
        norm: float,
        votes: int,
        failed_save: str | None,
        can_lower_scale: bool = False,
    ) -> Verdict:
        """Return what becomes of the step with this loss and gradient norm; the guard remembers both.

        `can_lower_scale`: the loss is scaled, by more than the least. Then a gradient that is not finite is
        no sign of a bad step, and the guard does not count it, unless the loss is not finite either.
        """
        if votes > self.world_size:
            reason = failed_save or "another process could not save"
            return Verdict(fail=f"{reason}; continue with --resume auto")
        end = (self.stops.reason or "the request of another process") if votes else ""
        if can_lower_scale and math.isfinite(loss) and not math.isfinite(norm):
            return Verdict(end=end, skip=True, overflow=True)
        if self.guard.count_bad(loss, norm):
            give_up = self.guard.n_in_a_row >= self.settings.guard.max_skipped_steps
            return Verdict(end=end, skip=True, give_up=give_up)
        return Verdict(end=end, spike=self.guard.add_loss(loss))
