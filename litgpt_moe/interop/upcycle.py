"""Convert a dense model to a Mixture-of-Experts one that has the same logits until it is trained.

Every expert is initialised as a copy of the dense MLP and the router at random (Sparse Upcycling,
arxiv.org/abs/2212.05055); the weights of a token's experts sum to one, so the logits do not change. With a
width of 1/G of the dense one the MLP is cut into G slices. The G experts that make up one MLP have the same
router row, so that a token visits all slices or none (virtual groups, arxiv.org/abs/2410.07524).
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from litgpt_moe.checkpoints.layout import CONFIG_FILE, SETTINGS_FILE
from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.cli import WorkFailed, no_bar, train_command
from litgpt_moe.config import MoEConfig, model_facts
from litgpt_moe.files import free_name

N_CHECKED = 64  # tokens whose logits are compared
NEXT = "Next (training reads data/custom_text, or what --data_dir names):"


def moe_config(dense: MoEConfig, n_expert: int, top_k: int, width: int | None) -> MoEConfig:
    """Return `dense` with `n_expert` experts of `width` (None: the dense width); ValueError if impossible."""
    if dense.mlp_class_name == "LLaMAMoE":
        raise ValueError(f"the model has {dense.n_expert} experts already; upcycling starts from a dense one")
    if dense.mlp_class_name != "LLaMAMLP":
        only = "only LLaMAMLP has the shape of an expert"
        raise ValueError(f"mlp_class_name is {dense.mlp_class_name}; {only}")
    assert dense.intermediate_size  # LitGPT's Config computes it
    dense_width = dense.intermediate_size
    width = dense_width if width is None else width
    if width < 1 or dense_width % width:
        way_out = f"choose a divisor of the dense width {dense_width}"
        raise ValueError(f"moe_intermediate_size is {width}; {way_out}")
    slices = dense_width // width
    for name, count in (("n_expert", n_expert), ("n_expert_per_token", top_k)):
        if count % slices:
            cut = f"--moe_intermediate_size {width} cuts the width {dense_width} into {slices} slices"
            must = f"not a multiple of {slices}: {cut}, and a token must meet all of them"
            raise ValueError(f"{name} is {count}, {must}")
    experts = {"n_expert": n_expert, "n_expert_per_token": top_k, "moe_intermediate_size": width}
    config = replace(dense, mlp_class_name="LLaMAMoE", **experts)
    return replace(config, name=f"MoE-{model_facts(config).total_params / 1e6:.3g}M")


def upcycle(
    weights: dict[str, torch.Tensor], config: MoEConfig, noise: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return the weights of `config`, made of the dense ones.

    `noise` is added to the experts' matrices; it is relative to the standard deviation of each matrix.
    """
    new = {name: weight for name, weight in weights.items() if ".mlp." not in name}
    width = config.moe_intermediate_size
    assert width and config.intermediate_size
    slices = config.intermediate_size // width
    for layer in tqdm(range(config.n_layer), unit="layer", desc="experts", disable=no_bar()):
        mlp = f"transformer.h.{layer}.mlp."
        dense = {name.removeprefix(mlp): weight for name, weight in weights.items() if name.startswith(mlp)}
        # the variance is that of LitGPT's nn.Linear (litgpt.pretrain.initialize_weights)
        rows = torch.randn(config.n_expert // slices, config.n_embd, generator=generator)
        gate = rows.mul_(math.sqrt(2.0 / 5 / config.n_embd)).repeat_interleave(slices, dim=0)
        new[f"{mlp}gate.weight"] = gate.to(dense["proj.weight"].dtype)
        for e in range(config.n_expert):
            for name, weight in dense.items():
                part = _slice_of(weight, name, e % slices * width, width)
                if noise and weight.dim() == 2:
                    spread = noise * weight.float().std()
                    part += torch.randn(part.shape, generator=generator).mul_(spread).to(part.dtype)
                new[f"{mlp}experts.{e}.{name}"] = part
    return new


def _slice_of(weight: torch.Tensor, name: str, start: int, width: int) -> torch.Tensor:
    """Return a copy of an expert's part of a dense MLP's tensor."""
    if name.startswith("fc_"):
        return weight[start : start + width].clone()
    if name == "proj.bias":
        return weight.clone()  # the K copies are summed with weights that sum to one
    # the router's weight of a slice is 1 / G of the weight of a whole MLP
    return weight[:, start : start + width].mul(weight.size(1) // width)


def sample_logits(folder: Path) -> torch.Tensor:
    """Return a checkpoint's logits in float32 on random tokens; WorkFailed if they are NaN or infinite."""
    model = load_model(folder, dtype=torch.float32)
    n_tokens = min(N_CHECKED, model.max_seq_length)
    ids = torch.randint(model.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(ids)
    if not logits.isfinite().all():
        raise WorkFailed(f"{folder}: its logits are NaN or infinite; use an earlier checkpoint")
    return logits


def training_command(checkpoint: Path, like: Path | None = None) -> str:
    """Return the command that trains from `checkpoint`, with the settings of the checkpoint `like` if any."""
    given = ("--config", like / SETTINGS_FILE) if like and (like / SETTINGS_FILE).is_file() else ()
    start = ("--initial_checkpoint_dir", checkpoint, "--tokenizer_dir", checkpoint)
    model = ("--model_config", checkpoint / CONFIG_FILE)
    out_dir = free_name(checkpoint.with_name(f"{checkpoint.absolute().name}_trained"), "_", start=2)
    return train_command(*given, *start, *model, "--out_dir", out_dir)
