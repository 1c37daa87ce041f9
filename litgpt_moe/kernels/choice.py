"""How the experts are run: one function for all kernels, and the choice by device and dtype."""

import torch
import torch.nn as nn
from litgpt.config import Config
from torch._subclasses.fake_tensor import FakeTensor

from litgpt_moe.kernels.cpu import segment_experts
from litgpt_moe.kernels.grouped_mm import grouped_mm_experts, has_fast_grouped_mm
from litgpt_moe.kernels.rows import Plan, combine, gather, rows_per_expert
from litgpt_moe.kernels.triton import has_triton, triton_experts

KERNELS = {
    "grouped_mm": "grouped GEMM (torch.nn.functional.grouped_mm)",
    "triton": "grouped GEMM (Triton, litgpt_moe/kernels)",
    "segments": "one GEMM for each expert's sorted rows",
    "loop": "a loop over the experts' modules",
}


def run_experts(
    kernel: str, x_NC: torch.Tensor, weights_R1: torch.Tensor, plan: Plan, experts: nn.ModuleList
) -> torch.Tensor:
    """Return each token's weighted sum of its experts' outputs, (N, C).

    `kernel` is a key of KERNELS. An expert has the linear layers of `litgpt.model.LLaMAMLP`.
    """
    if kernel == "loop":
        return combine(_call_experts(gather(x_NC, plan), plan.ends, experts) * weights_R1, plan)
    # not get_parameter: inside FSDP's forward the weights are plain tensors
    maps = ([getattr(expert, name).weight for expert in experts] for name in ("fc_1", "fc_2", "proj"))
    run = {"grouped_mm": grouped_mm_experts, "triton": triton_experts, "segments": segment_experts}[kernel]
    return run(x_NC, weights_R1, plan, *maps)


# not compiled: the numbers of rows are data, and torch.compile would compile anew for each of them
@torch.compiler.disable()
def _call_experts(x_RC: torch.Tensor, ends_E: torch.Tensor, experts: nn.ModuleList) -> torch.Tensor:
    if x_RC.is_meta:  # where FLOPs are counted: there are no numbers to read, and each row meets one expert
        return experts[0](x_RC)
    if isinstance(x_RC, FakeTensor):  # where memory is planned: no numbers either, so an even load
        parts = x_RC.tensor_split(len(experts))
    else:
        parts = x_RC.split(rows_per_expert(ends_E).tolist())
    return torch.cat([expert(x_SC) for expert, x_SC in zip(experts, parts, strict=True)])


def choose_kernel(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """Return the key of KERNELS for the fastest kernels that this device has in this dtype."""
    if config.bias:
        return "loop"
    # grouped_mm needs rows of a multiple of 16 bytes: 8 values in bf16
    is_aligned = config.n_embd % 8 == 0 and (config.moe_intermediate_size or 0) % 8 == 0
    if is_aligned and has_fast_grouped_mm(device, dtype):
        return "grouped_mm"
    return "triton" if has_triton(device.type, dtype) else "segments"


def describe_kernel(config: Config, device: torch.device | str, dtype: torch.dtype) -> str:
    """Return, in words, how this model's experts would be run on this device in this dtype."""
    if not config.n_expert:
        return "none"
    device = torch.device(device)
    kernel = choose_kernel(config, device, dtype)
    waits = device.type != "cpu" and kernel not in ("grouped_mm", "triton")
    return KERNELS[kernel] + (", which waits for the device" if waits else "")
