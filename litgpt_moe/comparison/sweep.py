"""Find a model's learning rate: short runs with rates in a geometric grid, and the best of them."""

import math
from dataclasses import dataclass
from typing import Any

from litgpt_moe.cli import WARNING, note
from litgpt_moe.comparison.contestants import Contestant
from litgpt_moe.comparison.runs import RunSpec
from litgpt_moe.comparison.settings import FindSettings
from litgpt_moe.comparison.train import Trainer

# rates beyond the grid, while the best is at its edge
MORE = 4
# steps below which a warm-up of a tenth and a decay leave little to tell rates apart by
FEW_STEPS = 50
SWEEP_FLAG = "--sweep_tokens (unless given, a tenth of the budget, or for find_lr.py of the training data)"


@dataclass(frozen=True)
class Sweep:
    """The losses of a model by learning rate, after the same tokens and with the same seed."""

    name: str
    tokens: int
    losses: dict[float, float]
    """On the whole validation split; infinite where training diverged."""
    failed: str | None = None
    """Why there is no best rate: training diverged with each, or a run went wrong in another way."""

    @property
    def best(self) -> float:
        """The rate of the lowest loss."""
        return min(self.losses, key=lambda rate: self.losses[rate])

    @property
    def is_at_edge(self) -> bool:
        """Whether no lower, or no higher, rate than the best was tried."""
        return self.failed is None and not min(self.losses) < self.best < max(self.losses)

    def as_json(self) -> dict[str, Any]:
        """Return what comparison.json has of it; the loss is null where training diverged."""
        losses = {str(rate): loss if math.isfinite(loss) else None for rate, loss in self.losses.items()}
        best = None if self.failed is not None else self.best
        found = {"best": best, "is_at_edge": self.is_at_edge, "failed": self.failed}
        return {"name": self.name, "tokens": self.tokens, "losses": losses, **found}

    def __str__(self) -> str:
        """Return the rates and losses in a line."""
        pairs = ", ".join(f"{rate:g}: {self.losses[rate]:.4f}" for rate in sorted(self.losses))
        text = f"{self.name}, {self.tokens:,} tokens at each rate: {pairs}"
        if self.failed is not None:
            return f"{text}; {self.failed}"
        return f"{text}; best {self.best:g}{'; it is at the edge of the grid' if self.is_at_edge else ''}"


def grid(settings: FindSettings) -> list[float]:
    """Return the learning rates to begin with, with three digits."""
    return [rounded(settings.lr_first * settings.lr_factor**i) for i in range(settings.lr_count)]


def rounded(rate: float) -> float:
    """Return a rate with three digits, so that it is the same number in a command, a file and a name."""
    return float(f"{rate:.3g}")


def beyond(losses: dict[float, float], factor: float) -> float | None:
    """Return the next rate to try, beyond the end at which the best one is; None if it is inside."""
    best = min(losses, key=lambda rate: losses[rate])
    if not math.isfinite(losses[best]) or best == min(losses):
        return rounded(min(losses) / factor)
    return rounded(best * factor) if best == max(losses) else None


def rates_to_try(losses: dict[float, float], settings: FindSettings) -> list[float]:
    """Return the rates that are still to be tried, given the losses so far; empty when the sweep is done."""
    if missing := [rate for rate in grid(settings) if rate not in losses]:
        return missing
    edge = beyond(losses, settings.lr_factor)
    n_beyond = len(losses) - len({*grid(settings)})
    # a factor near 1 may round to a rate that was tried
    return [edge] if edge is not None and edge not in losses and n_beyond < MORE else []


def sweep_spec(contestant: Contestant, settings: FindSettings, tokens: float, rate: float) -> RunSpec:
    """Return the run of a sweep with one rate."""
    n_tokens = contestant.whole_steps(tokens, SWEEP_FLAG)
    return RunSpec(contestant, settings.first_seed, n_tokens, rate, "sweep")


def sweep_all(
    trainer: Trainer, contestants: list[Contestant], settings: FindSettings, tokens: float
) -> list[Sweep]:
    """Train each model for `tokens` with each rate of the grid, and beyond it where the best is there."""
    for contestant in contestants:
        n_steps = contestant.whole_steps(tokens, SWEEP_FLAG) // contestant.tokens_per_step
        if n_steps < FEW_STEPS:
            few = f"{n_steps} steps at each rate are few to find one by"
            note(f"{WARNING} {contestant.name}: {few}; raise --sweep_tokens.")
    # one after another, so that each says at once what was found, unless several runs are made at once
    groups = [contestants] if settings.at_once > 1 else [[each] for each in contestants]
    return [one for group in groups for one in _sweep_group(trainer, group, settings, tokens)]


def _sweep_group(
    trainer: Trainer, contestants: list[Contestant], settings: FindSettings, tokens: float
) -> list[Sweep]:
    losses: dict[str, dict[float, float]] = {contestant.name: {} for contestant in contestants}
    failed: dict[str, str] = {}

    def take(spec: RunSpec, row: dict[str, Any]) -> None:
        if row.get("again"):
            failed[spec.contestant.name] = f"the run with rate {spec.lr:g} went wrong: {row['failed']}"
        else:
            losses[spec.contestant.name][spec.lr] = row.get("loss", math.inf)

    def to_make() -> list[RunSpec]:
        going_on = [each for each in contestants if each.name not in failed]
        pairs = [(each, rate) for each in going_on for rate in rates_to_try(losses[each.name], settings)]
        return [sweep_spec(each, settings, tokens, rate) for each, rate in pairs]

    while wanted := to_make():
        trainer.make_all(wanted, take)
    return [_finish(each, tokens, losses[each.name], failed.get(each.name)) for each in contestants]


def _finish(contestant: Contestant, tokens: float, losses: dict[float, float], failed: str | None) -> Sweep:
    n_tokens = contestant.whole_steps(tokens, SWEEP_FLAG)
    if failed is None and not math.isfinite(min(losses.values())):
        failed = f"it diverges with every rate from {min(losses):g} on; lower --lr_first"
    found = Sweep(contestant.name, n_tokens, losses, failed)
    note(f"{WARNING} {found}" if failed else str(found))
    return found
