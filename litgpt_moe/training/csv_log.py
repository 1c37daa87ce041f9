"""The CSV files of a run: columns, rows that wait while a file cannot be written, and what a resume keeps."""

import codecs
import contextlib
import csv
import errno
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from litgpt import Config

from litgpt_moe.balance import STATISTICS
from litgpt_moe.cli import note
from litgpt_moe.files import free_name, open_no_link, open_whole, patient_rename, write_whole
from litgpt_moe.locks import remove_left_over
from litgpt_moe.processes import is_main_process

METRICS_FILE = Path("csv/metrics.csv")
STEP_COLUMNS = (
    "step total_tokens time_s iter epoch loss learning_rate grad_norm skipped_steps "
    "tokens_per_s mfu flops iter_time remaining_time peak_memory_gb"
)
# of runs in 16-mixed
SCALING_COLUMNS = ("overflow_steps", "loss_scale")


def metric_columns(config: Config, precision: str = "") -> list[str]:
    """Return the columns of metrics.csv: of the step, of each MoE layer's router, of a validation."""
    has_experts = config.mlp_class_name == "LLaMAMoE"
    blocks = range(config.first_k_dense_replace or 0, config.n_layer) if has_experts else []
    router = [f"moe/{name}/layer_{layer:02d}" for layer in blocks for name in STATISTICS]
    scaling = SCALING_COLUMNS if precision == "16-mixed" else ()
    return [*STEP_COLUMNS.split(), *scaling, *router, "val_loss", "val_ppl"]


class CsvLog:
    """A CSV file with given columns. Only rank 0 writes; callers need not check.

    Rows that cannot be written (a full disk; on Windows, a spreadsheet that locks the file) wait for the next
    row. Lightning's CSVLogger opens a new file at each resume, and loses the last rows of a run.
    """

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self.columns, self.n_rows = path, columns, 0
        self._waiting: list[dict[str, Any]] = []
        self._size = 0  # of the file after the latest row
        self.last_val_loss: float | None = None  # in the last of the rows that were kept
        self.failure: str | None = None  # why the latest row could not be written

    def keep(self, n_rows: int) -> None:
        """Keep the first `n_rows` rows, those of the checkpoint; the resumed run writes the later ones again.

        The file is rewritten whole with this log's columns, followed by those that only the file has.
        """
        if not is_main_process():
            return
        remove_left_over(self.path)
        if not self.path.is_file():
            return
        names, own_columns = self._names(), self.columns
        if n_rows and names and self.columns[0] not in names:
            # emptied while it was written, by `: > metrics.csv` or by logrotate
            self._begin_anew("has no header")
            names = []
        self.columns = list(dict.fromkeys([*self.columns, *names]))
        try:
            self.n_rows, last = self._keep_rows(n_rows)
        except csv.Error as error:
            self.columns, self.n_rows, last = own_columns, 0, {}
            self._begin_anew(f"is damaged ({error})")
        if self.n_rows < n_rows:
            has = f"{self.path} has {self.n_rows:,} of the {n_rows:,} rows that the checkpoint counts"
            note(f"Warning: {has}; the others were deleted or never written")
        with contextlib.suppress(ValueError, TypeError):
            self.last_val_loss = float(last["val_loss"]) if "val_loss" in names and last else None

    def _names(self) -> list[str]:
        """Return the columns that the file has; those of a damaged one do not count."""
        with contextlib.suppress(csv.Error), self._rows() as rows:
            return [name for name in rows.fieldnames or [] if name]
        return []

    def _begin_anew(self, why: str) -> None:
        """Put the file aside, and begin another one in its place."""
        patient_rename(self.path, aside := free_name(self.path))
        note(f"Warning: {self.path} {why}; it is now {aside.name}")
        self._begin()

    @contextlib.contextmanager
    def _rows(self) -> Iterator[csv.DictReader]:
        # the last row may be torn or worse, if the machine stopped while it was written
        with self.path.open(encoding="utf-8", errors="replace", newline="") as file:
            yield csv.DictReader(line.replace("\0", "") for line in file)

    def _keep_rows(self, n_rows: int | None = None, is_last_torn: bool = False) -> tuple[int, dict[str, str]]:
        """Rewrite the file with the first `n_rows` rows, or all but a torn last one.

        Return their number and the last of them. One row at a time is in memory: the log of a large model
        takes a gigabyte in a week.
        """
        n_kept, last = 0, {}
        # the file that is read is closed before it is replaced, which Windows asks for
        with open_whole(self.path) as file, self._rows() as rows:
            # a torn row may have more values than there are columns
            writer = csv.DictWriter(codecs.getwriter("utf-8")(file), self.columns, extrasaction="ignore")
            writer.writeheader()
            kept = itertools.islice(rows, n_rows)
            for last in (row for row, _ in itertools.pairwise(kept)) if is_last_torn else kept:
                writer.writerow(last)
                n_kept += 1
        return n_kept, last

    def write(self, *rows: dict[str, Any]) -> None:
        """Append rows, opening the file once; columns that a row lacks stay empty."""
        if not is_main_process():
            return
        self._waiting += rows
        self.n_rows += len(rows)
        with self._failure_is_reported():
            self._append()

    def _append(self) -> None:
        if any(folder.is_symlink() for folder in (self.path.parent, self.path.parent.parent)):
            raise OSError(errno.ELOOP, "its folder has become a link")
        # emptied, the file lacks its header
        if not self.path.is_file() or self.path.stat().st_size < len(self._header().encode()):
            if (n_lost := self.n_rows - len(self._waiting)) > 0:
                note(f"Warning: {self.path} is gone, with {n_lost:,} rows; it begins anew")
                # a checkpoint records how many rows to keep
                self.n_rows = len(self._waiting)
            self._begin()
        elif self.path.stat().st_size < self._size:
            self._mend()
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", encoding="utf-8", newline="", opener=open_no_link) as file:
                csv.DictWriter(file, self.columns).writerows(self._waiting)
        except OSError:
            # a part of the rows may be in the file, and all are written again later
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self._size = self.path.stat().st_size
        self._waiting.clear()

    def _mend(self) -> None:
        """Keep the whole rows of a file that something else has cut, and count them anew."""
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            is_last_torn = file.read() != b"\n"
        try:
            n_kept, _ = self._keep_rows(is_last_torn=is_last_torn)
        except csv.Error as error:
            n_kept = 0
            self._begin_anew(f"is damaged ({error})")
        n_lost = self.n_rows - len(self._waiting) - n_kept
        note(f"Warning: {self.path} was cut by something else, and {n_lost:,} of its rows are lost")
        # a checkpoint records how many rows to keep
        self.n_rows = n_kept + len(self._waiting)

    @contextlib.contextmanager
    def _failure_is_reported(self) -> Iterator[None]:
        """Report an error of the file instead of raising it: once, until the log can be written again."""
        try:
            yield
            self.failure = None
        except OSError as error:
            reason = str(error.strerror or error)
            if self.failure is None:
                note(f"Warning: {self.path} cannot be written ({reason}); training goes on, its rows wait")
            self.failure = reason

    def _begin(self) -> None:
        write_whole(self.path, self._header())

    def _header(self) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writeheader()
        return text.getvalue()

    def sync(self) -> None:
        """Write the rows that wait and flush the file to the disk, before a checkpoint counts on them."""
        if not is_main_process():
            return
        with self._failure_is_reported():
            if self._waiting:
                self._append()
            if self.path.is_file():
                with self.path.open("rb+") as file:
                    os.fsync(file.fileno())

    def close(self) -> None:
        """Write the rows that wait, for the last time, and say so if they are lost."""
        self.sync()
        if n_lost := len(self._waiting):
            reason = f"{self.path} could not be written to the end ({self.failure})"
            note(f"Warning: {reason}: {n_lost:,} rows are lost")


