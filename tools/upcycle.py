"""Convert a dense checkpoint to a Mixture-of-Experts one whose training can be continued.

Run: uv run python tools/upcycle.py checkpoints/dense checkpoints/upcycled --n_expert 8 --n_expert_per_token 2
(15 s, most of it imports)

Every expert is initialised as a copy of the dense MLP, so that the untrained new model has the dense one's
logits (Sparse Upcycling, arxiv.org/abs/2212.05055). With a --moe_intermediate_size of 1/G of the dense width
the MLP is cut into G slices (virtual groups, arxiv.org/abs/2410.07524).

tools/import_hf.py converts a dense model of Transformers to a checkpoint.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from litgpt_moe.cli import run_command, run_script
from litgpt_moe.flags import FlagParser, add_flags, from_flags
from litgpt_moe.generation.settings import check_ranges


@dataclass(frozen=True)
class UpcycleSettings:
    """How the experts are initialised from the dense MLP."""

    moe_intermediate_size: int | None = None
    """Width of an expert (default: of the dense MLP)."""
    noise: float = 0.0
    """Standard deviation of the noise on the experts, relative to the weights' own (default 0.0 = off)."""
    seed: int = 42
    """Seed of router and noise."""


def run(args: argparse.Namespace) -> str:
    """Write the checkpoint; return lines that describe it and the next command."""
    import torch

    from litgpt_moe.checkpoints import layout
    from litgpt_moe.checkpoints.reader import load_model
    from litgpt_moe.checkpoints.tokenizer_files import read_tokenizer_files
    from litgpt_moe.checkpoints.writer import write_checkpoint
    from litgpt_moe.config import MoEConfig, model_facts
    from litgpt_moe.interop import upcycle

    rules = [
        ("n_expert", args.n_expert >= 2, "2 or more"),
        ("n_expert_per_token", args.n_expert_per_token >= 1, "1 or more"),
        ("noise", 0 <= args.noise < math.inf, "0 (off) or more; 0.01 is little"),
        ("seed", 0 <= args.seed < 2**63, "0 or more"),
    ]
    check_ranges(args, rules)
    settings: UpcycleSettings = from_flags(UpcycleSettings, args)
    layout.check_new_place(args.out)
    folder = layout.find_checkpoint(args.ckpt_dir)
    dense = MoEConfig.from_file(folder / layout.CONFIG_FILE)
    sizes = (args.n_expert, args.n_expert_per_token, settings.moe_intermediate_size)
    try:
        config = upcycle.moe_config(dense, *sizes)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    logits, weights = upcycle.sample_logits(folder), load_model(folder).state_dict()
    new = upcycle.upcycle(weights, config, settings.noise, torch.Generator().manual_seed(settings.seed))
    write_checkpoint(args.out, new, config, read_tokenizer_files(folder))
    before, facts = model_facts(dense), model_facts(config)
    counts = f"{facts.total_params:,} parameters, {facts.active_params:,} active per token"
    lines = [f"Dense   {folder}: {dense.name}, {before.total_params:,} parameters"]
    lines.append(f"Wrote   {args.out}: {config.name}, {counts}")
    if not settings.noise:
        difference = (upcycle.sample_logits(args.out) - logits).abs().max().item()
        lines.append(f"Checked it gives the dense model's logits, within {difference:.1e}")
    train = upcycle.training_command(args.out, folder)
    return "\n".join([*lines, "Next:" if "--config" in train else upcycle.NEXT, f"  {train}"])


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt_dir", type=Path, help="dense checkpoint directory, or an out_dir (its final or newest)")
    parser.accept_positional("ckpt_dir", is_required=True)
    add("out", type=Path, help="checkpoint directory to make; must not exist, or be empty")
    add("--n_expert", type=int, required=True, help="experts in each layer, 2 or more")
    add("--n_expert_per_token", type=int, required=True, help="experts that a token visits")
    add_flags(parser, UpcycleSettings)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
