"""Experts by PyTorch's grouped GEMM: one kernel for all experts, on the GPUs for which PyTorch has it."""

import torch
import torch.nn.functional as F

from litgpt_moe.kernels.rows import Matrices, Plan, combine, gather, swiglu


def grouped_mm_experts(
    x_NC: torch.Tensor, weights_R1: torch.Tensor, plan: Plan, fc_1: Matrices, fc_2: Matrices, proj: Matrices
) -> torch.Tensor:
    """Return each token's weighted sum, (N, C), by three grouped GEMMs; the host waits for nothing."""

    def stacked(matrices: Matrices) -> torch.Tensor:
        return torch.stack(matrices).to(x_NC.dtype).transpose(-2, -1)  # autocast does not know grouped_mm

    x_RC = gather(x_NC, plan)
    gate_RF = F.grouped_mm(x_RC, stacked(fc_1), offs=plan.ends)
    up_RF = F.grouped_mm(x_RC, stacked(fc_2), offs=plan.ends)
    y_RC = F.grouped_mm(swiglu(gate_RF, up_RF, weights_R1), stacked(proj), offs=plan.ends)
    return combine(y_RC, plan)


@torch.compiler.assume_constant_result  # the device does not change under a compiled graph
def has_fast_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `F.grouped_mm` is one kernel: bf16 on SM90 and SM100; elsewhere it loops on the host."""
    # torch 2.10, aten/src/ATen/native/cuda/GroupedBlas.cpp
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
