"""Equal load for the experts: two auxiliary losses, a bias on the choice of experts, and statistics.

Call `set_balance` once, `update_selection_bias` after each optimizer step and `router_statistics` when you
log. Axes: N tokens, K experts per token, E experts, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from litgpt.model import LLaMAMoE

# LitGPT's and Hugging Face's name of the selection bias
BIAS_NAME = "e_score_correction_bias"
STATISTICS = ("load_imbalance", "dead_experts", "router_entropy", "aux_loss", "z_loss")


def layers_of(model: nn.Module) -> dict[int, Any]:
    """Return the model's MoE layers by the index of their block; dense blocks are left out."""
    # Any: each is a moe_layers.MoE, whose module imports this one
    blocks = enumerate(model.get_submodule("transformer.h").children())
    layers = {index: getattr(block, "mlp", None) for index, block in blocks}
    return {index: mlp for index, mlp in layers.items() if isinstance(mlp, LLaMAMoE)}


# --- the two losses and how they reach the gradients --------------------------------------------------------


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
    """How one layer is balanced, and what it counted. See `set_balance`.

    The counters are plain tensors, not buffers: DistributedDataParallel overwrites every rank's buffers with
    rank 0's.
    """

    aux_loss_coef: float
    z_loss_coef: float
    bias_update_rate: float
    scale: float
    loss_scale: torch.Tensor | None
    """Scalar by which the loss is scaled in fp16, changed in place between steps; None in other dtypes."""
    step_load: torch.Tensor
    """(E,) int64, tokens of each expert in this optimizer step."""
    load: torch.Tensor
    """(E,) int64, tokens of each expert since the statistics were last read."""
    sums: torch.Tensor
    """(4,) float32: the number of micro-batches, and sums over them of entropy, aux loss and z loss."""


def attach_loss(
    weights_NK: torch.Tensor,
    router_logits_NE: torch.Tensor,
    router_probs_NE: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    balance: Balance,
) -> torch.Tensor:
    """Return the weights unchanged; their backward pass adds both losses' gradients and counts the load.

    LitGPT's loop has no place for a second loss. This way it needs none, and it logs pure cross-entropy.
    """
    aux_loss = load_balancing_loss(router_probs_NE, tokens_per_expert)
    z_loss = router_z_loss(router_logits_NE)
    loss = balance.aux_loss_coef * aux_loss + balance.z_loss_coef * z_loss
    if balance.loss_scale is not None:
        loss = loss * balance.loss_scale
    entropy = -torch.special.xlogy(router_probs_NE, router_probs_NE).detach().sum(1).mean()
    means = torch.stack([torch.ones_like(entropy), entropy, aux_loss.detach(), z_loss.detach()]).float()
    counters = [balance.step_load, balance.load, balance.sums]
    return torch.ops.moe.attach_loss(weights_NK, loss, tokens_per_expert, means, counters, balance.scale)


