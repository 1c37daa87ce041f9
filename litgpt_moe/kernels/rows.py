"""Rows sorted by expert: how to sort them, gather them, add them up, and what every kernel does with them.

Axes as in moe_layers.py: N tokens, C `n_embd`, E experts, K experts per token, F width of an expert, and
R = N * K rows, one for each token and choice, sorted by expert.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from litgpt_moe.kernels.autograd import Function

Matrices = list[torch.Tensor]  # one of each expert


class Plan(NamedTuple):
    """Which sorted row belongs to which token and expert. Its shapes do not depend on the routing.

    So the host need not wait for the device to learn how many rows an expert has, and `torch.compile` makes
    one graph for every load.
    """

    token: torch.Tensor
    """(R,) the token of each sorted row."""
    order: torch.Tensor
    """(R,) the index `n * K + k` (token n, choice k) of each sorted row."""
    inverse: torch.Tensor
    """(N, K) the sorted row of each token's choice."""
    ends: torch.Tensor
    """(E,) int32: expert e owns the sorted rows from ends[e - 1] up to, not including, ends[e]."""
    tokens_per_expert: torch.Tensor
    """(E,) int64: the number of each expert's rows."""

    @classmethod
    def of(cls, indices_NK: torch.Tensor, n_expert: int) -> "Plan":
        """Return the plan for the chosen experts; rows of one expert stay in the order of their tokens."""
        # int16 sorts several times faster than int64 on a CPU, and n_expert stays far below 32,768
        expert_R, order_R = indices_NK.flatten().to(torch.int16).sort(stable=True)
        ids_E = torch.arange(n_expert, dtype=torch.int16, device=indices_NK.device)
        ends_E = torch.searchsorted(expert_R, ids_E, right=True)
        rows_R = torch.arange(order_R.numel(), device=indices_NK.device)
        inverse_NK = torch.empty_like(order_R).scatter_(0, order_R, rows_R).view_as(indices_NK)
        token_R = order_R.div(indices_NK.size(1), rounding_mode="floor")
        return cls(token_R, order_R, inverse_NK, ends_E.to(torch.int32), rows_per_expert(ends_E))


def rows_per_expert(ends_E: torch.Tensor) -> torch.Tensor:
    """Return each expert's number of sorted rows, (E,)."""
    return ends_E.diff(prepend=ends_E.new_zeros(1))


# --- dispatch and combine -----------------------------------------------------------------------------------


def sum_of_rows(y_RC: torch.Tensor, rows_NK: torch.Tensor) -> torch.Tensor:
    """Return the sum over K of `y_RC[rows_NK]`, (N, C), added up in float32 or wider."""
    if torch.compiler.is_compiling() or y_RC.is_meta:
        # Inductor fuses K gathers and additions into one loop, but not a gather of (N, K, C) and its sum
        first_N, *others_N = rows_NK.unbind(1)
        total_NC = _cast(y_RC[first_N], accumulation_dtype(y_RC))
        for rows_N in others_N:
            total_NC = total_NC + y_RC[rows_N].to(total_NC.dtype)
        return _cast(total_NC, y_RC.dtype)
    starts_N = torch.arange(0, rows_NK.numel(), rows_NK.size(1), device=y_RC.device)
    return torch.embedding_bag(y_RC, rows_NK.flatten(), starts_N)[0]


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x in `dtype`, without an operation if it has that dtype.

    What `forward` of an autograd.Function returns must come from an operation with a new result, and not from
    one that returns its own argument, such as `mul_` or a cast to the same dtype: compiled by torch 2.11, the
    gradient of such an output is silently zero (pytorch issue 180642; 2.10 and 2.15 are right).
    """
    return x if x.dtype == dtype else x.to(dtype)


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype to add up many values of `x` in: float32, or `x`'s own if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def gather(x_NC: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return each sorted row's token, (R, C): the dispatch to the experts."""
    return _Gather.apply(x_NC, plan.token, plan.inverse)


