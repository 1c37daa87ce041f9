"""Activation checkpointing: the backward pass computes a block again, so that only its input is kept."""

from typing import Any

import torch
from litgpt.model import GPT, Block
from torch.utils.checkpoint import checkpoint


class RecomputedBlock(Block):
    """LitGPT's block, whose activations are computed again in the backward pass; see `recompute_blocks`.

    Memory falls from all activations to one tensor for each block and the activations of one block, for one
    more forward pass: Chen et al. (arxiv.org/abs/1604.06174), section 4, with a segment for each block.
    """

    def forward(self, *args: Any, **options: Any) -> Any:
        """Return the block's output."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **options)
        # a block has no dropout, so that the random generators need not be set back for the second pass
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **options)


def recompute_blocks(model: GPT) -> None:
    """Turn each block of the model into a `RecomputedBlock`; parameters and their names stay as they are."""
    # not only the children of transformer.h: FSDP wraps each block
    for module in model.modules():
        if type(module) is Block:
            module.__class__ = RecomputedBlock  # the same object, so hooks and parameters stay
