"""Means over seeds, the interval of a difference, where a curve crosses a loss: pure functions."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# two-sided 95% points of Student's t by degrees of freedom, from 1 on; any table of the distribution has them
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_95 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


@dataclass(frozen=True)
class Spread:
    """The mean of n values and their standard deviation, None for one value."""

    mean: float
    sd: float | None
    n: int

    def __str__(self) -> str:
        """Return the mean, the deviation and n as a table shows them."""
        return f"{self.mean:.4f}" + (f" ± {self.sd:.4f}" if self.sd is not None else "") + f" (n = {self.n})"


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its 95% interval, None for one pair."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval is there and does not hold 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        """Return the mean, the interval and n as a table shows them."""
        if self.low is None:
            return f"{self.mean:+.4f} (n = 1: no interval)"
        return f"{self.mean:+.4f} (95%: {self.low:+.4f} to {self.high:+.4f}, n = {self.n})"


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and the sample standard deviation of one or more values."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd, len(values))


def t_95(degrees: int) -> float:
    """Return the two-sided 95% point of Student's t."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    # the first terms of its expansion around the normal distribution: right to 0.001 from here on
    z = 1.95996
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Return the mean of `values` - `others`, pair by pair, and its t interval.

    The pairs are seeds: both models of a pair saw the same batches, unless their batch sizes or data seeds
    differ.
    """
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Difference(mean, None, None, 1)
    half = t_95(n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def crossing(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Return how far a curve of (tokens, loss) is when it first gets to `loss`.

    Between two points the loss is taken as a straight line over the logarithm of the tokens. None if the
    curve never gets there, or is there before its first point.
    """
    before: tuple[float, float] | None = None
    for tokens, value in curve:
        if value <= loss:
            if before is None:
                return tokens if value == loss else None
            share = (before[1] - loss) / (before[1] - value)
            return math.exp(math.log(before[0]) + share * (math.log(tokens) - math.log(before[0])))
        before = tokens, value
    return None
