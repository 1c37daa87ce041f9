"""Measure the tokens a second of several models side by side: short real runs in turn, on an idle machine."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_moe.cli import WARNING, note
from litgpt_moe.comparison.contestants import Contestant
from litgpt_moe.comparison.identity import for_speed, nameless, same_settings
from litgpt_moe.comparison.processes import check_ended
from litgpt_moe.comparison.runs import SPEED_LOG, RunSpec
from litgpt_moe.comparison.train import Trainer
from litgpt_moe.files import fits, read_json, remove, write_json
from litgpt_moe.report.read import METRICS, read_metrics

# odd, so that a median is a measured value
ROUNDS = 5
# rows of a run's log; the first, in which the machine warms up, is left out
N_ROWS = 6
# cores that other programs use, above which the figures are doubtful
BUSY = 0.3
# the row of the speeds by which a comparison at equal seconds began, in its folder
PIN = "speeds.json"
ROW_FORM: dict[str, Any] = {"models": [{"model": {}, "settings": {}}], "rates": [[0.0]], "machine": {}}


@dataclass(frozen=True)
class Speeds:
    """The tokens a second of models that were measured side by side."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    """Each round's tokens a second, by the names of the contestants; empty if nothing was measured.

    In a round the models ran right after one another.
    """
    row: dict[str, Any] = field(default_factory=dict)
    """The row of the file."""
    is_reused: bool = False
    """Whether they were measured before this command."""

    @property
    def tokens_per_s(self) -> dict[str, float]:
        """The medians of the rounds."""
        return {name: round(statistics.median(rates), 1) for name, rates in self.rounds.items()}

    @property
    def load(self) -> float | None:
        """Cores that other programs used meanwhile."""
        load = self.row.get("load_of_others")
        return load if isinstance(load, float) else None

    @property
    def origin(self) -> str:
        """When, by which code and beside what they were measured."""
        date, commit = str(self.row.get("time"))[:10], str(self.row.get("commit"))[:7]
        load = "an unknown number of" if self.load is None else f"{self.load:g}"
        return f"of {date} at commit {commit}, while other programs used {load} cores,"

    def as_json(self) -> dict[str, Any]:
        """Return what comparison.json has of them."""
        facts = {key: self.row.get(key) for key in ("time", "commit", "is_clean", "machine")}
        return {"rounds": self.rounds, "load_of_others": self.load, "is_reused": self.is_reused, **facts}


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
        note(f"{WARNING} other programs used {load:.1f} cores meanwhile; measure again when they have ended.")
    row = {
        "kind": "speed",
        "name": ", ".join(rates),
        "model": {},
        "settings": {},
        "models": [_identity(trainer, contestant) for contestant in contestants],
        "rates": [[round(rate, 1) for rate in values] for values in rates.values()],
        "tokens_per_s": [round(statistics.median(values), 1) for values in rates.values()],
        "load_of_others": load,
        **trainer.record(),
    }
    trainer.file.append(row)
    return Speeds(dict(zip(rates, row["rates"], strict=True)), row)


def known_speeds(trainer: Trainer, contestants: list[Contestant], is_for_budget: bool) -> Speeds:
    """Return the newest speeds that were measured side by side of all models on a machine like this one.

    For a budget in seconds those that this comparison began with come first: with others its finished runs
    would be runs of another budget. Others that were measured on a busy machine are not taken for it.
    """
    wanted = {contestant.name: _identity(trainer, contestant) for contestant in contestants}
    pin = trainer.place.out / PIN
    if is_for_budget and (pinned := _pinned(pin, wanted)) is not None:
        note(f"The speeds in {pin} {pinned.origin} are kept; --measure_again measures anew.")
        return pinned
    newest = Speeds()
    for row in trainer.file.rows():
        is_speed = row["kind"] == "speed" and trainer.facts.is_this_machine(row.get("machine") or {})
        newest = (_of_row(row, wanted) if is_speed else None) or newest
    if not newest.tokens_per_s:
        return newest
    if is_for_budget and newest.load is not None and newest.load > BUSY:
        note(f"The measured speeds {newest.origin} are not taken for a budget in seconds: it needs new ones.")
        return Speeds()
    like = "on this machine or one like it"  # nothing that would tell them apart is recorded
    note(f"Measured speeds {newest.origin} {like}, are reused; --measure_again measures anew.")
    return newest


def pin_speeds(speeds: Speeds, out: Path) -> None:
    """Keep the speeds by which a comparison at equal seconds begins."""
    write_json(out / PIN, speeds.row)


def _pinned(pin: Path, wanted: dict[str, dict[str, Any]]) -> Speeds | None:
    if not (row := read_json(pin)):
        return None
    if (found := _of_row(row, wanted)) is None:
        note(f"{WARNING} {pin} does not have all these models as they are now; it will be written anew.")
    return found


def _of_row(row: dict[str, Any], wanted: dict[str, dict[str, Any]]) -> Speeds | None:
    """Return the speeds in a row, None if it does not have all the models, whose identities are `wanted`."""
    if not fits(row, ROW_FORM) or len(row["models"]) != len(row["rates"]) or not all(row["rates"]):
        return None
    rounds = {}
    for name, own in wanted.items():
        for was, rates in zip(row["models"], row["rates"], strict=True):
            if was["model"] == own["model"] and same_settings(was["settings"], own["settings"]):
                rounds[name] = rates
    if len(rounds) < len(wanted):
        return None
    return Speeds(rounds, row, is_reused=True)


def _identity(trainer: Trainer, contestant: Contestant) -> dict[str, Any]:
    """Return what a contestant's speed depends on."""
    spec = _spec(trainer, contestant)
    settings = for_speed(spec.settings, bool(contestant.config.n_expert))
    return {"model": nameless(contestant.config), "settings": settings}


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
