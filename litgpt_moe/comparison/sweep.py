"""Find a model's learning rate: short runs with rates in a geometric grid, and the best of them."""

import math
from dataclasses import dataclass
from typing import Any

from litgpt_moe.cli import note
from litgpt_moe.comparison.contestants import Contestant
from litgpt_moe.comparison.runs import RunSpec
from litgpt_moe.comparison.settings import FindSettings
from litgpt_moe.comparison.train import Trainer

# rates beyond the grid, while the best is at its edge
MORE = 4


@dataclass(frozen=True)
class Sweep:
    """The losses of a model by learning rate, after the same tokens and with the same seed."""

    name: str
    tokens: int
    losses: dict[float, float]
    """On the whole validation split; infinite where training diverged."""

    @property
    def best(self) -> float:
        """The rate of the lowest loss."""
        return min(self.losses, key=lambda rate: self.losses[rate])

    @property
    def is_inside(self) -> bool:
        """Whether lower and higher rates than the best were tried."""
        return min(self.losses) < self.best < max(self.losses)

    def as_json(self) -> dict[str, Any]:
        """Return what comparison.json has of it; the loss is null where training diverged."""
        losses = {str(rate): loss if math.isfinite(loss) else None for rate, loss in self.losses.items()}
        return {"name": self.name, "tokens": self.tokens, "losses": losses, "best": self.best}

    def __str__(self) -> str:
        """Return the rates and losses in a line."""
        pairs = ", ".join(f"{rate:g}: {self.losses[rate]:.4f}" for rate in sorted(self.losses))
        edge = "" if self.is_inside else "; it is at the edge of the grid"
        return f"{self.name}, {self.tokens:,} tokens at each rate: {pairs}; best {self.best:g}{edge}"


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


def sweep_all(
    trainer: Trainer, contestants: list[Contestant], settings: FindSettings, tokens: float
) -> list[Sweep]:
    """Train each model for `tokens` with each rate of the grid, and beyond it where the best is there.

    Raises ValueError for a model that diverges with every rate.
    """
    # one after another, so that each says at once what was found, unless several runs are made at once
    groups = [contestants] if settings.at_once > 1 else [[each] for each in contestants]
    return [one for group in groups for one in _sweep_group(trainer, group, settings, tokens)]


def _sweep_group(
    trainer: Trainer, contestants: list[Contestant], settings: FindSettings, tokens: float
) -> list[Sweep]:
    losses: dict[str, dict[float, float]] = {contestant.name: {} for contestant in contestants}

    def spec(contestant: Contestant, rate: float) -> RunSpec:
        n_tokens = contestant.whole_steps(tokens)
        return RunSpec(contestant, trainer.place.first_seed, n_tokens, rate, "sweep")

    def take(spec: RunSpec, row: dict[str, Any]) -> None:
        losses[spec.contestant.name][spec.lr] = row.get("loss", math.inf)

    wanted = [spec(contestant, rate) for contestant in contestants for rate in grid(settings)]
    for _ in range(1 + MORE):
        if not wanted:
            break
        trainer.make_all(wanted, take)
        edges = [(each, beyond(losses[each.name], settings.lr_factor)) for each in contestants]
        wanted = [spec(each, rate) for each, rate in edges if rate is not None]
    return [_finish(each.name, each.whole_steps(tokens), losses[each.name]) for each in contestants]


def _finish(name: str, tokens: int, losses: dict[float, float]) -> Sweep:
    found = Sweep(name, tokens, losses)
    note(str(found))
    if not math.isfinite(losses[found.best]):
        raise ValueError(f"{name} diverges with every rate from {min(losses):g} on; lower --lr_first")
    return found
