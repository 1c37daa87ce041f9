"""The experts by calling each one's module: slow, and the only way that knows biases."""

import torch
import torch.nn as nn

from litgpt_moe.kernels.rows import rows_per_expert


@torch.compiler.disable  # row counts are data: compiling would specialise on each and recompile for ever
def loop_experts(x_RC: torch.Tensor, ends_E: torch.Tensor, experts: nn.ModuleList) -> torch.Tensor:
    """Return the experts' outputs by calling each on its slice: the one way that knows biases."""
    if x_RC.is_meta:  # where FLOPs are counted: no row counts to read, and each row meets one expert
        return experts[0](x_RC)
    parts = x_RC.split(rows_per_expert(ends_E).tolist())
    return torch.cat([expert(x_SC) for expert, x_SC in zip(experts, parts, strict=True)])
