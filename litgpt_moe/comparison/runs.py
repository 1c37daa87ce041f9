"""One run of a comparison: what determines it, its command, and its row in the file of finished runs."""

import dataclasses
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_moe.comparison.contestants import Contestant, file_name
from litgpt_moe.comparison.identity import USUAL, has_own_window, is_same, nameless, that_matter
from litgpt_moe.files import check_no_links
from litgpt_moe.locks import locked_folder
from litgpt_moe.report.results import append, json_rows
from litgpt_moe.training.settings import Settings

# the fewest and the most validations of a run, the points of its curve
N_VALIDATIONS = (4, 16)
# validation tokens for each training token; a run has as many validations as keep to that
VALIDATION_SHARE = 0.2
N_LOG_ROWS = 200
# checkpoints of a run: an interruption costs a tenth of it
N_SAVES = 10
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
            # a curve has its last point at the end, and none before the first step
            "eval.initial_validation": "false",
            "eval.final_validation": "true",
            "resume": "auto",
        }
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        # the variant's own come first: a later flag counts, and the rate is this run's
        return [*self.contestant.flags, *words, "--no_progress"]


def stands_for(row: dict[str, Any], kind: str) -> bool:
    """Return whether a row is the result of a run of this kind, if it is that run.

    What failed in a sweep is tried again as a run. What was scored in a sweep is a run too if its curve has
    the points of one.
    """
    if row["kind"] == "speed":
        return False
    if "failed" in row:
        return row["kind"] in (kind, "run")
    scores = [row.get(name) for name in (("loss",) if kind == "sweep" else ("loss", "bits_per_byte"))]
    if not all(isinstance(score, float) and math.isfinite(score) for score in scores):
        return False
    if kind == "sweep":
        return True
    n_points = len(row["curve"]) if isinstance(row.get("curve"), list) else 0
    return n_points >= (1 if row["kind"] == "run" else min(row.get("steps", math.inf), N_VALIDATIONS[0]))


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

    def check(self) -> None:
        """Raise ValueError or OSError if no row can be appended: now, and not after hours of training."""
        another = "name another --results_file"
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder; {another}")
        if self.path.is_file():
            with self.path.open("ab") as file:  # raises OSError for one that is read-only
                size = file.tell()
            if size and next(self.rows(), None) is None and not self._begins_as_row():
                raise ValueError(f"{self.path} holds something else than finished runs; {another}")
            return
        folder = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{self.path} cannot be written, because of {folder}; {another}")

    def _begins_as_row(self) -> bool:
        with self.path.open("rb") as file:
            return file.read(8) == b'{"kind":'

    def find(self, identity: dict[str, Any], kind: str = "run") -> dict[str, Any] | None:
        """Return the first row of the run with this identity, None if there is none yet."""
        for row in self.rows():
            is_it = stands_for(row, kind) and is_same(row, identity)
            if is_it and ("failed" in row or has_own_window(row, identity)):
                return row
        return None

    def append(self, row: dict[str, Any], identity: dict[str, Any] | None = None) -> dict[str, Any]:
        """Append a row and return it; with the identity of a run, the row that another process has appended.

        Two commands that share the file may have made the same run: the first row counts.
        """
        doing, folder = "a run is being recorded", self.path.parent
        with self._lock, locked_folder(folder, self.path.stem, doing, "wait for it", wait=True):
            if identity is not None and (other := self.find(identity, row["kind"])) is not None:
                return other
            append(row, self.path)
        return row
