"""One run of a comparison: what determines it, its command, and its row in the file of finished runs."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_moe.comparison.contestants import Contestant, file_name, nameless, that_matter
from litgpt_moe.files import check_no_links
from litgpt_moe.report.results import append, json_rows
from litgpt_moe.training.settings import Settings, dotted, plain_settings

# the fewest and the most validations of a run, the points of its curve
N_VALIDATIONS = (4, 16)
# validation tokens for each training token; a run has as many validations as keep to that
VALIDATION_SHARE = 0.2
N_LOG_ROWS = 200
# checkpoints of a run: an interruption costs a tenth of it
N_SAVES = 10
USUAL = dict(dotted(plain_settings(Settings())))
# steps between the rows of a run that measures the speed
SPEED_LOG = 10
ROW_FORM: dict[str, Any] = {"kind": str, "model": {}, "settings": {}, "data": {"fingerprint": str}}


@dataclass(frozen=True)
class RunSpec:
    """A run to be made: a contestant, and what differs from run to run."""

    contestant: Contestant
    seed: int
    tokens: int
    lr: float
    kind: str = "run"
    """run, sweep (to find a learning rate) or speed (its first steps, to measure the tokens a second)."""

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.tokens // self.contestant.tokens_per_step

    @property
    def settings(self) -> Settings:
        """The contestant's settings with this run's seed, tokens and rates."""
        base = self.contestant.settings
        init_args = {**(base.optimizer.get("init_args") or {}), "lr": self.lr}
        train = dataclasses.replace(base.train, max_tokens=self.tokens, min_lr=self._min_lr)
        schedule = dataclasses.replace(base.schedule, warmup_tokens=self._warmup_tokens)
        changes = {
            "train": train,
            "schedule": schedule,
            "optimizer": {**base.optimizer, "init_args": init_args},
        }
        return dataclasses.replace(base, seed=self.seed, **changes)

    @property
    def _min_lr(self) -> float:
        # the decay ends at the same share of the rate, whatever that is
        return float(f"{self.contestant.end_share * self.lr:.6g}")

    @property
    def _warmup_tokens(self) -> int | None:
        # a tenth of a run at most: the short runs of a sweep have no time for that of the long ones
        base = self.contestant.settings
        wanted = base.schedule.warmup_tokens
        if wanted is None and base.train.lr_warmup_fraction:
            return None
        if wanted is None:
            wanted = (base.train.lr_warmup_steps or 0) * self.contestant.tokens_per_step
        return min(wanted, self.tokens // 10)

    def identity(self, fingerprint: str) -> dict[str, Any]:
        """Return all that determines the trained model, as JSON reads it back."""
        has_experts = bool(self.contestant.config.n_expert)
        parts = {
            "model": nameless(self.contestant.config),
            "settings": that_matter(self.settings, has_experts),
            "data": {"fingerprint": fingerprint},
        }
        return json.loads(json.dumps(parts))

    def folder_name(self, fingerprint: str) -> str:
        """Return the name of the run's folder: readable, and another one for every other run."""
        parts = self.identity(fingerprint)
        # without the usual values a setting that a later version adds changes no name
        parts["settings"] = {key: v for key, v in parts["settings"].items() if USUAL.get(key) != v}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
        return f"{file_name(self.contestant.name)}-lr{self.lr:g}-seed{self.seed}-{self.tokens}-{digest}"

    def command(self, config: Path, data: Path, out_dir: Path, val_tokens: int) -> list[str]:
        """Return the arguments of run_train.py; a validation takes `val_tokens`."""
        n, affordable = self.n_steps, int(VALIDATION_SHARE * self.tokens / val_tokens)
        fewest, most = N_VALIDATIONS
        n_validations = min(n, max(fewest, min(most, affordable)))
        flags: dict[str, object] = {
            "config": config,
            "model_config": self.contestant.model_file,
            "data_dir": data,
            "out_dir": out_dir,
            "seed": self.seed,
            "train.max_tokens": self.tokens,
            "train.epochs": "null",
            "optimizer.init_args.lr": self.lr,
            "train.min_lr": self._min_lr,
            "schedule.warmup_tokens": "null" if (warmup := self._warmup_tokens) is None else warmup,
            "train.log_interval": SPEED_LOG if self.kind == "speed" else max(1, n // N_LOG_ROWS),
            "train.save_interval": max(1, n // N_SAVES) if self.kind == "run" else n,
            "checkpoints.keep_last": 1,
            "eval.interval": n + 1 if self.kind != "run" else max(1, n // n_validations),
            # the whole split at each validation
            "eval.max_iters": 1 if self.kind == "speed" else 10**9,
            "resume": "auto",
        }
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        # the variant's own come first: a later flag counts, and the rate is this run's
        return [*self.contestant.flags, *words, "--no_progress"]


def is_same(row: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Return whether a row of the file is the run with this identity.

    A setting that the row lacks had its usual value: the version that wrote it did not have the setting.
    """
    if row["model"] != identity["model"] or row["data"]["fingerprint"] != identity["data"]["fingerprint"]:
        return False
    was, now = row["settings"], identity["settings"]
    return all(was.get(key, USUAL.get(key)) == now.get(key, USUAL.get(key)) for key in {*was, *now})


class RunsFile:
    """The finished runs, one JSON object a line; a damaged line is left out."""

    def __init__(self, path: Path) -> None:
        check_no_links(path)
        self.path = path
        # runs at once end at once
        self._lock = threading.Lock()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Return the rows that have the form of a run's."""
        return json_rows(self.path, ROW_FORM)

    def find(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row of the run with this identity, None if there is none yet."""
        return next((row for row in self.rows() if row["kind"] != "speed" and is_same(row, identity)), None)

    def append(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self._lock:
            append(row, self.path)
