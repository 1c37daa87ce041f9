"""Compare whole training steps: ours, stock LitGPT's loop and layer, and the dense model of the same FLOPs.

Run: uv run python tools/benchmarks/train.py      (3 min on 2 CPU cores for MoE-30M)

All train in turn in one process on the same random tokens; a round is a fresh run of each, of which the
first steps are left out. Stock is `litgpt.pretrain.main` with LitGPT's own `LLaMAMoE` and one patch: its
count of FLOPs, which raises on MoE layers (0.5.13), is skipped. Dense has one SwiGLU as wide as the experts
that a token meets, LitGPT's layers, and our loop, loss and optimizer; "stock dense" trains in LitGPT's loop.
In LitGPT's loop glibc returns freed memory to the system, its default; in ours, on a CPU, it keeps it.
Where oneDNN multiplies in our linear layers (CPUs of AMD), "dense oneDNN" has these layers too. Printed are
medians, ratios of tokens/s and where the time of a step goes (from one more round, for there the clock waits
for the device); the JSON has the machine and versions too.
"""

import argparse
import functools
import logging
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from litgpt_moe.cli import run_command, run_script
from litgpt_moe.flags import FlagParser, add_flags, from_flags
from litgpt_moe.threads import limit_spinning
from tools.benchmarks.machine import check_counts, machine
from tools.benchmarks.train_settings import TrainBenchmark

DENSE = ("dense", "dense oneDNN", "stock dense")


def key_and_value(text: str) -> tuple[str, Any]:
    """Return a key of the model configuration and its value, written as n_expert=8, the value as in YAML."""
    try:
        key, value = text.split("=", 1)
        return key, yaml.safe_load(value)
    except (ValueError, yaml.YAMLError):
        raise argparse.ArgumentTypeError(f"{text} is no KEY=VALUE; write it as n_expert=8") from None


def parse(argv: list[str] | None) -> tuple[TrainBenchmark, dict[str, Any]]:
    """Return the settings, and the keys of the model configuration that are replaced."""
    parser = FlagParser(description=__doc__)
    add_flags(parser, TrainBenchmark)
    options: dict[str, Any] = {"nargs": "+", "action": "extend", "type": key_and_value, "default": []}
    changes = "keys of the model configuration to replace"
    parser.add_argument("--override", metavar="KEY=VALUE", help=changes, **options)
    args = parser.parse_args(argv)
    settings: TrainBenchmark = from_flags(TrainBenchmark, args)
    check_counts(parser, settings)
    return settings, dict(args.override)


def compare(settings: TrainBenchmark, override: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the figures of all contestants, as the JSON holds them."""
    import torch

    from litgpt_moe.config import MoEConfig
    from litgpt_moe.files import write_json
    from litgpt_moe.hardware import peak_flops, peak_memory_gb, pick_device, will_compile
    from tools.benchmarks.train_contestants import contestants, make_run, share_of_parts, step_times

    config = MoEConfig.from_file(settings.model_config, **override)
    # with the FLOPs of the experts that a token visits
    width = config.n_expert_per_token * (config.moe_intermediate_size or 0)
    no_experts = {"mlp_class_name": "LLaMAMLP", "n_expert": 0, "n_expert_per_token": 0}
    dense = replace(config, intermediate_size=width, **no_experts)
    run = make_run(settings, config, folder)
    kinds = contestants(run, dense)

    def fresh_run(name: str) -> Callable[[], None]:
        train, its_config = kinds[name]
        return functools.partial(train, make_run(settings, its_config, folder))

    times: dict[str, list[float]] = {name: [] for name in kinds}
    memory: dict[str, float] = {}
    for _ in range(settings.rounds):
        for name in kinds:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            times[name] += step_times(fresh_run(name))
            memory[name] = round(peak_memory_gb(), 3)
            if settings.out:  # what is known if the rest takes too long
                medians = {kind: statistics.median(values) for kind, values in times.items() if values}
                rates = {kind: round(run.tokens_per_step / seconds, 1) for kind, seconds in medians.items()}
                write_json(
                    settings.out, {"unfinished": True, "tokens_per_s": rates, "peak_memory_gb": memory}
                )
    shares = {name: share_of_parts(fresh_run(name), settings.steps) for name in kinds}
    medians = {name: statistics.median(values) for name, values in times.items()}
    rates = {name: run.tokens_per_step / seconds for name, seconds in medians.items()}
    rivals = [name for name in ("stock", *DENSE) if name in medians]
    peak = peak_flops(pick_device("auto", "auto")[0], run.precision)
    return {
        "machine": machine(),
        "precision": run.precision,
        "compiled": will_compile(settings.compile, "auto")[0],
        "model": config.name,
        "override": override,
        "tokens_per_step": run.tokens_per_step,
        "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        **{ratio_key(name): float(f"{medians[name] / medians['ours']:.4g}") for name in rivals},
        "mfu": round(run.facts.flops_per_token * rates["ours"] / peak, 4),
        "share_of_step": shares,
        # one process: on a CPU this is the highest of all so far
        "peak_memory_gb": memory if torch.cuda.is_available() else {},
    }


def ratio_key(name: str) -> str:
    """Return the JSON key of the ratio of our speed to that of `name`."""
    return "of_" + name.replace(" ", "_").lower()


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    device, parts = figures["machine"]["device"], list(figures["share_of_step"]["ours"])
    print(f"{figures['model']}, {figures['tokens_per_step']:,} tokens a step, {device}")
    print(f"{'':14}{'tokens/s':>10}" + "".join(f"{part:>11}" for part in parts))
    for name, rate in figures["tokens_per_s"].items():
        shares = "".join(f"{figures['share_of_step'][name][part]:>11.1%}" for part in parts)
        print(f"{name:14}{rate:>10,.0f}{shares}")
    ratios = [f"{figures[key]:.2f} of {name}" for name in DENSE if (key := ratio_key(name)) in figures]
    print(f"ours: {figures['of_stock']:.2f} times stock, {', '.join(ratios)}, MFU {figures['mfu']:.1%}")


def run(settings: TrainBenchmark, override: dict[str, Any]) -> None:
    """Measure, print the table and write the JSON if it has a name."""
    from litgpt_moe.files import write_json
    from tools.benchmarks.train_contestants import write_tokenizer

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # "Seed set to 42", each time
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name))
        figures = compare(settings, override, Path(name))
    show(figures)
    if settings.out:
        write_json(settings.out, figures)
        print(f"Written to {settings.out}")


def main(argv: list[str] | None = None) -> int:
    """Return 0; 2 after a message on a bad setting."""
    settings, override = parse(argv)
    limit_spinning()
    return run_command(lambda: run(settings, override))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
