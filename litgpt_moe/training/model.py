"""The model that is trained: balanced layers, head, first weights, and what its routers counted."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from litgpt import GPT

from litgpt_moe.balance import Balance, layers_of, set_balance, use_selection_bias
from litgpt_moe.kernels.matmul import use_fast_linear
from litgpt_moe.loss import LossHead, defer_head
from litgpt_moe.training.run import Run
from litgpt_moe.training.sharding import is_sharded


class PreparedModel(NamedTuple):
    """The model in training, without what compiles and shards it."""

    gpt: GPT
    head: LossHead | None
    """Its lm_head, where the loss computes the logits itself."""
    has_selection_bias: bool
    """Whether experts are chosen with a bias, which makes stock LitGPT refuse the weights."""


def prepare_model(fabric: Fabric, module: Any, run: Run) -> PreparedModel:
    """Return the model in Fabric's `module` ready to train: balanced, with the weights to start from."""
    gpt: GPT = module.module
    use_fast_linear(gpt)
    # LitGPT divides its own loss by the number of micro-batches, not what a layer adds
    set_balance(gpt, **asdict(run.settings.moe), scale=1 / run.accumulation)
    # FSDP's weights are whole only inside the model's forward
    head = None if is_sharded(fabric) else defer_head(gpt)
    source = run.initial or run.resume
    was_biased = source is not None and source.has_selection_bias
    if was_biased:
        # trained with a selection bias, the experts are chosen with it even if nothing updates it
        use_selection_bias(gpt)
    if run.initial is not None:
        # LitGPT's own initial_checkpoint_dir reads bare weights, not checkpoints. strict=False: the weights
        # were checked, and the optimizer's state stays behind
        if run.initial.is_bare:
            fabric.load_raw(run.initial.file, module, strict=False, weights_only=True)
        else:
            fabric.load(run.initial.file, {"model": module}, strict=False)
        # as long as something refers to a tensor in the mapped file, its disk space stays in use
        run.initial.state.clear()
    return PreparedModel(gpt, head, was_biased or run.settings.moe.bias_update_rate > 0)


def router_counts(
    gpt: GPT, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """Return what each layer counted since the last row of the log, over all ranks."""
    return [
        {"load": sum_over_ranks(balance.load.clone()), "sums": sum_over_ranks(balance.sums.clone())}
        for balance in _balances(gpt)
    ]


def set_router_counts(gpt: GPT, counts: list[dict[str, torch.Tensor]]) -> None:
    """Let the layers go on counting from `counts`; call it on one rank, since a row sums over all."""
    for balance, count in zip(_balances(gpt), counts, strict=True):
        balance.load.copy_(count["load"])
        balance.sums.copy_(count["sums"])


def _balances(gpt: GPT) -> list[Balance]:
    return [layer.balance for layer in layers_of(gpt).values() if layer.balance is not None]
