"""Weights of 8 bits: which are rounded, and how."""

import torch
from litgpt.model import GPT
from torch import nn


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in int8 and the float32 scale of each row: symmetric, the largest value becomes 127."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def round_weights(model: GPT) -> None:
    """Round a model's weights to what the engine computes with after --quantize int8, in their own dtype.

    That is every matrix but those of the routers, where a rounded logit may choose another expert.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not name.endswith(".mlp.gate"):
            values, scale = quantize_rows(module.weight.detach())
            module.weight.data.copy_(values * scale[:, None])
