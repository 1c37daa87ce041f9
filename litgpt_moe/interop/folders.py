"""Stand-ins until litgpt_moe.checkpoints and config are there; their users change one import each."""

from dataclasses import dataclass
from pathlib import Path

import torch
from litgpt.model import GPT
from litgpt.utils import save_config

from litgpt_moe.files import new_folder
from moe_layers import CHECKPOINT_FILE, MoEConfig, count_parameters
from run_train import (
    meta_model,  # noqa: F401 (-> litgpt_moe.config)
    tensor_bytes,
    write_record,
    write_state,
)

# -> litgpt_moe.checkpoints.layout
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


# -> litgpt_moe.checkpoints.writer
def read_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the content of those files in `folder` that are there."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


# -> litgpt_moe.checkpoints.writer
def write_checkpoint(
    out: Path, weights: dict[str, torch.Tensor], config: MoEConfig, files: dict[str, bytes]
) -> None:
    """Write a checkpoint directory of bare weights, and `files`, from which run_train.py and others start.

    Raises as `new_folder`.
    """
    with new_folder(out, tensor_bytes(weights)) as staging:
        entry = write_state({"model": weights}, staging / CHECKPOINT_FILE)
        for name, content in files.items():
            (staging / name).write_bytes(content)
        save_config(config, staging)
        write_record(staging, 0, {CHECKPOINT_FILE: entry})


# -> litgpt_moe.config
@dataclass(frozen=True)
class ModelFacts:
    """What one configuration costs."""

    total_params: int
    active_params: int
    flops_per_token: int


# -> litgpt_moe.config
def model_facts(config: MoEConfig, block_size: int | None = None) -> ModelFacts:
    """Return the parameters of a model and its FLOPs per token, forward and backward."""
    with torch.device("meta"):
        model = GPT(config)
    total, active = count_parameters(config)
    look_up = model.get_parameter("transformer.wte.weight")  # it multiplies nothing, nor do norms and biases
    matmul = active - sum(p.numel() for p in model.parameters() if p.dim() < 2 or p is look_up)
    # PaLM, appendix B (arxiv.org/abs/2204.02311): 6 a weight, 12 L H Q T for attention without its mask
    length = block_size or config.block_size
    attention = 12 * config.n_layer * config.n_head * (config.head_size or 0) * length
    return ModelFacts(total, active, 6 * matmul + attention)
