"""The balance of the experts' load: two losses, a selection bias, statistics."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from litgpt.model import LLaMAMoE

BIAS_NAME = "e_score_correction_bias"  # as in LitGPT and Hugging Face


STATISTICS = ("load_imbalance", "dead_experts", "router_entropy", "aux_loss", "z_loss")


def load_balancing_loss(router_probs_NE: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Return the Switch balance loss, 1.0 when every expert gets equal load and equal probability.

    E * sum over e of f_e * P_e, with f_e the share of all N*K choices that fell on expert e (no gradient) and
    P_e its mean probability. Switch Transformer, eq. 4 to 6 (arxiv.org/abs/2101.03961), f divided by top_k.
    """
    share_E = tokens_per_expert.to(router_probs_NE.dtype) / tokens_per_expert.sum()
    return router_probs_NE.size(1) * (share_E * router_probs_NE.mean(dim=0)).sum()


def router_z_loss(router_logits_NE: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of logsumexp(logits)^2. ST-MoE, eq. 5 (arxiv.org/abs/2202.08906)."""
    return router_logits_NE.logsumexp(dim=1).square().mean()


@dataclass
class Balance:
    """How one layer is balanced, and what it counted. See `set_balance`."""

    aux_loss_coef: float
    z_loss_coef: float
    bias_update_rate: float
    scale: float
    # Plain tensors, no buffers: DistributedDataParallel overwrites every rank's buffers with rank 0's.
    step_load: torch.Tensor  # (E,) int64, tokens of this optimizer step
    load: torch.Tensor  # (E,) int64, tokens since the last statistics
    sums: torch.Tensor  # (4,) float32: micro-batches, and the sums over them of entropy, aux loss, z loss


# A custom operator and no autograd.Function: Dynamo (torch 2.10) mixes up what the backward of the latter
# changes in place with sizes, once these are dynamic.
@torch.library.custom_op("moe::attach_loss", mutates_args=())
def _attach_loss(
    x: torch.Tensor,
    loss: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    means: torch.Tensor,
    counters: list[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Return `x`; backward gives `loss` the gradient `scale`, and adds to step_load, load and sums.

    Counting belongs there: backward runs once for a micro-batch, forward also to recompute activations.
    """
    return x.clone()


@_attach_loss.register_fake
def _(x: Any, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _attach_keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # the counters on ctx: a saved tensor must not change before backward, and another micro-batch may add
    _, loss, tokens_per_expert, means, ctx.counters, ctx.scale = inputs
    ctx.loss_dtype = loss.dtype
    ctx.save_for_backward(tokens_per_expert, means)


def _attach_backward(ctx: Any, grad: torch.Tensor):
    tokens_per_expert, means = ctx.saved_tensors
    for counter, value in zip(ctx.counters, (tokens_per_expert, tokens_per_expert, means), strict=True):
        counter.add_(value)
    loss_grad = torch.full((), ctx.scale, dtype=ctx.loss_dtype, device=grad.device)
    return grad, loss_grad, None, None, [None] * len(ctx.counters), None


_attach_loss.register_autograd(_attach_backward, setup_context=_attach_keep)


def set_balance(
    model: nn.Module,
    *,
    aux_loss_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    bias_update_rate: float = 0.0,
    scale: float = 1.0,
) -> None:
    """Balance the model's MoE layers while they train, and count their load. Call it on the final device.

    The losses act through the layers' backward alone: what the model returns and its loss stay as they are,
    and nothing happens in eval mode or without gradients. A rate above 0 puts the selection bias into the
    state dict, so call this (or `use_selection_bias`) before a checkpoint is loaded.

    Args:
        aux_loss_coef: weight of `load_balancing_loss`, over the micro-batch of one device; 0 is off.
        z_loss_coef: weight of `router_z_loss`; 0 is off.
        bias_update_rate: step of `update_selection_bias`; 0 is off.
        scale: what the loss is multiplied by outside the model, 1 / gradient accumulation steps. No factor
            for the number of processes: DDP and FSDP average these gradients with all others.
    """
    if bias_update_rate:
        use_selection_bias(model)
    for layer in layers_of(model).values():
        device, n_expert = layer.gate.weight.device, layer.config.n_expert
        layer.balance = Balance(
            aux_loss_coef,
            z_loss_coef,
            bias_update_rate,
            scale,
            step_load=torch.zeros(n_expert, dtype=torch.int64, device=device),
            load=torch.zeros(n_expert, dtype=torch.int64, device=device),
            sums=torch.zeros(4, dtype=torch.float32, device=device),
        )


def use_selection_bias(model: nn.Module) -> None:
    """Let every MoE layer's bias take part in the choice and in the state dict (stock LitGPT's has none)."""
    for layer in layers_of(model).values():
        layer.use_selection_bias()


def has_selection_bias(state_dict: dict[str, torch.Tensor]) -> bool:
    """Return whether these weights hold a selection bias.

    Stock LitGPT then refuses them as unexpected keys, except with expert groups, where its router has one.
    """
    return any(name.endswith(f".{BIAS_NAME}") for name in state_dict)


@torch.no_grad()
def update_selection_bias(
    model: nn.Module, all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> None:
    """Move each expert's bias by the update rate, up if it got less than the mean in this step.

    DeepSeek-V3, section 2.1.2 (arxiv.org/abs/2412.19437): b_e += rate * sign(mean load - load_e). Call it
    after each optimizer step, on all processes; `all_reduce` returns the sum over them. No host round trip.
    """
    layers = [layer for layer in layers_of(model).values() if layer.balance is not None]
    if any(layer.balance.bias_update_rate for layer in layers):
        load_LE = torch.stack([layer.balance.step_load for layer in layers]).double()
        load_LE = load_LE if all_reduce is None else all_reduce(load_LE)
        direction_LE = (load_LE.mean(dim=1, keepdim=True) - load_LE).sign()
        for layer, direction_E in zip(layers, direction_LE, strict=True):
            bias = layer.selection_bias
            if bias.dtype != torch.float32:  # FSDP casts buffers to its compute dtype
                bias.data = bias.float()
            bias.add_(direction_E, alpha=layer.balance.bias_update_rate)
    discard_step_load(model)


def discard_step_load(model: nn.Module) -> None:
    """Forget the load of an optimizer step that is skipped, so that it does not move the bias."""
    for layer in layers_of(model).values():
        if layer.balance is not None:
            layer.balance.step_load.zero_()


@torch.no_grad()
def router_statistics(
    model: nn.Module, all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], dict[str, float]]]:
    """Return the routers' statistics since the last call, on the device, and what reads its copy on the host.

    The tensor is (layers, E + 4) float32: tokens per expert, micro-batches, and sums over these of entropy,
    aux loss and z loss. The function turns it, once on the host (`.cpu()`), into `moe/NAME/layer_03` ->
    number, for the names

        load_imbalance  max over mean of the tokens per expert, 1.0 is even
        dead_experts    experts without a token
        router_entropy  mean over tokens, in nats; log(E) is undecided
        aux_loss        `load_balancing_loss`, not yet times its coefficient; 1.0 is even
        z_loss          `router_z_loss`, not yet times its coefficient

    so that all layers, and whatever else is logged, need one transfer. Before any backward it gives {}.
    """
    layers = {index: layer for index, layer in layers_of(model).items() if layer.balance is not None}
    if not layers:
        return torch.zeros(0, 4), lambda _: {}
    balances = [layer.balance for layer in layers.values()]
    stacked = torch.stack([torch.cat([balance.load.float(), balance.sums]) for balance in balances])
    for balance in balances:
        balance.load.zero_()
        balance.sums.zero_()
    stacked = stacked if all_reduce is None else all_reduce(stacked)
    return stacked, partial(_read_statistics, list(layers))


def _read_statistics(indices: list[int], stacked: torch.Tensor) -> dict[str, float]:
    values: dict[str, float] = {}
    for index, row in zip(indices, stacked.double(), strict=True):
        load_E, (n_batches, *sums) = row[:-4], row[-4:].tolist()
        if not n_batches:
            continue
        means = [total / n_batches for total in sums]
        imbalance, dead = (load_E.max() / load_E.mean()).item(), float((load_E == 0).sum())
        for name, value in zip(STATISTICS, [imbalance, dead, *means], strict=True):
            values[f"moe/{name}/layer_{index:02d}"] = value
    return values


def layers_of(model: nn.Module) -> dict[int, LLaMAMoE]:
    """Return the model's MoE layers by their block's index (dense blocks are left out)."""
    blocks = enumerate(model.transformer.h)
    return {index: block.mlp for index, block in blocks if isinstance(block.mlp, LLaMAMoE)}


def count_expert_load(model: nn.Module, enabled: bool) -> None:
    """Switch the counting of tokens per expert on or off, and set the counters to zero."""
    for layer in layers_of(model).values():
        layer.count_load = enabled
        layer.tokens_per_expert.zero_()


def expert_load(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return block index -> tokens each expert got since counting began, (E,) float64 on the host."""
    return {index: layer.tokens_per_expert.double().cpu() for index, layer in layers_of(model).items()}
