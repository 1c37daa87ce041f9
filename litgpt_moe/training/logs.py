"""What a run reports: times and throughput, the row of metrics, the line or the bar on the terminal."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

from lightning.fabric.loggers.logger import Logger
from tqdm import tqdm

from litgpt_moe.cli import command_line
from litgpt_moe.hardware import peak_memory_gb
from litgpt_moe.processes import is_main_process
from litgpt_moe.training.csv_log import RunLogs
from litgpt_moe.training.guard import Spike
from litgpt_moe.training.run import Run


class Clock:
    """The time that training takes, over all processes that one run has had."""

    def __init__(self, start_step: int) -> None:
        self.start_step, self.began = start_step, time.perf_counter()
        # of the processes that this one resumes
        self.earlier_s = 0.0
        self.longest_step_s = 0.0
        self.first_step_at = self.last_step_at = 0.0
        self._row_step, self._row_s = start_step, 0.0
        self._paused_s = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training so far, with validation and saving."""
        return self.earlier_s + time.perf_counter() - self.began

    def resume(self, earlier_s: float) -> None:
        """Go on from the seconds that a checkpoint holds."""
        self.earlier_s = self._row_s = earlier_s

    def end_step(self) -> None:
        """Note that an optimizer step has ended."""
        now = time.perf_counter()
        self.longest_step_s = max(self.longest_step_s, now - (self.last_step_at or self.began))
        self.last_step_at = now
        self.first_step_at = self.first_step_at or now

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave a validation out of the rate of the next row."""
        started = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - started

    def steps_per_s(self, step: int, seconds: float) -> float:
        """Return the steps per second since the last call, validation left out; nan if no time has passed."""
        n_steps, elapsed = step - self._row_step, seconds - self._row_s - self._paused_s
        self._row_step, self._row_s, self._paused_s = step, seconds, 0.0
        return n_steps / elapsed if elapsed > 0 else math.nan

    def overall_steps_per_s(self, step: int) -> float | None:
        """Return the steps per second from this process's first step to its last, None for fewer than two."""
        n_steps, seconds = step - self.start_step - 1, self.last_step_at - self.first_step_at
        return n_steps / seconds if n_steps > 0 and seconds > 0 else None


class StepFigures(NamedTuple):
    """What is known of the latest step, on the host and over all ranks."""

    loss: float = math.nan
    grad_norm: float = math.nan
    learning_rate: float = math.nan


def validation_row(run: Run, step: int, seconds: float, losses: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a validation: when it was, and its losses."""
    when = {"step": step, "total_tokens": step * run.tokens_per_step, "time_s": seconds}
    return when | {key: float(value) for key, value in losses.items()}


def metric_row(
    run: Run,
    step: int,
    seconds: float,
    steps_per_s: float,
    figures: StepFigures,
    peak_flops: float,
    from_litgpt: dict[str, Any],
) -> dict[str, Any]:
    """Return the row of a step in place of LitGPT's: its loss is rank 0's, its rates count validations in.

    The router's statistics, the epoch and the skipped steps are for the caller to add.
    """
    tokens, rate = step * run.tokens_per_step, steps_per_s * run.tokens_per_step
    return {
        "step": step,
        "total_tokens": tokens,
        "time_s": seconds,
        **figures._asdict(),
        "tokens_per_s": rate,
        # model FLOPs utilization: the share of what the devices could do at most
        "mfu": rate * run.facts.flops_per_token / peak_flops,
        "flops": tokens * run.facts.flops_per_token,
        "peak_memory_gb": peak_memory_gb(),
        **{key: from_litgpt[key] for key in ("iter", "iter_time", "remaining_time")},
    }


def metric_line(row: dict[str, Any], n_steps: int, val_loss: float | None) -> str:
    """Return a row of metrics as a line for a person."""
    parts = (
        f"step {row['step']:,}/{n_steps:,}",
        f"epoch {row['epoch'] + 1}",
        f"loss {row['loss']:.3f}" + ("" if val_loss is None else f", val {val_loss:.3f}"),
        f"lr {row['learning_rate']:.2e}",
        f"norm {row['grad_norm']:.2f}",
        f"{row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.1%}",
        *_worst_layer(row),
        f"{timedelta(seconds=int(row['remaining_time']))} left",
    )
    return " | ".join(parts)


def _worst_layer(row: dict[str, Any]) -> list[str]:
    """Return what the line says of the layer whose fullest expert is furthest above the mean."""
    prefix = "moe/load_imbalance/layer_"
    loads = [(value, key.removeprefix(prefix)) for key, value in row.items() if key.startswith(prefix)]
    if not loads:
        return []
    value, layer = max(loads)
    dead = int(row[f"moe/dead_experts/layer_{layer}"])
    return [f"load x{value:.2f} in layer {int(layer)}" + (f", {dead} dead" if dead else "")]


class MetricLog(Logger):
    """The logger of every run: metrics.csv, and on the terminal a live bar or else a line for each row."""

    # Lightning asks for both; one log holds all resumes of a run, so it has no version
    name = property(lambda self: "csv")
    version = property(lambda self: None)

    def __init__(self, run: Run, logs: RunLogs) -> None:
        self.run, self.logs = run, logs
        self.is_live = run.settings.progress and sys.stderr.isatty() and is_main_process()
        self.bar: tqdm | None = None
        # loss and val_loss
        self.latest: dict[str, float] = {}

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Do nothing: the settings are in run.json and in every checkpoint."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row and show it."""
        if not is_main_process():
            return
        self.logs.metrics.write(metrics)
        self.latest |= {key: float(metrics[key]) for key in ("loss", "val_loss") if key in metrics}
        if self.bar is not None:
            self.bar.set_postfix({key: f"{value:.3f}" for key, value in self.latest.items()}, refresh=False)
        elif "loss" in metrics:
            self.print(metric_line(metrics, self.run.n_steps, self.latest.get("val_loss")))

    def report_spike(self, step: int, figures: StepFigures, spike: Spike) -> None:
        """Write down where the batch of a loss spike lies, so that it can be looked at."""
        first = (step - 1) * self.run.settings.train.global_batch_size
        row = {"step": step, "loss": figures.loss, "grad_norm": figures.grad_norm, **spike._asdict()}
        self.logs.spikes.write({**row, "first_sequence": first})
        self.print(
            f"step {step}: the loss {figures.loss:.3f} is far above {spike.mean:.3f} +- {spike.sigma:.3f} "
            "before; its stories: uv run python tools/show_batch.py "
            + command_line(self.run.settings.out_dir, "--step", step)
        )

    def advance(self, step: int) -> None:
        """Move the bar on after a step; the first one makes it."""
        n_tokens = self.run.tokens_per_step
        if self.bar is None and self.is_live:
            total, done = self.run.n_steps * n_tokens, (step - 1) * n_tokens
            self.bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, dynamic_ncols=True)
        if self.bar is not None:
            self.bar.update(n_tokens)

    def print(self, *texts: Any, **_: Any) -> None:
        """Print a line on stderr, except LitGPT's own that the bar, our lines and our summary replace."""
        line = " ".join(map(str, texts))
        # litgpt 0.5.13's summary divides by a clock reading; its epoch begins at 1 again after a resume
        if line.startswith(("| ", "-----", "Epoch ")) or not is_main_process():
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def finalize(self, status: str) -> None:
        """Finish the bar."""
        if self.bar is not None:
            self.bar.close()
