"""What a run will take: time, passes through the data, disk and memory, told before and at its beginning."""

import contextlib
import csv
import math
import statistics
import time

import torch

from litgpt_moe import budget
from litgpt_moe.hardware import fits, gpu_bytes, has_cuda, memory_bytes, peak_flops
from litgpt_moe.planning import StepPlanner
from litgpt_moe.training import fit
from litgpt_moe.training.csv_log import METRICS_FILE
from litgpt_moe.training.folder_checks import disk_bytes, free_bytes
from litgpt_moe.training.memory import planner_of, smaller_micro_batches
from litgpt_moe.training.run import Run

# a validation's micro-batch has no backward pass, which takes two thirds of a step's
FORWARD_SHARE = 1 / 3


class Forecast:
    """Tells once, when two steps of this process have been measured, what the run takes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._ended: float | None = None

    def after(self, step: int) -> str | None:
        """Return the line after the second step of this process, whose first one prepares much."""
        if step > self.run.start_step + 2:
            return None
        ended, self._ended = self._ended, time.perf_counter()
        return None if ended is None else forecast(self.run, step, self._ended - ended)


def forecast(run: Run, step: int, step_s: float) -> str:
    """Return the line on the run after `step` steps of which one takes `step_s` seconds."""
    settings, n_left = run.settings, run.n_steps - step
    batch_s = step_s / run.accumulation
    n_validations = n_left // settings.eval.interval + settings.eval.final_validation
    left_s = n_left * step_s + n_validations * settings.eval.max_iters * batch_s * FORWARD_SHARE
    parts = [f"about {budget.time_words(left_s)} for {n_left:,} more steps" if n_left else "the last step"]
    limit_s = settings.train.max_time
    # by the clock it is the time of the whole run
    used_s = run.used_time.seconds if run.is_timed else 0.0
    if limit_s is not None and limit_s - used_s - (time.monotonic() - run.started) < left_s:
        parts[0] += f" (train.max_time ends the run after {budget.time_words(limit_s)})"
    if passes := passes_of(run):
        parts.append(passes)
    return f"Plan    {'; '.join([*parts, f'{budget.size_words(disk_bytes(run))} of checkpoints'])}"


def passes_of(run: Run) -> str:
    """Return how often the whole run goes through its data; "" where that is not known."""
    # data of another class, or not prepared
    with contextlib.suppress(ValueError, OSError):
        if (in_pass := fit.pass_tokens(run.data, run.block_size)) and run.data_dir and run.n_steps:
            return budget.passes_words(run.settings.train.n_tokens, in_pass, run.data_dir)
    return ""


def plan_text(run: Run) -> str:
    """Return the plan of a run that has been set up, which trains nothing: for `run_train.py --plan`."""
    facts, is_on_gpu = run.facts, run.settings.accelerator != "cpu" and has_cuda()
    device = torch.device("cuda" if is_on_gpu else "cpu")
    has = gpu_bytes(run.devices) if is_on_gpu else memory_bytes()
    free = free_bytes(run.settings.out_dir)
    rate = run.optimizer["init_args"].get("lr")
    proposed = fit.proposed_rate(run.config, facts)
    at_once = f", {budget.size_words(disk_bytes(run))} at most at a time" if run.n_steps else ""
    counts = f"{facts.total_params:,} parameters, {facts.active_params:,} active per token"
    cost = f"{facts.flops_per_token / 1e6:,.0f} MFLOPs a token"
    return "\n".join(
        [
            f"Model   {run.config.name}: {counts}, {cost}, vocabulary {run.config.vocab_size:,}",
            *_memory_lines(run, planner_of(run, device.type), has),
            _time_line(run, device),
            f"Data    {passes_of(run) or 'not prepared yet, or of a class whose tokens are not known'}",
            f"Rate    {rate:g}; the rule gives {proposed:g} ({budget.RATE_SOURCE})"
            if isinstance(rate, float)
            else f"Rate    {rate}",
            f"Disk    {budget.size_words(run.checkpoint_bytes)} a checkpoint{at_once}; "
            f"{budget.size_words(free)} are free",
        ]
    )


def _memory_lines(run: Run, planner: StepPlanner, has: int) -> list[str]:
    """Return the memory of a step by its parts, and its peak by micro-batch size."""
    size = run.settings.train.micro_batch_size
    step = planner.memory(size, run.accumulation > 1, run.world_size > 1)
    room = f"of {has / 1e9:.1f}" + ("" if fits(step.peak, has) else ", which is too little")
    others = {
        n: planner.memory(n, has_buckets=run.world_size > 1).peak for n in smaller_micro_batches(run)[:5]
    }
    by_size = ", ".join(f"{n}: {peak / 1e9:.2f}" for n, peak in others.items())
    lines = [f"Memory  micro-batch of {size}: {step} {room}"]
    return [*lines, f"        smaller ones, in GB: {by_size}"] if by_size else lines


def _time_line(run: Run, device: torch.device) -> str:
    if not run.n_steps:
        return "Time    known when the data are prepared: prepare_data.py"
    tokens = run.settings.train.n_tokens - run.tokens_at(run.start_step)
    if rate := measured_rate(run):
        seconds, how = tokens / rate, f"at {rate:,.0f} tokens a second, measured so far in this run"
    else:
        peak = peak_flops(device, run.precision) * run.world_size
        mfu = budget.TYPICAL_MFU if device.type == "cuda" else budget.CPU_MFU
        seconds = budget.train_seconds(tokens, run.facts.flops_per_token, peak, mfu)
        how = f"at a typical {mfu:.0%} of {peak / 1e12:.3g} TFLOP/s; a run tells its own after two steps"
    n_steps = run.n_steps - run.start_step
    return f"Time    about {budget.time_words(seconds)} for {n_steps:,} steps, {tokens:,} tokens, {how}"


def measured_rate(run: Run) -> float | None:
    """Return the tokens a second in the log of the run that is resumed, the median; None without one."""
    if run.resume is None:
        return None
    # a damaged log is reported where the run opens it
    with contextlib.suppress(ValueError, OSError, csv.Error):
        with (run.settings.out_dir / "logs" / METRICS_FILE).open(encoding="utf-8", newline="") as file:
            rates = [float(row["tokens_per_s"]) for row in csv.DictReader(file) if row.get("tokens_per_s")]
        return statistics.median(filter(math.isfinite, rates))
    return None
