"""A comparison as lines of text: the figures of each model, what to know about them, and the verdicts."""

from litgpt_moe.comparison.result import METRICS, Entry, Verdict, provenance


def table(entries: list[Entry], all_verdicts: list[Verdict], warnings: list[str]) -> str:
    """Return the figures and the verdicts as lines of text."""
    head = f"{'model':<24} {'total':>8} {'active':>8} {'MFLOPs':>8} {'tokens':>12} {'seconds':>14}"
    lines = [f"{head} {'rate':>8}  {'loss, nats per token':<30}  bits per byte", *map(_line, entries)]
    origin = [f"These are {runs}."] if (runs := provenance(entries)) else []
    return "\n".join([*lines, *failures(entries), *origin, *warnings, "", *map(str, all_verdicts)])


def failures(entries: list[Entry]) -> list[str]:
    """Return which runs, or sweeps, failed, and why."""
    pairs = [(entry.contestant.name, entry.failed) for entry in entries]
    return [f"{name}, {what} failed: {why}" for name, failed in pairs for what, why in failed.items()]


def _line(entry: Entry) -> str:
    name, facts = entry.contestant.name, entry.contestant.facts
    nothing = "failed" if entry.failed else "not run yet"
    scores = [str(entry.spread(key) or nothing) for key in METRICS]
    seconds = "-" if entry.seconds is None else f"{entry.seconds:,.0f}{'' if entry.rounds else ' as run'}"
    return (
        f"{name:<24} {facts.total_params / 1e6:>7.2f}M {facts.active_params / 1e6:>7.2f}M "
        f"{facts.flops_per_token / 1e6:>8.2f} {entry.tokens:>12,} {seconds:>14} "
        f"{'-' if entry.lr is None else f'{entry.lr:g}':>8}  {scores[0]:<30}  {scores[1]}"
    )
