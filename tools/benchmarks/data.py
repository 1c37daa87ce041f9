"""Measure the data path beside stock LitGPT's: tokenizing per core, peak memory, time to load a batch.

Run: uv run python tools/benchmark_data.py      (1 min; --big_mb 2048 takes 5 min on two cores)

Tokenizing: `litgpt.data.text_files.tokenize` and our encoder get the same file, one process, in turns.
Memory: prepare_data.py on a generated file, resident memory summed over its processes every 20 ms (memory
that they share is counted for each). Loading: batches of the training loader, no worker processes.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from litgpt_moe.cli import FlagParser
from litgpt_moe.files import write_whole
from prepare_data import (
    PieceCache,
    PrepareSettings,
    StoryEncoder,
    TokenBatches,
    TokenStream,
    prepare,
    read_tokenizer,
)
from tools.machine import count, machine

ROOT = Path(__file__).resolve().parents[1]

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # per core


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def benchmark_tokenizing(text: Path, tokenizer_dir: Path, rounds: int) -> dict:
    """Return MB/s of ours (cache empty and filled) and of stock LitGPT, and whether the ids agree."""
    from litgpt import Tokenizer
    from litgpt.data.text_files import tokenize

    stock, ours = Tokenizer(tokenizer_dir), StoryEncoder(read_tokenizer(tokenizer_dir))

    def run_ours() -> np.ndarray:
        return ours.encode(text.read_text(encoding="utf-8").strip())

    def empty_cache() -> None:
        if ours.pieces is not None:
            ours.pieces = PieceCache(ours.facts)

    times: dict[str, list[float]] = {"stock": [], "ours": [], "ours_warm": []}
    for _ in range(rounds):  # in turns, so that a busy machine is busy for all of them
        times["stock"].append(seconds(lambda: next(tokenize(str(text), stock))))
        empty_cache()
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
        "ids_identical": run_ours()[:-1].tolist() == next(tokenize(str(text), stock)).tolist(),
    }


def tree_memory(pid: int) -> int:
    """Return the resident bytes of a process and all below it."""
    import psutil

    total = 0
    try:
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            try:
                total += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        pass
    return total


def write_big_text(path: Path, source: Path, megabytes: int) -> None:
    """Write distinct stories of about that size: those of `source` again and again, numbered."""
    stories = source.read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    path.parent.mkdir(parents=True)
    number = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        while file.tell() < megabytes * 1_000_000:
            number += 1
            file.write("".join(f"Story {number} {s}\n<|endoftext|>\n" for s in stories))


def benchmark_memory(source: Path, tokenizer_dir: Path, folder: Path, megabytes: int) -> dict:
    """Return peak memory and speed of prepare_data.py on a file of that size."""
    write_big_text(folder / "train" / "big.txt", source, megabytes)
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


def benchmark_loading(data_dir: Path, batch_size: int, block_size: int) -> dict:
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


def table(result: dict) -> str:
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


def run(args: argparse.Namespace, folder: Path) -> dict:
    """Return all figures; the demo corpus and its tokenizer stand in for what was not named."""
    demo = PrepareSettings(folder / "demo", "demo", folder / "tokenizer", train_tokenizer=2048, workers=1)
    prepare(demo)
    text = args.text or folder / "demo" / "train" / "demo.txt"
    tokenizer_dir = args.tokenizer_dir or folder / "tokenizer"
    read_tokenizer(tokenizer_dir)
    sample = folder / "sample.txt"
    with text.open(encoding="utf-8") as file:
        write_whole(sample, file.read(int(args.megabytes * 1e6)))
    return {
        "machine": machine(),
        "tokenizing": benchmark_tokenizing(sample, tokenizer_dir, args.rounds),
        "memory": benchmark_memory(sample, tokenizer_dir, folder / "big", args.big_mb),
        "loading": benchmark_loading(folder / "big", args.batch_size, args.block_size),
    }


def _megabytes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def main(argv: list[str] | None = None) -> int:
    """Return the exit status."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="text to tokenize (default: the demo corpus)")
    add("--tokenizer_dir", type=Path, metavar="DIR", help="default: 2,048 pieces trained on the demo corpus")
    add(
        "--megabytes",
        type=_megabytes,
        default=1.0,
        help="of the text to tokenize (default %(default)s)",
    )
    add("--rounds", type=count, default=5, help="of each tokenizer (default %(default)s)")
    add("--big_mb", type=count, default=100, help="of the file for the memory figure (default %(default)s)")
    add("--batch_size", type=count, default=8, help="sequences (default %(default)s)")
    add("--block_size", type=count, default=1024, help="tokens (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark_data") as folder:
            result = run(args, Path(folder))
        if args.json:
            write_whole(args.json, json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
