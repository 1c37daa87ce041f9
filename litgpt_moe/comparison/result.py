"""What the finished runs of a comparison say: figures of each model over its seeds, and verdicts on pairs."""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from litgpt_moe.comparison.contestants import Contestant
from litgpt_moe.comparison.statistics import Difference, Spread, crossing, paired_difference, spread

Row = dict[str, Any]
METRICS = {"loss": "nats per token", "bits_per_byte": "bits per byte"}


@dataclass(frozen=True)
class Entry:
    """One model of a comparison with the rows of its finished runs, by seed."""

    contestant: Contestant
    rows: dict[int, Row]
    lr: float
    tokens: int
    tokens_per_s: float | None
    """Measured side by side with the others; None if that was not done."""

    @property
    def flops_per_token(self) -> int:
        """As training counts them."""
        return self.contestant.facts.flops_per_token

    def spread(self, key: str) -> Spread | None:
        """Return the mean of a figure over the seeds, None before the first run has finished."""
        return spread([row[key] for row in self.rows.values()]) if self.rows else None

    @property
    def seconds(self) -> float | None:
        """Seconds of training: by the measured speed, else the mean of the runs, whatever ran beside them."""
        if self.tokens_per_s:
            return self.tokens / self.tokens_per_s
        known = [row["seconds"] for row in self.rows.values() if row.get("seconds")]
        return statistics.fmean(known) if known else None

    def curve(self) -> list[tuple[float, float]]:
        """Return (tokens, mean validation loss over the seeds) at the validations that all runs have."""
        by_tokens: dict[int, list[float]] = {}
        for row in self.rows.values():
            for _, tokens, _, val_loss, _ in row["curve"]:
                by_tokens.setdefault(tokens, []).extend([] if val_loss is None else [val_loss])
        whole = {tokens: losses for tokens, losses in by_tokens.items() if len(losses) == len(self.rows)}
        return [(tokens, statistics.fmean(whole[tokens])) for tokens in sorted(whole)]

    def as_json(self) -> dict[str, Any]:
        """Return what comparison.json has of the model."""
        facts = self.contestant.facts
        scores = {key: self.spread(key) for key in METRICS}
        return {
            "name": self.contestant.name,
            "note": self.contestant.note,
            "reference": self.contestant.reference,
            "n_expert": self.contestant.config.n_expert,
            "total_params": facts.total_params,
            "active_params": facts.active_params,
            "flops_per_token": facts.flops_per_token,
            "tokens": self.tokens,
            "flops": self.tokens * facts.flops_per_token,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "is_measured_side_by_side": self.tokens_per_s is not None,
            "lr": self.lr,
            **{key: value and {**asdict(value), "unit": METRICS[key]} for key, value in scores.items()},
            "seeds": {str(seed): {key: row[key] for key in METRICS} for seed, row in self.rows.items()},
            "curve": self.curve(),
        }


@dataclass(frozen=True)
class Verdict:
    """How a model compares with its reference, over the seeds that both have."""

    name: str
    reference: str
    loss: Difference
    bits_per_byte: Difference
    factors: dict[str, float | None]
    """How many times the tokens, FLOPs and seconds the worse one took to the loss at which it ended."""

    @property
    def better(self) -> str | None:
        """The name of the better one, None if the interval of the difference holds 0 or is not there."""
        if not self.loss.is_clear:
            return None
        return self.name if self.loss.mean < 0 else self.reference

    def __str__(self) -> str:
        """Return the verdict in a sentence."""
        pair = f"{self.name} against {self.reference}"
        text = f"{pair}: {self.loss} nats per token, {self.bits_per_byte} bits per byte"
        worse = self.reference if self.loss.mean < 0 else self.name
        known = [f"{value:.2f} times the {what}" for what, value in self.factors.items() if value]
        needs = f"; {worse} took {', '.join(known)} to where it ended" if known else ""
        clear = f"{self.better} is better" if self.better else "no clear difference"
        return f"{text}: {clear}{needs}"

    def as_json(self) -> dict[str, Any]:
        """Return what comparison.json has of the pair."""
        return {**asdict(self), "better": self.better, "text": str(self)}


def verdict(entry: Entry, reference: Entry) -> Verdict | None:
    """Return the verdict on a pair, None before both have a run with the same seed."""
    seeds = [seed for seed in entry.rows if seed in reference.rows]
    if not seeds:
        return None
    pairs = {
        key: paired_difference(*([one.rows[seed][key] for seed in seeds] for one in (entry, reference)))
        for key in METRICS
    }
    names = (entry.contestant.name, reference.contestant.name)
    good, bad = (entry, reference) if pairs["loss"].mean < 0 else (reference, entry)
    return Verdict(*names, pairs["loss"], pairs["bits_per_byte"], needed(good, bad))


def needed(good: Entry, bad: Entry) -> dict[str, float | None]:
    """Return how many times what the better model took, the worse took to the loss at which it ended.

    By the better one's own curve, in the midst of whose run the learning rate has not come down yet: a run
    that was made as short would get there sooner, so that the true factor is larger rather than smaller.
    """
    curve, end = good.curve(), bad.curve()
    at = crossing(curve, end[-1][1]) if curve and end else None
    if at is None:
        return dict.fromkeys(("tokens", "FLOPs", "seconds"))
    tokens = end[-1][0] / at
    seconds = None
    if good.seconds and bad.seconds:
        seconds = tokens * (bad.seconds / bad.tokens) / (good.seconds / good.tokens)
    return {
        "tokens": tokens,
        "FLOPs": tokens * bad.flops_per_token / good.flops_per_token,
        "seconds": seconds,
    }


def verdicts(entries: list[Entry]) -> list[Verdict]:
    """Return the verdict on each model that has a reference, as far as runs are there."""
    by_name = {entry.contestant.name: entry for entry in entries}
    pairs = [(entry, by_name[entry.contestant.reference]) for entry in entries if entry.contestant.reference]
    return [found for pair in pairs if (found := verdict(*pair)) is not None]


def table(entries: list[Entry], all_verdicts: list[Verdict]) -> str:
    """Return the figures and the verdicts as lines of text."""
    head = f"{'model':<24} {'total':>8} {'active':>8} {'MFLOPs':>8} {'tokens':>12} {'seconds':>9} {'rate':>8}"
    lines = [f"{head}  {'loss, nats per token':<30}  bits per byte"]
    for entry in entries:
        name, facts, seconds = entry.contestant.name, entry.contestant.facts, entry.seconds
        scores = [str(entry.spread(key) or "not run yet") for key in METRICS]
        lines.append(
            f"{name:<24} {facts.total_params / 1e6:>7.2f}M {facts.active_params / 1e6:>7.2f}M "
            f"{facts.flops_per_token / 1e6:>8.2f} {entry.tokens:>12,} "
            f"{math.nan if seconds is None else seconds:>9,.0f} {entry.lr:>8g}  {scores[0]:<30}  {scores[1]}"
        )
    return "\n".join([*lines, "", *map(str, all_verdicts)])
