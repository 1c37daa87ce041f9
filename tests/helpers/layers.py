"""MoE layers with random weights, and everything that one forward and backward gives."""

import torch
from conftest import TINY_CONFIG

from litgpt_moe.config import MoEConfig
from moe_layers import MoE

GROUPS = {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2}
WIDE = {"n_embd": 64, "moe_intermediate_size": 32}


def pair(stock_class: type, dtype: torch.dtype, **overrides: object) -> tuple[torch.nn.Module, MoE]:
    """A stock-shaped layer and ours with the same random weights."""
    config = MoEConfig(**{**TINY_CONFIG, **overrides})
    stock, ours = stock_class(config).to(dtype), MoE(config).to(dtype)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def run(layer: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The layer's output, and every gradient by name, for a loss that weighs each output differently."""
    layer.zero_grad()
    x = x.clone().requires_grad_(True)
    y = layer(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    grads = {name.removeprefix("_orig_mod."): p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x.grad": x.grad, **grads}


def per_token(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The definition, one token and one choice at a time, of plain products; differentiable."""
    outputs = []
    for token in x.reshape(-1, x.size(-1)):
        logits = layer.gate.weight @ token
        values, chosen = logits.topk(layer.config.n_expert_per_token)
        weights = values.softmax(0, dtype=torch.float).to(x.dtype)  # float32 in every precision, as LitGPT's
        total = torch.zeros_like(token)
        for weight, e in zip(weights, chosen.tolist(), strict=True):
            fc_1, fc_2, proj = (getattr(layer.experts[e], name).weight for name in ("fc_1", "fc_2", "proj"))
            gate = fc_1 @ token
            total = total + weight * (proj @ (gate * gate.sigmoid() * (fc_2 @ token)))
        outputs.append(total)
    return torch.stack(outputs).view_as(x)
