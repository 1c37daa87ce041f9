"""A whole comparison: speeds, learning rates, runs, and after each run the files that say what is known."""

from dataclasses import dataclass, field
from typing import Any

from litgpt_moe.cli import WARNING, note
from litgpt_moe.comparison.contestants import Contestant
from litgpt_moe.comparison.result import Entry, provenance, verdicts
from litgpt_moe.comparison.runs import RunSpec
from litgpt_moe.comparison.settings import CompareSettings
from litgpt_moe.comparison.speed import Speeds, known_speeds, measure, pin_speeds
from litgpt_moe.comparison.sweep import Sweep, sweep_all
from litgpt_moe.comparison.table import failures, table
from litgpt_moe.comparison.train import Trainer
from litgpt_moe.files import write_json, write_whole
from litgpt_moe.report.comparison import comparison_page, curve_chart


@dataclass(frozen=True)
class Budget:
    """How much each model trains."""

    match: str
    amount: float
    """Tokens, FLOPs or seconds, by `match`."""
    flag: str = "--budget"
    """What the user gave."""

    def tokens(self, contestant: Contestant, tokens_per_s: float | None) -> int:
        """Return the tokens of the whole steps that a model can do; ValueError if it can do none."""
        if self.match == "tokens":
            return contestant.whole_steps(self.amount, self.flag)
        if self.match == "flops":
            return contestant.whole_steps(self.amount / contestant.facts.flops_per_token, self.flag)
        assert tokens_per_s is not None  # it was measured
        return contestant.whole_steps(self.amount * tokens_per_s, self.flag)


def budget_of(
    settings: CompareSettings, amount: float | None, first: Contestant, speeds: dict[str, float]
) -> Budget:
    """Return the budget: the amount itself, or what the first model takes for --budget_of_first tokens."""
    if amount is not None:
        return Budget(settings.match, amount)
    flag = "--budget_of_first"
    tokens: float = first.whole_steps(settings.budget_of_first or 0, flag)
    # a thousandth of a step more, so that rounding does not cost the last step
    tokens += first.tokens_per_step / 1000
    if settings.match == "flops":
        return Budget("flops", tokens * first.facts.flops_per_token, flag)
    if settings.match == "seconds":
        return Budget("seconds", tokens / speeds[first.name], flag)
    return Budget("tokens", tokens, flag)


