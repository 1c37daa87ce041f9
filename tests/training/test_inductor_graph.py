"""The kernels that Inductor makes of a whole training step, for a GPU that is not there."""

import functools
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG
from helpers.fake_cuda import backward, fake_gpu
from litgpt.model import GPT

from litgpt_moe import balance
from litgpt_moe.config import MoEConfig
from litgpt_moe.loss import defer_head

pytest.importorskip("triton")
pytestmark = [pytest.mark.usefixtures("eager"), pytest.mark.slow]


def code_of_a_step(**config: Any) -> str:
    """Return Inductor's code of a model's forward and backward."""
    from helpers.inductor import code_of, trace  # not at the top: Inductor's import takes seconds

    with pytest.MonkeyPatch.context() as patch, fake_gpu((8, 6), with_bodies=False):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = GPT(MoEConfig(**{**TINY_CONFIG, "n_embd": 64, "moe_intermediate_size": 32, **config}))
        finally:
            torch.set_default_dtype(torch.float32)
        balance.set_balance(model, aux_loss_coef=0.01, z_loss_coef=0.001)
        assert defer_head(model) is not None
        names = [name for name, _ in model.named_parameters()]

        def step(tokens: torch.Tensor, grad: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
            leaves = [weight.detach().requires_grad_() for weight in weights]
            by_name = dict(zip(names, leaves, strict=True))
            hidden = torch.func.functional_call(model, by_name, (tokens,))
            # the loss, which is not compiled in training, has a backward of its own
            backward((hidden * grad).sum())
            return [hidden.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

        # what a graph of torch.compile takes
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        tokens = torch.zeros(2, 64, dtype=torch.int64)
        grad = torch.zeros(2, 64, 64, dtype=torch.bfloat16)
        fakes = [tokens, grad, *(weight.detach() for weight in model.parameters())]
        graph, inputs = trace(step, fakes)
    return code_of(graph, inputs)


@functools.cache
def n_kernels(**config: Any) -> int:
    """Return how many of Inductor's Triton kernels a step starts; GEMMs and operators come on top."""
    return code_of_a_step(**config).partition("def call(")[2].count(".run(")


def test_the_number_of_kernels_does_not_grow_with_the_experts() -> None:
    # in two layers; a kernel for each expert would be 32 more
    assert 10 < n_kernels(n_expert=32) < n_kernels(n_expert=16) + 4


def test_a_layer_takes_a_few_dozen_kernels() -> None:
    # 34 with torch 2.10; attention is computed by its formula, because fake tensors choose no flash attention
    per_layer = n_kernels(n_expert=16, n_layer=3) - n_kernels(n_expert=16)
    assert 10 < per_layer <= 40, per_layer
