"""The functions with a backward of their own give the same gradients when torch.compile traces them."""

from collections.abc import Callable

import pytest
import torch

from litgpt_moe.kernels.rows import Plan, combine, gather, router_logits, swiglu


def plan(n_choices: int) -> Plan:
    """Which of three experts take each of five tokens."""
    chosen_NK = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1]])[:, :n_choices]
    return Plan.of(chosen_NK, 3)


FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[tuple[int, int], ...]]] = {
    "swiglu": (swiglu, ((10, 6), (10, 6), (10, 1))),
    "gather": (lambda x_NC: gather(x_NC, plan(2)), ((5, 4),)),
    "combine": (lambda y_RC: combine(y_RC, plan(2)), ((10, 4),)),
    "combine, one expert a token": (lambda y_RC: combine(y_RC, plan(1)), ((5, 4),)),
    "router_logits": (lambda x_NC, w_EC: router_logits(x_NC, w_EC, torch.float32), ((5, 4), (3, 4))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("function", "shapes"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_traced_function_has_its_gradients(
    function: Callable[..., torch.Tensor], shapes: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]

    def gradients(call: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_(True) for x in inputs]
        y = call(*leaves)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    # no code is generated: Dynamo alone, whose trace of autograd.Function differs between versions of torch
    traced = gradients(torch.compile(function, backend="eager", fullgraph=True))
    expected = gradients(function)
    assert len(traced) == len(inputs) and all(grad.any() for grad in expected)
    for got, wanted in zip(traced, expected, strict=True):
        torch.testing.assert_close(got, wanted)