# A custom operator and not an autograd.Function: with dynamic shapes, Dynamo (torch 2.10) takes a tensor that
# the backward of a Function changes in place for a size.
@torch.library.custom_op("moe::attach_loss", mutates_args=())
def _attach_loss(
    x: torch.Tensor,
    loss: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    means: torch.Tensor,
    counters: list[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Return `x`; backward gives `loss` the gradient `scale`, and adds to the three counters.

    It is backward that counts, because it runs once per micro-batch: activation checkpointing runs forward
    a second time.
    """
    return x.clone()


@_attach_loss.register_fake
def _(x: Any, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _attach_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # on ctx, not saved: autograd refuses a saved tensor that another micro-batch has changed in place
    _, loss, tokens_per_expert, means, ctx.counters, ctx.scale = inputs
    ctx.loss_dtype = loss.dtype
    ctx.save_for_backward(tokens_per_expert, means)


def _attach_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    tokens_per_expert, means = ctx.saved_tensors
    for counter, value in zip(ctx.counters, (tokens_per_expert, tokens_per_expert, means), strict=True):
        counter.add_(value)
    loss_grad = torch.full((), ctx.scale, dtype=ctx.loss_dtype, device=grad.device)
    return grad, loss_grad, None, None, [None] * len(ctx.counters), None


_attach_loss.register_autograd(_attach_backward, setup_context=_attach_setup_context)


def set_balance(
    model: nn.Module,
    *,
    aux_loss_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    bias_update_rate: float = 0.0,
    scale: float = 1.0,
    loss_scale: torch.Tensor | None = None,
) -> None:
    """Balance the model's MoE layers while they train, and count their load.

    Call it when the model is on its final device.

    The losses act through the layers' backward pass only: what the model returns and its loss stay the same,
    and nothing happens in eval mode or without gradients. A rate above 0 puts the selection bias into the
    state dict, so call this (or `use_selection_bias`) before a checkpoint is loaded.

    Args:
        aux_loss_coef: weight of `load_balancing_loss`, over the micro-batch of one device; 0 is off.
        z_loss_coef: weight of `router_z_loss`; 0 is off.
        bias_update_rate: step of `update_selection_bias`; 0 is off.
        scale: what the loss is multiplied by outside the model, 1 / gradient accumulation steps. No factor
            for the number of processes: DDP and FSDP average these gradients with all others.
        loss_scale: scalar on the device by which loss scaling multiplies the loss outside the model besides.
            It is read in each forward pass.
    """
    if bias_update_rate:
        use_selection_bias(model)
    for layer in layers_of(model).values():
        load_E = torch.zeros(layer.config.n_expert, dtype=torch.int64, device=layer.gate.weight.device)
        counters = load_E.clone(), load_E, load_E.new_zeros(4, dtype=torch.float32)
        layer.balance = Balance(aux_loss_coef, z_loss_coef, bias_update_rate, scale, loss_scale, *counters)


# --- the selection bias -------------------------------------------------------------------------------------


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
    """Raise the bias of each expert with fewer tokens than the step's mean; lower it for those with more.

    DeepSeek-V3, section 2.1.2 (arxiv.org/abs/2412.19437): b_e += rate * sign(mean load - load_e). Call it
    after each optimizer step, on all processes; `all_reduce` returns the sum over them. The host does not
    wait for the device.
    """
    layers = {layer: layer.balance for layer in layers_of(model).values() if layer.balance is not None}
    if any(balance.bias_update_rate for balance in layers.values()):
        load_LE = torch.stack([balance.step_load for balance in layers.values()])
        # MPS has no float64
        load_LE = load_LE.to(torch.float32 if load_LE.is_mps else torch.float64)
        load_LE = load_LE if all_reduce is None else all_reduce(load_LE)
        direction_LE = (load_LE.mean(dim=1, keepdim=True) - load_LE).sign()
        for (layer, balance), direction_E in zip(layers.items(), direction_LE, strict=True):
            bias = layer.selection_bias
            if bias.dtype != torch.float32:  # FSDP casts buffers to its compute dtype
                bias.data = bias.float()
            bias.add_(direction_E, alpha=balance.bias_update_rate)
    discard_step_load(model)


def discard_step_load(model: nn.Module) -> None:
    """Set the load of this optimizer step to zero, so that a skipped step does not move the bias."""
    for layer in layers_of(model).values():
        if layer.balance is not None:
            layer.balance.step_load.zero_()


# --- statistics ---------------------------------------------------------------------------------------------


@torch.no_grad()
def router_statistics(
    model: nn.Module, all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], dict[str, float]]]:
    """Return the routers' statistics since the last call, on the device, and a function that names them.

    The tensor is (layers, E + 4) float32: tokens per expert, micro-batches, and sums over these of entropy,
    aux loss and z loss. Give the function a copy on the host (`.cpu()`); it returns `moe/NAME/layer_03` ->
    number, for the names

        load_imbalance  max over mean of the tokens per expert, 1.0 is even
        dead_experts    experts without a token
        router_entropy  mean over tokens, in nats; log(E) is undecided
        aux_loss        `load_balancing_loss`, not yet times its coefficient; 1.0 is even
        z_loss          `router_z_loss`, not yet times its coefficient

    One transfer to the host serves all layers. Before any backward pass the function returns {}.
    """
    layers = {index: layer.balance for index, layer in layers_of(model).items() if layer.balance is not None}
    if not layers:
        return torch.zeros(0, 4), lambda _: {}
    balances = layers.values()
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
        if n_batches:
            numbers = [(load_E.max() / load_E.mean()).item(), float((load_E == 0).sum())]
            numbers += [total / n_batches for total in sums]
            names = (f"moe/{name}/layer_{index:02d}" for name in STATISTICS)
            values |= zip(names, numbers, strict=True)
    return values


def count_expert_load(model: nn.Module, enabled: bool) -> None:
    """Switch the counting of tokens per expert in forward passes on or off, and set the counters to zero."""
    for layer in layers_of(model).values():
        layer.count_load = enabled
        layer.tokens_per_expert.zero_()


def expert_load(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return block index -> tokens each expert got since counting began, (E,) float64 on the host."""
    return {index: layer.tokens_per_expert.cpu().double() for index, layer in layers_of(model).items()}
