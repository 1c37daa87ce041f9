"""Notices when training becomes slow for a while, and says what the machine does besides."""

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

# a period is one long step, or as many short ones as take this long, in seconds
PERIOD_S = 2.0
# periods whose median is compared: one slow step, or two, change nothing
WINDOW = 5
FACTOR = 2.0
# an episode ends below this factor, so that one at the limit is told once
RECOVERED = 1.5


class Slowdown(NamedTuple):
    """The begin of an episode of slow steps."""

    step_s: float
    """Seconds of a step now: the median of the latest periods."""
    best_s: float
    """The same at its best in this process."""
    others: float | None
    """Cores that other processes used meanwhile; None where that is not known."""


class SlowSteps:
    """Compares how long steps take with the best of this process.

    `others` is called at the end of each period and returns the cores that other processes used since its
    last call, or None.
    """

    def __init__(self, others: Callable[[], float | None]) -> None:
        self.others, self.best_s, self.is_slow = others, math.inf, False
        self._steps: list[float] = []
        self._periods: deque[tuple[float, float | None]] = deque(maxlen=WINDOW)

    def add(self, seconds: float) -> Slowdown | None:
        """Add the time of a step; return a Slowdown if an episode of slow steps begins."""
        self._steps.append(seconds)
        if sum(self._steps) < PERIOD_S:
            return None
        self._periods.append((statistics.fmean(self._steps), self.others()))
        self._steps.clear()
        if len(self._periods) < WINDOW:
            return None
        times, loads = zip(*self._periods, strict=True)
        now, was_slow = statistics.median(times), self.is_slow
        self.best_s = min(self.best_s, now)
        self.is_slow = now > self.best_s * (RECOVERED if was_slow else FACTOR)
        if was_slow or not self.is_slow:
            return None
        known = [load for load in loads if load is not None]
        return Slowdown(now, self.best_s, statistics.median(known) if known else None)


def warning(slow: Slowdown, step: int, device: str, n_cores: int, n_threads: int) -> str:
    """Return the line about a slowdown at `step`, with how to go on quicker."""
    factor = slow.step_s / slow.best_s
    times = f"{factor:.1f} times as long as at best, {slow.step_s:.3g} s for {slow.best_s:.3g} s"
    line = f"Step {step:,}: steps take {times}."
    if device == "cuda":
        return f"{line} nvidia-smi shows whether other programs use the GPU, and whether it is hot."
    if slow.others is None:
        return f"{line} Look whether other programs use the machine, and end them."
    line += f" Other processes use {slow.others:.1f} of {n_cores} cores"
    if slow.others < 0.5:
        return f"{line}: look whether the machine swaps, is hot or runs on battery."
    line += ": end them to go on quicker."
    if n_threads == 1:
        return line
    kept = f"this run keeps its {n_threads} threads, so that a resume is bit for bit"
    return f"{line} If they are to stay, start a new run with OMP_NUM_THREADS=1; {kept}."
