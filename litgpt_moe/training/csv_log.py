"""CSV files that are continuous over all resumes of a run.

Lightning's CSVLogger opens a new file at each resume, and loses the last rows of a run.
"""

import contextlib
import csv
import io
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from litgpt import Config

from litgpt_moe.balance import STATISTICS
from litgpt_moe.files import write_whole
from litgpt_moe.processes import is_main_process

METRICS_FILE = Path("csv/metrics.csv")
STEP_COLUMNS = (
    "step",
    "total_tokens",
    "time_s",
    "iter",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "skipped_steps",
    "tokens_per_s",
    "mfu",
    "flops",
    "iter_time",
    "remaining_time",
    "peak_memory_gb",
)


def metric_columns(config: Config) -> list[str]:
    """Return the columns of metrics.csv: of the step, of each MoE layer's router, of a validation."""
    has_experts = config.mlp_class_name == "LLaMAMoE"
    # as litgpt.model.Block decides it
    blocks = range(config.first_k_dense_replace or 0, config.n_layer) if has_experts else []
    router = [f"moe/{name}/layer_{layer:02d}" for layer in blocks for name in STATISTICS]
    return [*STEP_COLUMNS, *router, "val_loss", "val_ppl"]


class CsvLog:
    """A CSV file with given columns. Only rank 0 writes; callers need not check."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self.columns = path, columns
        self.n_rows = 0
        # rows that wait while another program (Windows, a spreadsheet) has the file locked
        self._waiting: list[dict[str, Any]] = []

    def keep(self, n_rows: int) -> None:
        """Keep the first rows, which were there when the checkpoint was made; later ones are written again.

        The file is rewritten whole with this log's columns, and behind them those that only the file has.
        """
        if not self.path.is_file() or not is_main_process():
            return
        # the last row may be torn or worse, if the machine stopped while it was written
        with self.path.open(encoding="utf-8", errors="replace", newline="") as file:
            reader = csv.DictReader(line.replace("\0", "") for line in file)
            names = [name for name in reader.fieldnames or [] if name]
            rows = list(itertools.islice(reader, n_rows))
        self.columns = list(dict.fromkeys([*self.columns, *names]))
        self._rewrite(rows)
        self.n_rows = len(rows)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; columns that it lacks stay empty."""
        if not is_main_process():
            return
        self._waiting.append(row)
        self.n_rows += 1
        with contextlib.suppress(PermissionError):
            if not self.path.is_file():
                self._rewrite([])
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns).writerows(self._waiting)
            self._waiting.clear()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        # a torn row may have more values than there are columns
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue())

    def sync(self) -> None:
        """Flush the rows to the disk, before a checkpoint counts on them."""
        if self.path.is_file() and is_main_process():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())


class RunLogs:
    """The CSV files of a run; a checkpoint holds their lengths, so that a resumed run goes on behind them."""

    def __init__(self, folder: Path, config: Config) -> None:
        experts = [f"e{expert}" for expert in range(config.n_expert or 0)]
        spikes = ["step", "loss", "mean", "sigma", "grad_norm", "first_sequence"]
        self.metrics = CsvLog(folder / METRICS_FILE, metric_columns(config))
        self.spikes = CsvLog(folder / "spikes.csv", spikes)
        self.loads = CsvLog(folder / "expert_load.csv", ["step", "layer", *experts])
        self.stories = CsvLog(folder / "stories.csv", ["step", "tokens", "prompt", "text"])
        logs = (self.metrics, self.spikes, self.loads, self.stories)
        self._by_key = dict(zip(("n_rows", "n_spikes", "n_loads", "n_stories"), logs, strict=True))

    def lengths(self) -> dict[str, int]:
        """Return the numbers of rows, by the keys that they have in a checkpoint."""
        return {key: log.n_rows for key, log in self._by_key.items()}

    def keep(self, lengths: dict[str, int]) -> None:
        """Keep the rows that were there when the checkpoint with these lengths was made; {} keeps none."""
        for key, log in self._by_key.items():
            log.keep(lengths.get(key, 0))

    def write_loads(self, step: int, layers: Iterable[int], counts: list[list[float]]) -> None:
        """Write the tokens that each expert of each layer got, from the rows of router_statistics."""
        for layer, numbers in zip(layers, counts, strict=True):
            # behind the experts stand the sums of four statistics
            load = {f"e{expert}": int(n) for expert, n in enumerate(numbers[:-4])}
            self.loads.write({"step": step, "layer": layer, **load})

    def sync(self) -> None:
        """Flush all to the disk."""
        for log in self._by_key.values():
            log.sync()
