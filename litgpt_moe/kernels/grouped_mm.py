"""The experts by PyTorch's grouped GEMM, which is one kernel on some GPUs."""

import torch
import torch.nn.functional as F

from litgpt_moe.kernels.rows import SwiGLU


def grouped_mm_experts(
    x_RC: torch.Tensor,
    weights_R1: torch.Tensor,
    ends_E: torch.Tensor,
    fc_1: list[torch.Tensor],
    fc_2: list[torch.Tensor],
    proj: list[torch.Tensor],
) -> torch.Tensor:
    """Return each sorted row's weighted expert output, (R, C), by three grouped GEMMs, no round trip."""

    def stacked(matrices: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(matrices).to(x_RC.dtype).transpose(-2, -1)  # grouped_mm knows no autocast

    gate_RF = F.grouped_mm(x_RC, stacked(fc_1), offs=ends_E)
    up_RF = F.grouped_mm(x_RC, stacked(fc_2), offs=ends_E)
    return F.grouped_mm(SwiGLU.apply(gate_RF, up_RF, weights_R1), stacked(proj), offs=ends_E)


@torch.compiler.assume_constant_result  # a device does not change under a compiled graph
def has_fast_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `F.grouped_mm` is one kernel: bf16 on SM90/SM100; elsewhere torch loops on the host."""
    # torch 2.10, aten/src/ATen/native/cuda/GroupedBlas.cpp
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
