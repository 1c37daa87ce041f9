"""A whole comparison: speeds, learning rates, runs, and after each run the files that say what is known."""

from dataclasses import dataclass
from typing import Any

from litgpt_moe.comparison.contestants import Contestant
from litgpt_moe.comparison.result import Entry, table, verdicts
from litgpt_moe.comparison.runs import RunSpec
from litgpt_moe.comparison.settings import CompareSettings
from litgpt_moe.comparison.speed import Speeds, known_speeds, measure
from litgpt_moe.comparison.sweep import Sweep, sweep_all
from litgpt_moe.comparison.train import Trainer
from litgpt_moe.files import write_json, write_whole
from litgpt_moe.report.comparison import comparison_page, curve_chart


@dataclass(frozen=True)
class Budget:
    """How much each model trains."""

    match: str
    amount: float
    """Tokens, FLOPs or seconds, by `match`."""

    def tokens(self, contestant: Contestant, tokens_per_s: float | None) -> int:
        """Return the tokens of the whole steps that a model can do."""
        if self.match == "tokens":
            return contestant.whole_steps(self.amount)
        if self.match == "flops":
            return contestant.whole_steps(self.amount / contestant.facts.flops_per_token)
        assert tokens_per_s is not None  # it was measured
        return contestant.whole_steps(self.amount * tokens_per_s)


def budget_of(
    settings: CompareSettings, amount: float | None, first: Contestant, speeds: dict[str, float]
) -> Budget:
    """Return the budget: the amount itself, or what the first model takes for --budget_of_first tokens."""
    if amount is not None:
        return Budget(settings.match, amount)
    tokens = first.whole_steps(settings.budget_of_first or 0)
    # a thousandth of a step more, so that rounding does not cost the last step
    tokens += first.tokens_per_step / 1000
    if settings.match == "flops":
        return Budget("flops", tokens * first.facts.flops_per_token)
    if settings.match == "seconds":
        return Budget("seconds", tokens / speeds[first.name])
    return Budget("tokens", tokens)


@dataclass
class Comparison:
    """One comparison under way; its files are written anew after each run."""

    settings: CompareSettings
    trainer: Trainer
    contestants: list[Contestant]
    speeds: Speeds
    budget: Budget
    rates: dict[str, float]
    sweeps: list[Sweep]

    def entries(self) -> list[Entry]:
        """Return each model with the runs of it that have finished."""
        return [
            Entry(
                contestant,
                {spec.seed: row for spec in self.specs(contestant) if (row := self._row(spec))},
                self.rates[contestant.name],
                self.tokens(contestant),
                self.speeds.tokens_per_s.get(contestant.name),
            )
            for contestant in self.contestants
        ]

    def _row(self, spec: RunSpec) -> dict[str, Any] | None:
        return self.trainer.file.find(spec.identity(self.trainer.facts.fingerprint))

    def tokens(self, contestant: Contestant) -> int:
        """Return how many tokens a model trains on."""
        return self.budget.tokens(contestant, self.speeds.tokens_per_s.get(contestant.name))

    def specs(self, contestant: Contestant) -> list[RunSpec]:
        """Return a model's runs, by their seeds."""
        seeds = range(self.settings.first_seed, self.settings.first_seed + self.settings.seeds)
        tokens, rate = self.tokens(contestant), self.rates[contestant.name]
        return [RunSpec(contestant, seed, tokens, rate) for seed in seeds]

    def run(self) -> str:
        """Make all runs, seed by seed, and return the figures as text."""
        specs = [spec for specs in zip(*map(self.specs, self.contestants), strict=True) for spec in specs]
        self.trainer.make_all(specs, lambda *_: self.write())
        return self.write()

    def write(self) -> str:
        """Write comparison.json and comparison.html, and return the same as text."""
        entries = self.entries()
        found = verdicts(entries)
        content = {
            "match": self.budget.match,
            "budget": self.budget.amount,
            "seeds": self.settings.seeds,
            "first_seed": self.settings.first_seed,
            **self.trainer.record(),
            "load_of_others_while_measured": self.speeds.load,
            "models": [entry.as_json() for entry in entries],
            "verdicts": [one.as_json() for one in found],
            "sweeps": [one.as_json() for one in self.sweeps],
            "missing": sum(self.settings.seeds - len(entry.rows) for entry in entries),
        }
        write_json(self.settings.out / "comparison.json", content)
        write_whole(self.settings.out / "comparison.html", comparison_page(content))
        write_whole(self.settings.out / "comparison.svg", curve_chart(content["models"], "tokens"))
        return table(entries, found)


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
    # first, while the machine is still idle
    speeds = Speeds({}) if settings.measure_again else known_speeds(trainer, contestants)
    is_needed = settings.measure or settings.match == "seconds"
    if settings.measure_again or (is_needed and not speeds.tokens_per_s):
        speeds = measure(trainer, contestants)
    budget = budget_of(settings, amount, contestants[0], speeds.tokens_per_s)
    if rate is not None:
        rates = {contestant.name: rate for contestant in contestants}
        return Comparison(settings, trainer, contestants, speeds, budget, rates, [])
    of_first = budget.tokens(contestants[0], speeds.tokens_per_s.get(contestants[0].name))
    tokens = settings.sweep_tokens or of_first / 10
    sweeps = sweep_all(trainer, contestants, settings, tokens)
    rates = {one.name: one.best for one in sweeps}
    return Comparison(settings, trainer, contestants, speeds, budget, rates, sweeps)
