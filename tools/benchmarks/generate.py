"""Time generate.py beside stock `litgpt generate`: one prompt, float32, same weights, same tokens.

Run: uv run python tools/benchmarks/generate.py --config configs/moe_200m.yaml
(1 min on 2 CPU cores; seeded random weights unless --ckpt_dir names a checkpoint)

Stock is `litgpt.generate.base.generate_fn` on a stock `litgpt.GPT` with `LLaMAMoE` layers, ours is
`generate.generate` on the model that generate.py loads. Rounds alternate, and medians are compared.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litgpt_moe.cli import WorkFailed, run_command, run_script
from litgpt_moe.generation.settings import Sampling
from tools.benchmarks.machine import machine, parse

if TYPE_CHECKING:
    from litgpt.model import GPT


@dataclass(frozen=True)
class GenerateBenchmark:
    """What is generated, how often, and with which weights."""

    config: Path = Path("configs/moe_200m.yaml")
    """Model configuration."""
    ckpt_dir: Path | None = None
    """Trained checkpoint to take instead (default: seeded random weights)."""
    prompt_tokens: int = 16
    """Tokens in the prompt."""
    max_tokens: int = 64
    """New tokens in a round."""
    rounds: int = 5
    """Timed rounds, after one to warm up."""
    threads: int | None = None
    """CPU threads (default: torch's choice)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What to compute on."""
    seed: int = 0
    """Seed of the weights and the prompt."""
    json: Path | None = None
    """File for the figures (default: none is written)."""


def build_models(
    config_file: Path, ckpt_dir: Path | None, seed: int, device: str = "cpu"
) -> "tuple[GPT, GPT]":
    """Return the stock model and ours, in float32, with equal weights."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT

    from litgpt_moe.checkpoints.reader import load_model
    from litgpt_moe.config import MoEConfig
    from litgpt_moe.generation.decode import lay_out_for_decoding

    torch.manual_seed(seed)
    stock = GPT(Config.from_file(config_file)).requires_grad_(False).eval()
    if ckpt_dir is None:
        stock.apply(stock._init_weights)  # LitGPT's own; torch's default makes all logits nearly equal
        ours = GPT(MoEConfig.from_file(config_file)).requires_grad_(False).eval()
        ours.load_state_dict(stock.state_dict())
    else:
        ours = load_model(ckpt_dir, "cpu", torch.float32)
        stock.load_state_dict(ours.state_dict())
    stock, ours = stock.to(device), ours.to(device)
    lay_out_for_decoding(ours)
    return stock, ours


def stock_tokens(model: "GPT", prompt_ids: list[int], n_tokens: int) -> list[int]:
    """Return the greedy continuation by stock LitGPT, called as `litgpt generate` calls it."""
    import torch
    from litgpt.generate.base import generate_fn

    total = len(prompt_ids) + n_tokens
    model.max_seq_length = total
    model.set_kv_cache(batch_size=1, device=model.lm_head.weight.device)
    prompt = torch.tensor(prompt_ids, device=model.lm_head.weight.device)
    steps = generate_fn(model, prompt, total, temperature=0.0, include_prompt=False, include_eos=True)
    return [int(token) for token in steps]


def benchmark(stock: "GPT", ours: "GPT", prompt_ids: list[int], n_tokens: int, rounds: int) -> dict[str, Any]:
    """Return the tokens/s of both in alternating rounds, their medians, ratio, and whether tokens agree."""
    from litgpt_moe.generation.decode import generate

    greedy = Sampling(temperature=0.0)
    kinds: dict[str, Callable[[], list[int]]] = {
        "stock": lambda: stock_tokens(stock, prompt_ids, n_tokens),
        "ours": lambda: list(generate(ours, prompt_ids, n_tokens, greedy)),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    tokens: dict[str, list[int]] = {}
    equal = True
    for number in range(rounds + 1):
        for name, continuation in kinds.items():
            started = time.perf_counter()
            tokens[name] = continuation()
            if number:  # the first round warms up
                rates[name].append(len(tokens[name]) / (time.perf_counter() - started))
        equal = equal and tokens["stock"] == tokens["ours"]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens_per_s": rates,
        "median_tokens_per_s": medians,
        "ratio": medians["ours"] / medians["stock"],
        "tokens_equal": equal,
    }


def run(settings: GenerateBenchmark) -> None:
    """Print the table and write the JSON if it has a name; WorkFailed when the tokens differ."""
    import torch

    from litgpt_moe.checkpoints.layout import CONFIG_FILE, find_checkpoint
    from litgpt_moe.files import write_json

    if settings.threads:
        torch.set_num_threads(settings.threads)
    ckpt_dir = settings.ckpt_dir and find_checkpoint(settings.ckpt_dir)
    config = ckpt_dir / CONFIG_FILE if ckpt_dir else settings.config
    stock, ours = build_models(config, ckpt_dir, settings.seed, settings.device)
    draw = torch.Generator().manual_seed(settings.seed)
    n_prompt, n_tokens = settings.prompt_tokens, settings.max_tokens
    prompt_ids = torch.randint(stock.config.vocab_size, (n_prompt,), generator=draw).tolist()
    given = {"config": str(config), "prompt_tokens": n_prompt, "max_tokens": n_tokens}
    where, figures = machine(), benchmark(stock, ours, prompt_ids, n_tokens, settings.rounds)
    print(f"{config}, {settings.device}, {where['cpu']}, {where['threads']} threads, torch {where['torch']}")
    for name, rate in figures["median_tokens_per_s"].items():
        print(f"{name:6} {rate:8.1f} tokens/s")
    print(f"ratio  {figures['ratio']:8.2f}    tokens equal: {'yes' if figures['tokens_equal'] else 'NO'}")
    if settings.json:
        write_json(settings.json, given | where | figures)
    if not figures["tokens_equal"]:
        raise WorkFailed("ours gives other tokens than stock LitGPT")


def main(argv: list[str] | None = None) -> int:
    """Return 0, 1 when the tokens differ, 2 for bad settings."""
    settings = parse(__doc__, GenerateBenchmark, argv)
    return run_command(lambda: run(settings))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
