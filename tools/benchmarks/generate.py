"""Time our decoding beside stock LitGPT and llama.cpp: same weights, greedy, one text and several at once.

Run: uv run python tools/benchmarks/generate.py       (10 min on 2 CPU cores; --rounds 2 for a first look)
     uv run python tools/benchmarks/generate.py --busy true      (the same beside one busy process)

Seeded random weights unless --ckpt_dir names a checkpoint. In each round all take their turn; medians count.
llama.cpp comes with the package xllamacpp in an environment of its own, which uv makes below --llama_env, and
reads a GGUF file of the same weights. Our tokens must be those of stock LitGPT in float32. The last column is
the bytes of weights that a second of one text reads, as a share of what a sum over a large tensor reads.
"""

import contextlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe.cli import WorkFailed, run_command, run_script
from tools.benchmarks.busy import busy_process
from tools.benchmarks.machine import ROOT, machine, parse, recorded

if TYPE_CHECKING:
    from litgpt.model import GPT

    from tools.benchmarks.generate_contestants import Contestant, Round

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "q8_0": 34 / 32}


@dataclass(frozen=True)
class GenerateBenchmark:
    """What is generated, how often, and with which weights."""

    config: Path = ROOT / "configs/moe_200m.yaml"
    """Model configuration."""
    ckpt_dir: Path | None = None
    """Trained checkpoint to take instead (default: seeded random weights)."""
    prompt_tokens: int = 16
    """Tokens in the prompt."""
    max_tokens: int = 64
    """New tokens of each text."""
    rounds: int = 5
    """Timed rounds, after one to warm up."""
    max_threads: int = 2
    """Every number of CPU threads up to this one is measured."""
    batch: int = 4
    """Texts at once, beside one alone."""
    busy: bool = False
    """Keep one core busy with another process."""
    llama_env: str = ".llama_env"
    """Environment of xllamacpp; '' leaves llama.cpp out."""
    seed: int = 0
    """Seed of the weights and the prompts, which differ: texts at once choose different experts."""
    out: Path | None = None
    """JSON file for the figures (default: none is written)."""


def bytes_per_s(n_bytes: int = 1 << 29) -> float:
    """Return how many bytes a second a sum over `n_bytes` reads: the best of five."""
    import torch

    numbers, best = torch.ones(n_bytes // 4), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - started)
    return n_bytes / best


def bytes_per_token(model: "GPT", precision: str) -> float:
    """Return the bytes of weights that a token of one text reads: the active ones, not the embedding."""
    from litgpt_moe.config import model_facts

    config = model.config
    looked_up = (config.padded_vocab_size or 0) * config.n_embd
    return (model_facts(config).active_params - looked_up) * WEIGHT_BYTES[precision]


def measure(
    contestants: "dict[str, Contestant]", settings: GenerateBenchmark, prompts: list[list[int]]
) -> "dict[str, list[Round]]":
    """Return each contestant's rounds, in which all take turns. WorkFailed if tokens differ from stock's."""
    rounds: dict[str, list[Round]] = {name: [] for name in contestants}
    for number in range(settings.rounds + 1):
        for name, contestant in contestants.items():
            found = contestant.run(prompts, settings.max_tokens)
            if number:  # the first round warms up
                rounds[name].append(found)
    expected = rounds["stock float32"][0].tokens
    for name, found in rounds.items():
        if name.startswith(("torch", "native")) and name.endswith("float32") and found[0].tokens != expected:
            raise WorkFailed(f"{name} gives other tokens than stock LitGPT")
    return rounds


@contextlib.contextmanager
def all_contestants(
    ours: "dict[str, Contestant]", ggufs: dict[str, Path], python: Path | None, n_threads: int, batch: int
) -> "Iterator[dict[str, Contestant]]":
    """In the block, llama.cpp runs too, where it is wanted."""
    from tools.benchmarks.generate_contestants import llama_contestants

    if python is None:
        yield ours
        return
    with llama_contestants(python, ggufs, n_threads, batch, 1024) as theirs:
        yield ours | theirs


def figures(rounds: "dict[str, list[Round]]", n_tokens: int) -> dict[str, dict[str, float]]:
    """Return each contestant's median tokens/s with its spread, and median seconds to the first token."""
    found = {}
    for name, some in rounds.items():
        rates = sorted(n_tokens / one.seconds for one in some)
        found[name] = {"tokens_per_s": statistics.median(rates), "least": rates[0], "most": rates[-1]}
        firsts = [one.first_s for one in some if one.first_s is not None]
        found[name] |= {"first_s": statistics.median(firsts)} if firsts else {}
    return found


def run(settings: GenerateBenchmark) -> None:
    """Print the tables and write the JSON if it has a name; WorkFailed when the tokens differ."""
    import torch

    from litgpt_moe.checkpoints.layout import find_checkpoint
    from litgpt_moe.files import write_json
    from litgpt_moe.threads import sleep_when_busy
    from tools.benchmarks import generate_contestants as made

    ckpt_dir = settings.ckpt_dir and find_checkpoint(settings.ckpt_dir)
    config = made.config_of(settings.config, ckpt_dir)
    python = made.make_llama_environment(Path(settings.llama_env)) if settings.llama_env else None
    model = made.build(config, ckpt_dir, settings.seed)
    ours = made.our_contestants(model, config)
    draw = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch, settings.prompt_tokens)
    prompts = torch.randint(3, model.config.vocab_size, size, generator=draw).tolist()
    report: dict[str, Any] = {"settings": recorded(settings), "machine": machine(), "cases": []}
    with tempfile.TemporaryDirectory() as folder, busy_process(settings.busy):
        ggufs = made.write_ggufs(model, ckpt_dir, Path(folder)) if python else {}
        for n_threads in range(1, settings.max_threads + 1):
            torch.set_num_threads(n_threads)
            speed = bytes_per_s()
            theirs = all_contestants(ours, ggufs, python, n_threads, settings.batch)
            with sleep_when_busy(), theirs as contestants:  # as generate.py does
                for batch in (1, settings.batch):
                    rounds = measure(contestants, settings, prompts[:batch])
                    found = figures(rounds, settings.max_tokens * batch)
                    case = {"threads": n_threads, "batch": batch, "read_gb_per_s": speed / 1e9}
                    report["cases"].append({**case, "figures": found})
                    show(model, case, found)
    if settings.out:
        write_json(settings.out, report)


def show(model: "GPT", case: dict[str, Any], found: dict[str, dict[str, float]]) -> None:
    """Print one table."""
    print(f"\n{case['threads']} thread(s), {case['batch']} text(s); memory {case['read_gb_per_s']:.1f} GB/s")
    stock = found["stock float32"]["tokens_per_s"]
    for name, one in found.items():
        line = f"{name:19} {one['tokens_per_s']:8.1f} tokens/s, {one['tokens_per_s'] / stock:5.2f} of stock"
        line += f", first after {1000 * one['first_s']:6.1f} ms" if "first_s" in one else ""
        if case["batch"] == 1:
            share = (
                one["tokens_per_s"] * bytes_per_token(model, name.split()[-1]) / 1e9 / case["read_gb_per_s"]
            )
            line += f", {share:.0%} of memory"
        print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Return 0, 1 when the tokens differ or something cannot be made, 2 for bad settings."""
    settings = parse(__doc__, GenerateBenchmark, argv)

    def act() -> None:
        try:
            run(settings)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise ValueError(f"--llama_env {settings.llama_env}: {error}; '' leaves llama.cpp out") from None

    return run_command(act)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
