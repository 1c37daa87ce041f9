"""Turn a dense checkpoint into a Mixture-of-Experts one, to continue training from.

Run: uv run python tools/upcycle.py checkpoints/dense checkpoints/upcycled --n_expert 8 --n_expert_per_token 2
(15 s, most of it imports)

Every expert begins as a copy of the dense MLP and the router at random (Sparse Upcycling,
arxiv.org/abs/2212.05055); since a token's weights sum to one, the new model gives the dense one's logits
until it is trained. With a --moe_intermediate_size of 1/G of the dense width the MLP is cut into G slices,
and each G experts that together are one MLP share a router row, so that a token meets all slices or none
(virtual groups, Upcycling Large Language Models into Mixture of Experts, arxiv.org/abs/2410.07524).

A dense model of Transformers becomes a checkpoint by tools/import_hf.py.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe.cli import FlagParser

if TYPE_CHECKING:
    import torch

    from moe_layers import MoEConfig

N_CHECKED = 64  # tokens whose logits are compared


def moe_config(dense: "MoEConfig", n_expert: int, top_k: int, width: int | None) -> "MoEConfig":
    """Return the configuration of `dense` with `n_expert` experts of `width` (None: the dense width).

    Raises:
        ValueError: one sentence on what does not go together.
    """
    from moe_layers import count_parameters

    if dense.mlp_class_name == "LLaMAMoE":
        raise ValueError(f"the model has {dense.n_expert} experts already; upcycling starts from a dense one")
    if dense.mlp_class_name != "LLaMAMLP":
        raise ValueError(
            f"mlp_class_name is {dense.mlp_class_name}; only LLaMAMLP has the shape of an expert"
        )
    width = width or dense.intermediate_size
    slices = n_slices(dense, width)
    for name, count in (("n_expert", n_expert), ("n_expert_per_token", top_k)):
        if count % slices:
            raise ValueError(
                f"{name} is {count}, not a multiple of {slices}: --moe_intermediate_size {width} cuts the "
                f"width {dense.intermediate_size} into {slices} slices, and a token must meet all of them"
            )
    experts = {"n_expert": n_expert, "n_expert_per_token": top_k, "moe_intermediate_size": width}
    config = replace(dense, mlp_class_name="LLaMAMoE", **experts)
    total, _ = count_parameters(config)
    return replace(config, name=f"MoE-{total / 1e6:.3g}M")


def n_slices(dense: "MoEConfig", width: int) -> int:
    """Return into how many experts of `width` a dense MLP is cut. ValueError if it does not come out even."""
    if width < 1 or dense.intermediate_size % width:
        raise ValueError(
            f"moe_intermediate_size is {width}; choose a divisor of the dense width {dense.intermediate_size}"
        )
    return dense.intermediate_size // width


def upcycle(
    weights: "dict[str, torch.Tensor]", config: "MoEConfig", noise: float, generator: "torch.Generator"
) -> "dict[str, torch.Tensor]":
    """Return the weights of `config` made of the dense ones, each expert's matrices with noise added.

    `noise` is its standard deviation, as a fraction of that of the matrix; 0.0 leaves the copies equal.
    """
    from tqdm import tqdm

    new = {name: weight for name, weight in weights.items() if ".mlp." not in name}
    for layer in tqdm(range(config.n_layer), unit="layer", desc="experts", disable=None):
        mlp = f"transformer.h.{layer}.mlp"
        dense = {name: weight for name, weight in weights.items() if name.startswith(f"{mlp}.")}
        new[f"{mlp}.gate.weight"] = router(config, generator).to(next(iter(dense.values())).dtype)
        for e in range(config.n_expert):
            for name, weight in dense.items():
                part = slice_of(weight, name.removeprefix(f"{mlp}."), e, config)
                if noise and weight.dim() == 2:
                    part += _normal(part.shape, generator).mul_(noise * weight.float().std()).to(part.dtype)
                new[name.replace(".mlp.", f".mlp.experts.{e}.")] = part
    return new


def router(config: "MoEConfig", generator: "torch.Generator") -> "torch.Tensor":
    """Return a random router, (E, C); the experts that together are one dense MLP have the same row."""
    slices = n_slices(config, config.moe_intermediate_size)
    rows = _normal((config.n_expert // slices, config.n_embd), generator)
    # the variance that LitGPT gives every nn.Linear (litgpt.pretrain.initialize_weights)
    return rows.mul_(math.sqrt(2.0 / 5 / config.n_embd)).repeat_interleave(slices, dim=0)


def slice_of(weight: "torch.Tensor", name: str, e: int, config: "MoEConfig") -> "torch.Tensor":
    """Return a copy of expert `e`'s part of a dense MLP's tensor, `name` being fc_1.weight, proj.bias, ..."""
    width = config.moe_intermediate_size
    slices = n_slices(config, width)
    start = e % slices * width
    if name.startswith("fc_"):
        return weight[start : start + width].clone()
    if name == "proj.bias":
        return weight.clone()  # its K copies are weighted by numbers that sum to one
    # each slice is weighted by 1 / G of what the whole MLP would be
    return weight[:, start : start + width].mul(slices)


def _normal(shape: tuple[int, ...], generator: "torch.Generator") -> "torch.Tensor":
    import torch

    return torch.empty(shape).normal_(generator=generator)


def largest_difference(dense_dir: Path, moe_dir: Path) -> float:
    """Return the largest difference between the logits of two checkpoints, in float32 on random tokens."""
    import torch

    from moe_layers import load_model

    dense, moe = load_model(dense_dir, dtype=torch.float32), load_model(moe_dir, dtype=torch.float32)
    n_tokens = min(N_CHECKED, dense.max_seq_length)
    ids = torch.randint(dense.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return (dense(ids) - moe(ids)).abs().max().item()


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError with a line per flag that is out of range."""
    rules = [
        ("n_expert", args.n_expert >= 2, "2 or more"),
        ("n_expert_per_token", args.n_expert_per_token >= 1, "1 or more"),
        ("noise", 0 <= args.noise < math.inf, "0 (off) or more; 0.01 is little"),
        ("seed", 0 <= args.seed < 2**63, "0 or more"),
    ]
    problems = [f"{name} is {getattr(args, name)}; choose {rule}" for name, ok, rule in rules if not ok]
    if problems:
        raise ValueError("\n".join(problems))


