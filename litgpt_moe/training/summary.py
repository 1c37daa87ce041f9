"""What a run says of itself: at its start, in logs/run.json, at its end, and when it fails."""

import math
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import litgpt_moe
from litgpt_moe.cli import command_line
from litgpt_moe.data.module import TextShards
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.files import FolderInUse, is_disk_full, write_json
from litgpt_moe.hardware import has_cuda, peak_memory_gb
from litgpt_moe.kernels.choice import experts_path
from litgpt_moe.training.hooks import LoopHooks
from litgpt_moe.training.run import Run
from litgpt_moe.training.settings import plain_settings
from litgpt_moe.training.steps import RunFailed
from litgpt_moe.training.stories import final_story


@dataclass(frozen=True)
class Result:
    """What came of a run in this process; nan or None is what there was not."""

    step: int
    """Steps done, those of the processes before included."""
    ending: str
    """Why it was stopped before its last step, "" if it was not."""
    loss: float
    val_loss: float | None
    n_skipped: int
    tokens_per_s: float | None
    """From the first to the last step, validation and saving included."""
    log: Path

    @classmethod
    def of(cls, hooks: LoopHooks) -> "Result":
        """Return the result of the run that the hooks have followed."""
        rate = hooks.clock.overall_steps_per_s(hooks.step)
        return cls(
            step=hooks.step,
            ending=hooks.ending,
            loss=hooks.figures.loss,
            val_loss=hooks.metrics.latest.get("val_loss"),
            n_skipped=hooks.guard.n_skipped,
            tokens_per_s=rate and rate * hooks.run.tokens_per_step,
            log=hooks.logs.metrics.path,
        )


def describe(run: Run, device: torch.device, mode: str, why: str) -> str:
    """Return the lines that say what runs, and on what."""
    total, active = run.facts.total_params, run.facts.active_params
    dtype = torch.bfloat16 if run.precision.startswith("bf16") else torch.float32
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() == "high"
    has_idle_mps = device.type == "cpu" and torch.backends.mps.is_available()
    mps = ", and there is MPS: try it by --accelerator mps" if has_idle_mps else ""
    resumed = f", resuming after step {run.start_step} ({run.resume.folder})" if run.resume else ""
    return (
        f"Model   {run.config.name}: {total:,} parameters, {active:,} active per token\n"
        f"Device  {device}, {run.precision}{' (TF32)' if tf32 else ''}, {mode} ({why}){mps}\n"
        f"Experts {experts_path(run.config, device, dtype)}\n"
        f"Run     {run.n_steps:,} steps of {run.tokens_per_step:,} tokens, seed {run.settings.seed}{resumed}"
    )


def write_run_facts(run: Run) -> None:
    """Write logs/run.json: the command, the settings and the versions, for reports."""
    versions = {"python": sys.version.split()[0], "litgpt_moe": litgpt_moe.__version__}
    versions |= {name: version(name) for name in ("torch", "litgpt", "lightning", "numpy")}
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    facts = {"command": command, "settings": plain_settings(run.settings), "versions": versions}
    write_json(run.settings.out_dir / "logs/run.json", facts)


def report(run: Run, result: Result, resume_command: str) -> str:
    """Return the run's figures, a story, and what to do next; of a stopped run, how to go on."""
    if result.ending:
        stopped = f"Stopped after step {result.step:,} of {run.n_steps:,} ({result.ending}). To go on:"
        return f"{stopped}\n  {resume_command}"
    final, n_steps = run.settings.out_dir / "final", result.step - run.start_step
    # of the last step, which may lie between two rows of the log
    losses = [] if math.isnan(result.loss) else [f"{result.loss:.3f} in training"]
    losses += [] if result.val_loss is None else [f"{result.val_loss:.3f} in validation"]
    rate = f", {result.tokens_per_s:,.0f} tokens/s with validation and saving" if result.tokens_per_s else ""
    lines = [f"\nTrained    {n_steps * run.tokens_per_step:,} tokens in {n_steps} steps{rate}"]
    lines += [f"Loss       {', '.join(losses)}"] if losses else []
    if result.n_skipped:
        lines.append(f"Skipped    {result.n_skipped} steps without a finite gradient")
    lines.append(f"Memory     {peak_memory_gb():.2f} GB{' on the GPU' if has_cuda() else ''} at its peak")
    lines += [f"Checkpoint {final}", f"Log        {result.log}"]
    if isinstance(run.data, TextShards):
        lines.append(f"\nA story from it:\n\n{final_story(final)}\n")
    return "\n".join([*lines, *_next_commands(run, final)])


def _next_commands(run: Run, final: Path) -> list[str]:
    usual = PrepareSettings.data_dir
    folder = Path(run.data.train_data_path).parent if isinstance(run.data, TextShards) else usual
    data_flag = () if folder == usual else ("--data_dir", folder)
    lines = [
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
    return lines


def failure(error: Exception, out_dir: Path) -> str | None:
    """Return the sentence for a failure in training, None for one that only a bug can cause."""
    if isinstance(error, RunFailed | FolderInUse):
        return str(error)
    # gloo's "Connection closed by peer", or "reset"
    if "by peer" in str(error):
        return "another process of this run has ended, see its message; then continue with --resume auto"
    if is_disk_full(error):
        return f"{out_dir}: the disk is full; make room and continue with --resume auto"
    return f"{error}; put it right and continue with --resume auto" if isinstance(error, OSError) else None
