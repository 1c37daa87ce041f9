"""What a run prints at its start, at its end and when it fails."""

import errno
import sys
from datetime import timedelta

import torch

from litgpt_moe.cli import command_line, first_line, is_out_of_memory, printable
from litgpt_moe.data.settings import DEFAULT_DATA_DIR
from litgpt_moe.files import is_disk_full
from litgpt_moe.hardware import has_cuda, peak_memory_gb, precision_dtype
from litgpt_moe.kernels.choice import describe_kernel
from litgpt_moe.locks import FolderInUse
from litgpt_moe.terminal import wrapped
from litgpt_moe.training.hooks import LoopHooks
from litgpt_moe.training.memory import out_of_memory
from litgpt_moe.training.parse import resume_command
from litgpt_moe.training.run import Run
from litgpt_moe.training.steps import RunFailed
from litgpt_moe.training.stories import final_story


def describe(run: Run, device: torch.device, mode: str, why: str) -> str:
    """Return the lines about the model, the device and the length of the run."""
    total, active = run.facts.total_params, run.facts.active_params
    dtype = precision_dtype(run.precision)
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() == "high"
    has_idle_mps = device.type == "cpu" and torch.backends.mps.is_available()
    mps = ", and there is MPS: try it by --accelerator mps" if has_idle_mps else ""
    resumed = f", resuming after step {run.start_step} ({run.resume.folder})" if run.resume else ""
    steps = f"{run.n_steps:,} steps of {run.tokens_per_step:,} tokens"
    if len(run.batch_sizes.changes) > 1:
        steps = f"{run.n_steps:,} steps, now of {run.tokens_per_step:,} tokens"
    if run.is_timed:
        time = timedelta(seconds=round(run.settings.train.max_time or 0))
        used = f", {timedelta(seconds=round(run.used_time.seconds))} of them used" if run.resume else ""
        steps = f"{time} in all{used}, at most {steps}"
    return (
        f"Model   {run.config.name}: {total:,} parameters, {active:,} active per token, "
        f"vocabulary {run.config.vocab_size:,}\n"
        f"Device  {device}, {run.precision}{' (TF32)' if tf32 else ''}, {mode} ({why}){mps}\n"
        f"Experts {describe_kernel(run.config, device, dtype)}\n"
        f"Run     {steps}, seed {run.settings.seed}{resumed}"
    )


def report(hooks: LoopHooks, argv: list[str]) -> str:
    """Return the run's figures, a story and the next commands; for a stopped run, how to continue it."""
    run, latest, rate = hooks.run, hooks.metrics.latest, hooks.clock.overall_steps_per_s(hooks.step)
    if hooks.ending:
        stopped = f"Stopped after step {hooks.step:,} of {run.n_steps:,} ({hooks.ending}). To go on:"
        return f"{stopped}\n  {resume_command(argv)}"
    final, n_steps = run.settings.out_dir / "final", hooks.step - run.start_step
    speed = f", {rate * run.tokens_per_step:,.0f} tokens/s with validation and saving" if rate else ""
    lines = [f"\nTrained    {n_steps * run.tokens_per_step:,} tokens in {n_steps} steps{speed}"]
    losses = []
    if "loss" in latest:
        # the last steps may lie behind the last row of the log
        step = "" if latest["step"] == hooks.step else f" (step {latest['step']:,})"
        losses.append(f"{latest['loss']:.3f} in training{step}")
    if "val_loss" in latest:
        losses.append(f"{latest['val_loss']:.3f} in validation")
    lines += [f"Loss       {', '.join(losses)}"] if losses else []
    if n_skipped := hooks.judge.guard.n_skipped:
        lines.append(f"Skipped    {n_skipped} steps without a finite gradient")
    if (scaling := hooks.scaling) is not None:
        lines.append(f"Loss scale {scaling.current.item():,g}; {scaling.n_overflows} steps overflowed")
    lines.append(f"Memory     {peak_memory_gb():.2f} GB{' on the GPU' if has_cuda() else ''} at its peak")
    lines += [f"Checkpoint {final}", f"Log        {hooks.logs.metrics.path}"]
    if run.data_dir is not None:
        story = wrapped(printable(final_story(final)), sys.stdout)
        lines.append(f"\nA story from it:\n\n{story}\n")
    data_flag = () if run.data_dir in (None, DEFAULT_DATA_DIR) else ("--data_dir", run.data_dir)
    lines += [
        "Next:",
        f'  uv run python generate.py {command_line("--ckpt_dir", final)} --prompt "One day, a little dog"',
        f"  uv run python evaluate.py {command_line('--ckpt_dir', final, *data_flag)}",
        f"  uv run python tools/report.py {command_line(run.settings.out_dir)}",
    ]
    if run.demo_data:
        lines += [
            "These were the built-in demo stories. For real ones:",
            "  uv run python prepare_data.py --dataset tinystories --data_dir data/tinystories "
            "--tokenizer_dir data/tinyllama",
        ]
    return "\n".join(lines)


def failure(error: BaseException, run: Run, argv: list[str]) -> str | None:
    """Return the sentence for an error in training, None for one that only a bug of ours can cause."""
    out_dir, text = run.settings.out_dir, str(error)
    if is_out_of_memory(error) or getattr(error, "errno", None) == errno.ENOMEM:
        return out_of_memory(run, argv)
    if isinstance(error, RunFailed | FolderInUse):
        return text
    if type(error).__name__ == "InductorError":  # its import takes a second
        return f"the model cannot be compiled ({first_line(error)}); put that right, or use --compile off"
    # gloo: "Connection closed by peer", "Connection reset by peer"
    if "by peer" in text:
        return "another process of this run has ended, see its message; then continue with --resume auto"
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        way_on = "lower data.init_args.num_workers and continue with --resume auto"
        return f"a worker process that reads the data was killed (out of memory?); {way_on}"
    if "in DataLoader worker process" in text:
        # the last line of the worker's traceback
        text = text.strip().splitlines()[-1]
    if is_disk_full(error):
        return f"{out_dir}: the disk is full; make room and continue with --resume auto"
    return f"{text}; put it right and continue with --resume auto" if isinstance(error, OSError) else None
