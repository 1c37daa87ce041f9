"""Matrix products on a CPU by the faster of MKL and oneDNN, and linear layers that use them."""

import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from litgpt_moe.kernels.autograd import Function


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a (M, K) @ b (K, N), in `out` if given, by the faster library; for code with its own backward.

    oneDNN copies an `a` that is not contiguous; `b` may have any strides, and `out` any dtype.
    """
    if prefers_onednn(a) and a.numel() and b.numel():
        y = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    elif out is None or out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    else:
        y = torch.mm(a, b)
    return y if out is None else out.copy_(y)


def add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total` in place; `total` has the same dtype or a wider one."""
    if total.dtype == a.dtype and not prefers_onednn(a):
        total.addmm_(a, b)
    else:
        total += matmul(a, b)


class _LinearFunction(Function):
    """x @ weight.T and its gradients, by `matmul`."""

    @staticmethod
    def forward(ctx: Any, x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return matmul(x_MK, weight_NK.t())

    @staticmethod
    def backward(ctx: Any, grad_MN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_MK, weight_NK = ctx.saved_tensors
        x_grad_MK = matmul(grad_MN, weight_NK) if ctx.needs_input_grad[0] else None
        return x_grad_MK, matmul(grad_MN.t(), x_MK) if ctx.needs_input_grad[1] else None


class Linear(nn.Linear):
    """`nn.Linear` without a bias, multiplied by oneDNN where that is faster; see `use_fast_linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input @ weight.T, (..., out_features)."""
        # torch.compile and autocast choose their own kernels; decoding's few rows are memory-bound
        is_plain = not torch.compiler.is_compiling() and compute_dtype(input) == input.dtype
        if is_plain and input.numel() >= 16 * input.size(-1) and prefers_onednn(input):
            y = _LinearFunction.apply(input.reshape(-1, input.size(-1)), self.weight)
            return y.view(*input.shape[:-1], -1)
        return super().forward(input)


def use_fast_linear(model: nn.Module) -> None:
    """Turn each plain nn.Linear of the model, above all those of attention, into a `Linear`."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = Linear  # the same object, so hooks and parameters stay


def uses_onednn(x: torch.Tensor) -> bool:
    """Return whether oneDNN multiplies `x`: by torch's choice in 16 bits, by ours in float32."""
    is_half = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return is_half or prefers_onednn(x)


def prefers_onednn(x: torch.Tensor) -> bool:
    """Return whether oneDNN, which torch uses for bfloat16, multiplies this float32 tensor faster than MKL.

    MKL uses only AVX2 on AMD's processors, oneDNN their AVX-512 too: 1.4 to 2.3 times as fast at the sizes of
    experts (EPYC, Zen 5, torch 2.10). `torch.backends.mkldnn.flags(enabled=False)` turns it off.
    """
    return _has_faster_onednn() and x.device.type == "cpu" and x.dtype == torch.float32


@torch.compiler.assume_constant_result  # the processor does not change under a compiled graph
def _has_faster_onednn() -> bool:
    return _is_amd_with_avx512() and bool(torch.backends.mkldnn.enabled)


@cache
def _is_amd_with_avx512() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.is_file() else platform.processor())


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which `x` is to be multiplied: autocast's, or its own."""
    # is_autocast_enabled("meta") raises, and nothing is cast there
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def no_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Return a context in which autocast is off on the device of `x`."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
