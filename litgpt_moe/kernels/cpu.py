"""The experts by one GEMM for each expert's rows: the way of CPUs, and of GPUs without another."""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from litgpt_moe.kernels.matmul import add_matmul, matmul, uses_onednn
from litgpt_moe.kernels.rows import Plan, rows_per_expert, sum_of_rows, swiglu, swiglu_grad


def cpu_experts(
    x_NC: torch.Tensor,
    weights_R1: torch.Tensor,
    plan: Plan,
    fc_1: list[torch.Tensor],
    fc_2: list[torch.Tensor],
    proj: list[torch.Tensor],
) -> torch.Tensor:
    """Return each token's weighted sum, (N, C), by GEMMs on each expert's rows.

    One operator, and one for its gradients, at any number of experts. It gathers an expert's rows as it needs
    them, and does all that there is to do with them while they are in the cache. Autocast casts nothing
    inside: each matrix is cast as it is used.
    """
    return torch.ops.moe.experts(x_NC, weights_R1, plan.token, plan.inverse, plan.ends, fc_1, fc_2, proj)[0]


class Slots(NamedTuple):
    """Where the experts' rows lie in memory: sorted, and each expert's filled up to one of few sizes.

    oneDNN makes a kernel for each size (0.1 ms) and keeps 1,024. Other libraries' rows are not filled up.
    """

    sizes: list[int]  # each expert's number of slots
    row: torch.Tensor  # (R,) the slot of each sorted row
    token: torch.Tensor  # (P,) the token in each slot; one of the expert's own where it has no row

    @classmethod
    def of(cls, token_R: torch.Tensor, ends_E: torch.Tensor, x: torch.Tensor) -> "Slots":
        """Return the slots for GEMMs of `x`. On CUDA this waits for the device, on a CPU it is free."""
        counts_E, row_R = rows_per_expert(ends_E), torch.arange(token_R.numel(), device=token_R.device)
        counts = counts_E.tolist()
        if not uses_onednn(x):
            return cls(counts, row_R, token_R)
        sizes = [slots_of(count) for count in counts]
        sizes_E = ends_E.new_tensor(sizes)
        extra_E = sizes_E - counts_E
        row_R += (extra_E.cumsum(0) - extra_E).repeat_interleave(counts_E)
        last_P = (ends_E - 1).repeat_interleave(sizes_E)
        return cls(sizes, row_R, token_R[last_P].index_copy_(0, row_R, token_R))

    def parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return each expert's part of a tensor of as many rows as there are slots, or more."""
        return rows[: self.token.size(0)].split(self.sizes)

    def weights(self, weights_R1: torch.Tensor) -> torch.Tensor:
        """Return the slots' weights, (P, 1): 0 where there is no row, which keeps it out of every sum."""
        return weights_R1.new_zeros(self.token.size(0), 1).index_copy_(0, self.row, weights_R1)


