"""What the finished runs of a comparison say: figures of each model over its seeds, and verdicts on pairs."""

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from litgpt_moe.comparison.contestants import Contestant
from litgpt_moe.comparison.statistics import Difference, Spread, crossing, paired_difference, spread

Row = dict[str, Any]
METRICS = {"loss": "nats per token", "bits_per_byte": "bits per byte"}
# of a machine, what makes it another one; a run may use fewer of its threads
MACHINE = ("device", "cpu", "cores", "system")
# what is recorded of each run beside its scores
PROVENANCE = ("commit", "is_clean", "machine", "at_once", "time")


@dataclass(frozen=True)
class Entry:
    """One model of a comparison with the rows of its finished runs, by seed."""

    contestant: Contestant
    rows: dict[int, Row]
    lr: float | None
    """None if no rate was found."""
    tokens: int
    rounds: tuple[float, ...] = ()
    """Tokens a second by rounds, side by side with the others; empty if that was not measured."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why there is no result, by `seed 42` and so on, or for the `sweep`."""
    is_at_edge: bool = False
    """Whether the rate was the first or the last of those that were tried."""

    @property
    def tokens_per_s(self) -> float | None:
        """The median of the rounds, None if the speed was not measured."""
        return round(statistics.median(self.rounds), 1) if self.rounds else None

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

    def n_missing(self, wanted: int) -> int:
        """Return how many runs are neither made nor failed, of those that are wanted."""
        return 0 if "sweep" in self.failed else wanted - len(self.rows) - len(self.failed)

    def curve(self, seeds: Iterable[int] | None = None) -> list[tuple[float, float]]:
        """Return (tokens, mean validation loss) at the validations that all runs, or those of seeds, have."""
        rows = [self.rows[seed] for seed in (self.rows if seeds is None else seeds)]
        by_tokens: dict[int, list[float]] = {}
        for row in rows:
            for _, tokens, _, val_loss, _ in row["curve"]:
                by_tokens.setdefault(tokens, []).extend([] if val_loss is None else [val_loss])
        whole = {tokens: losses for tokens, losses in by_tokens.items() if len(losses) == len(rows)}
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
            "is_measured_side_by_side": bool(self.rounds),
            "lr": self.lr,
            "lr_is_at_edge": self.is_at_edge,
            **{key: value and {**asdict(value), "unit": METRICS[key]} for key, value in scores.items()},
            "seeds": {
                str(seed): {key: row[key] for key in METRICS} | {key: row.get(key) for key in PROVENANCE}
                for seed, row in self.rows.items()
            },
            "failed": self.failed,
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
    seconds_range: tuple[float, float] | None
    """The factor of the seconds by the least and the most of the rounds in which the speeds were measured."""
    seeds_wanted: int
    is_same_batches: bool
    """Whether the two saw the same batches with the same seed."""

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
        spans = {"seconds": " ({:.2f} to {:.2f})".format(*self.seconds_range)} if self.seconds_range else {}
        known = {what: value for what, value in self.factors.items() if value}
        words = [f"{value:.2f}{spans.get(what, '')} times the {what}" for what, value in known.items()]
        needs = f"; {worse} took {', '.join(words)} to where it ended" if words else ""
        clear = f"{self.better} is better" if self.better else "no clear difference"
        few = f" (with {self.loss.n} of {self.seeds_wanted} seeds)" if self.loss.n < self.seeds_wanted else ""
        return f"{text}: {clear}{few}{needs}"

    def as_json(self) -> dict[str, Any]:
        """Return what comparison.json has of the pair."""
        return {**asdict(self), "better": self.better, "text": str(self)}


def verdict(entry: Entry, reference: Entry, seeds_wanted: int) -> Verdict | None:
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
    is_same_batches = entry.contestant.sees_batches_of(reference.contestant)
    needs = needed(good, bad, seeds)
    return Verdict(*names, pairs["loss"], pairs["bits_per_byte"], *needs, seeds_wanted, is_same_batches)


def needed(
    good: Entry, bad: Entry, seeds: list[int]
) -> tuple[dict[str, float | None], tuple[float, float] | None]:
    """Return how many times what the better model took, the worse took to the loss at which it ended.

    By the curves over these seeds, where each gets there first: a model that overfits was there before. In
    the midst of the better one's run the learning rate has not come down yet: a run that was made as short
    would get there sooner, so that the true factor is larger rather than smaller. The seconds are those of
    the median round, and beside them of the least and the most; None unless both were measured side by side,
    as other programs may have slowed down the runs.
    """
    curve, own = good.curve(seeds), bad.curve(seeds)
    at, own_at = (crossing(each, own[-1][1]) if each and own else None for each in (curve, own))
    factors: dict[str, float | None] = dict.fromkeys(("tokens", "FLOPs", "seconds"))
    if at is None or own_at is None:
        return factors, None
    tokens = own_at / at
    factors |= {"tokens": tokens, "FLOPs": tokens * bad.flops_per_token / good.flops_per_token}
    # in a round the two were measured right after one another: what slows the machine down slows both
    ratios = [tokens * fast / slow for fast, slow in zip(good.rounds, bad.rounds, strict=False)]
    if not ratios:
        return factors, None
    return factors | {"seconds": statistics.median(ratios)}, (min(ratios), max(ratios))


def verdicts(entries: list[Entry], seeds_wanted: int) -> list[Verdict]:
    """Return the verdict on each model that has a reference, as far as runs are there."""
    by_name = {entry.contestant.name: entry for entry in entries}
    pairs = [(entry, by_name[entry.contestant.reference]) for entry in entries if entry.contestant.reference]
    return [found for pair in pairs if (found := verdict(*pair, seeds_wanted)) is not None]


def provenance(entries: list[Entry]) -> str:
    """Return how many machines, commits and versions the runs are of, where they are of more than one."""
    rows = [row for entry in entries for row in entry.rows.values()]
    machines = [row.get("machine") or {} for row in rows]
    counts = {
        "machines": len({tuple(str(one.get(key)) for key in MACHINE) for one in machines}),
        "commits": len({row.get("commit") for row in rows}),
        "versions of torch": len({one.get("torch") for one in machines}),
    }
    several = [f"{count} {what}" for what, count in counts.items() if count > 1]
    return f"runs of {', '.join(several)}" if several else ""
