"""Experts by one GEMM for each expert's rows: on CPUs, and on GPUs without a grouped GEMM."""

import heapq
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from litgpt_moe.kernels.matmul import add_matmul, matmul, uses_onednn
from litgpt_moe.kernels.rows import Plan, rows_per_expert, sum_of_rows, swiglu_backward, swiglu_forward


def segment_experts(
    x_NC: torch.Tensor, weights_R1: torch.Tensor, plan: Plan, *maps: list[torch.Tensor]
) -> torch.Tensor:
    """Return each token's weighted sum, (N, C), by GEMMs on each expert's rows; `maps` are fc_1, fc_2, proj.

    One operator, and one for its gradients, for any number of experts. It gathers one expert's rows at a
    time and does everything with them while they are in the cache. Autocast does not reach inside an
    operator, so each matrix is cast as it is used.
    """
    return torch.ops.moe.experts(x_NC, weights_R1, plan.token, plan.inverse, plan.ends, *maps)[0]


class PaddedRows(NamedTuple):
    """Where the experts' rows lie in memory: sorted, each expert's padded to one of a few sizes.

    oneDNN makes a kernel for each new size (0.1 ms) and keeps 1,024 of them. MKL does not, so for MKL
    nothing is padded. P is the number of rows with padding, S that of one expert.
    """

    sizes: list[int]
    """Each expert's number of rows with padding; they sum to P."""
    position: torch.Tensor
    """(R,) where each sorted row lies among the P."""
    token: torch.Tensor
    """(P,) the token of each row; padding repeats the expert's last one."""

    @classmethod
    def of(cls, token_R: torch.Tensor, ends_E: torch.Tensor, x: torch.Tensor) -> "PaddedRows":
        """Return the rows for GEMMs of `x`. On CUDA this waits for the device."""
        counts_E, position_R = rows_per_expert(ends_E), torch.arange(token_R.numel(), device=token_R.device)
        counts = counts_E.tolist()
        if not uses_onednn(x):
            return cls(counts, position_R, token_R)
        sizes = [padded_size(count) for count in counts]
        sizes_E = ends_E.new_tensor(sizes)
        padding_E = sizes_E - counts_E
        position_R += (padding_E.cumsum(0) - padding_E).repeat_interleave(counts_E)
        last_P = (ends_E - 1).repeat_interleave(sizes_E)
        return cls(sizes, position_R, token_R[last_P].index_copy_(0, position_R, token_R))

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return each expert's part of a tensor of P rows or more."""
        return rows[: self.token.size(0)].split(self.sizes)

    def weights(self, weights_R1: torch.Tensor) -> torch.Tensor:
        """Return the rows' weights, (P, 1), 0 for padding, which keeps it out of every sum."""
        return weights_R1.new_zeros(self.token.size(0), 1).index_copy_(0, self.position, weights_R1)


