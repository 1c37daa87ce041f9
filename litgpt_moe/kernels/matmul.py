"""Matrix products by the faster of two CPU libraries, MKL and oneDNN, and linear maps that use it."""

import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a @ b, (M, N), in `out` of any dtype if given, by the faster library; unknown to autograd.

    Args:
        a: (M, K). What oneDNN multiplies has to be contiguous, or is copied.
        b: (K, N), of any strides.
    """
    if prefers_onednn(a) and a.numel() and b.numel():
        y = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    elif out is None or out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    else:
        y = torch.mm(a, b)
    return y if out is None else out.copy_(y)


def add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total`, of the same dtype or a wider one."""
    if total.dtype == a.dtype and not prefers_onednn(a):
        total.addmm_(a, b)
    else:
        total += matmul(a, b)


class _LinearFunction(torch.autograd.Function):
    """x @ weight.T by `matmul`, and its gradients."""

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
    """`nn.Linear` without a bias, by `matmul` where oneDNN wins; see `use_fast_linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.T, (..., out_features)."""
        # a compiled graph and autocast have products of their own; decoding's few rows are bound by memory
        is_plain = not torch.compiler.is_compiling() and compute_dtype(x) == x.dtype
        if is_plain and x.numel() >= 16 * x.size(-1) and prefers_onednn(x):
            return _LinearFunction.apply(x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)
        return super().forward(x)


def use_fast_linear(model: nn.Module) -> None:
    """Let the model's plain linear maps, those of attention above all, be multiplied as the experts are."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = Linear  # the same module, hooks and parameters


def uses_onednn(x: torch.Tensor) -> bool:
    is_half = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return is_half or prefers_onednn(x)


def prefers_onednn(x: torch.Tensor) -> bool:
    """Return whether oneDNN, which torch has for bfloat16, multiplies this float32 faster than MKL.

    MKL keeps to AVX2 on AMD's processors, oneDNN uses their AVX-512: 1.4 to 2.3 times as fast at the sizes of
    experts (EPYC, Zen 5, torch 2.10). `torch.backends.mkldnn.flags(enabled=False)` turns it off.
    """
    return _has_faster_onednn() and x.device.type == "cpu" and x.dtype == torch.float32


@torch.compiler.assume_constant_result  # a processor does not change under a compiled graph
def _has_faster_onednn() -> bool:
    return _is_amd_with_avx512() and torch.backends.mkldnn.enabled


@cache
def _is_amd_with_avx512() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.is_file() else platform.processor())


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    # is_autocast_enabled("meta") raises, and nothing is cast there
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def no_autocast(x: torch.Tensor) -> AbstractContextManager:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
