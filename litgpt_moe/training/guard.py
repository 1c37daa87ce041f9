"""The guard of a run: finds losses that are not finite, and loss spikes."""

import math
import statistics
from typing import Any, NamedTuple


class Spike(NamedTuple):
    """Mean and standard deviation of the losses before a step whose loss is far above them."""

    mean: float
    sigma: float


class Guard:
    """Finds steps whose loss or gradient is not finite, or whose loss is far above those before it."""

    # a loss is compared with the 128 losses before it (OLMo-core's SkipStepOptimizer), once there are 32
    WINDOW, FEWEST = 128, 32

    def __init__(self, spike_sigma: float) -> None:
        self.spike_sigma = spike_sigma
        self.n_skipped = self.n_in_a_row = 0
        self.losses: list[float] = []

    def count_bad(self, loss: float, norm: float) -> bool:
        """Return whether a step must be skipped because its loss or gradient is not finite; count it."""
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self.n_in_a_row = self.n_in_a_row + 1 if bad else 0
        self.n_skipped += bad
        return bad

    def add_loss(self, loss: float) -> Spike | None:
        """Remember a loss; return the mean and standard deviation before it, if it is a spike."""
        before, found = self.losses, None
        if self.spike_sigma and len(before) >= self.FEWEST:
            mean, sigma = statistics.fmean(before), statistics.pstdev(before)
            # 1e-6: equal losses, as those of a model that does not learn, have a deviation of 0
            found = Spike(mean, sigma) if loss > mean + self.spike_sigma * max(sigma, 1e-6) else None
        self.losses = [*before, loss][-self.WINDOW :]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and losses, for a checkpoint."""
        return {"n_skipped": self.n_skipped, "n_in_a_row": self.n_in_a_row, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts and losses of a checkpoint."""
        self.n_skipped, self.n_in_a_row = state["n_skipped"], state["n_in_a_row"]
        self.losses = state["losses"]
