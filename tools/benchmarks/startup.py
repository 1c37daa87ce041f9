"""Time what a user waits for: `--help` of each script, and a run's first step, ours and stock LitGPT's.

Run: uv run python tools/benchmarks/startup.py (2 min on 2 CPU cores; with --help_only 20 s)

A new process for each measurement, ours and stock in turn, medians in seconds, one JSON object on stdout.
"First step" is the time from starting Python to the first optimizer step: imports, settings, data, model,
LitGPT's trial validation, its count of FLOPs, one micro-batch. Stock is `litgpt pretrain`, on the
same shards by our data module (its own needs litdata), eager (compiling costs it a minute more), dense with
the width of the experts one token meets: stock LitGPT 0.5.13 cannot start a run with MoE layers (its count of
FLOPs raises in `LLaMAMoE` on the meta device).
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from litgpt_moe.cli import WorkFailed, run_command, run_script
from tools.benchmarks.machine import ROOT, parse

HELP_GOAL_S = 1.0
VOCABULARY = 512
REACHED = 77  # exit status of a run that came to its first optimizer step

# Both runs end inside their first optimizer step, at once: saving and clean-up are not start-up.
STOP_AT_FIRST_STEP = f"""
import os, sys
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
register_optimizer_step_pre_hook(lambda *_: os._exit({REACHED}))
torch.compiler.set_stance("force_eager")
"""
OURS = STOP_AT_FIRST_STEP + "import run_train; sys.exit(run_train.main(sys.argv[1:]))"
STOCK = STOP_AT_FIRST_STEP + "from litgpt.__main__ import main; sys.exit(main())"

SIZES = {"block_size": 64, "vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY}
SIZES |= {"n_layer": 2, "n_head": 2, "n_embd": 32}
LLAMA = {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm"}
MODEL: dict[str, object] = {"name": "startup", **SIZES, **LLAMA}
DENSE: dict[str, object] = {"mlp_class_name": "LLaMAMLP", "intermediate_size": 64}
EXPERTS: dict[str, object] = {"mlp_class_name": "LLaMAMoE", "moe_intermediate_size": 32}
EXPERTS |= {"n_expert": 8, "n_expert_per_token": 2}


@dataclass(frozen=True)
class StartupBenchmark:
    """What is timed, and how often."""

    rounds: int = 5
    """Runs of each; the median counts."""
    help_only: bool = False
    """Time --help alone, start no training."""


def scripts() -> list[Path]:
    """Return the scripts that a user can start; what only others import is not one."""
    paths = sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py")])
    return [path for path in paths if "\nif __name__ == " in path.read_text(encoding="utf-8")]


def timed(command: list[str], expected_status: int, folder: Path) -> float:
    """Return the seconds that the command took; WorkFailed if it ended with another status."""
    started = time.perf_counter()
    result = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
    seconds = time.perf_counter() - started
    if result.returncode != expected_status:
        said = (result.stderr or result.stdout).strip()[-1500:]
        raise WorkFailed(f"{command[-1]} ended with status {result.returncode}: {said}")
    return seconds


def benchmark_help(rounds: int) -> dict[str, float]:
    """Return the median seconds of each script's --help; the scripts take turns."""
    seconds: dict[str, list[float]] = {path.relative_to(ROOT).as_posix(): [] for path in scripts()}
    for _ in range(rounds):
        for name, values in seconds.items():
            values.append(timed([sys.executable, str(ROOT / name), "--help"], 0, ROOT))
    return {name: round(statistics.median(values), 3) for name, values in seconds.items()}


def write_inputs(folder: Path) -> dict[str, list[str]]:
    """Prepare a small data directory and both runs' settings; return the command of each run."""
    from litgpt_moe.data.prepare import prepare
    from litgpt_moe.data.settings import PrepareSettings

    data, tokenizer = folder / "data", folder / "tokenizer"
    prepare(PrepareSettings(data, "demo", tokenizer, train_tokenizer=VOCABULARY, demo_stories=500))
    shards = {f"{split}_data_path": str(data / split) for split in ("train", "val")}
    shards["tokenizer_dir"] = str(tokenizer)
    settings: dict[str, object] = {
        "out_dir": str(folder / "out"),
        "precision": "32-true",
        "tokenizer_dir": str(tokenizer),
        "data": {"class_path": "prepare_data.TextShards", "init_args": shards},
        "train": {"global_batch_size": 4, "micro_batch_size": 4, "max_tokens": 25600, "lr_warmup_steps": 2},
        "eval": {"interval": 100, "max_iters": 1},
        "devices": 1,
        "logger_name": "csv",
    }
    model = folder / "model.yaml"
    _write_yaml(model, MODEL | EXPERTS)
    _write_yaml(folder / "ours.yaml", settings)
    _write_yaml(folder / "stock.yaml", settings | {"model_name": "startup", "model_config": MODEL | DENSE})
    ours = ["--config", str(folder / "ours.yaml"), "--model_config", str(model), "--no_progress"]
    return {
        "ours": [sys.executable, "-c", OURS, *ours],
        "stock": [sys.executable, "-c", STOCK, "pretrain", "--config", str(folder / "stock.yaml")],
    }


def _write_yaml(path: Path, values: dict[str, object]) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def benchmark_first_step(rounds: int) -> dict[str, object]:
    """Return the median seconds to the first optimizer step, of ours and of stock, and their ratio."""
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory() as scratch:
        commands = write_inputs(Path(scratch))
        for number in range(rounds + 1):
            for name, values in seconds.items():
                took = timed(commands[name], REACHED, Path(scratch))
                print(f"first step, round {number}: {name} {took:.1f} s", file=sys.stderr)
                if number:  # the first round reads the libraries from disk
                    values.append(took)
    ours, stock = statistics.median(seconds["ours"]), statistics.median(seconds["stock"])
    return {"ours_s": round(ours, 2), "stock_s": round(stock, 2), "stock_over_ours": round(stock / ours, 3)}


def run(settings: StartupBenchmark) -> str:
    """Return the figures as JSON."""
    help_s = benchmark_help(settings.rounds)
    report: dict[str, object] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "rounds": settings.rounds,
        "help_s": help_s,
        "help_goal_met": max(help_s.values()) < HELP_GOAL_S,
    }
    if not settings.help_only:
        report["first_step"] = benchmark_first_step(settings.rounds)
    return json.dumps(report, indent=2)


def main(argv: list[str] | None = None) -> int:
    """Print the figures as JSON; 1 when a run failed."""
    settings = parse(__doc__, StartupBenchmark, argv)
    return run_command(lambda: run(settings))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
