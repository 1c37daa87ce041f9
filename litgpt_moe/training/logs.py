"""What a run reports: rows of metrics, in CSV files and as the line or the bar on the terminal."""

import contextlib
import csv
import errno
import io
import itertools
import math
import os
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from litgpt import Config
from tqdm import tqdm

from litgpt_moe.balance import STATISTICS
from litgpt_moe.cli import command_line, note, printable
from litgpt_moe.files import open_no_link, write_whole
from litgpt_moe.hardware import peak_memory_gb
from litgpt_moe.processes import is_main_process
from litgpt_moe.training.guard import Spike
from litgpt_moe.training.run import Run

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
        self.has_failed = False

    def keep(self, n_rows: int) -> None:
        """Keep the first `n_rows` rows, those of the checkpoint; the resumed run writes the later ones again.

        The file is rewritten whole with this log's columns, followed by those that only the file has.
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
        with self._failure_is_reported():
            self._append()

    def _append(self) -> None:
        if any(folder.is_symlink() for folder in (self.path.parent, self.path.parent.parent)):
            raise OSError(errno.ELOOP, "its folder has become a link")
        # logrotate's copytruncate empties a file in its place
        if not self.path.is_file() or not self.path.stat().st_size:
            if (n_lost := self.n_rows - len(self._waiting)) > 0:
                note(f"Warning: {self.path} is gone, with {n_lost:,} rows; it begins anew")
                # a checkpoint records how many rows to keep
                self.n_rows = len(self._waiting)
            self._rewrite([])
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", encoding="utf-8", newline="", opener=open_no_link) as file:
                csv.DictWriter(file, self.columns).writerows(self._waiting)
        except OSError:
            # a part of the rows may be in the file, and all are written again later
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self._waiting.clear()

    @contextlib.contextmanager
    def _failure_is_reported(self) -> Iterator[None]:
        """Report an error of the file instead of raising it: once, until the log can be written again."""
        try:
            yield
            self.has_failed = False
        except OSError as error:
            if not self.has_failed:
                reason = error.strerror or error
                note(f"Warning: {self.path} cannot be written ({reason}); training goes on, its rows wait")
            self.has_failed = True

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        # a torn row may have more values than there are columns
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue())

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
        for layer, numbers in zip(layers, counts, strict=True):
            # the last four numbers are sums of other statistics
            load = {f"e{expert}": int(n) for expert, n in enumerate(numbers[:-4])}
            self.loads.write({"step": step, "layer": layer, **load})

    def sync(self) -> None:
        """Flush all to the disk."""
        for log in self._by_key.values():
            log.sync()


class StepFigures(NamedTuple):
    """The figures of the latest step, on the host and over all ranks."""

    loss: float = math.nan
    grad_norm: float = math.nan
    learning_rate: float = math.nan


def validation_row(run: Run, step: int, seconds: float, losses: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a validation: when it was, and its losses."""
    when = {"step": step, "total_tokens": run.tokens_at(step), "time_s": seconds}
    return when | {key: float(value) for key, value in losses.items()}


def metric_row(
    run: Run,
    step: int,
    seconds: float,
    steps_per_s: float,
    figures: StepFigures,
    peak_flops: float | None,
    from_litgpt: dict[str, Any],
) -> dict[str, Any]:
    """Return the row of a step, without the routers' statistics, the epoch and the skipped steps.

    It replaces LitGPT's, whose loss is rank 0's and whose rates include the validations. `peak_flops` is that
    of all devices, None where it is not known.
    """
    tokens, rate = run.tokens_at(step), steps_per_s * run.tokens_per_step
    # model FLOPs utilization: the share of the devices' peak
    mfu = {} if peak_flops is None else {"mfu": rate * run.facts.flops_per_token / peak_flops}
    return {
        "step": step,
        "total_tokens": tokens,
        "time_s": seconds,
        **figures._asdict(),
        "tokens_per_s": rate,
        **mfu,
        "flops": tokens * run.facts.flops_per_token,
        "peak_memory_gb": peak_memory_gb(),
        **{key: from_litgpt[key] for key in ("iter", "iter_time", "remaining_time")},
    }


