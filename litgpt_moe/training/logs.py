"""What a run reports: the rows of metrics, and each as the line or the bar on the terminal."""

import math
import sys
from datetime import timedelta
from typing import Any, NamedTuple

from litgpt_moe.cli import command_line, no_bar, note
from litgpt_moe.hardware import peak_memory_gb
from litgpt_moe.processes import is_main_process
from litgpt_moe.terminal import shows_bars
from litgpt_moe.training.bar import RunBar
from litgpt_moe.training.csv_log import RunLogs
from litgpt_moe.training.forecast import Forecast
from litgpt_moe.training.guard import Spike
from litgpt_moe.training.run import Run


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


def validation_line(row: dict[str, Any], n_steps: int) -> str:
    """Return the row of a validation as the line on the terminal."""
    loss, perplexity = float(row["val_loss"]), float(row["val_ppl"])
    return f"step {row['step']:,}/{n_steps:,} | validation loss {loss:.3f}, perplexity {perplexity:.4g}"


class MetricLog:
    """Fabric's logger in every run: metrics.csv, and on the terminal a live bar or a line for each row."""

    def __init__(self, run: Run, logs: RunLogs) -> None:
        self.run, self.logs = run, logs
        self.is_live = run.settings.progress and not no_bar() and shows_bars(sys.stderr) and is_main_process()
        self.bar: RunBar | None = None
        self.forecast = Forecast(run)
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
            self.bar.set_losses(self.latest)
        if "val_loss" in metrics:
            self.print(validation_line(metrics, self.run.n_steps))
        elif self.bar is None and "loss" in metrics:
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

    def show(self, doing: str) -> None:
        """Say on the bar what the run does now, "" for training; the first call makes the bar appear."""
        if self.bar is not None:
            self.bar.show(doing)
        elif self.is_live:
            ends = self.run.tokens_at(self.run.n_steps), self.run.tokens_at(self.run.start_step)
            if self.run.is_timed:
                ends = self.run.settings.train.max_time or 0.0, self.run.used_time.seconds
            self.bar = RunBar(*ends, doing, self.run.is_timed)

    def advance(self, step: int, used_s: float) -> None:
        """Move the bar on after a step, when the run has used so many seconds."""
        if self.bar is not None:
            self.bar.advance(used_s if self.run.is_timed else self.run.tokens_at(step))
        if is_main_process() and (line := self.forecast.after(step)):
            self.print(line)

    def print(self, text: str) -> None:
        """Print a line on stderr, above the bar if there is one."""
        if is_main_process():
            note(text)

    def finalize(self, status: str) -> None:
        """Write the rows that wait, or say that they are lost, and finish the bar."""
        self.logs.close()
        if self.bar is not None:
            self.bar.close()
