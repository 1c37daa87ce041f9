"""Time training on an idle machine and beside one busy process, by how long OpenMP's threads spin.

Run: uv run python tools/benchmarks/busy.py      (8 min on 2 CPU cores; nothing else may run)

Each measurement is run_train.py in a process of its own on the demo stories; they take turns. "chosen" is
what litgpt_moe/threads.py chooses, "torch" is libgomp's own 300,000 spins, "one thread" has nobody to wait
for. It prints the medians of tokens/s, idle and busy, and each as a share of the best of its line.
"""

import contextlib
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_moe.cli import WorkFailed, run_command, run_script
from tools.benchmarks.machine import ROOT, machine, parse

CASES: dict[str, dict[str, str]] = {
    "chosen": {},
    "torch": {"GOMP_SPINCOUNT": "300000"},
    "20000 spins": {"GOMP_SPINCOUNT": "20000"},
    "2000 spins": {"GOMP_SPINCOUNT": "2000"},
    "no spins": {"GOMP_SPINCOUNT": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
# the first steps are slower: memory is taken, kernels are made
WARM_UP_STEPS = 10


@dataclass(frozen=True)
class BusyBenchmark:
    """What is trained, and how often."""

    model_config: Path = ROOT / "configs/demo_model.yaml"
    """Model configuration."""
    train_config: Path = ROOT / "configs/demo_train.yaml"
    """Training configuration."""
    steps: int = 60
    """Steps of a run, the first ten of which are not timed."""
    rounds: int = 3
    """Runs of each, idle and busy; the median counts."""
    out: Path | None = None
    """JSON file for the figures (default: none is written)."""


@contextlib.contextmanager
def busy_process(is_wanted: bool) -> Iterator[None]:
    """Have another process use one core, if wanted, until the block ends."""
    if not is_wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            yield
        finally:
            neighbour.kill()


def tokens_per_s(settings: BusyBenchmark, variables: dict[str, str], folder: Path) -> float:
    """Return the median over a run's timed steps; WorkFailed if the run fails."""
    own_choice = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    inherited = {name: value for name, value in os.environ.items() if name not in own_choice}
    flags: dict[str, Any] = {
        "model_config": settings.model_config,
        "config": settings.train_config,
        "out_dir": folder / "run",
        "data_dir": folder / "data",
        "tokenizer_dir": folder / "tokenizer",
        "train.max_tokens": (settings.steps + WARM_UP_STEPS) * 1024,
        "train.log_interval": 1,
        "eval.interval": 10**6,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(ROOT / "run_train.py"), *words, "--overwrite", "--no_progress"]
    result = subprocess.run(
        command, env=inherited | variables, capture_output=True, encoding="utf-8", check=False
    )
    if result.returncode:
        raise WorkFailed(f"run_train.py ended with status {result.returncode}: {result.stderr[-1500:]}")
    with (folder / "run/logs/csv/metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]][WARM_UP_STEPS:]
    pairs = itertools.pairwise((float(row["time_s"]), int(row["total_tokens"])) for row in rows)
    return statistics.median((tokens - old) / (time - start) for (start, old), (time, tokens) in pairs)


def measure(settings: BusyBenchmark) -> dict[str, Any]:
    """Return the median tokens/s of each case, idle and busy."""
    from litgpt_moe.data.prepare import prepare
    from litgpt_moe.data.settings import PrepareSettings

    rates: dict[str, dict[str, list[float]]] = {"idle": {}, "busy": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(PrepareSettings(folder / "data", "demo", folder / "tokenizer", train_tokenizer=2048))
        for number in range(settings.rounds):
            for state, of_state in rates.items():
                for case, variables in CASES.items():
                    with busy_process(state == "busy"):
                        rate = tokens_per_s(settings, variables, folder)
                    of_state.setdefault(case, []).append(rate)
                    print(f"round {number + 1}, {state}, {case}: {rate:,.0f} tokens/s", file=sys.stderr)
    medians = {
        state: {case: round(statistics.median(values)) for case, values in of_state.items()}
        for state, of_state in rates.items()
    }
    return {"machine": machine(), "model": settings.model_config.name, **medians}


def run(settings: BusyBenchmark) -> None:
    """Measure, print the table and write the JSON if it has a name."""
    from litgpt_moe.files import write_json

    figures = measure(settings)
    for state in ("idle", "busy"):
        best = max(figures[state].values())
        cells = (f"{case} {rate:,} ({rate / best:.2f})" for case, rate in figures[state].items())
        print(f"{state}: {', '.join(cells)}")
    if settings.out:
        write_json(settings.out, figures)
        print(f"Written to {settings.out}")


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 1 after a run that failed."""
    settings = parse(__doc__, BusyBenchmark, argv)
    return run_command(lambda: run(settings))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
