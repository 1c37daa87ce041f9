"""The guard of a run: which loss is not a number, and which is suddenly far above the ones before it."""

import math
import statistics
from typing import Any, NamedTuple


class Spike(NamedTuple):
    """The losses before a step whose own loss is far above them."""

    mean: float
    sigma: float


class Guard:
    """Finds steps whose loss or gradient is not finite, or whose loss is far above those before."""

    # a loss is compared with the 128 before it, as OLMo-core's SkipStepOptimizer does, once there are 32
    WINDOW, FEWEST = 128, 32

    def __init__(self, spike_sigma: float) -> None:
        self.spike_sigma = spike_sigma
        self.n_skipped = self.n_in_a_row = 0
        self.losses: list[float] = []

    def count_bad(self, loss: float, norm: float) -> bool:
        """Count a step; return whether it is bad, its loss or gradient not finite, and must be skipped."""
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self.n_in_a_row = self.n_in_a_row + 1 if bad else 0
        self.n_skipped += bad
        return bad

    def add_loss(self, loss: float) -> Spike | None:
        """Remember a loss; return the mean and standard deviation before it, if it is a spike."""
        before, found = self.losses, None
        if self.spike_sigma and len(before) >= self.FEWEST:
            mean, sigma = statistics.fmean(before), statistics.pstdev(before)
            # 1e-6: equal losses, as of a model that does not learn, have no deviation at all
            found = Spike(mean, sigma) if loss > mean + self.spike_sigma * max(sigma, 1e-6) else None
        self.losses = [*before, loss][-self.WINDOW :]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and losses, for a checkpoint."""
        return {"n_skipped": self.n_skipped, "n_in_a_row": self.n_in_a_row, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the counts and losses of a checkpoint."""
        self.n_skipped, self.n_in_a_row = state["n_skipped"], state["n_in_a_row"]
        self.losses = state["losses"]
