"""Experts by calling each one's module: the slowest path, and the only one for experts with biases."""

import torch
import torch.nn as nn

from litgpt_moe.kernels.rows import Plan, combine, gather, rows_per_expert


def loop_experts(
    x_NC: torch.Tensor, weights_R1: torch.Tensor, plan: Plan, experts: nn.ModuleList
) -> torch.Tensor:
    """Return each token's weighted sum, (N, C), by calling each expert on its rows."""
    x_RC = gather(x_NC, plan)
    y_RC = _call_experts(x_RC, plan.ends, experts) * weights_R1
    return combine(y_RC, plan)


# not compiled: the numbers of rows are data, and torch.compile would compile anew for each of them
@torch.compiler.disable()
def _call_experts(x_RC: torch.Tensor, ends_E: torch.Tensor, experts: nn.ModuleList) -> torch.Tensor:
    if x_RC.is_meta:  # where FLOPs are counted: there are no numbers to read, and each row meets one expert
        return experts[0](x_RC)
    parts = x_RC.split(rows_per_expert(ends_E).tolist())
    return torch.cat([expert(x_SC) for expert, x_SC in zip(experts, parts, strict=True)])
