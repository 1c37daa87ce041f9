"""Measure the data path beside stock LitGPT's: tokenizing per core, peak memory, time to load a batch.

Run: uv run python tools/benchmarks/data.py      (1 min; --big_mb 2048 takes 5 min on two cores)

Tokenizing: `litgpt.data.text_files.tokenize` and our encoder get the same file, one process, in turns.
Memory: prepare_data.py on a generated file, resident memory summed over its processes every 20 ms (memory
that they share is counted for each). Loading: batches of the training loader, no worker processes.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_moe.cli import run_command, run_script
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.files import write_json, write_whole
from tools.benchmarks.machine import machine, parse


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
    from litgpt_moe.data.prepare import prepare
    from tools.benchmarks.data_measures import benchmark_loading, benchmark_memory, benchmark_tokenizing

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
