"""Measure the data path beside stock LitGPT's: tokenizing per core, peak memory, time to load a batch.

Run: uv run python tools/benchmarks/data.py      (1 min; --big_mb 2048 takes 5 min on two cores)

Tokenizing: `litgpt.data.text_files.tokenize` and our encoder get the same file, one process, in turns.
Memory: prepare_data.py on a generated file, resident memory summed over its processes every 20 ms (memory
that they share is counted for each). Loading: batches of the training loader, no worker processes.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_moe.cli import run_command, run_script
from litgpt_moe.data.batches import TokenBatches, TokenStream
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.tokenizer import PieceCache, StoryEncoder, read_tokenizer_facts
from litgpt_moe.files import write_json, write_whole
from tools.benchmarks.machine import ROOT, machine, parse

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # per core


@dataclass(frozen=True)
class DataBenchmark:
    """What is tokenized, prepared and loaded, and how often."""

    text: Path | None = None
    """Text to tokenize (default: the demo corpus)."""
    tokenizer_dir: Path | None = None
    """The tokenizer (default: 2,048 pieces trained on the demo corpus)."""
    megabytes: float = 1.0
    """MB of the text to tokenize."""
    rounds: int = 5
    """Rounds of each tokenizer."""
    big_mb: int = 100
    """MB of the file for the memory figure."""
    batch_size: int = 8
    """Sequences of a batch."""
    block_size: int = 1024
    """Tokens of a sequence."""
    json: Path | None = None
    """File for all figures (default: none is written)."""


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def benchmark_tokenizing(text: Path, tokenizer_dir: Path, rounds: int) -> dict[str, Any]:
    """Return MB/s of ours (cache empty and filled) and of stock LitGPT, and whether the ids agree."""
    from litgpt import Tokenizer
    from litgpt.data.text_files import tokenize

    ours, stock = StoryEncoder(read_tokenizer_facts(tokenizer_dir)), Tokenizer(tokenizer_dir)

    def run_stock() -> Any:
        return next(tokenize(str(text), stock))

    def run_ours() -> np.ndarray:
        return ours.encode(text.read_text(encoding="utf-8").strip())

    times: dict[str, list[float]] = {"stock": [], "ours": [], "ours_warm": []}
    for _ in range(rounds):  # in turns, so that a busy machine is busy for all of them
        times["stock"].append(seconds(run_stock))
        if ours.pieces is not None:
            ours.pieces = PieceCache(ours.facts)
        times["ours"].append(seconds(run_ours))
        times["ours_warm"].append(seconds(run_ours))
    megabytes = text.stat().st_size / 1e6
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "megabytes": megabytes,
        "rounds": rounds,
        **{f"{name}_mb_per_s": megabytes / value for name, value in median.items()},
        "ratio": median["stock"] / median["ours"],
        "ratio_warm": median["stock"] / median["ours_warm"],
        # stock puts BOS before the file and no EOS after it
        "ids_identical": run_ours()[:-1].tolist() == run_stock().tolist(),
    }


def tree_memory(pid: int) -> int:
    """Return the resident bytes of a process and all below it."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss
    return total


def benchmark_memory(source: Path, tokenizer_dir: Path, folder: Path, megabytes: int) -> dict[str, Any]:
    """Return peak memory and speed of prepare_data.py on a file of that size."""
    stories = source.read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    (folder / "train").mkdir(parents=True)
    number = 0  # distinct stories: those of `source` again and again, numbered
    with (folder / "train" / "big.txt").open("w", encoding="utf-8", newline="\n") as file:
        while file.tell() < megabytes * 1_000_000:
            number += 1
            file.write("".join(f"Story {number} {s}\n<|endoftext|>\n" for s in stories))
    arguments = ["--data_dir", str(folder), "--tokenizer_dir", str(tokenizer_dir)]
    peak, start = 0, time.perf_counter()
    command = [sys.executable, str(ROOT / "prepare_data.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"prepare_data.py ended with status {process.returncode}")
    took = time.perf_counter() - start
    return {"megabytes": megabytes, "peak_mb": peak / 1e6, "seconds": took, "mb_per_s": megabytes / took}


def benchmark_loading(data_dir: Path, batch_size: int, block_size: int) -> dict[str, Any]:
    """Return milliseconds per batch, median and 99th percentile, over three epochs at most."""
    batches = TokenBatches(TokenStream(data_dir, "train"), batch_size, block_size, seed=0)
    times = []
    for _ in range(3):
        iterator = iter(batches)
        next(iterator)  # imports torch, draws the order
        times += [seconds(lambda: next(iterator)) for _ in range(min(len(batches) - 1, 1000))]  # noqa: B023
    quantiles = statistics.quantiles(times, n=100)
    shape = {"batch_size": batch_size, "block_size": block_size, "batches": len(times)}
    return {**shape, "median_ms": 1e3 * statistics.median(times), "p99_ms": 1e3 * quantiles[98]}


def table(result: dict[str, Any]) -> str:
    """Return the figures as lines to read."""
    t, m, b = (result[name] for name in ("tokenizing", "memory", "loading"))
    return "\n".join(
        [
            f"tokenizing {t['megabytes']:.1f} MB, one core, median of {t['rounds']}",
            f"  stock TextFiles      {t['stock_mb_per_s']:8.2f} MB/s",
            f"  ours, empty cache    {t['ours_mb_per_s']:8.2f} MB/s   {t['ratio']:6.1f} times",
            f"  ours, filled cache   {t['ours_warm_mb_per_s']:8.2f} MB/s   {t['ratio_warm']:6.1f} times",
            f"  ids identical        {t['ids_identical']}",
            f"preparing {m['megabytes']} MB: peak {m['peak_mb']:.0f} MB over all processes, "
            f"{m['seconds']:.1f} s, {m['mb_per_s']:.1f} MB/s",
            f"loading a batch of {b['batch_size']} x {b['block_size']}: median {b['median_ms']:.3f} ms, "
            f"99% below {b['p99_ms']:.3f} ms",
        ]
    )


def measure(settings: DataBenchmark, folder: Path) -> dict[str, Any]:
    """Return all figures; the demo corpus and its tokenizer stand in for what was not named."""
    prepare(PrepareSettings(folder / "demo", "demo", folder / "tokenizer", train_tokenizer=2048, workers=1))
    text = settings.text or folder / "demo" / "train" / "demo.txt"
    tokenizer_dir = settings.tokenizer_dir or folder / "tokenizer"
    sample = folder / "sample.txt"
    with text.open(encoding="utf-8") as file:
        write_whole(sample, file.read(int(settings.megabytes * 1e6)))
    return {
        "machine": machine(),
        "tokenizing": benchmark_tokenizing(sample, tokenizer_dir, settings.rounds),
        "memory": benchmark_memory(sample, tokenizer_dir, folder / "big", settings.big_mb),
        "loading": benchmark_loading(folder / "big", settings.batch_size, settings.block_size),
    }


def run(settings: DataBenchmark) -> str:
    """Measure, write the JSON if it has a name, and return the table."""
    if not 0 < settings.megabytes < 1e6:
        raise ValueError(f"--megabytes: {settings.megabytes} is not a number above 0")
    with tempfile.TemporaryDirectory(prefix="benchmark_data") as folder:
        result = measure(settings, Path(folder))
    if settings.json:
        write_json(settings.json, result)
    return table(result)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 2 for bad settings."""
    settings = parse(__doc__, DataBenchmark, argv)
    return run_command(lambda: run(settings))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
