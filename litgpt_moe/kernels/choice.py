"""Which way the experts are run."""

import torch
from litgpt.config import Config

from litgpt_moe.kernels.grouped_mm import has_fast_grouped_mm
from litgpt_moe.kernels.triton import has_triton

WAYS = {
    "grouped_mm": "grouped GEMM (torch.nn.functional.grouped_mm)",
    "triton": "grouped GEMM (Triton, layers_of.py)",
    "segments": "one GEMM for each expert's sorted rows",
    "loop": "a loop over the experts' modules",
}


def choose_way(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """Return how experts are run, a key of WAYS: the fastest that this device and dtype have."""
    if config.bias:
        return "loop"
    is_aligned = config.n_embd % 8 == 0 and config.moe_intermediate_size % 8 == 0  # rows of 16 bytes in bf16
    if is_aligned and has_fast_grouped_mm(device, dtype):
        return "grouped_mm"
    return "triton" if has_triton(device.type, dtype) else "segments"


def experts_path(config: Config, device: torch.device | str, dtype: torch.dtype) -> str:
    """Return, in words, how this model's experts would be run on this device in this dtype."""
    if not config.n_expert:
        return "none"
    device = torch.device(device)
    way = choose_way(config, device, dtype)
    waits = "" if way in ("grouped_mm", "triton") or device.type == "cpu" else ", which waits for the device"
    return WAYS[way] + waits