def run(args: argparse.Namespace) -> list[str]:
    """Write the checkpoint and return lines that say what it is and what to do next."""
    import torch

    from litgpt_moe.files import check_new_folder
    from moe_layers import CONFIG_FILE, MoEConfig, count_parameters, find_checkpoint, load_model
    from tools.folders import NEXT, TOKENIZER_FILES, read_files, train_on, write_checkpoint

    check_args(args)
    check_new_folder(args.out, 0)
    folder = find_checkpoint(args.dense)
    dense = MoEConfig.from_file(folder / CONFIG_FILE)
    try:
        config = moe_config(dense, args.n_expert, args.n_expert_per_token, args.moe_intermediate_size)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    weights = load_model(folder).state_dict()
    generator = torch.Generator().manual_seed(args.seed)
    new = upcycle(weights, config, args.noise, generator)
    write_checkpoint(args.out, new, config, read_files(folder, TOKENIZER_FILES))
    counts = "{:,} parameters, {:,} active per token".format
    lines = [
        f"Dense   {folder}: {dense.name}, {count_parameters(dense)[0]:,} parameters",
        f"Wrote   {args.out}: {config.name}, {counts(*count_parameters(config))}",
    ]
    if not args.noise:
        difference = largest_difference(folder, args.out)
        lines.append(f"Checked it gives the dense model's logits, within {difference:.1e}")
    train = train_on(args.out, folder)
    return [*lines, f"{'Next:' if '--config' in train else NEXT}\n  {train}"]


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("dense", type=Path, help="dense checkpoint directory, or an out_dir (then its final or newest)")
    add("out", type=Path, help="checkpoint directory to make; must not exist, or be empty")
    add("--n_expert", type=int, required=True, help="experts in each layer, 2 or more")
    add("--n_expert_per_token", type=int, required=True, help="experts that a token meets")
    add(
        "--moe_intermediate_size",
        type=int,
        help="width of an expert (default: of the dense MLP)",
    )
    noise = "standard deviation of the noise on the experts, relative to the weights' own (default 0.0 = off)"
    add("--noise", type=float, default=0.0, help=noise)
    add("--seed", type=int, default=42, help="of router and noise (default %(default)s)")
    args = parser.parse_args(argv)
    from litgpt_moe.cli import run_command

    return run_command(lambda: "\n".join(run(args)))


if __name__ == "__main__":
    raise SystemExit(main())
