"""Experts by grouped GEMMs in Triton: for CUDA devices on which PyTorch has no fast one.

Axes beside those of moe_layers.py: O outputs and I inputs of a product; here T stands for tiles of rows.
"""

import math
from functools import lru_cache
from subprocess import SubprocessError
from types import ModuleType
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from litgpt_moe.kernels.autograd import Function
from litgpt_moe.kernels.rows import Matrices, Plan, sum_of_rows, swiglu_backward, swiglu_forward


@torch.compiler.assume_constant_result  # what is installed does not change under a compiled graph
def has_triton(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether Triton is installed, can start kernels here, and has fast ones for this dtype."""
    # Triton 3.6 uses no tensor cores before SM80, and there spills kilobytes of registers in 16 bits
    oldest_arch = {torch.float32: 75, torch.bfloat16: 80, torch.float16: 80}.get(dtype)
    return device_type == "cuda" and oldest_arch is not None and _triton_arch() >= oldest_arch


@lru_cache
def _triton_arch() -> int:
    """Return the architecture of the GPU that Triton starts kernels on, 86 for SM86; 0 if it cannot."""
    try:
        import triton  # not at the top: not every machine has it

        # asking compiles a C file, so that a Linux without a C compiler fails here
        target: Any = triton.runtime.driver.active.get_current_target()
    except (ImportError, OSError, RuntimeError, SubprocessError):
        return 0
    return target.arch if target.backend == "cuda" else 0


def _kernels() -> ModuleType:
    from litgpt_moe.kernels import triton_kernels  # not at the top: not every machine has Triton

    return triton_kernels


def _tile(n_rows: int, n_expert: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the sizes of the kernels' tiles (rows, outputs, inputs), and their numbers of warps and stages.

    Four stages hold three pairs of tiles, 48 KB of shared memory for the largest: two such programs fit into
    the 100 KB of a consumer GPU's multiprocessor (SM86, SM89, SM120). Not tuned on a GPU yet.
    """
    if dtype == torch.float32:
        # twice the bytes; and without TF32 the products of a larger tile spill registers
        return {"BLOCK_R": 64, "BLOCK_O": 64, "BLOCK_I": 32, "num_warps": 4, "num_stages": 4}
    # an expert's last tile is half empty on average: of 256 rows, tiles of 128 would waste a fifth
    rows, warps = (128, 8) if n_rows >= 512 * n_expert else (64, 4)
    return {"BLOCK_R": rows, "BLOCK_O": 128, "BLOCK_I": 32, "num_warps": warps, "num_stages": 4}


def _precision(dtype: torch.dtype) -> str:
    """Return Triton's name for the precision of products that torch.set_float32_matmul_precision asks for."""
    is_exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if is_exact else "tf32"


def triton_experts(
    x_NC: torch.Tensor, weights_R1: torch.Tensor, plan: Plan, fc_1: Matrices, fc_2: Matrices, proj: Matrices
) -> torch.Tensor:
    """Return each token's weighted sum, (N, C), by grouped GEMMs that gather their rows as they load them."""
    n_rows, n_expert = plan.token.size(0), len(proj)
    size = _tile(n_rows, n_expert, x_NC.dtype)["BLOCK_R"]
    # a tile has rows of one expert only; the host knows the largest possible number of tiles, not the number
    tile_ends_E = ((plan.tokens_per_expert + size - 1) // size).cumsum(0)
    tiles_T = torch.arange(n_rows // size + min(n_expert, n_rows), device=x_NC.device)
    tile_experts_T = torch.searchsorted(tile_ends_E, tiles_T, right=True)
    up_EOC = torch.stack([w for pair in zip(fc_1, fc_2, strict=True) for w in pair]).to(x_NC.dtype)
    proj_ECF = torch.stack(proj).to(x_NC.dtype)
    sorting = (plan.token, plan.inverse, plan.ends, tile_ends_E, tile_experts_T)
    return _TritonExperts.apply(x_NC, weights_R1, up_EOC.view(n_expert, -1, x_NC.size(1)), proj_ECF, *sorting)


class _TritonExperts(Function):
    """SwiGLU experts from fc_1 above fc_2, (E, 2F, C), and proj, (E, C, F).

    Backward keeps x and the product of both, and computes SwiGLU again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: torch.Tensor,
        weights_R1: torch.Tensor,
        up_EOC: torch.Tensor,
        proj_ECF: torch.Tensor,
        token_R: torch.Tensor,
        inverse_NK: torch.Tensor,
        ends_E: torch.Tensor,
        *tiles: torch.Tensor,
    ) -> torch.Tensor:
        x_NC = x_NC.contiguous()
        both_RO = torch.ops.moe.expert_rows(x_NC, up_EOC, token_R, ends_E, *tiles)
        gate_RF, up_RF = both_RO.chunk(2, dim=1)
        hidden_RF = swiglu_forward(gate_RF, up_RF, weights_R1)
        y_RC = torch.ops.moe.expert_rows(hidden_RF, proj_ECF, None, ends_E, *tiles)
        ctx.save_for_backward(
            x_NC, both_RO, weights_R1, up_EOC, proj_ECF, token_R, inverse_NK, ends_E, *tiles
        )
        return sum_of_rows(y_RC, inverse_NK)

    @staticmethod
    def backward(ctx: Any, grad_NC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NC, both_RO, weights_R1, up_EOC, proj_ECF, token_R, inverse_NK, ends_E, *tiles = ctx.saved_tensors
        grad_NC = grad_NC.contiguous()
        grad_RF = torch.ops.moe.expert_rows(grad_NC, proj_ECF.mT, token_R, ends_E, *tiles)
        gate_RF, up_RF = both_RO.chunk(2, dim=1)
        hidden_RF, *both_grads, weights_grad_R1 = swiglu_backward(grad_RF, gate_RF, up_RF, weights_R1)
        proj_grad = torch.ops.moe.expert_matrices(grad_NC, token_R, hidden_RF, None, ends_E)
        grad_RO = torch.cat(both_grads, dim=1)
        x_grad_RC = torch.ops.moe.expert_rows(grad_RO, up_EOC.mT, None, ends_E, *tiles)
        up_grad = torch.ops.moe.expert_matrices(grad_RO, None, x_NC, token_R, ends_E)
        x_grad_NC = sum_of_rows(x_grad_RC, inverse_NK)
        return x_grad_NC, weights_grad_R1, up_grad, proj_grad, *[None] * (3 + len(tiles))


@torch.library.custom_op("moe::expert_rows", mutates_args=())
def _expert_rows(
    x: torch.Tensor,
    w: torch.Tensor,
    rows: torch.Tensor | None,
    ends: torch.Tensor,
    tile_ends: torch.Tensor,
    tile_experts: torch.Tensor,
) -> torch.Tensor:
    """Return (R, O): each row of x, or of x[rows], times its expert's matrix in w (E, O, I), transposed."""
    y = _expert_rows_shape(x, w, rows, ends, tile_ends, tile_experts)
    tile = _tile(y.size(0), w.size(0), x.dtype)
    grid = (tile_experts.size(0) * -(-w.size(1) // tile["BLOCK_O"]),)
    tensors = (x, ends if rows is None else rows, w, y, ends, tile_ends, tile_experts)
    numbers = (*w.shape, x.stride(0), *w.stride())
    options = {"GATHER": rows is not None, "PRECISION": _precision(x.dtype), **tile}
    with torch.cuda.device_of(x):
        _kernels().rows_kernel[grid](*tensors, *numbers, **options)
    return y


@_expert_rows.register_fake
def _expert_rows_shape(x: Any, w: Any, rows: Any, ends: Any, tile_ends: Any, tile_experts: Any) -> Any:
    return x.new_empty(x.size(0) if rows is None else rows.size(0), w.size(1))


@torch.library.custom_op("moe::expert_matrices", mutates_args=())
def _expert_matrices(
    y: torch.Tensor,
    y_rows: torch.Tensor | None,
    x: torch.Tensor,
    x_rows: torch.Tensor | None,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Return each expert's y^T x over its sorted rows, (E, O, I): the gradient of its matrix."""
    w = _expert_matrices_shape(y, y_rows, x, x_rows, ends)
    n_rows = (x if x_rows is None else x_rows).size(0)
    tile = _tile(n_rows, w.size(0), x.dtype)
    # here the sum is over rows, so they take the tile size that the other kernel has for inputs
    tile |= {"BLOCK_R": tile["BLOCK_I"], "BLOCK_O": tile["BLOCK_R"], "BLOCK_I": tile["BLOCK_O"]}
    tile["num_stages"] += 1  # Triton also pipelines the loads of the row numbers
    grid = (-(-w.size(1) // tile["BLOCK_O"]) * -(-w.size(2) // tile["BLOCK_I"]), w.size(0))
    tensors = (y, ends if y_rows is None else y_rows, x, ends if x_rows is None else x_rows, w, ends)
    numbers = (*w.shape[1:], y.stride(0), x.stride(0))
    options = {"GATHER_Y": y_rows is not None, "GATHER_X": x_rows is not None, **tile}
    with torch.cuda.device_of(x):
        _kernels().matrices_kernel[grid](*tensors, *numbers, PRECISION=_precision(x.dtype), **options)
    return w


@_expert_matrices.register_fake
def _expert_matrices_shape(y: Any, y_rows: Any, x: Any, x_rows: Any, ends: Any) -> Any:
    return x.new_empty(ends.size(0), y.size(1), x.size(1))


@register_flop_formula(torch.ops.moe.expert_rows)
def _(x: Any, w: Any, rows: Any, *_: Any, **__: Any) -> int:
    return 2 * (x if rows is None else rows)[0] * math.prod(w[1:])


@register_flop_formula(torch.ops.moe.expert_matrices)
def _(y: Any, y_rows: Any, x: Any, x_rows: Any, *_: Any, **__: Any) -> int:
    return 2 * (x if x_rows is None else x_rows)[0] * y[1] * x[1]
