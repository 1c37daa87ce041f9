"""Measure the tokens a second of several models side by side: short real runs in turn, on an idle machine."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from litgpt_moe.cli import note
from litgpt_moe.comparison.contestants import Contestant, nameless, that_matter
from litgpt_moe.comparison.processes import check_ended
from litgpt_moe.comparison.runs import SPEED_LOG, RunSpec
from litgpt_moe.comparison.train import Trainer
from litgpt_moe.files import remove
from litgpt_moe.report.read import METRICS, read_metrics

ROUNDS = 3
# rows of a run's log; the first, in which the machine warms up, is left out
N_ROWS = 6
# cores that other programs use, above which the figures are doubtful
BUSY = 0.3
# settings on which the time of a step does not depend
NO_MATTER = (
    "seed",
    "train.max_tokens",
    "train.min_lr",
    "train.lr_warmup",
    "schedule.",
    "optimizer.init_args.lr",
)


@dataclass(frozen=True)
class Speeds:
    """The tokens a second of models that were measured side by side."""

    tokens_per_s: dict[str, float]
    """By the names of the contestants; empty if nothing was measured."""
    load: float | None = None
    """Cores that other programs used meanwhile."""


def measure(trainer: Trainer, contestants: list[Contestant]) -> Speeds:
    """Measure the contestants in turn, append the row to the file, and return their speeds."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    loads: list[float] = []
    for n in range(ROUNDS):
        # every second round in reverse order, so that a drift of the machine affects all alike
        for contestant in contestants if n % 2 == 0 else contestants[::-1]:
            rate, load = _measure(trainer, contestant)
            rates[contestant.name].append(rate)
            loads += [] if load is None else [load]
            note(f"{contestant.name}: {rate:,.0f} tokens/s")
    load = round(statistics.fmean(loads), 2) if loads else None
    if load is not None and load > BUSY:
        note(f"Warning: other programs used {load:.1f} cores meanwhile; measure again when they have ended.")
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    row = {
        "kind": "speed",
        "name": ", ".join(rates),
        "model": {},
        "settings": {},
        "models": [_identity(trainer, contestant) for contestant in contestants],
        "rates": [[round(rate, 1) for rate in values] for values in rates.values()],
        "tokens_per_s": list(medians.values()),
        "load_of_others": load,
        **trainer.record(),
    }
    trainer.file.append(row)
    return Speeds(medians, load)


def known_speeds(trainer: Trainer, contestants: list[Contestant]) -> Speeds:
    """Return the newest speeds in the file that were measured side by side of all of them on this machine."""
    wanted = {contestant.name: _identity(trainer, contestant) for contestant in contestants}
    found = Speeds({})
    for row in trainer.file.rows():
        if row["kind"] != "speed" or not trainer.facts.is_this_machine(row.get("machine", {})):
            continue
        rates = list(zip(row["models"], row["tokens_per_s"], strict=True))
        by_name = {name: rate for name, own in wanted.items() for model, rate in rates if model == own}
        if len(by_name) == len(wanted):
            found = Speeds(by_name, row["load_of_others"])
    return found


def _identity(trainer: Trainer, contestant: Contestant) -> dict[str, Any]:
    """Return what a contestant's speed depends on."""
    spec = _spec(trainer, contestant)
    settings = that_matter(spec.settings, bool(contestant.config.n_expert))
    kept = {key: value for key, value in settings.items() if not key.startswith(NO_MATTER)}
    return {"model": nameless(contestant.config), "settings": kept}


def _spec(trainer: Trainer, contestant: Contestant) -> RunSpec:
    tokens = N_ROWS * SPEED_LOG * contestant.tokens_per_step
    return RunSpec(contestant, trainer.place.first_seed, tokens, contestant.own_rate, "speed")


def _measure(trainer: Trainer, contestant: Contestant) -> tuple[float, float | None]:
    """Return the tokens a second of a short run, and the cores that others used meanwhile."""
    spec = _spec(trainer, contestant)
    folder = trainer.folder(spec)
    remove(folder)
    outcome, log = trainer.train(spec, low_priority=False)
    check_ended(outcome, f"measuring {contestant.name}", log)
    rates = read_metrics(folder / METRICS)[0]["rate"][1:]
    remove(folder)
    # equal tokens in each row: the mean over time is the harmonic one
    return len(rates) / float(np.sum(1 / rates)), outcome.others