def combine(y_RC: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return the sum of each token's K rows, (N, C)."""
    return _Combine.apply(y_RC, plan.token, plan.inverse)


class _Gather(Function):
    """Backward adds up each token's K gradients; autograd's own, by `index_put`, is slow."""

    @staticmethod
    def forward(
        ctx: Any, x_NC: torch.Tensor, token_R: torch.Tensor, inverse_NK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse_NK)
        return x_NC.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return sum_of_rows(grad_RC, *ctx.saved_tensors), None, None


class _Combine(Function):
    """Backward copies each token's gradient to its K rows."""

    @staticmethod
    def forward(
        ctx: Any, y_RC: torch.Tensor, token_R: torch.Tensor, inverse_NK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(token_R)
        return sum_of_rows(y_RC, inverse_NK)

    @staticmethod
    def backward(ctx: Any, grad_NC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad_NC.index_select(0, *ctx.saved_tensors), None, None


# --- the router's product -----------------------------------------------------------------------------------


def router_logits(x_NC: torch.Tensor, weight_EC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x @ weight.T, (N, E), multiplied in `dtype` without rounding its factors."""
    return _RouterLogits.apply(x_NC, weight_EC, dtype)


class _RouterLogits(Function):
    """Backward keeps `x` in its own dtype: in bf16 half as large as the float32 copy that is multiplied."""

    @staticmethod
    def forward(ctx: Any, x_NC: torch.Tensor, weight_EC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(x_NC, weight_EC)
        return _product(x_NC, weight_EC.t(), dtype)

    @staticmethod
    def backward(ctx: Any, grad_NE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NC, weight_EC = ctx.saved_tensors
        x_grad_NC = _product(grad_NE, weight_EC, grad_NE.dtype).to(x_NC.dtype)
        return x_grad_NC, _product(grad_NE.t(), x_NC, grad_NE.dtype).to(weight_EC.dtype), None


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a @ b in `dtype`, without TF32 on CUDA: its 10 bits of mantissa make close logits equal."""
    if a.device.type == "cuda" or torch.compiler.is_compiling():
        return torch.ops.moe.exact_product(a, b, dtype)
    return a.to(dtype) @ b.to(dtype)


# A custom operator: a compiled graph cannot change the precision for one product, and would keep the copies
# in `dtype` for the backward pass.
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


# --- SwiGLU of weighted rows --------------------------------------------------------------------------------
# `gate` and `up` are here the outputs of fc_1 and fc_2; the router, which the layer calls `gate`, is another.


def swiglu(gate_RF: torch.Tensor, up_RF: torch.Tensor, weights_R1: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up * weight, (R, F)."""
    return _SwiGLU.apply(gate_RF, up_RF, weights_R1)


def swiglu_forward(gate_RF: torch.Tensor, up_RF: torch.Tensor, weights_R1: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up * weight, (R, F), for code that has a backward of its own."""
    if torch.compiler.is_compiling():  # see `_cast`; the compiler fuses the three anyway
        return F.silu(gate_RF) * up_RF * weights_R1
    return F.silu(gate_RF).mul_(up_RF).mul_(weights_R1)


def swiglu_backward(
    grad_RF: torch.Tensor, gate_RF: torch.Tensor, up_RF: torch.Tensor, weights_R1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output of `swiglu_forward`, computed again, and the gradients of its three arguments."""
    activated_RF = F.silu(gate_RF)
    hidden_RF = activated_RF * up_RF
    weights_grad_R1 = (grad_RF * hidden_RF).sum(1, keepdim=True)
    grad_RF = grad_RF * weights_R1
    gate_grad_RF = torch.ops.aten.silu_backward(grad_RF * up_RF, gate_RF)
    return hidden_RF.mul_(weights_R1), gate_grad_RF, activated_RF.mul_(grad_RF), weights_grad_R1


class _SwiGLU(Function):
    """Backward keeps the inputs only and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, gate_RF: torch.Tensor, up_RF: torch.Tensor, weights_R1: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gate_RF, up_RF, weights_R1)
        return swiglu_forward(gate_RF, up_RF, weights_R1)

    @staticmethod
    def backward(ctx: Any, grad_RF: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return swiglu_backward(grad_RF, *ctx.saved_tensors)[1:]
