"""Finer points of the optimizer and of the first weights, each off by default: the settings of `recipe`."""

from typing import Any

import torch
from litgpt import GPT
from torch.optim import Optimizer

from litgpt_moe.training.settings import RecipeArgs

FULL_DECAY = "full_weight_decay"  # key of a group: its weight decay before it is lowered
LR_FACTOR = "lr_factor"  # key of a group: its learning rate over the schedule's


def has_own_rates(recipe: RecipeArgs) -> bool:
    """Return whether some kind of weight has a learning rate of its own, and so a group of its own."""
    return any(factor != 1.0 for factor in (recipe.embedding_lr, recipe.head_lr, recipe.other_lr))


def apply_recipe(recipe: RecipeArgs, optimizer: Optimizer) -> Optimizer:
    """Return the optimizer, prepared for what the recipe asks of its steps."""
    if recipe.decay_to_zero:
        for group in optimizer.param_groups:
            group[FULL_DECAY] = group.get("weight_decay", 0.0)
    if recipe.cautious_decay:
        CautiousDecay(optimizer)
    return optimizer


def set_rates(optimizer: Optimizer, lr: float, done: float, recipe: RecipeArgs) -> None:
    """Set each group's learning rate, and its weight decay, in a run of which the share `done` is over."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)
        if recipe.decay_to_zero and FULL_DECAY in group:
            # AdamW and Muon multiply it by the learning rate, which falls by itself
            group["weight_decay"] = group[FULL_DECAY] * max(0.0, 1.0 - done)


class CautiousDecay:
    """Decays a weight only where the optimizer's own step makes it smaller too (arxiv.org/abs/2510.12402).

    It works for every optimizer with decoupled weight decay: the decay is switched off for the step and made
    up for afterwards, which takes a copy of the decayed weights meanwhile.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._decays: list[float] = []
        self._before: list[list[torch.Tensor]] = []
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    @torch.no_grad()
    def _begin(self, optimizer: Optimizer, *_: Any) -> None:
        self._decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
        self._before = []
        for group, decay in zip(optimizer.param_groups, self._decays, strict=True):
            self._before.append([weight.clone() for weight in _moved(group)] if decay else [])
            if decay:
                group["weight_decay"] = 0.0

    @torch.no_grad()
    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        for group, decay, before in zip(optimizer.param_groups, self._decays, self._before, strict=True):
            if not decay:
                continue
            group["weight_decay"] = decay
            for weight, old in zip(_moved(group), before, strict=True):
                # the step is old - weight: it shrinks what has its sign
                weight.sub_(old.mul(((old - weight) * old) >= 0), alpha=group["lr"] * decay)
        self._before = []


def _moved(group: dict[str, Any]) -> list[torch.Tensor]:
    """Return the weights of a group that a step moves."""
    return [weight for weight in group["params"] if weight.grad is not None]


def zero_head(gpt: GPT) -> None:
    """Set the head to zero, so that the untrained model finds every word equally probable."""
    with torch.no_grad():
        gpt.lm_head.weight.zero_()