def metric_line(row: dict[str, Any], n_steps: int, val_loss: float | None) -> str:
    """Return a row of metrics as the line on the terminal."""
    parts = (
        f"step {row['step']:,}/{n_steps:,}",
        f"epoch {row['epoch'] + 1}",
        f"loss {row['loss']:.3f}" + ("" if val_loss is None else f", val {val_loss:.3f}"),
        f"lr {row['learning_rate']:.2e}",
        f"norm {row['grad_norm']:.2f}",
        *([f"scale {row['loss_scale']:,g}"] if "loss_scale" in row else []),
        f"{row['tokens_per_s']:,.0f} tokens/s" + (f", MFU {row['mfu']:.1%}" if "mfu" in row else ""),
        *_worst_layer(row),
        f"{timedelta(seconds=int(row['remaining_time']))} left",
    )
    return " | ".join(parts)


def _worst_layer(row: dict[str, Any]) -> list[str]:
    prefix = "moe/load_imbalance/layer_"
    loads = [(value, key.removeprefix(prefix)) for key, value in row.items() if key.startswith(prefix)]
    if not loads:
        return []
    value, layer = max(loads)
    dead = int(row[f"moe/dead_experts/layer_{layer}"])
    return [f"load x{value:.2f} in layer {int(layer)}" + (f", {dead} dead" if dead else "")]


class MetricLog:
    """Fabric's logger in every run: metrics.csv, and on the terminal a live bar or a line for each row."""

    def __init__(self, run: Run, logs: RunLogs) -> None:
        self.run, self.logs = run, logs
        self.is_live = run.settings.progress and sys.stderr.isatty() and is_main_process()
        self.bar: tqdm | None = None
        self.latest: dict[str, float] = {}
        """The latest loss and val_loss in the log, and `step`, the one of that loss."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row and show it."""
        if not is_main_process():
            return
        self.logs.metrics.write(metrics)
        self.latest |= {key: float(metrics[key]) for key in ("loss", "val_loss") if key in metrics}
        if "loss" in metrics:
            self.latest["step"] = metrics["step"]
        if self.bar is not None:
            losses = {key: f"{value:.3f}" for key, value in self.latest.items() if key != "step"}
            self.bar.set_postfix(losses, refresh=False)
        elif "loss" in metrics:
            self.print(metric_line(metrics, self.run.n_steps, self.latest.get("val_loss")))

    def report_spike(self, step: int, figures: StepFigures, spike: Spike) -> None:
        """Log a loss spike with the place of its batch in the data, for tools/show_batch.py."""
        first = self.run.batch_sizes.sequences(step - 1)
        row = {"step": step, "loss": figures.loss, "grad_norm": figures.grad_norm, **spike._asdict()}
        self.logs.spikes.write({**row, "first_sequence": first})
        self.print(
            f"step {step}: the loss {figures.loss:.3f} is far above {spike.mean:.3f} +- {spike.sigma:.3f} "
            "before; its stories: uv run python tools/show_batch.py "
            + command_line(self.run.settings.out_dir, "--step", step)
        )

    def advance(self, step: int) -> None:
        """Move the bar on after a step; the first step creates it."""
        n_tokens = self.run.tokens_per_step
        if self.bar is None and self.is_live:
            total, done = self.run.tokens_at(self.run.n_steps), self.run.tokens_at(step - 1)
            self.bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, dynamic_ncols=True)
        if self.bar is not None:
            self.bar.update(n_tokens)

    def print(self, *texts: Any, **_: Any) -> None:
        """Print a line on stderr, except for LitGPT's own metrics and summary, which ours replace."""
        line = printable(" ".join(map(str, texts)))
        # litgpt 0.5.13's summary divides by a clock reading, and its epochs restart at 1 after a resume
        if line.startswith(("| ", "-----", "Epoch ")) or not is_main_process():
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def finalize(self, status: str) -> None:
        """Write the rows that wait, and finish the bar."""
        self.logs.sync()
        if self.bar is not None:
            self.bar.close()
