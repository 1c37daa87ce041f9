"""What benchmarks/data.py measures: tokenizing, memory and loading."""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from litgpt import Tokenizer
from litgpt.data.text_files import tokenize

from litgpt_moe.cli import WorkFailed
from litgpt_moe.data.batches import TokenBatches, TokenStream
from litgpt_moe.data.tokenizer import StoryEncoder, read_tokenizer_facts
from tools.benchmarks.machine import ROOT

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # per core


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def benchmark_tokenizing(text: Path, tokenizer_dir: Path, rounds: int) -> dict[str, Any]:
    """Return MB/s of ours (cache empty and filled) and of stock LitGPT, and whether the ids agree."""
    ours, stock = StoryEncoder(read_tokenizer_facts(tokenizer_dir)), Tokenizer(tokenizer_dir)

    def run_stock() -> Any:
        return next(tokenize(str(text), stock))

    def run_ours() -> np.ndarray:
        return ours.encode(text.read_text(encoding="utf-8").strip())

    times: dict[str, list[float]] = {"stock": [], "ours": [], "ours_warm": []}
    for _ in range(rounds):  # in turns, so that a busy machine is busy for all of them
        times["stock"].append(seconds(run_stock))
        if ours.pieces is not None:
            ours.pieces.clear()
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
        raise WorkFailed(f"prepare_data.py ended with status {process.returncode}")
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
