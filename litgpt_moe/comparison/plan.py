"""What a comparison would do: its models, their tokens, and which of its runs stand in the file already."""

import math
from typing import Any

from litgpt_moe.comparison.compare import Comparison, budget_of
from litgpt_moe.comparison.contestants import Contestant
from litgpt_moe.comparison.runs import RunSpec
from litgpt_moe.comparison.settings import CompareSettings
from litgpt_moe.comparison.speed import Speeds, known_speeds
from litgpt_moe.comparison.sweep import rates_to_try, sweep_spec
from litgpt_moe.comparison.train import Trainer


def plan_text(
    settings: CompareSettings,
    trainer: Trainer,
    contestants: list[Contestant],
    amount: float | None,
    rate: float | None,
) -> str:
    """Return the plan as lines; nothing is measured, trained or written. `rate` None: by a sweep for each."""
    trainer.lanes(contestants)
    is_for_budget = settings.match == "seconds"
    speeds = Speeds() if settings.measure_again else known_speeds(trainer, contestants, is_for_budget)
    if is_for_budget and not speeds.rounds:
        return "\n".join(
            [*map(str, contestants), "Their tokens follow from their speeds, which are measured first."]
        )
    budget = budget_of(settings, amount, contestants[0], speeds.tokens_per_s)
    comparison = Comparison(settings, trainer, contestants, speeds, budget, {}, [])
    sweep_tokens = settings.sweep_tokens or comparison.tokens(contestants[0]) / 10
    lines = []
    for contestant in contestants:
        tokens = comparison.tokens(contestant)
        lines += [str(contestant), f"  {tokens:,} tokens, {tokens // contestant.tokens_per_step:,} steps"]
        found = rate
        if rate is None:
            sweep, found = _sweep(trainer, contestant, settings, sweep_tokens)
            lines += sweep
        if found is not None:
            comparison.rates[contestant.name] = found
            lines += [_line(spec, trainer.standing(spec)) for spec in comparison.specs(contestant)]
        else:
            lines.append(f"  {settings.seeds} runs with the best rate: to be trained, unless they stand")
    return "\n".join([*lines, *comparison.warnings([])])


def _sweep(
    trainer: Trainer, contestant: Contestant, settings: CompareSettings, tokens: float
) -> tuple[list[str], float | None]:
    """Return the lines on the runs of a sweep, and the best rate if all of them stand."""
    losses: dict[float, float] = {}
    lines: list[str] = []
    while rates := rates_to_try(losses, settings):
        specs = [sweep_spec(contestant, settings, tokens, rate) for rate in rates]
        rows = {spec.lr: trainer.standing(spec) for spec in specs}
        lines += [_line(spec, rows[spec.lr]) for spec in specs]
        losses |= {rate: row.get("loss", math.inf) for rate, row in rows.items() if row is not None}
        if None in rows.values():
            return lines, None
    best = min(losses, key=lambda rate: losses[rate])
    return lines, best if math.isfinite(losses[best]) else None


def _line(spec: RunSpec, row: dict[str, Any] | None) -> str:
    state = "to be trained" if row is None else f"stands{' as failed' if 'failed' in row else ''}"
    what = f"sweep, {spec.tokens:,} tokens" if spec.kind == "sweep" else "run"
    return f"  {what}, seed {spec.seed}, rate {spec.lr:g}: {state}"
