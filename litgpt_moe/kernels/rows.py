"""Rows sorted by expert: the plan of a sort, gathering and adding up rows, the router's product, SwiGLU."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula


class Plan(NamedTuple):
    """Which sorted row belongs to which token and expert: static shapes, no host round trip."""

    token: torch.Tensor  # (R,) whose row lies at each sorted row
    order: torch.Tensor  # (R,) the token-major row (n * K + k) that lies at each sorted row
    inverse: torch.Tensor  # (N, K) the sorted row of each choice
    ends: torch.Tensor  # (E,) int32, expert e owns the sorted rows up to ends[e]
    tokens_per_expert: torch.Tensor  # (E,) int64

    @classmethod
    def of(cls, indices_NK: torch.Tensor, n_expert: int) -> "Plan":
        """Return the plan for these choices; rows of one expert keep their order."""
        # int16 sorts several times faster than int64 on CPU, and n_expert stays far below 32,768
        expert_R, order_R = indices_NK.flatten().to(torch.int16).sort(stable=True)
        ids_E = torch.arange(n_expert, dtype=torch.int16, device=indices_NK.device)
        ends_E = torch.searchsorted(expert_R, ids_E, right=True)
        rows_R = torch.arange(order_R.numel(), device=indices_NK.device)
        inverse_NK = torch.empty_like(order_R).scatter_(0, order_R, rows_R).view_as(indices_NK)
        token_R = order_R.div(indices_NK.size(1), rounding_mode="floor")
        return cls(token_R, order_R, inverse_NK, ends_E.to(torch.int32), rows_per_expert(ends_E))


def rows_per_expert(ends_E: torch.Tensor) -> torch.Tensor:
    """Return each expert's number of rows, (E,)."""
    return ends_E.diff(prepend=ends_E.new_zeros(1))


def sum_of_rows(y_RC: torch.Tensor, rows_NK: torch.Tensor) -> torch.Tensor:
    """Return the sum over K of `y_RC[rows_NK]`, (N, C), added up in float32 or wider."""
    if torch.compiler.is_compiling() or y_RC.is_meta:
        # written out, Inductor makes one vectorised loop of it; a gather and a sum it does not
        total = sum(y_RC[rows_N].to(accumulation_dtype(y_RC)) for rows_N in rows_NK.unbind(1))
        return total.to(y_RC.dtype)
    starts_N = torch.arange(0, rows_NK.numel(), rows_NK.size(1), device=y_RC.device)
    return torch.embedding_bag(y_RC, rows_NK.flatten(), starts_N)[0]


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Gather(torch.autograd.Function):
    """Each sorted row's token; backward gathers too, as autograd's `index_put` is slow."""

    @staticmethod
    def forward(ctx: Any, x_NC: torch.Tensor, token_R: torch.Tensor, inverse_NK: torch.Tensor):
        ctx.save_for_backward(inverse_NK)
        return x_NC.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RC: torch.Tensor):
        return sum_of_rows(grad_RC, *ctx.saved_tensors), None, None


class Combine(torch.autograd.Function):
    """Each token's sum of its rows; backward is the gather."""

    @staticmethod
    def forward(ctx: Any, y_RC: torch.Tensor, token_R: torch.Tensor, inverse_NK: torch.Tensor):
        ctx.save_for_backward(token_R)
        return sum_of_rows(y_RC, inverse_NK)

    @staticmethod
    def backward(ctx: Any, grad_NC: torch.Tensor):
        return grad_NC.index_select(0, *ctx.saved_tensors), None, None


class RouterLogits(torch.autograd.Function):
    """The linear map in `dtype`; backward keeps `x` as it came, half the size of its float32 copy."""

    @staticmethod
    def forward(ctx: Any, x_NC: torch.Tensor, weight_EC: torch.Tensor, dtype: torch.dtype):
        ctx.save_for_backward(x_NC, weight_EC)
        return _product(x_NC, weight_EC.t(), dtype)

    @staticmethod
    def backward(ctx: Any, grad_NE: torch.Tensor):
        x_NC, weight_EC = ctx.saved_tensors
        x_grad_NC = _product(grad_NE, weight_EC, grad_NE.dtype).to(x_NC.dtype)
        return x_grad_NC, _product(grad_NE.t(), x_NC, grad_NE.dtype).to(weight_EC.dtype), None


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a @ b in `dtype`, on CUDA too in whole float32: TF32's 10 bits, if allowed, make ties."""
    if a.device.type == "cuda" or torch.compiler.is_compiling():
        return torch.ops.moe.exact_product(a, b, dtype)
    return a.to(dtype) @ b.to(dtype)


# An operator, for a compiled graph knows no setting that holds for one product, and would keep the copies in
# `dtype` for the backward pass.
@torch.library.custom_op("moe::exact_product", mutates_args=())
def _exact_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return a.to(dtype) @ b.to(dtype)
    finally:
        torch.set_float32_matmul_precision(before)


@_exact_product.register_fake
def _(a: Any, b: Any, dtype: torch.dtype) -> torch.Tensor:
    return a.new_empty(a.size(0), b.size(1), dtype=dtype)


@register_flop_formula(torch.ops.moe.exact_product)
def _(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * b[1]


def swiglu(gate_RF: torch.Tensor, up_RF: torch.Tensor, weights_R1: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up * weight, (R, F)."""
    if torch.compiler.is_compiling():  # written as in `swiglu_grad`, which then need not compute it again
        return gate_RF * gate_RF.sigmoid() * up_RF * weights_R1
    return F.silu(gate_RF).mul_(up_RF).mul_(weights_R1)


def swiglu_grad(
    grad_RF: torch.Tensor, gate_RF: torch.Tensor, up_RF: torch.Tensor, weights_R1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `swiglu` gave, computed again, and the gradients of its three arguments."""
    if torch.compiler.is_compiling():  # one loop, for which silu and its gradient take the sigmoid once
        sigmoid_RF = gate_RF.sigmoid()
        activated_RF = gate_RF * sigmoid_RF
    else:
        activated_RF = F.silu(gate_RF)
    hidden_RF = activated_RF * up_RF
    weights_grad_R1 = (grad_RF * hidden_RF).sum(1, keepdim=True)
    grad_RF = grad_RF * weights_R1
    if torch.compiler.is_compiling():
        gate_grad_RF = grad_RF * up_RF * sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
    else:
        gate_grad_RF = torch.ops.aten.silu_backward(grad_RF * up_RF, gate_RF)
    return hidden_RF.mul_(weights_R1), gate_grad_RF, activated_RF.mul_(grad_RF), weights_grad_R1


class SwiGLU(torch.autograd.Function):
    """`swiglu`, of which backward keeps the inputs alone and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, gate_RF: torch.Tensor, up_RF: torch.Tensor, weights_R1: torch.Tensor):
        ctx.save_for_backward(gate_RF, up_RF, weights_R1)
        return swiglu(gate_RF, up_RF, weights_R1)

    @staticmethod
    def backward(ctx: Any, grad_RF: torch.Tensor):
        return swiglu_grad(grad_RF, *ctx.saved_tensors)[1:]
