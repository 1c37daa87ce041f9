"""What a run reports: the rows of metrics, and each as the line or the bar on the terminal."""

import math
import sys
from datetime import timedelta
from typing import Any, NamedTuple

from tqdm import tqdm

from litgpt_moe.cli import command_line, printable
from litgpt_moe.hardware import peak_memory_gb
from litgpt_moe.processes import is_main_process
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


class MetricLog:
    """Fabric's logger in every run: metrics.csv, and on the terminal a live bar or a line for each row."""

    def __init__(self, run: Run, logs: RunLogs) -> None:
        self.run, self.logs = run, logs
        self.is_live = run.settings.progress and sys.stderr.isatty() and is_main_process()
        self.bar: tqdm | None = None
        self.hides_validation = False
        """Whether LitGPT's lines about a validation stay out, whose loss is not the real one."""
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
        if is_main_process() and (line := self.forecast.after(step)):
            self.print(line)

    def print(self, *texts: Any, **_: Any) -> None:
        """Print a line on stderr, except for LitGPT's own metrics and summary, which ours replace."""
        line = printable(" ".join(map(str, texts)))
        # litgpt 0.5.13's summary divides by a clock reading, and its epochs restart at 1 after a resume
        if line.startswith(("| ", "-----", "Epoch ")) or not is_main_process():
            return
        if self.hides_validation and line.startswith(("iter ", "Final evaluation")):
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def finalize(self, status: str) -> None:
        """Write the rows that wait, or say that they are lost, and finish the bar."""
        self.logs.close()
        if self.bar is not None:
            self.bar.close()
