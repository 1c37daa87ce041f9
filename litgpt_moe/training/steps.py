"""What is decided at each optimizer step: whether it counts, and whether the run goes on. Needs no LitGPT."""

import os
import signal
import threading
from types import FrameType
from typing import Any, NamedTuple, Self

from litgpt_moe.cli import WorkFailed
from litgpt_moe.training.guard import Guard, Spike
from litgpt_moe.training.settings import Settings


class Ending(Exception):
    """Raised between two steps, when everything is saved, to leave LitGPT's loop."""


class RunFailed(WorkFailed):
    """The run cannot go on; the text says why and what to do."""


class StopSignals:
    """While active: the first signal asks for an end after this step, a second one leaves at once."""

    # Ctrl-C, Slurm and systemd, Slurm, Ctrl-Break
    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")

    def __init__(self) -> None:
        self.reason = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in self.NAMES:
            if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.reason:
            # checkpoints are renamed when they are whole: there is nothing to break
            os._exit(128 + number)
        self.reason = signal.Signals(number).name
        text = f"\n{self.reason}: finishing this step and saving; once more leaves at once.\n"
        # not print, which the signal may have interrupted
        os.write(2, text.encode())


class Verdict(NamedTuple):
    """What becomes of a step; every rank comes to the same."""

    fail: str = ""
    """Why the run ends at once, with what was saved before."""
    end: str = ""
    """Why the run ends after this step: it saves, and can go on later."""
    skip: bool = False
    """The loss or gradient is not finite: the weights must stay as they are."""
    give_up: bool = False
    """So many steps in a row were skipped that the run fails."""
    spike: Spike | None = None


class Judge:
    """Decides what becomes of each step, from its figures and from what asks the run to end."""

    def __init__(self, settings: Settings, began: float, stops: StopSignals, world_size: int) -> None:
        self.settings, self.began, self.stops, self.world_size = settings, began, stops, world_size
        self.guard = Guard(settings.guard.spike_sigma)

    def vote(self, now: float, step_s: float, save_s: float, failed_save: str | None) -> int:
        """Return this rank's vote for the end of the run; `verdict` takes the sum over all ranks.

        `now` is on the clock of `began`; the longest step took `step_s` seconds, a save takes `save_s`;
        `failed_save` says why the latest save failed.
        """
        # weights that are not finite cannot be saved later either
        must_save = self.settings.checkpoints.on_full_disk == "stop"
        if failed_save is not None and (must_save or "no numbers" in failed_save):
            # more than all ranks that ask for an end
            return self.world_size + 1
        limit_s = self.settings.train.max_time
        # half a step more: the longest so far need not be the longest there is
        ends_at = now - self.began + 1.5 * step_s + save_s
        if limit_s is not None and ends_at >= limit_s and not self.stops.reason:
            self.stops.reason = f"train.max_time of {limit_s:g} s"
        return int(bool(self.stops.reason))

    def verdict(self, loss: float, norm: float, votes: int, failed_save: str | None) -> Verdict:
        """Return what becomes of the step with this loss and gradient norm, which the guard remembers."""
        if votes > self.world_size:
            reason = failed_save or "another process could not save"
            return Verdict(fail=f"{reason}; continue with --resume auto")
        end = (self.stops.reason or "the request of another process") if votes else ""
        if self.guard.count_bad(loss, norm):
            give_up = self.guard.n_in_a_row >= self.settings.guard.max_skipped_steps
            return Verdict(end=end, skip=True, give_up=give_up)
        return Verdict(end=end, spike=self.guard.add_loss(loss))