@dataclass
class Comparison:
    """One comparison under way; its files are written anew after each run."""

    settings: CompareSettings
    trainer: Trainer
    contestants: list[Contestant]
    speeds: Speeds
    budget: Budget
    rates: dict[str, float]
    """By the names of the contestants, without those for which no rate was found."""
    sweeps: list[Sweep]
    went_wrong: dict[tuple[str, int], str] = field(default_factory=dict)
    """Runs of this command that are not recorded, by name and seed: the same command tries them again."""

    def entries(self) -> list[Entry]:
        """Return each model with the runs of it that have finished."""
        return [self._entry(contestant) for contestant in self.contestants]

    def _entry(self, contestant: Contestant) -> Entry:
        name, rows, failed = contestant.name, {}, {}
        for spec in self.specs(contestant):
            row = self.trainer.standing(spec) or {}
            if "loss" in row:
                rows[spec.seed] = row
            elif reason := row.get("failed") or self.went_wrong.get((name, spec.seed)):
                failed[f"seed {spec.seed}"] = reason
        sweep = next((one for one in self.sweeps if one.name == name), None)
        if sweep is not None and sweep.failed is not None:
            failed["sweep"] = sweep.failed
        is_at_edge = sweep is not None and sweep.is_at_edge
        rounds = tuple(self.speeds.rounds.get(name, ()))
        rate, tokens = self.rates.get(name), self.tokens(contestant)
        return Entry(contestant, rows, rate, tokens, rounds, failed, is_at_edge)

    def tokens(self, contestant: Contestant) -> int:
        """Return how many tokens a model trains on."""
        return self.budget.tokens(contestant, self.speeds.tokens_per_s.get(contestant.name))

    def specs(self, contestant: Contestant) -> list[RunSpec]:
        """Return a model's runs, by their seeds; none without a learning rate."""
        if (rate := self.rates.get(contestant.name)) is None:
            return []
        seeds = range(self.settings.first_seed, self.settings.first_seed + self.settings.seeds)
        return [RunSpec(contestant, seed, self.tokens(contestant), rate) for seed in seeds]

    def run(self) -> str:
        """Make all runs, seed by seed, and return the figures as text."""
        every = [self.specs(contestant) for contestant in self.contestants]
        specs = [spec for specs in zip(*filter(None, every), strict=True) for spec in specs]

        def done(spec: RunSpec, row: dict[str, Any]) -> None:
            if row.get("again"):
                self.went_wrong[spec.contestant.name, spec.seed] = row["failed"]
            self.write()

        self.trainer.make_all(specs, done)
        return self.write()

    def failures(self) -> list[str]:
        """Return which models have a run, or a sweep, that failed."""
        return failures(self.entries())

    def warnings(self, entries: list[Entry]) -> list[str]:
        """Return what a reader must know of the figures."""
        by_name = {one.name: one for one in self.contestants}
        pairs = [(one, by_name[one.reference]) for one in self.contestants if one.reference]
        other = [unequal_batches(*pair) for pair in pairs if not pair[0].sees_batches_of(pair[1])]
        edges = [
            f"{WARNING} {entry.contestant.name}: the best rate, {entry.lr:g}, is at the edge of those that "
            "were tried; raise --lr_count, or move --lr_first."
            for entry in entries
            if entry.is_at_edge
        ]
        return [*other, *edges]

    def write(self) -> str:
        """Write comparison.json and comparison.html, and return the same as text."""
        entries, n_seeds = self.entries(), self.settings.seeds
        found, warnings = verdicts(entries, n_seeds), self.warnings(entries)
        content = {
            "match": self.budget.match,
            "budget": self.budget.amount,
            "seeds": n_seeds,
            "first_seed": self.settings.first_seed,
            **self.trainer.record(),
            "load_of_others_while_measured": self.speeds.load,
            "speeds": self.speeds.as_json() if self.speeds.rounds else None,
            "provenance": provenance(entries),
            "warnings": warnings,
            "models": [entry.as_json() for entry in entries],
            "verdicts": [one.as_json() for one in found],
            "sweeps": [one.as_json() for one in self.sweeps],
            "missing": sum(entry.n_missing(n_seeds) for entry in entries),
        }
        write_json(self.settings.out / "comparison.json", content)
        write_whole(self.settings.out / "comparison.html", comparison_page(content))
        write_whole(self.settings.out / "comparison.svg", curve_chart(content["models"], "tokens"))
        return table(entries, found, warnings)


def unequal_batches(one: Contestant, other: Contestant) -> str:
    """Return the warning about a pair that does not see the same batches."""
    sizes = [f"{each.tokens_per_step:,} in sequences of {each.block_size:,}" for each in (one, other)]
    differs = "data.init_args.seed or data.class_path"
    if sizes[0] != sizes[1]:
        differs = f"tokens of a step: {sizes[0]}, and {sizes[1]}"
    return (
        f"{WARNING} {one.name} and {other.name} do not see the same batches ({differs}), so pairing by seed "
        "removes less of the noise."
    )


def begin(
    settings: CompareSettings,
    trainer: Trainer,
    contestants: list[Contestant],
    amount: float | None,
    rate: float | None,
) -> Comparison:
    """Return the comparison with its speeds and learning rates; `rate` None: found by a sweep for each."""
    # refuses a wrong --at_once now, and not after the speeds are measured
    trainer.lanes(contestants)
    is_for_budget = settings.match == "seconds"
    # first, while the machine is still idle
    speeds = Speeds() if settings.measure_again else known_speeds(trainer, contestants, is_for_budget)
    is_needed = settings.measure or is_for_budget
    if settings.measure_again or (is_needed and not speeds.tokens_per_s):
        speeds = measure(trainer, contestants)
    if is_for_budget:
        pin_speeds(speeds, settings.out)
    budget = budget_of(settings, amount, contestants[0], speeds.tokens_per_s)
    comparison = Comparison(settings, trainer, contestants, speeds, budget, {}, [])
    tokens = [comparison.tokens(contestant) for contestant in contestants]
    for warning in comparison.warnings([]):
        note(warning)
    if rate is not None:
        comparison.rates = {contestant.name: rate for contestant in contestants}
        return comparison
    comparison.sweeps = sweep_all(trainer, contestants, settings, settings.sweep_tokens or tokens[0] / 10)
    comparison.rates = {one.name: one.best for one in comparison.sweeps if one.failed is None}
    return comparison
