"""Train, score and record the runs of a comparison, each in a process of its own."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_moe.cli import WARNING, note
from litgpt_moe.comparison.at_once import each_at_once, make_lanes
from litgpt_moe.comparison.contestants import Contestant
from litgpt_moe.comparison.facts import Facts
from litgpt_moe.comparison.processes import Lane, Outcome, RunFailed, check_ended, run_to_end, script
from litgpt_moe.comparison.runs import RunsFile, RunSpec
from litgpt_moe.comparison.settings import PlaceSettings
from litgpt_moe.files import remove
from litgpt_moe.report.read import METRICS, Columns, read_metrics
from litgpt_moe.report.results import RESULTS_FILE

# what run_train.py says of a rate that is too high
DIVERGED = "steps in a row"
CURVE = ("step", "tokens", "loss", "val_loss", "seconds")


@dataclass(frozen=True)
class Trainer:
    """Makes runs: trains by run_train.py, scores by evaluate.py, appends the row, deletes the checkpoints."""

    place: PlaceSettings
    facts: Facts
    file: RunsFile
    start: Callable[[list[str], Path, bool, Lane | None], Outcome] = run_to_end
    """Runs a command to its end: its output in a log, at low priority if so, in a lane if there is one."""
    lane: Lane | None = None

    def make_all(self, specs: list[RunSpec], done: Callable[[RunSpec, dict[str, Any]], object]) -> None:
        """Make the runs, `at_once` of them at a time, and call `done` with each and its row as they end."""
        if self.place.at_once == 1 or not specs:
            for spec in specs:
                done(spec, self.result(spec))
            return

        def make(spec: RunSpec, lane: Lane) -> dict[str, Any]:
            return dataclasses.replace(self, lane=lane).result(spec)

        # a run that is listed twice, perhaps under two names, must not be made twice at the same time
        identities = [spec.identity(self.facts.fingerprint) for spec in specs]
        again = [i for i, identity in enumerate(identities) if identity in identities[:i]]
        first = [spec for i, spec in enumerate(specs) if i not in again]
        each_at_once(make, first, self.lanes([spec.contestant for spec in specs]), done)
        for i in again:
            done(specs[i], self.result(specs[i]))

    def lanes(self, contestants: list[Contestant]) -> list[Lane]:
        """Return the lanes of the runs at once; ValueError if --at_once asks for too many."""
        return make_lanes(self.place.at_once, [contestant.settings for contestant in contestants])

    def result(self, spec: RunSpec) -> dict[str, Any]:
        """Return the row of a run: the one that stands in the file, or that of the run made now.

        Where training diverged it has `failed`, the reason, and no scores. A run that was killed or went
        wrong in another way is not recorded, so that the same command tries it again: {"failed", "again"}.
        """
        identity = spec.identity(self.facts.fingerprint)
        if (row := self.file.find(identity, spec.kind)) is not None:
            note(f"{self.describe(spec)}: {self._where_it_stands(spec, row)}")
            return row
        note(f"{self.describe(spec)}: training ({time.strftime('%H:%M')})")
        try:
            made = self._make(spec, identity)
        except RunFailed as failure:
            note(f"{WARNING} {failure}; the others go on, and the same command tries it again.")
            return {"failed": str(failure), "again": True}
        if (row := self.file.append(made, identity)) is not made:
            note(f"{self.describe(spec)}: another command has recorded it meanwhile, and its row counts")
        self._clear(spec, "failed" in made)
        return row

    def standing(self, spec: RunSpec) -> dict[str, Any] | None:
        """Return the row of a run in the file, None if there is none yet."""
        return self.file.find(spec.identity(self.facts.fingerprint), spec.kind)

    def _where_it_stands(self, spec: RunSpec, row: dict[str, Any]) -> str:
        stands, another = f"stands in {self.file.path}", "--results_file another.jsonl makes it anew"
        if "failed" in row:
            return f"{stands} as failed ({row['failed']}); {another}"
        if self.place.keep and spec.kind == "run" and not (self.folder(spec) / "final").is_dir():
            return f"no checkpoint: the run {stands}; {another}"
        return stands

    def _clear(self, spec: RunSpec, is_failed: bool) -> None:
        """Delete the checkpoints of a run that is recorded, but for a last one that is to be kept."""
        folder = self.folder(spec)
        is_kept = self.place.keep and spec.kind == "run" and not is_failed
        for path in (*folder.glob("step-*"), *([] if is_kept else [folder / "final"])):
            remove(path)

    @staticmethod
    def describe(spec: RunSpec) -> str:
        """Return a run in words."""
        return f"{spec.contestant.name}, {spec.tokens:,} tokens, seed {spec.seed}, rate {spec.lr:g}"

    def folder(self, spec: RunSpec) -> Path:
        """Return the folder of a run."""
        return self.place.out / "runs" / spec.folder_name(self.facts.fingerprint)

    def train(self, spec: RunSpec, low_priority: bool) -> tuple[Outcome, Path]:
        """Train a run to its end, from where an earlier try stopped; return how, and where its log is."""
        folder = self.folder(spec)
        log = self.place.out / "logs" / f"{folder.name}.txt"
        words = spec.command(self.place.config, self.place.data_dir, folder, self.facts.data["val_tokens"])
        return self.start(script("run_train.py", *words), log, low_priority, self.lane), log

    def _make(self, spec: RunSpec, identity: dict[str, Any]) -> dict[str, Any]:
        folder, start = self.folder(spec), time.time()
        outcome, log = self.train(spec, self.place.low_priority)
        if outcome.status == 1 and DIVERGED in outcome.last_error:
            note(f"{WARNING} {self.describe(spec)} diverged: {outcome.last_error}")
            figures: dict[str, Any] = {"failed": outcome.last_error}
        else:
            check_ended(outcome, self.describe(spec), log)
            if not (folder / "final").is_dir():
                raise KeyboardInterrupt  # somebody has asked run_train.py itself to save and end
            self.facts.check_data(self.place.data_dir)
            figures = {"window": spec.contestant.block_size, **self._score(spec, log)}
        facts = spec.contestant.facts
        return {
            "kind": spec.kind,
            "name": spec.contestant.name,
            **identity,
            "seed": spec.seed,
            "lr": spec.lr,
            "tokens": spec.tokens,
            "steps": spec.n_steps,
            "total_params": facts.total_params,
            "active_params": facts.active_params,
            "flops_per_token": facts.flops_per_token,
            "flops": facts.flops_per_token * spec.tokens,
            **figures,
            "wall_s": round(time.time() - start, 1),
            "at_once": self.place.at_once,
            # the other lanes' use of the cores would be taken for that of other programs
            "load_of_others": None if outcome.others is None or self.lane else round(outcome.others, 2),
            **self.record(),
        }

    def record(self) -> dict[str, Any]:
        """Return what each row records: data, machine, commit, command and time."""
        return {
            "data": self.facts.data,
            "machine": self.facts.machine | self._threads(),
            **self.facts.commit,
            "command": self.facts.command,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _threads(self) -> dict[str, int]:
        threads = self.lane.environment.get("OMP_NUM_THREADS", "") if self.lane else ""
        return {"threads": int(threads)} if threads.isdecimal() else {}

    def _score(self, spec: RunSpec, log: Path) -> dict[str, Any]:
        """Return the scores on the whole validation split, and the curve of the run."""
        folder = self.folder(spec)
        scores = self._evaluate(folder, log, spec.contestant.block_size)
        train, val = read_metrics(folder / METRICS)
        points = curve(train, val)
        return {
            **{key: scores[key] for key in ("loss", "loss_stderr", "bits_per_byte", "n_tokens", "n_bytes")},
            "seconds": points[-1][-1] if points else None,
            "curve_columns": CURVE,
            "curve": points,
        }

    def _evaluate(self, folder: Path, log: Path, window: int) -> dict[str, Any]:
        """Return what evaluate.py says of the final checkpoint on the whole validation split.

        A window has as many tokens as a sequence in training: at later places a model has learnt nothing.
        """
        results = folder / RESULTS_FILE
        flags = {
            "ckpt_dir": folder / "final",
            "data_dir": self.place.data_dir,
            "results_file": results,
            "max_seq_length": window,
            "precision": "32-true",
        }
        words = [word for key, value in flags.items() for word in (f"--{key}", value)]
        outcome = self.start(script("evaluate.py", *words), log, self.place.low_priority, self.lane)
        check_ended(outcome, f"scoring {folder / 'final'}", log)
        return json.loads(results.read_text(encoding="utf-8").splitlines()[-1])


def curve(train: Columns, val: Columns) -> list[list[float | None]]:
    """Return the points of a run's curve, at its validations, in the order of CURVE.

    A point's training loss is the mean since the point before. Its seconds are those of training alone: the
    log's tokens a second leave out validations, and the first row, in which the machine warms up, is taken
    to have gone as fast as the median row.
    """
    tokens, rate = train["tokens"], train["rate"].copy()
    rate[0] = np.nanmedian(rate)
    rate = np.where(np.isfinite(rate) & (rate > 0), rate, rate[0])
    seconds = np.cumsum(np.diff(tokens, prepend=0.0) / rate)
    points: list[list[float | None]] = []
    before = 0.0
    for step, at, loss in zip(val["step"], val["tokens"], val["loss"], strict=True):
        if at <= 0:
            continue  # a validation before the first step
        if points and points[-1][0] == step:
            continue  # the final validation comes right after that of the last step
        since = (tokens > before) & (tokens <= at)
        mean = train["loss"][since].mean() if since.any() else math.nan
        figures = (_known(value) for value in (mean, loss, np.interp(at, tokens, seconds)))
        points.append([int(step), int(at), *figures])
        before = at
    return points


def _known(value: float) -> float | None:
    """Return a figure with five decimals, None if it is not finite: JSON has no word for that."""
    return round(float(value), 5) if math.isfinite(value) else None
