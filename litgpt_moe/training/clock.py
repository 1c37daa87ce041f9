"""The time of a run whose learning rate follows the clock: how much is used, and whether a step fits."""

from typing import TYPE_CHECKING, NamedTuple

from litgpt_moe.training.settings import Settings

if TYPE_CHECKING:
    from litgpt_moe.training.resume import OpenCheckpoint

# a step may take longer than the longest so far
CAUTION = 1.5


class UsedTime(NamedTuple):
    """The time that a run has used up to a checkpoint."""

    seconds: float = 0.0
    """Of all its commands, from their starts."""
    share: float = 0.0
    """Share of its time for steps; 1 where the run has ended for it."""


NO_TIME = UsedTime()


class TimeBudget:
    """The time of one run, over all commands that go on from each other; `train.max_time` is its limit.

    Where the learning rate follows the tokens alone there is no limit, and the time is only counted.
    """

    def __init__(self, settings: Settings, began: float, before: UsedTime) -> None:
        """Count from `began`, the start of this command on its clock."""
        is_timed = settings.schedule.progress == "time"
        self.limit_s = settings.train.max_time if is_timed else None
        self.began, self.before = began, before
        self.longest_step_s = 0.0
        """Of the steps of this command but the first, which prepares much."""
        self._share, self._n_steps = before.share, 0

    @property
    def is_up(self) -> bool:
        """Whether no other step fits in."""
        return self.limit_s is not None and self._share >= 1

    def used_s(self, now: float) -> float:
        """Return the seconds used so far."""
        return self.before.seconds + now - self.began

    def left_s(self, now: float) -> float | None:
        """Return the seconds that are left, None without a limit."""
        return None if self.limit_s is None else max(0.0, self.limit_s - self.used_s(now))

    def end_step(self, step_s: float) -> None:
        """Note that a step has taken `step_s`."""
        if self._n_steps:
            self.longest_step_s = max(self.longest_step_s, step_s)
        self._n_steps += 1

    def share(self, now: float, last_s: float, next_s: float = 0.0) -> float:
        """Return how much of the time for steps is over, 0 without a limit.

        `last_s` is for what comes after the steps, the last validation and save; `next_s` for a validation
        before the next step. The share is 1 where no other step fits in, and it never falls, while these are
        known better and better.
        """
        if self.limit_s is None:
            return 0.0
        used_s, for_steps_s = self.used_s(now), self.limit_s - last_s - CAUTION * self.longest_step_s
        if used_s + next_s >= for_steps_s:
            return 1.0
        return max(self._share, used_s / for_steps_s)

    def settle(self, share: float) -> float | None:
        """Take the mean share of all processes as that of this step; return it, None without a limit."""
        self._share = max(self._share, share)
        return None if self.limit_s is None else self._share

    def state_dict(self, now: float) -> dict[str, float]:
        """Return what a resumed run needs."""
        return {"used_s": self.used_s(now), "share": self._share}


def used_time(opened: "OpenCheckpoint", settings: Settings) -> UsedTime:
    """Return the time that a run has used up to a checkpoint; ValueError if it has used more than it has now.

    Its share counts only for the same limit.
    """
    state, limit_s = opened.state.get("run", {}), settings.train.max_time
    # an earlier version recorded the time of training alone
    budget = state.get("budget") or {"used_s": state.get("time_s", 0.0), "share": 0.0}
    used_s, before_s = budget["used_s"], opened.settings.get("train.max_time")
    if settings.schedule.progress != "time" or limit_s is None:
        return UsedTime(used_s)
    if opened.settings.get("schedule.progress") == "time" and before_s == limit_s:
        return UsedTime(used_s, budget["share"])
    if used_s >= limit_s:
        raise ValueError(
            f"{opened.folder} is past the end of the run: it has used {used_s:,.0f} s, "
            f"and train.max_time is {limit_s:g}; raise that"
        )
    return UsedTime(used_s)