class RunLogs:
    """The CSV files of a run; a checkpoint holds their lengths, after which a resumed run goes on writing."""

    def __init__(self, folder: Path, config: Config, precision: str = "") -> None:
        experts = [f"e{expert}" for expert in range(config.n_expert or 0)]
        spikes = ["step", "loss", "mean", "sigma", "grad_norm", "first_sequence"]
        self.metrics = CsvLog(folder / METRICS_FILE, metric_columns(config, precision))
        self.spikes = CsvLog(folder / "spikes.csv", spikes)
        self.loads = CsvLog(folder / "expert_load.csv", ["step", "layer", *experts])
        self.stories = CsvLog(folder / "stories.csv", ["step", "tokens", "prompt", "text"])
        logs = (self.metrics, self.spikes, self.loads, self.stories)
        self._by_key = dict(zip(("n_rows", "n_spikes", "n_loads", "n_stories"), logs, strict=True))

    def lengths(self) -> dict[str, int]:
        """Return the numbers of rows, by the keys that they have in a checkpoint."""
        return {key: log.n_rows for key, log in self._by_key.items()}

    def keep(self, lengths: dict[str, int]) -> None:
        """Keep as many rows as `lengths`, of a checkpoint, says; {} keeps none."""
        for key, log in self._by_key.items():
            log.keep(lengths.get(key, 0))

    def write_loads(self, step: int, layers: Iterable[int], counts: list[list[float]]) -> None:
        """Write the tokens of each expert in each layer, from the rows of `balance.router_statistics`."""
        rows = []
        for layer, numbers in zip(layers, counts, strict=True):
            # the last four numbers are sums of other statistics
            load = {f"e{expert}": int(n) for expert, n in enumerate(numbers[:-4])}
            rows.append({"step": step, "layer": layer, **load})
        self.loads.write(*rows)

    def sync(self) -> None:
        """Flush all to the disk."""
        for log in self._by_key.values():
            log.sync()

    def close(self) -> None:
        """Flush all to the disk for the last time, and say which rows are lost."""
        for log in self._by_key.values():
            log.close()
