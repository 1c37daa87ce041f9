"""The model that Fabric has wrapped: how it is prepared, and the router counters in a checkpoint."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from lightning.fabric import Fabric
from litgpt import GPT

from litgpt_moe import balance
from litgpt_moe.kernels.matmul import use_fast_linear
from litgpt_moe.recompute import recompute_blocks
from litgpt_moe.training.loss_scaling import loss_scaling
from litgpt_moe.training.recipe import zero_head
from litgpt_moe.training.run import Run
from litgpt_moe.training.sharding import is_sharded
from litgpt_moe.training.steps import RunFailed


def prepare_model(fabric: Fabric, module: Any, run: Run) -> bool:
    """Balance the model in Fabric's `module`, and load the weights of `run.initial`.

    Return whether the experts are chosen with a selection bias: stock LitGPT then refuses the checkpoints.
    """
    gpt: GPT = module.module
    use_fast_linear(gpt)
    if run.settings.activation_checkpointing:
        recompute_blocks(gpt)
    loss_scale = None
    if scaling := loss_scaling(fabric):
        scaling.start(fabric.device)
        loss_scale = scaling.current
    # LitGPT divides its own loss by the number of micro-batches, but not the loss that a layer attaches
    balance.set_balance(gpt, **asdict(run.settings.moe), scale=1 / run.accumulation, loss_scale=loss_scale)
    if run.settings.recipe.zero_head and run.resume is None and run.initial is None:
        if is_sharded(fabric):
            raise RunFailed("recipe.zero_head needs a whole head, which FSDP splits; use strategy: ddp")
        zero_head(gpt)
    source = run.initial or run.resume
    was_biased = source is not None and source.has_selection_bias
    if was_biased:
        # experts trained with a selection bias are chosen with it, even if it is no longer updated
        balance.use_selection_bias(gpt)
    if run.initial is not None:
        # LitGPT's own initial_checkpoint_dir reads bare weights alone. strict=False leaves the optimizer's
        # state unread; the weights have been checked
        if run.initial.is_bare:
            fabric.load_raw(run.initial.file, module, strict=False, weights_only=True)
        else:
            fabric.load(run.initial.file, {"model": module}, strict=False)
        # a tensor that still refers to the memory-mapped file keeps its disk space in use
        run.initial.state.clear()
    return was_biased or run.settings.moe.bias_update_rate > 0


def router_counts(
    gpt: GPT, all_reduce: Callable[[torch.Tensor], torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """Return each MoE layer's counters since the last row of the log, summed over all ranks."""
    return [
        {name: all_reduce(getattr(counters, name).clone()) for name in ("load", "sums")}
        for counters in _counters(gpt)
    ]


def set_router_counts(gpt: GPT, saved: list[dict[str, torch.Tensor]]) -> None:
    """Set the counters to what `router_counts` returned."""
    for counters, values in zip(_counters(gpt), saved, strict=True):
        counters.load.copy_(values["load"])
        counters.sums.copy_(values["sums"])


def _counters(gpt: GPT) -> list[balance.Balance]:
    return [layer.balance for layer in balance.layers_of(gpt).values() if layer.balance is not None]