def padded_size(count: int) -> int:
    """Return `count` rounded up to one of a few sizes, by at most 15 or a sixteenth of it."""
    step = max(16, 1 << count.bit_length() >> 5)
    return -(-count // step) * step


def max_padded_rows(x: torch.Tensor, n_rows: int, n_expert: int) -> int:
    """Return the largest P that `n_rows` can have: a compiled graph needs a shape that fits every load."""
    return n_rows + n_rows // 16 + 15 * n_expert if uses_onednn(x) else n_rows


def for_each_expert(run_expert: Callable[[int], None], sizes: list[int], matrix: torch.Tensor) -> None:
    """Call `run_expert` for every expert; on a CPU in several threads, each of which runs one at a time.

    Two threads inside the products of one expert, a few hundred rows, wait for each other more than they
    gain, above all when other programs run: the layer of MoE-30M, forward and backward, takes 31 ms that way
    and 27 ms this way; beside one busy process 148 ms and 54 ms (AMD EPYC, two cores, 2,048 tokens, float32).

    Args:
        run_expert: runs the expert of this index.
        sizes: each expert's number of rows.
        matrix: a weight matrix of any expert, of which only the device and size are read.
    """
    n_threads = torch.get_num_threads() if matrix.device.type == "cpu" else 1
    by_size = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    if n_threads == 1 or not _is_worth_threads(sizes, n_threads, matrix):
        for e in by_size:
            run_expert(e)
        return
    experts = iter(by_size)
    # set again in each thread: inference mode and no_grad are thread-local
    is_inference = torch.is_inference_mode_enabled()

    def run_experts() -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            for e in experts:
                run_expert(e)

    # the calling thread runs experts too; like the helpers, it uses one thread inside an expert
    torch.set_num_threads(1)
    helpers = [_helper_threads(n_threads - 1).submit(run_experts) for _ in range(n_threads - 1)]
    try:
        run_experts()
    finally:
        wait(helpers)
        # the last call in any thread is also the default of threads that start later
        torch.set_num_threads(n_threads)
    for helper in helpers:
        helper.result()


@cache
def _helper_threads(n: int) -> ThreadPoolExecutor:
    """Return threads that live as long as the process: to begin new ones costs 5 ms a layer of MoE-30M."""
    return ThreadPoolExecutor(n, "experts", torch.set_num_threads, (1,))


def _is_worth_threads(sizes: list[int], n_threads: int, matrix: torch.Tensor) -> bool:
    """Return whether an average expert has enough to do, and threads would be busy for 7/8 of the time."""
    # below 4 million multiply-adds a product, the threads mostly wait for the GIL (Xeon, 2 cores, float32)
    if sum(sizes) * matrix.numel() < len(sizes) << 22:
        return False
    loads = [0] * n_threads
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return 7 / 8 * max(loads) * n_threads <= sum(sizes)


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
    """Return each token's weighted sum, (N, C), and what backward needs: x fc_1^T and x fc_2^T, (>= P, F)."""
    _, gate_PF, up_PF = _experts_shapes(x, weights, token, inverse, ends, fc_1, fc_2, proj)
    padded = PaddedRows.of(token, ends, x)
    y_PC = x.new_empty(padded.token.size(0), x.size(1))
    tensors = (padded.token, padded.weights(weights), gate_PF, up_PF, y_PC)
    parts = list(zip(*map(padded.split, tensors), strict=True))

    def run_expert(e: int) -> None:
        token_S, weights_S1, gate_SF, up_SF, y_SC = parts[e]
        x_SC = x.index_select(0, token_S)
        matmul(x_SC, fc_1[e].to(x.dtype).t(), out=gate_SF)
        matmul(x_SC, fc_2[e].to(x.dtype).t(), out=up_SF)
        matmul(swiglu_forward(gate_SF, up_SF, weights_S1), proj[e].to(x.dtype).t(), out=y_SC)

    for_each_expert(run_expert, padded.sizes, fc_1[0])
    return sum_of_rows(y_PC, padded.position[inverse]), gate_PF, up_PF


@_experts.register_fake
def _experts_shapes(
    x: Any, weights: Any, token: Any, inverse: Any, ends: Any, fc_1: Any, fc_2: Any, proj: Any
) -> Any:
    shape = max_padded_rows(x, token.size(0), ends.size(0)), fc_1[0].size(0)
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
    padded = PaddedRows.of(token, ends, x)
    weights_P1, x_grad_PC = padded.weights(weights), x.new_empty(padded.token.size(0), x.size(1))
    weights_grad_P1 = torch.empty_like(weights_P1)
    tensors = (padded.token, weights_P1, gate, up, weights_grad_P1, x_grad_PC)
    parts = list(zip(*map(padded.split, tensors), strict=True))
    # not allocated in the threads, whose memory glibc gives back each time
    fc_1_grads, fc_2_grads, proj_grads = ([torch.empty_like(w) for w in maps] for maps in (fc_1, fc_2, proj))

    def run_expert(e: int) -> None:
        token_S, weights_S1, gate_SF, up_SF, weights_grad_S1, x_grad_SC = parts[e]
        grad_SC, x_SC = grad.index_select(0, token_S), x.index_select(0, token_S)
        hidden_SF, gate_grad_SF, up_grad_SF, found_S1 = swiglu_backward(
            matmul(grad_SC, proj[e].to(x.dtype)), gate_SF, up_SF, weights_S1
        )
        weights_grad_S1.copy_(found_S1)
        # without rows a product is zero, as the gradient must be
        matmul(grad_SC.t(), hidden_SF, out=proj_grads[e])
        matmul(gate_grad_SF.t(), x_SC, out=fc_1_grads[e])
        matmul(up_grad_SF.t(), x_SC, out=fc_2_grads[e])
        matmul(gate_grad_SF, fc_1[e].to(x.dtype), out=x_grad_SC)
        add_matmul(x_grad_SC, up_grad_SF, fc_2[e].to(x.dtype))

    for_each_expert(run_expert, padded.sizes, fc_1[0])
    x_grad = sum_of_rows(x_grad_PC, padded.position[inverse])
    return [x_grad, weights_grad_P1[padded.position], *fc_1_grads, *fc_2_grads, *proj_grads]


@_experts_grad.register_fake
def _(
    grad: Any, gate: Any, up: Any, x: Any, weights: Any, token: Any, inverse: Any, ends: Any, *maps: Any
) -> Any:
    return [torch.empty_like(tensor) for tensor in (x, weights, *itertools.chain(*maps))]


def _experts_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, fc_1, fc_2, proj = inputs
    ctx.save_for_backward(*output[1:], *tensors, *fc_1, *fc_2, *proj)
    ctx.set_materialize_grads(False)  # the second and third output have no gradients


def _experts_backward(ctx: Any, grad: torch.Tensor, *_: None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    *tensors, ends = saved[:7]
    matrices, n_expert = saved[7:], ends.numel()
    maps = [matrices[at : at + n_expert] for at in range(0, 3 * n_expert, n_expert)]
    x_grad, weights_grad, *grads = torch.ops.moe.experts_grad(grad.contiguous(), *tensors, ends, *maps)
    map_grads = (grads[at : at + n_expert] for at in range(0, 3 * n_expert, n_expert))
    return x_grad, weights_grad, None, None, None, *map_grads


_experts.register_autograd(_experts_backward, setup_context=_experts_setup_context)


@register_flop_formula(torch.ops.moe.experts)
def _(x: Any, weights: Any, token: Any, inverse: Any, ends: Any, *maps: Any, **_: Any) -> int:
    return sum(2 * token[0] * math.prod(matrices[0]) for matrices in maps)


@register_flop_formula(torch.ops.moe.experts_grad)
def _(grad: Any, gate: Any, up: Any, x: Any, weights: Any, token: Any, *others: Any, **_: Any) -> int:
    return sum(2 * 2 * token[0] * math.prod(matrices[0]) for matrices in others[2:])