def slots_of(count: int) -> int:
    """Return one of few sizes that has room: at most 15 more, or a sixteenth."""
    step = max(16, 1 << count.bit_length() >> 5)
    return -(-count // step) * step


def most_slots(x: torch.Tensor, n_rows: int, n_expert: int) -> int:
    """Return how many slots there are at most, whatever the load: it has to be known to compile."""
    return n_rows + n_rows // 16 + 15 * n_expert if uses_onednn(x) else n_rows


@torch.library.custom_op("moe::experts", mutates_args=())
def _experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    token: torch.Tensor,
    inverse: torch.Tensor,
    ends: torch.Tensor,
    fc_1: list[torch.Tensor],
    fc_2: list[torch.Tensor],
    proj: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each token's weighted sum, (N, C), and fc_1 and fc_2 of each slot, (at most P, F) both."""
    _, gate_PF, up_PF = _experts_shapes(x, weights, token, inverse, ends, fc_1, fc_2, proj)
    slots = Slots.of(token, ends, x)
    y_PC = x.new_empty(slots.token.size(0), x.size(1))
    parts = [slots.parts(rows) for rows in (slots.token, slots.weights(weights), gate_PF, up_PF, y_PC)]

    def work(e: int) -> None:
        token_S, weights_S1, gate_SF, up_SF, y_SC = (part[e] for part in parts)
        x_SC = x.index_select(0, token_S)
        matmul(x_SC, fc_1[e].to(x.dtype).t(), out=gate_SF)
        matmul(x_SC, fc_2[e].to(x.dtype).t(), out=up_SF)
        matmul(swiglu(gate_SF, up_SF, weights_S1), proj[e].to(x.dtype).t(), out=y_SC)

    for e in range(len(fc_1)):
        work(e)
    return sum_of_rows(y_PC, slots.row[inverse]), gate_PF, up_PF


@_experts.register_fake
def _experts_shapes(
    x: Any, weights: Any, token: Any, inverse: Any, ends: Any, fc_1: Any, fc_2: Any, proj: Any
) -> Any:
    shape = most_slots(x, token.size(0), ends.size(0)), fc_1[0].size(0)
    return torch.empty_like(x), x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("moe::experts_grad", mutates_args=())
def _experts_grad(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    token: torch.Tensor,
    inverse: torch.Tensor,
    ends: torch.Tensor,
    fc_1: list[torch.Tensor],
    fc_2: list[torch.Tensor],
    proj: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Return the gradients of x, of the weights, and of every fc_1, fc_2 and proj."""
    slots = Slots.of(token, ends, x)
    weights_P1, x_grad_PC = slots.weights(weights), x.new_empty(slots.token.size(0), x.size(1))
    weights_grad_P1 = torch.empty_like(weights_P1)
    rows = (slots.token, weights_P1, gate, up, weights_grad_P1, x_grad_PC)
    parts = [slots.parts(tensor) for tensor in rows]
    fc_1_grads, fc_2_grads, proj_grads = ([torch.empty_like(w) for w in maps] for maps in (fc_1, fc_2, proj))

    def work(e: int) -> None:
        token_S, weights_S1, gate_SF, up_SF, weights_grad_S1, x_grad_SC = (part[e] for part in parts)
        grad_SC, x_SC = grad.index_select(0, token_S), x.index_select(0, token_S)
        hidden_SF, gate_grad_SF, up_grad_SF, found_S1 = swiglu_grad(
            matmul(grad_SC, proj[e].to(x.dtype)), gate_SF, up_SF, weights_S1
        )
        weights_grad_S1.copy_(found_S1)
        # of no rows a product is zero, as the gradient must be
        matmul(grad_SC.t(), hidden_SF, out=proj_grads[e])
        matmul(gate_grad_SF.t(), x_SC, out=fc_1_grads[e])
        matmul(up_grad_SF.t(), x_SC, out=fc_2_grads[e])
        matmul(gate_grad_SF, fc_1[e].to(x.dtype), out=x_grad_SC)
        add_matmul(x_grad_SC, up_grad_SF, fc_2[e].to(x.dtype))

    for e in range(len(fc_1)):
        work(e)
    x_grad = sum_of_rows(x_grad_PC, slots.row[inverse])
    return [x_grad, weights_grad_P1[slots.row], *fc_1_grads, *fc_2_grads, *proj_grads]


@_experts_grad.register_fake
def _(
    grad: Any, gate: Any, up: Any, x: Any, weights: Any, token: Any, inverse: Any, ends: Any, *maps: Any
) -> Any:
    return [torch.empty_like(tensor) for tensor in (x, weights, *itertools.chain(*maps))]


def _experts_keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, fc_1, fc_2, proj = inputs
    ctx.save_for_backward(*output[1:], *tensors, *fc_1, *fc_2, *proj)
    ctx.set_materialize_grads(False)  # gate and up have none


def _experts_backward(ctx: Any, grad: torch.Tensor, *_: None):
    saved = ctx.saved_tensors  # asked for once: checkpointing allows no more
    *tensors, ends = saved[:7]
    matrices, n_expert = saved[7:], ends.numel()
    maps = [matrices[at : at + n_expert] for at in range(0, 3 * n_expert, n_expert)]
    x_grad, weights_grad, *grads = torch.ops.moe.experts_grad(grad.contiguous(), *tensors, ends, *maps)
    map_grads = (grads[at : at + n_expert] for at in range(0, 3 * n_expert, n_expert))
    return x_grad, weights_grad, None, None, None, *map_grads


_experts.register_autograd(_experts_backward, setup_context=_experts_keep)


@register_flop_formula(torch.ops.moe.experts)
def _(x: Any, weights: Any, token: Any, inverse: Any, ends: Any, *maps: Any, **_: Any) -> int:
    return sum(2 * token[0] * math.prod(matrices[0]) for matrices in maps)


@register_flop_formula(torch.ops.moe.experts_grad)
def _(grad: Any, gate: Any, up: Any, x: Any, weights: Any, token: Any, *others: Any, **_: Any) -> int:
    return sum(2 * 2 * token[0] * math.prod(matrices[0]) for matrices in others[2:])
