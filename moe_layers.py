"""The Mixture-of-Experts layer, its configuration, and the way from a checkpoint directory to a model.

Nothing to run here; the scripts import it. To read it: `SimplifiedLLaMAMoE` is the definition in twenty
lines, `MoE` computes the same (outputs and every gradient) without a host round trip for each expert.

Parameters carry LitGPT's names and shapes (`gate`, `experts.{e}.fc_1/fc_2/proj`, `shared_experts`), so
LitGPT's own initialisation, `litgpt generate`, `litgpt.LLM.load` and its converters read our checkpoints.

Shapes: B batch, T position, N = B*T tokens, C n_embd, E n_expert, K n_expert_per_token, F
moe_intermediate_size, R = N*K routed rows (one per token and choice), P rows in memory (see `_Slots`), S of
one expert. A tensor's name ends in its axes: `router_logits_NE` is (N, E).
"""

import ctypes
import hashlib
import heapq
import itertools
import json
import math
import pickle
import platform
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from subprocess import SubprocessError
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn as nn
import torch.nn.functional as F
from litgpt.config import Config
from litgpt.model import GPT, GroupedTopkRouter, LLaMAMoE
from torch.utils.flop_counter import register_flop_formula

from litgpt_moe.yaml_files import read_mapping, typed

BIAS_NAME = "e_score_correction_bias"  # as in LitGPT and Hugging Face
STATISTICS = ("load_imbalance", "dead_experts", "router_entropy", "aux_loss", "z_loss")
LEAST_SHARED = 1 << 22  # multiplications with one of an average expert's matrices, see _share_out
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


# --- the layer ----------------------------------------------------------------------------------------------


class SimplifiedLLaMAMoE(LLaMAMoE):
    """The MoE layer as its definition reads: each token's K best experts, weighted by a softmax.

    Mixtral of Experts, section 2.1 (arxiv.org/abs/2401.04088). Slow on purpose; `MoE` is tested against it.
    """

    def __init__(self, config: Config) -> None:
        if config.n_expert_groups:
            raise ValueError("SimplifiedLLaMAMoE routes by softmax; n_expert_groups needs MoE")
        super().__init__(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, (B, T, C) like `x`."""
        x_NC = x.reshape(-1, x.size(-1))
        topk_logits_NK, topk_indices_NK = self.gate(x_NC).topk(self.config.n_expert_per_token, dim=1)
        topk_weights_NK = topk_logits_NK.softmax(dim=1, dtype=torch.float).to(x.dtype)
        topk_weights_NK = topk_weights_NK * self.config.routed_scaling_factor
        y_NC = torch.zeros_like(x_NC)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(topk_indices_NK == e)
            y_NC = y_NC.index_add(0, token, topk_weights_NK[token, choice, None] * expert(x_NC[token]))
        if self.config.n_shared_expert:
            y_NC = y_NC + self.shared_experts(x_NC)
        return y_NC.view_as(x)


class MoE(LLaMAMoE):
    """LitGPT's `LLaMAMoE`, same parameters, outputs and gradients, computed on rows sorted by expert.

    `forward` = route -> sort rows by expert -> experts on their slices -> unsort, weight, sum -> shared.
    Experts without a token get a zero gradient, not none, so that every process updates the same parameters.

    The buffer `e_score_correction_bias` (E,) is there from the start and 0; `use_selection_bias` lets it
    choose, and puts it into the state dict, which then is not stock LitGPT's. With expert groups it is the
    router's own buffer of that name, which stock LitGPT has too.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.n_expert_groups:
            self.gate = GroupedRouter(config)
        else:
            bias_E = torch.zeros(config.n_expert, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias_E, persistent=False)
        self.balance: Balance | None = None  # see set_balance
        self.way: str | None = None  # one of WAYS in place of choose_way's
        self.count_load = False
        self._packed: dict[str, torch.Tensor] = {}  # see pack_for_decoding
        self.register_buffer(
            "tokens_per_expert", torch.zeros(config.n_expert, dtype=torch.int64), persistent=False
        )

    def reset_parameters(self) -> None:
        """Zero what `init_module(empty_init=True)` left unset here; the submodules reset their own."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> "MoE":
        return _keep_float32(self, super()._apply, fn, recurse)

    @property
    def selection_bias(self) -> torch.Tensor:
        """What is added to the router's scores before top-k, and to nothing else: (E,), float32."""
        owner = self.gate if self.config.n_expert_groups else self
        return owner.e_score_correction_bias

    @property
    def has_selection_bias(self) -> bool:
        """Whether the bias takes part in the choice and in the state dict."""
        return bool(self.config.n_expert_groups) or BIAS_NAME not in self._non_persistent_buffers_set

    def use_selection_bias(self) -> None:
        """Let the bias choose, and save it; expert groups always do."""
        if not self.has_selection_bias:
            self.register_buffer(BIAS_NAME, self.e_score_correction_bias, persistent=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, (B, T, C) like `x`."""
        x_NC = x.reshape(-1, x.size(-1))
        router_logits_NE, topk_weights_NK, topk_indices_NK = self._route(x_NC)
        if self.config.routed_scaling_factor != 1.0:
            topk_weights_NK = topk_weights_NK * self.config.routed_scaling_factor
        if _is_decoding(x_NC):
            y_NC = self._run_chosen(x_NC, topk_weights_NK.to(x.dtype), topk_indices_NK)
        else:
            plan = Plan.of(topk_indices_NK, self.config.n_expert)
            if self.count_load:
                self.tokens_per_expert += plan.tokens_per_expert
            if self.balance is not None and self.training and torch.is_grad_enabled():
                topk_weights_NK = self._attach_losses(topk_weights_NK, router_logits_NE, plan)
            y_NC = self._run_sorted(x_NC, topk_weights_NK.to(x.dtype), plan).to(x.dtype)
        if self.config.n_shared_expert:
            y_NC = y_NC + self.shared_experts(x_NC)
        return y_NC.view_as(x)

    def _route(self, x_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the router's logits (N, E), each token's K weights and the K experts they belong to."""
        with _no_autocast(x_NC):
            if self.config.n_expert_groups:
                router_logits_NE = _RouterLogits.apply(x_NC, self.gate.weight, torch.float)
                return router_logits_NE, *self.gate.choose(router_logits_NE)
            # float32: bf16 rounds close logits to ties, and top-k then picks by position. float64 stays.
            dtype = torch.promote_types(x_NC.dtype, torch.float32)
            router_logits_NE = _RouterLogits.apply(x_NC, self.gate.weight, dtype)
            if self.has_selection_bias:
                scores_NE = router_logits_NE.detach() + self.e_score_correction_bias
                topk_indices_NK = scores_NE.topk(self.config.n_expert_per_token, dim=1).indices
                topk_logits_NK = router_logits_NE.gather(1, topk_indices_NK)
            else:
                topk_logits_NK, topk_indices_NK = router_logits_NE.topk(self.config.n_expert_per_token, dim=1)
            topk_weights_NK = topk_logits_NK.softmax(dim=1, dtype=torch.float)  # float, as LitGPT's
        return router_logits_NE, topk_weights_NK.to(x_NC.dtype), topk_indices_NK

    def _attach_losses(
        self, weights_NK: torch.Tensor, router_logits_NE: torch.Tensor, plan: "Plan"
    ) -> torch.Tensor:
        """Return the weights as they are; their backward adds the auxiliary losses and counts the load."""
        balance = self.balance
        with _no_autocast(router_logits_NE):
            if self.config.n_expert_groups:
                scores_NE = router_logits_NE.sigmoid()  # DeepSeek-V3 eq. 18: normalised affinities
                probs_NE = scores_NE / scores_NE.sum(dim=1, keepdim=True)
            else:
                probs_NE = router_logits_NE.softmax(dim=1)
            aux_loss = load_balancing_loss(probs_NE, plan.tokens_per_expert)
            z_loss = router_z_loss(router_logits_NE)
            loss = balance.aux_loss_coef * aux_loss + balance.z_loss_coef * z_loss
            entropy = -torch.special.xlogy(probs_NE, probs_NE).detach().sum(1).mean()
            means = torch.stack([torch.ones_like(entropy), entropy, aux_loss.detach(), z_loss.detach()])
            counters = [balance.step_load, balance.load, balance.sums]
            return torch.ops.moe.attach_loss(
                weights_NK, loss, plan.tokens_per_expert, means.float(), counters, balance.scale
            )

    def _run_sorted(self, x_NC: torch.Tensor, weights_NK: torch.Tensor, plan: "Plan") -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, (N, C), from rows sorted by expert."""
        # cast before the gather, which then moves half the bytes
        dtype = _compute_dtype(x_NC)
        x_NC, weights_NK = x_NC.to(dtype), weights_NK.to(dtype)
        # the weight scales the hidden row: moved there, autograd needs no copy of the experts' outputs
        weights_R1 = weights_NK.reshape(-1, 1).index_select(0, plan.order)
        way = self.way or choose_way(self.config, x_NC.device, dtype)
        if way == "loop":
            x_RC = _Gather.apply(x_NC, plan.token, plan.inverse)
            y_RC = _module_loop(x_RC, plan.ends, self.experts) * weights_R1
            return _Combine.apply(y_RC, plan.token, plan.inverse)
        matrices = [[getattr(e, name).weight for e in self.experts] for name in ("fc_1", "fc_2", "proj")]
        if way in ("segments", "triton"):
            run_experts = _segment_experts if way == "segments" else _triton_experts
            return run_experts(x_NC, weights_R1, plan, *matrices)
        x_RC = _Gather.apply(x_NC, plan.token, plan.inverse)
        y_RC = _grouped_mm_experts(x_RC, weights_R1, plan.ends, *matrices)
        return _Combine.apply(y_RC, plan.token, plan.inverse)

    def _run_chosen(
        self, x_NC: torch.Tensor, weights_NK: torch.Tensor, indices_NK: torch.Tensor
    ) -> torch.Tensor:
        """Return the same for a handful of tokens, without sorting: decoding touches K experts' weights."""
        if self.count_load:
            self.tokens_per_expert += torch.bincount(indices_NK.flatten(), minlength=self.config.n_expert)
        if self._packed and self._is_packed_still():
            return self._run_packed(x_NC, weights_NK, indices_NK)
        rows = []
        for x_1C, weights_K, indices in zip(x_NC.split(1), weights_NK, indices_NK.tolist(), strict=True):
            y_KC = torch.cat([self.experts[e](x_1C) for e in indices])
            rows.append(weights_K @ y_KC)
        return torch.stack(rows)

    def pack_for_decoding(self) -> None:
        """Lay the experts' weights out for one-token steps on a CPU; shapes, values and names stay.

        All experts' `fc_1` lie in one tensor, (in, out) in memory, and the parameters become views of it
        (`fc_2` and `proj` too): no memory is spent twice, and every other path works as before.
        """
        if self.config.bias:
            return
        for name in ("fc_1", "fc_2", "proj"):
            layers = [getattr(expert, name) for expert in self.experts]
            packed_EIO = torch.stack([layer.weight.detach().t() for layer in layers])
            for layer, weight in zip(layers, packed_EIO, strict=True):
                layer.weight.data = weight.t()
            self._packed[name] = packed_EIO.flatten(0, 1)

    def _is_packed_still(self) -> bool:
        # `.to(...)` gives the parameters memory of their own
        return self._packed["fc_1"].data_ptr() == self.experts[0].fc_1.weight.data_ptr()

    def _run_packed(
        self, x_NC: torch.Tensor, weights_NK: torch.Tensor, indices_NK: torch.Tensor
    ) -> torch.Tensor:
        """Return the same from packed weights, each chosen matrix times its token by one `embedding_bag`.

        That is a matrix-vector product with gathering. It reads the rows in order: 18 GB/s on one core, 26 on
        two, where MKL's product reaches 10 on weights that are not in the cache (AMD EPYC, torch 2.10).
        """
        n_tokens, top_k = indices_NK.shape
        expert_R1 = indices_NK.view(-1, 1)
        x_RC = x_NC.repeat_interleave(top_k, dim=0)

        def product(name: str, x_RI: torch.Tensor) -> torch.Tensor:
            width = x_RI.size(1)
            rows_RI = expert_R1 * width + torch.arange(width, device=x_RI.device)
            return F.embedding_bag(rows_RI, self._packed[name], mode="sum", per_sample_weights=x_RI)

        hidden_RF = F.silu(product("fc_1", x_RC)) * product("fc_2", x_RC) * weights_NK.reshape(-1, 1)
        return product("proj", hidden_RF).view(n_tokens, top_k, -1).sum(dim=1)


class GroupedRouter(GroupedTopkRouter):
    """LitGPT's sigmoid router with expert groups (DeepSeek-V3), and the initialisation that it lacks."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer(BIAS_NAME, torch.zeros(config.n_expert, dtype=torch.float32))
        self.reset_parameters()  # as nn.Linear does: litgpt 0.5.13 leaves what was in memory before

    def reset_parameters(self) -> None:
        # the same variance as LitGPT gives every nn.Linear (litgpt.pretrain.initialize_weights)
        nn.init.normal_(self.weight, mean=0.0, std=(2.0 / 5 / self.config.n_embd) ** 0.5)
        self.e_score_correction_bias.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> "GroupedRouter":
        return _keep_float32(self, super()._apply, fn, recurse)

    def choose(self, router_logits_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and indices (N, K) as LitGPT's `forward` does, which keeps the logits to itself."""
        scores_NE = router_logits_NE.sigmoid()
        topk_indices_NK = self.get_topk_indices(scores_NE)
        topk_weights_NK = scores_NE.gather(1, topk_indices_NK)
        if self.config.norm_topk_prob:
            topk_weights_NK = topk_weights_NK / (topk_weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_weights_NK, topk_indices_NK


def _keep_float32(module: nn.Module, apply: Any, fn: Any, recurse: bool) -> Any:
    """Apply `fn` with the selection bias moved, but not cast: from 0.5 on, bf16 swallows steps of 0.001."""
    before = module._buffers.get(BIAS_NAME)
    apply(fn, recurse)
    if before is not None and (after := module._buffers[BIAS_NAME]).dtype != before.dtype:
        kept = after.to(before.dtype) if before.is_meta else before.to(after.device)
        module._buffers[BIAS_NAME] = kept
    return module


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
        return cls(token_R, order_R, inverse_NK, ends_E.to(torch.int32), _counts(ends_E))


def _counts(ends_E: torch.Tensor) -> torch.Tensor:
    """Return each expert's number of rows, (E,)."""
    return ends_E.diff(prepend=ends_E.new_zeros(1))


def _sum_of_rows(y_RC: torch.Tensor, rows_NK: torch.Tensor) -> torch.Tensor:
    """Return the sum over K of `y_RC[rows_NK]`, (N, C), added up in float32 or wider."""
    if torch.compiler.is_compiling() or y_RC.is_meta:
        # written out, Inductor makes one vectorised loop of it; a gather and a sum it does not
        total = sum(y_RC[rows_N].to(_accumulator(y_RC)) for rows_N in rows_NK.unbind(1))
        return total.to(y_RC.dtype)
    starts_N = torch.arange(0, rows_NK.numel(), rows_NK.size(1), device=y_RC.device)
    return torch.embedding_bag(y_RC, rows_NK.flatten(), starts_N)[0]


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _RouterLogits(torch.autograd.Function):
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
        is_plain = not torch.compiler.is_compiling() and _compute_dtype(x) == x.dtype
        if is_plain and x.numel() >= 16 * x.size(-1) and prefers_onednn(x):
            return _LinearFunction.apply(x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)
        return super().forward(x)


def use_fast_linear(model: nn.Module) -> None:
    """Let the model's plain linear maps, those of attention above all, be multiplied as the experts are."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = Linear  # the same module, hooks and parameters


def _uses_onednn(x: torch.Tensor) -> bool:
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


class _Gather(torch.autograd.Function):
    """Each sorted row's token; backward gathers too, as autograd's `index_put` is slow."""

    @staticmethod
    def forward(ctx: Any, x_NC: torch.Tensor, token_R: torch.Tensor, inverse_NK: torch.Tensor):
        ctx.save_for_backward(inverse_NK)
        return x_NC.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RC: torch.Tensor):
        return _sum_of_rows(grad_RC, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    """Each token's sum of its rows; backward is the gather."""

    @staticmethod
    def forward(ctx: Any, y_RC: torch.Tensor, token_R: torch.Tensor, inverse_NK: torch.Tensor):
        ctx.save_for_backward(token_R)
        return _sum_of_rows(y_RC, inverse_NK)

    @staticmethod
    def backward(ctx: Any, grad_NC: torch.Tensor):
        return grad_NC.index_select(0, *ctx.saved_tensors), None, None


def _swiglu(gate_RF: torch.Tensor, up_RF: torch.Tensor, weights_R1: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up * weight, (R, F)."""
    if torch.compiler.is_compiling():  # written as in `_swiglu_grad`, which then need not compute it again
        return gate_RF * gate_RF.sigmoid() * up_RF * weights_R1
    return F.silu(gate_RF).mul_(up_RF).mul_(weights_R1)


def _swiglu_grad(
    grad_RF: torch.Tensor, gate_RF: torch.Tensor, up_RF: torch.Tensor, weights_R1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `_swiglu` gave, computed again, and the gradients of its three arguments."""
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


class _SwiGLU(torch.autograd.Function):
    """`_swiglu`, of which backward keeps the inputs alone and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, gate_RF: torch.Tensor, up_RF: torch.Tensor, weights_R1: torch.Tensor):
        ctx.save_for_backward(gate_RF, up_RF, weights_R1)
        return _swiglu(gate_RF, up_RF, weights_R1)

    @staticmethod
    def backward(ctx: Any, grad_RF: torch.Tensor):
        return _swiglu_grad(grad_RF, *ctx.saved_tensors)[1:]


def _grouped_mm_experts(
    x_RC: torch.Tensor,
    weights_R1: torch.Tensor,
    ends_E: torch.Tensor,
    fc_1: list[torch.Tensor],
    fc_2: list[torch.Tensor],
    proj: list[torch.Tensor],
) -> torch.Tensor:
    """Return each sorted row's weighted expert output, (R, C), by three grouped GEMMs, no round trip."""

    def stacked(matrices: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(matrices).to(x_RC.dtype).transpose(-2, -1)  # grouped_mm knows no autocast

    gate_RF = F.grouped_mm(x_RC, stacked(fc_1), offs=ends_E)
    up_RF = F.grouped_mm(x_RC, stacked(fc_2), offs=ends_E)
    return F.grouped_mm(_SwiGLU.apply(gate_RF, up_RF, weights_R1), stacked(proj), offs=ends_E)


def _segment_experts(
    x_NC: torch.Tensor,
    weights_R1: torch.Tensor,
    plan: "Plan",
    fc_1: list[torch.Tensor],
    fc_2: list[torch.Tensor],
    proj: list[torch.Tensor],
) -> torch.Tensor:
    """Return each token's weighted sum, (N, C), by GEMMs on each expert's rows.

    One operator, and one for its gradients, at any number of experts. It gathers an expert's rows as it needs
    them, and does all that there is to do with them while they are in the cache. Autocast casts nothing
    inside: each matrix is cast as it is used. A compiled graph has operators for the GEMMs alone, and makes
    one loop of all that is between them.
    """
    if torch.compiler.is_compiling():
        weights_P1, token_P, rows_NK, sizes_E = weights_R1, plan.token, plan.inverse, plan.tokens_per_expert
        if _uses_onednn(x_NC):
            sizes_E, token_P, row_R = torch.ops.moe.slots(plan.token, plan.ends, x_NC)
            weights_P1 = weights_R1.new_zeros(token_P.size(0), 1).index_copy(0, row_R, weights_R1)
            rows_NK = row_R[plan.inverse]
        # on CUDA this waits for the device: once here, and not in each operator
        return _CompiledExperts.apply(x_NC, weights_P1, token_P, rows_NK, sizes_E.cpu(), *fc_1, *fc_2, *proj)
    return torch.ops.moe.experts(x_NC, weights_R1, plan.token, plan.inverse, plan.ends, fc_1, fc_2, proj)[0]


class _Slots(NamedTuple):
    """Where the experts' rows lie in memory: sorted, and each expert's filled up to one of few sizes.

    oneDNN makes a kernel for each size (0.1 ms) and keeps 1,024. Other libraries' rows are not filled up.
    """

    sizes: list[int]  # each expert's number of slots
    row: torch.Tensor  # (R,) the slot of each sorted row
    token: torch.Tensor  # (P,) the token in each slot; one of the expert's own where it has no row

    @classmethod
    def of(cls, token_R: torch.Tensor, ends_E: torch.Tensor, x: torch.Tensor) -> "_Slots":
        """Return the slots for GEMMs of `x`. On CUDA this waits for the device, on a CPU it is free."""
        counts_E, row_R = _counts(ends_E), torch.arange(token_R.numel(), device=token_R.device)
        counts = counts_E.tolist()
        if not _uses_onednn(x):
            return cls(counts, row_R, token_R)
        sizes = [_slots_of(count) for count in counts]
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


def _slots_of(count: int) -> int:
    """Return one of few sizes that has room: at most 15 more, or a sixteenth."""
    step = max(16, 1 << count.bit_length() >> 5)
    return -(-count // step) * step


def _most_slots(x: torch.Tensor, n_rows: int, n_expert: int) -> int:
    """Return how many slots there are at most, whatever the load: it has to be known to compile."""
    return n_rows + n_rows // 16 + 15 * n_expert if _uses_onednn(x) else n_rows


def _share_out(work: Callable[[int], None], sizes: list[int], matrix: torch.Tensor) -> None:
    """Call `work` on every job, on a CPU several at a time, each by one thread.

    Two threads on one expert's few hundred rows wait for each other more than they gain: its bfloat16 GEMMs
    are no faster by two than by one (Xeon with AMX, 64 experts). Jobs too large to be shared out evenly are
    done first, one after another by all threads; so are all where there is too little to do in each, as
    Python itself runs in one thread at a time: LEAST_SHARED is where both are even (Xeon, 2 cores, float32).

    Args:
        work: does one job: what is to be done with an expert, or a part of it.
        sizes: of each job, in rows.
        matrix: one of an expert's, for its device and size.
    """
    n_threads = torch.get_num_threads() if matrix.device.type == "cpu" and _openmp() else 1
    waiting = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    is_worth_it = n_threads > 1 and sum(sizes) * matrix.numel() >= len(sizes) * LEAST_SHARED
    n_together = 0 if is_worth_it else len(sizes)
    while n_together < len(sizes) and not _is_even([sizes[job] for job in waiting[n_together:]], n_threads):
        n_together += 1
    for job in waiting[:n_together]:
        work(job)
    if n_together == len(sizes):
        return
    rest = iter(waiting[n_together:])  # of a list: to take the next from it is safe in threads
    is_inference = torch.is_inference_mode_enabled()  # a thread has modes of its own

    def take() -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            for job in rest:
                work(job)

    _run_in_team(take, n_threads)


def _is_even(sizes: list[int], n_threads: int) -> bool:
    """Return whether threads that take the largest left in turn would be busy for 7/8 of the time."""
    loads = [0] * n_threads
    for size in sizes:
        heapq.heapreplace(loads, loads[0] + size)
    return 7 / 8 * max(loads) * n_threads <= sum(sizes)


def _run_in_team(work: Callable[[], None], n_threads: int) -> None:
    """Call `work` in each thread of OpenMP's own team, in which operators begin no threads in turn.

    Threads of ours would share the processors with OpenMP's, which spin after each loop lest they be late for
    the next (libgomp, 7 ms on a Xeon). This is what `#pragma omp parallel` compiles to, see the libgomp
    manual, "Implementing PARALLEL construct".
    """
    openmp, errors = _openmp(), []

    def begin(_: Any) -> None:
        try:
            torch.get_num_threads()  # asked for the first time in a thread, it sets what the others have
            openmp.omp_set_num_threads(1)  # of this thread until the team ends: oneDNN asks for it
            work()
        except BaseException as error:  # which cannot pass through OpenMP: Ctrl-C too
            errors.append(error)

    openmp.GOMP_parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(begin), None, n_threads, 0)
    if errors:
        raise errors[0]


@cache
def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP that torch runs its loops with, or None where it is not to be had by GCC's names."""
    if sys.platform != "linux":  # elsewhere it is another OpenMP, with other names
        return None
    library, n_threads = ctypes.CDLL(None), torch.get_num_threads()
    if not hasattr(library, "GOMP_parallel"):
        return None
    library.omp_set_num_threads(n_threads + 1)  # which torch hears of if the library is its own
    is_torch_s = torch.get_num_threads() == n_threads + 1
    library.omp_set_num_threads(n_threads)
    return library if is_torch_s else None


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
    slots = _Slots.of(token, ends, x)
    y_PC = x.new_empty(slots.token.size(0), x.size(1))
    parts = [slots.parts(rows) for rows in (slots.token, slots.weights(weights), gate_PF, up_PF, y_PC)]

    def work(e: int) -> None:
        token_S, weights_S1, gate_SF, up_SF, y_SC = (part[e] for part in parts)
        x_SC = x.index_select(0, token_S)
        matmul(x_SC, fc_1[e].to(x.dtype).t(), out=gate_SF)
        matmul(x_SC, fc_2[e].to(x.dtype).t(), out=up_SF)
        matmul(_swiglu(gate_SF, up_SF, weights_S1), proj[e].to(x.dtype).t(), out=y_SC)

    _share_out(work, slots.sizes, fc_1[0])
    return _sum_of_rows(y_PC, slots.row[inverse]), gate_PF, up_PF


@_experts.register_fake
def _experts_shapes(
    x: Any, weights: Any, token: Any, inverse: Any, ends: Any, fc_1: Any, fc_2: Any, proj: Any
) -> Any:
    shape = _most_slots(x, token.size(0), ends.size(0)), fc_1[0].size(0)
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
    slots = _Slots.of(token, ends, x)
    weights_P1, x_grad_PC = slots.weights(weights), x.new_empty(slots.token.size(0), x.size(1))
    weights_grad_P1 = torch.empty_like(weights_P1)
    rows = (slots.token, weights_P1, gate, up, weights_grad_P1, x_grad_PC)
    parts = [slots.parts(tensor) for tensor in rows]
    # not made in the threads, where malloc gives all of them back each time
    fc_1_grads, fc_2_grads, proj_grads = ([torch.empty_like(w) for w in maps] for maps in (fc_1, fc_2, proj))

    def work(e: int) -> None:
        token_S, weights_S1, gate_SF, up_SF, weights_grad_S1, x_grad_SC = (part[e] for part in parts)
        grad_SC, x_SC = grad.index_select(0, token_S), x.index_select(0, token_S)
        hidden_SF, gate_grad_SF, up_grad_SF, found_S1 = _swiglu_grad(
            matmul(grad_SC, proj[e].to(x.dtype)), gate_SF, up_SF, weights_S1
        )
        weights_grad_S1.copy_(found_S1)
        # of no rows a product is zero, as the gradient must be
        matmul(grad_SC.t(), hidden_SF, out=proj_grads[e])
        matmul(gate_grad_SF.t(), x_SC, out=fc_1_grads[e])
        matmul(up_grad_SF.t(), x_SC, out=fc_2_grads[e])
        matmul(gate_grad_SF, fc_1[e].to(x.dtype), out=x_grad_SC)
        add_matmul(x_grad_SC, up_grad_SF, fc_2[e].to(x.dtype))

    _share_out(work, slots.sizes, fc_1[0])
    x_grad = _sum_of_rows(x_grad_PC, slots.row[inverse])
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


# The experts as a compiled graph has them.


@torch.library.custom_op("moe::slots", mutates_args=())
def _slots(
    token: torch.Tensor, ends: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `_Slots` in tensors: sizes (E,), token (at most P,) and row (R,)."""
    slots = _Slots.of(token, ends, x)
    token_P = token.new_zeros(_most_slots(x, token.size(0), ends.size(0)))
    token_P[: slots.token.size(0)] = slots.token
    return torch.tensor(slots.sizes, device=token.device), token_P, slots.row


@_slots.register_fake
def _(token: Any, ends: Any, x: Any) -> Any:
    most = _most_slots(x, token.size(0), ends.size(0))
    return token.new_empty(ends.size(0)), token.new_empty(most), torch.empty_like(token)


def _split(rows: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """Return each expert's part of a tensor of as many rows as there are slots, or more."""
    return rows[: sum(sizes)].split(sizes)


@torch.library.custom_op("moe::segments", mutates_args=())
def _segments(
    x: torch.Tensor,
    rows: torch.Tensor | None,
    sizes: torch.Tensor,
    maps: list[torch.Tensor],
    transposed: bool,
) -> list[torch.Tensor]:
    """Return x times the matrices, or their transposes, of each slot's expert: one product for every E.

    With `rows`, of x[rows] (P,): gathered by the thread that multiplies them, they are in its cache.
    """
    counts, products = sizes.tolist(), _segments_shapes(x, rows, sizes, maps, transposed)
    parts = [_split(tensor, counts) for tensor in (x if rows is None else rows, *products)]
    if transposed:
        maps = [matrix.t() for matrix in maps]

    def work(e: int) -> None:
        x_SI, *products_SO = (part[e] for part in parts)
        if rows is not None:
            x_SI = x.index_select(0, x_SI)
        for matrix, product_SO in zip(maps[e :: len(counts)], products_SO, strict=True):
            matmul(x_SI, matrix.to(x.dtype), out=product_SO)

    _share_out(work, counts, maps[0])
    return products


@_segments.register_fake
def _segments_shapes(x: Any, rows: Any, sizes: Any, maps: Any, transposed: bool) -> Any:
    shape = (x if rows is None else rows).size(0), maps[0].size(0 if transposed else 1)
    return [x.new_empty(shape) for _ in range(len(maps) // sizes.size(0))]


@torch.library.custom_op("moe::segments_grad", mutates_args=())
def _segments_grad(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    gate_grad: torch.Tensor,
    up_grad: torch.Tensor,
    x: torch.Tensor,
    token: torch.Tensor,
    sizes: torch.Tensor,
    fc_1: list[torch.Tensor],
    fc_2: list[torch.Tensor],
    proj: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Return the gradients of each slot's x, (P, C), and of every fc_1, fc_2 and proj.

    Args:
        grad: of each token's output, (N, C).
        hidden: what proj was multiplied with, (P, F), like the two gradients after it.
        x: (N, C).
    """
    counts, x_grad = sizes.tolist(), x.new_empty(token.size(0), x.size(1))
    fc_1_grads, fc_2_grads, proj_grads = ([torch.empty_like(w) for w in maps] for maps in (fc_1, fc_2, proj))
    rows = (token, hidden, gate_grad, up_grad, x_grad)
    token_E, hidden_E, gate_grad_E, up_grad_E, x_grad_E = (_split(tensor, counts) for tensor in rows)

    def of_fc(e: int) -> None:
        x_SC = x.index_select(0, token_E[e])
        matmul(gate_grad_E[e].t(), x_SC, out=fc_1_grads[e])
        matmul(up_grad_E[e].t(), x_SC, out=fc_2_grads[e])

    def of_x(e: int) -> None:
        matmul(gate_grad_E[e], fc_1[e].to(x.dtype), out=x_grad_E[e])
        add_matmul(x_grad_E[e], up_grad_E[e], fc_2[e].to(x.dtype))

    def of_proj(e: int) -> None:
        matmul(grad.index_select(0, token_E[e]).t(), hidden_E[e], out=proj_grads[e])

    # in parts, lest a thread be done long before the others; the last has half the products
    parts, sizes_J = (of_fc, of_x, of_proj), [*counts, *counts, *(count // 2 for count in counts)]
    _share_out(lambda job: parts[job // len(counts)](job % len(counts)), sizes_J, fc_1[0])
    return [x_grad, *fc_1_grads, *fc_2_grads, *proj_grads]


@_segments_grad.register_fake
def _(
    grad: Any, hidden: Any, gate_grad: Any, up_grad: Any, x: Any, token: Any, sizes: Any, *maps: Any
) -> Any:
    x_grad = x.new_empty(token.size(0), x.size(1))
    return [x_grad, *map(torch.empty_like, itertools.chain(*maps))]


@register_flop_formula(torch.ops.moe.segments)
def _(x: Any, rows: Any, sizes: Any, maps: Any, *_: Any, **__: Any) -> int:
    return 2 * (x if rows is None else rows)[0] * math.prod(maps[0]) * (len(maps) // sizes[0])


@register_flop_formula(torch.ops.moe.segments_grad)
def _(grad: Any, hidden: Any, gate: Any, up: Any, x: Any, token: Any, *maps: Any, **_: Any) -> int:
    return 5 * 2 * token[0] * math.prod(maps[1][0])


class _CompiledExperts(torch.autograd.Function):
    """`_experts` and its gradients, of which backward computes SwiGLU again."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: torch.Tensor,
        weights_P1: torch.Tensor,
        token_P: torch.Tensor,
        rows_NK: torch.Tensor,
        sizes_E: torch.Tensor,
        *maps: torch.Tensor,
    ) -> torch.Tensor:
        n_expert = sizes_E.size(0)
        gate_PF, up_PF = torch.ops.moe.segments(x_NC, token_P, sizes_E, maps[: 2 * n_expert], True)
        hidden_PF = _swiglu(gate_PF, up_PF, weights_P1)
        (y_PC,) = torch.ops.moe.segments(hidden_PF, None, sizes_E, maps[2 * n_expert :], True)
        ctx.save_for_backward(gate_PF, up_PF, weights_P1, x_NC, token_P, rows_NK, sizes_E, *maps)
        return _sum_of_rows(y_PC, rows_NK)

    @staticmethod
    def backward(ctx: Any, grad_NC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *hidden_parts, x_NC, token_P, rows_NK, sizes_E = ctx.saved_tensors[:7]
        matrices, n_expert = ctx.saved_tensors[7:], sizes_E.size(0)
        maps = [matrices[at : at + n_expert] for at in range(0, 3 * n_expert, n_expert)]
        (hidden_grad_PF,) = torch.ops.moe.segments(grad_NC, token_P, sizes_E, maps[2], False)
        *hidden_and_grads, weights_grad_P1 = _swiglu_grad(hidden_grad_PF, *hidden_parts)
        x_grad_PC, *grads = torch.ops.moe.segments_grad(
            grad_NC, *hidden_and_grads, x_NC, token_P, sizes_E, *maps
        )
        return _sum_of_rows(x_grad_PC, rows_NK), weights_grad_P1, None, None, None, *grads


@torch.compiler.disable  # row counts are data: compiling would specialise on each and recompile for ever
def _module_loop(x_RC: torch.Tensor, ends_E: torch.Tensor, experts: nn.ModuleList) -> torch.Tensor:
    """Return the experts' outputs by calling each on its slice: the one way that knows biases."""
    if x_RC.is_meta:  # where FLOPs are counted: no row counts to read, and each row meets one expert
        return experts[0](x_RC)
    parts = x_RC.split(_counts(ends_E).tolist())
    return torch.cat([expert(x_SC) for expert, x_SC in zip(experts, parts, strict=True)])


@torch.compiler.assume_constant_result  # a device does not change under a compiled graph
def has_fast_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `F.grouped_mm` is one kernel: bf16 on SM90/SM100; elsewhere torch loops on the host."""
    # torch 2.10, aten/src/ATen/native/cuda/GroupedBlas.cpp
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


WAYS = {
    "grouped_mm": "grouped GEMM (torch.nn.functional.grouped_mm)",
    "triton": "grouped GEMM (Triton, moe_layers.py)",
    "segments": "one GEMM for each expert's sorted rows",
    "loop": "a loop over the experts' modules",
}


def choose_way(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """Return how experts are run, a key of WAYS: the fastest that this device and dtype have."""
    if config.bias:
        return "loop"
    is_aligned = config.n_embd % 8 == 0 and config.moe_intermediate_size % 8 == 0  # rows of 16 bytes in bf16
    if is_aligned and has_fast_grouped_mm(device, dtype):
        return "grouped_mm"
    return "triton" if has_triton(device.type, dtype) else "segments"


def experts_path(config: Config, device: torch.device | str, dtype: torch.dtype) -> str:
    """Return, in words, how this model's experts would be run on this device in this dtype."""
    if not config.n_expert:
        return "none"
    device = torch.device(device)
    way = choose_way(config, device, dtype)
    waits = "" if way in ("grouped_mm", "triton") or device.type == "cpu" else ", which waits for the device"
    return WAYS[way] + waits


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    # is_autocast_enabled("meta") raises, and nothing is cast there
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _no_autocast(x: torch.Tensor) -> AbstractContextManager:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _is_decoding(x_NC: torch.Tensor) -> bool:
    # Up to four tokens (measured on CPU) sorting costs more than it saves. CUDA would wait for the indices.
    return x_NC.size(0) <= 4 and x_NC.device.type == "cpu" and not torch.is_grad_enabled()


# --- the experts in Triton: CUDA without a fast grouped GEMM ------------------------------------------------


# What a kernel uses of triton.language, which it looks for in its module; `_triton_kernels` imports it here.
tl: Any = None
constexpr: Any = "constexpr"


@torch.compiler.assume_constant_result  # what is installed does not change under a compiled graph
def has_triton(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether Triton starts kernels here that are worth it (on Linux it needs a C compiler too)."""
    # Triton 3.6 knows no tensor cores before SM80, and there spills kilobytes of registers in 16 bits
    oldest = 75 if dtype == torch.float32 else 80
    return device_type == "cuda" and dtype in DTYPES.values() and _triton_arch() >= oldest


@lru_cache
def _triton_arch() -> int:
    """Return the NVIDIA GPU that Triton starts kernels on, 86 for SM86; 0 without one."""
    try:
        import triton

        target = triton.runtime.driver.active.get_current_target()
    except (ImportError, OSError, RuntimeError, SubprocessError):
        return 0
    return target.arch if target.backend == "cuda" else 0


@lru_cache
def _triton_kernels() -> tuple[Any, Any]:
    """Return the two kernels. Triton is imported here: a machine without it has the other ways."""
    global tl, constexpr
    import triton
    import triton.language as tl

    constexpr = tl.constexpr
    return triton.jit(_rows_kernel), triton.jit(_matrices_kernel)


def _tile(n_rows: int, n_expert: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the sides of the kernels' tiles (rows, output, input), warps and stages of their pipelines.

    Four stages hold three pairs of tiles, 48 KB of shared memory for the largest: two such programs fit the
    100 KB of a consumer card's processor (SM86, SM89, SM120). Not tuned on a GPU yet.
    """
    if dtype == torch.float32:
        # twice the bytes; and without TF32 the products of a larger tile spill registers
        return {"BLOCK_R": 64, "BLOCK_O": 64, "BLOCK_I": 32, "num_warps": 4, "num_stages": 4}
    # an expert's last tile is half empty on average: of 256 rows, tiles of 128 would waste a fifth
    rows, warps = (128, 8) if n_rows >= 512 * n_expert else (64, 4)
    return {"BLOCK_R": rows, "BLOCK_O": 128, "BLOCK_I": 32, "num_warps": warps, "num_stages": 4}


def _precision(dtype: torch.dtype) -> str:
    """Return Triton's name for how float32 is multiplied, as torch.set_float32_matmul_precision says."""
    is_exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if is_exact else "tf32"


def _rows_kernel(
    x,
    rows,
    w,
    y,
    ends,
    tile_ends,
    tile_experts,
    n_expert,
    n_out,
    n_in,
    x_stride,
    e_stride,
    o_stride,
    i_stride,
    GATHER: constexpr,
    BLOCK_R: constexpr,
    BLOCK_O: constexpr,
    BLOCK_I: constexpr,
    PRECISION: constexpr,
):
    """One tile of y[r] = w[expert of r] @ x[rows[r]]: rows of one expert times columns of its outputs."""
    tiles_across = (n_out + BLOCK_O - 1) // BLOCK_O
    tile = tl.program_id(0) // tiles_across  # neighbours read the same rows of x
    expert = tl.load(tile_experts + tile)
    if expert >= n_expert:  # the grid has room for the worst load, and this tile is not needed
        return
    first_tile = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    row_R = start + (tile - first_tile) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row_R1 = (row_R < tl.load(ends + expert))[:, None]
    column_O = tl.program_id(0) % tiles_across * BLOCK_O + tl.arange(0, BLOCK_O)
    is_column_1O = (column_O < n_out)[None, :]
    source_R = row_R
    if GATHER:
        source_R = tl.load(rows + row_R, mask=row_R < tl.load(ends + expert), other=0)
    inner_I = tl.arange(0, BLOCK_I)
    x_RI = x + source_R[:, None] * x_stride + inner_I[None, :]
    w_IO = w + expert * e_stride + inner_I[:, None] * i_stride + column_O[None, :] * o_stride
    y_RO = tl.full((BLOCK_R, BLOCK_O), 0.0, tl.float32)
    for at in range(0, n_in, BLOCK_I):
        left = n_in - at
        x_tile = tl.load(x_RI, mask=is_row_R1 & (inner_I < left)[None, :], other=0.0)
        w_tile = tl.load(w_IO, mask=(inner_I < left)[:, None] & is_column_1O, other=0.0)
        y_RO = tl.dot(x_tile, w_tile, y_RO, input_precision=PRECISION)
        x_RI += BLOCK_I
        w_IO += BLOCK_I * i_stride
    place_RO = y + row_R[:, None] * n_out + column_O[None, :]
    tl.store(place_RO, y_RO.to(y.dtype.element_ty), mask=is_row_R1 & is_column_1O)


def _matrices_kernel(
    y,
    y_rows,
    x,
    x_rows,
    w,
    ends,
    n_out,
    n_in,
    y_stride,
    x_stride,
    GATHER_Y: constexpr,
    GATHER_X: constexpr,
    BLOCK_R: constexpr,
    BLOCK_O: constexpr,
    BLOCK_I: constexpr,
    PRECISION: constexpr,
):
    """One tile of w[e] = sum of y[y_rows[r]]^T x[x_rows[r]] over the rows r of expert e, zero without any."""
    expert = tl.program_id(1).to(tl.int64)
    tiles_across = (n_in + BLOCK_I - 1) // BLOCK_I
    column_O = tl.program_id(0) // tiles_across * BLOCK_O + tl.arange(0, BLOCK_O)
    column_I = tl.program_id(0) % tiles_across * BLOCK_I + tl.arange(0, BLOCK_I)
    is_column_O1, is_column_1I = (column_O < n_out)[:, None], (column_I < n_in)[None, :]
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    w_OI = tl.full((BLOCK_O, BLOCK_I), 0.0, tl.float32)
    for at in range(start, end, BLOCK_R):
        row_R = (at + tl.arange(0, BLOCK_R)).to(tl.int64)
        is_row_R = row_R < end
        y_R, x_R = row_R, row_R
        if GATHER_Y:
            y_R = tl.load(y_rows + row_R, mask=is_row_R, other=0)
        if GATHER_X:
            x_R = tl.load(x_rows + row_R, mask=is_row_R, other=0)
        y_OR = y + column_O[:, None] + y_R[None, :] * y_stride
        x_RI = x + x_R[:, None] * x_stride + column_I[None, :]
        y_tile = tl.load(y_OR, mask=is_column_O1 & is_row_R[None, :], other=0.0)
        x_tile = tl.load(x_RI, mask=is_row_R[:, None] & is_column_1I, other=0.0)
        w_OI = tl.dot(y_tile, x_tile, w_OI, input_precision=PRECISION)
    place_OI = w + (expert * n_out + column_O[:, None]) * n_in + column_I[None, :]
    tl.store(place_OI, w_OI.to(w.dtype.element_ty), mask=is_column_O1 & is_column_1I)


@torch.library.custom_op("moe::expert_rows", mutates_args=())
def _expert_rows(
    x: torch.Tensor,
    w: torch.Tensor,
    rows: torch.Tensor | None,
    ends: torch.Tensor,
    tile_ends: torch.Tensor,
    tile_experts: torch.Tensor,
) -> torch.Tensor:
    """Return w[e] (E, O, I) times each sorted row of x, (R, O); with `rows`, times x[rows] (R,)."""
    y = _expert_rows_shape(x, w, rows, ends, tile_ends, tile_experts)
    tile = _tile(y.size(0), w.size(0), x.dtype)
    kernel = _triton_kernels()[0]
    grid = (tile_experts.size(0) * -(-w.size(1) // tile["BLOCK_O"]),)
    numbers = (*w.shape, x.stride(0), *w.stride())
    with torch.cuda.device_of(x):
        kernel[grid](
            x,
            ends if rows is None else rows,
            w,
            y,
            ends,
            tile_ends,
            tile_experts,
            *numbers,
            GATHER=rows is not None,
            PRECISION=_precision(x.dtype),
            **tile,
        )
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
    # the sum runs over rows here: its step is the other kernel's step over inputs
    tile |= {"BLOCK_R": tile["BLOCK_I"], "BLOCK_O": tile["BLOCK_R"], "BLOCK_I": tile["BLOCK_O"]}
    tile["num_stages"] += 1  # Triton gives the numbers of gathered rows stages of their own
    grid = (-(-w.size(1) // tile["BLOCK_O"]) * -(-w.size(2) // tile["BLOCK_I"]), w.size(0))
    with torch.cuda.device_of(x):
        _triton_kernels()[1][grid](
            y,
            ends if y_rows is None else y_rows,
            x,
            ends if x_rows is None else x_rows,
            w,
            ends,
            *w.shape[1:],
            y.stride(0),
            x.stride(0),
            GATHER_Y=y_rows is not None,
            GATHER_X=x_rows is not None,
            PRECISION=_precision(x.dtype),
            **tile,
        )
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


def _triton_experts(
    x_NC: torch.Tensor,
    weights_R1: torch.Tensor,
    plan: "Plan",
    fc_1: list[torch.Tensor],
    fc_2: list[torch.Tensor],
    proj: list[torch.Tensor],
) -> torch.Tensor:
    """Return each token's weighted sum, (N, C), by grouped GEMMs that gather their rows as they load them."""
    n_rows, n_expert = plan.token.size(0), len(proj)
    size = _tile(n_rows, n_expert, x_NC.dtype)["BLOCK_R"]
    # a tile has rows of one expert only; on the host only their largest possible number is known
    tile_ends_E = ((plan.tokens_per_expert + size - 1) // size).cumsum(0)
    tiles_T = torch.arange(n_rows // size + min(n_expert, n_rows), device=x_NC.device)
    tile_experts_T = torch.searchsorted(tile_ends_E, tiles_T, right=True)
    up_EOC = torch.stack([w for pair in zip(fc_1, fc_2, strict=True) for w in pair]).to(x_NC.dtype)
    proj_ECF = torch.stack(proj).to(x_NC.dtype)
    sorting = (plan.token, plan.inverse, plan.ends, tile_ends_E, tile_experts_T)
    return _TritonExperts.apply(x_NC, weights_R1, up_EOC.view(n_expert, -1, x_NC.size(1)), proj_ECF, *sorting)


class _TritonExperts(torch.autograd.Function):
    """SwiGLU experts from fc_1 on fc_2 (E, 2F, C) and proj (E, C, F); backward keeps x and their products."""

    @staticmethod
    def forward(
        ctx: Any, x_NC, weights_R1, up_EOC, proj_ECF, token_R, inverse_NK, ends_E, *tiles
    ) -> torch.Tensor:
        x_NC = x_NC.contiguous()
        both_RO = torch.ops.moe.expert_rows(x_NC, up_EOC, token_R, ends_E, *tiles)
        hidden_RF = _swiglu(*both_RO.chunk(2, dim=1), weights_R1)
        y_RC = torch.ops.moe.expert_rows(hidden_RF, proj_ECF, None, ends_E, *tiles)
        ctx.save_for_backward(
            x_NC, both_RO, weights_R1, up_EOC, proj_ECF, token_R, inverse_NK, ends_E, *tiles
        )
        return _sum_of_rows(y_RC, inverse_NK)

    @staticmethod
    def backward(ctx: Any, grad_NC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NC, both_RO, weights_R1, up_EOC, proj_ECF, token_R, inverse_NK, ends_E, *tiles = ctx.saved_tensors
        grad_NC = grad_NC.contiguous()
        grad_RF = torch.ops.moe.expert_rows(grad_NC, proj_ECF.mT, token_R, ends_E, *tiles)
        hidden_RF, *both_grads, weights_grad_R1 = _swiglu_grad(grad_RF, *both_RO.chunk(2, dim=1), weights_R1)
        proj_grad = torch.ops.moe.expert_matrices(grad_NC, token_R, hidden_RF, None, ends_E)
        grad_RO = torch.cat(both_grads, dim=1)
        x_grad_RC = torch.ops.moe.expert_rows(grad_RO, up_EOC.mT, None, ends_E, *tiles)
        up_grad = torch.ops.moe.expert_matrices(grad_RO, None, x_NC, token_R, ends_E)
        x_grad_NC = _sum_of_rows(x_grad_RC, inverse_NK)
        return x_grad_NC, weights_grad_R1, up_grad, proj_grad, *[None] * (3 + len(tiles))


# --- the loss of a large vocabulary -------------------------------------------------------------------------

IGNORED_TOKEN = -100  # a target without loss, as in LitGPT and PyTorch
# values of a chunk of logits: 64 MB in float32 are 2 to 7 % faster on a Xeon than
# the 28 MB that glibc keeps by itself, see `keep_freed_memory`; 256 MB keep a GPU's GEMMs large
CHUNK_VALUES = {"cpu": 16 << 20, "cuda": 1 << 26}


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    """Return how many rows of logits to have at once."""
    return max(1, CHUNK_VALUES.get(device.type, 1 << 22) // vocab_size)


def linear_cross_entropy(
    hidden: torch.Tensor, weight_VC: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return the mean cross-entropy, float32 or wider, of the logits `hidden @ weight_VC.T`, chunk by chunk.

    The logits and their gradient are never there as a whole: with 32,000 words they are the largest tensors
    of a small model's step. The gradients are computed in forward, as a chunk's logits are at hand.
    Liger Kernel, section 3.2 (arxiv.org/abs/2410.10989).

    Args:
        hidden: (..., C) what the head would multiply.
        targets: (...) words, or IGNORED_TOKEN.
        dtype: of the GEMMs; the weight's if not given.
    """
    hidden_NC = hidden.reshape(-1, hidden.size(-1))
    # inside `forward` no_grad does not show
    has_backward = torch.is_grad_enabled() and (hidden.requires_grad or weight_VC.requires_grad)
    dtype = dtype or weight_VC.dtype
    return _LinearCrossEntropy.apply(hidden_NC, weight_VC, targets.reshape(-1), dtype, has_backward)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: torch.Tensor,
        weight_VC: torch.Tensor,
        targets_N: torch.Tensor,
        dtype: torch.dtype,
        has_backward: bool,
    ) -> torch.Tensor:
        is_kept_N1 = (targets_N != IGNORED_TOKEN)[:, None]
        words_N1 = targets_N.clamp_min(0)[:, None]
        n_kept = is_kept_N1.sum().clamp_min(1)
        x_NC, w_VC, exact = hidden_NC.to(dtype), weight_VC.to(dtype), _accumulator(hidden_NC)
        loss = torch.zeros((), dtype=exact, device=x_NC.device)
        gradients = None
        if has_backward:
            # many chunks are added up: not in bfloat16
            weight_grad_VC = torch.zeros(weight_VC.shape, dtype=exact, device=x_NC.device)
            if prefers_onednn(x_NC):  # see `_add_gradients`
                weight_grad_VC = weight_grad_VC.view(weight_VC.shape[::-1]).t()
            gradients = torch.empty_like(hidden_NC), weight_grad_VC
        size = chunk_rows(x_NC.device, w_VC.size(0))
        for at in range(0, x_NC.size(0), size):
            rows = slice(at, at + size)
            logits_SV = matmul(x_NC[rows], w_VC.t())
            log_probs_SV = _log_softmax(logits_SV, exact)
            loss -= (log_probs_SV.gather(1, words_N1[rows]) * is_kept_N1[rows]).sum()
            if gradients is not None:
                _add_gradients(log_probs_SV.exp_(), words_N1, is_kept_N1, rows, x_NC, w_VC, *gradients)
        if gradients is not None:
            ctx.save_for_backward(*gradients, n_kept)
            ctx.weight_dtype = weight_VC.dtype
        return loss / n_kept

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        hidden_grad_NC, sum_VC, n_kept = ctx.saved_tensors
        scale = grad / n_kept
        weight_grad_VC = sum_VC.new_empty(sum_VC.shape, dtype=ctx.weight_dtype)
        torch.mul(sum_VC, scale, out=weight_grad_VC)
        return hidden_grad_NC * scale.to(hidden_grad_NC.dtype), weight_grad_VC, None, None, None


def _log_softmax(logits_SV: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the logarithms of the rows' probabilities, on a CPU in place if `logits_SV` is of that dtype."""
    if logits_SV.device.type != "cpu":
        return logits_SV.log_softmax(1, dtype=dtype)  # one kernel, which reads the narrower dtype
    logits_SV = logits_SV.to(dtype)
    return torch.log_softmax(logits_SV, 1, out=logits_SV)


def _add_gradients(
    probs_SV: torch.Tensor,
    words_N1: torch.Tensor,
    is_kept_N1: torch.Tensor,
    rows: slice,
    x_NC: torch.Tensor,
    w_VC: torch.Tensor,
    hidden_grad_NC: torch.Tensor,
    weight_grad_VC: torch.Tensor,
) -> None:
    """Write the rows' gradients of the summed loss into the last two; `probs_SV` is used up."""
    words_S1, is_kept_S1 = words_N1[rows], is_kept_N1[rows]
    grad_SV = probs_SV.scatter_add_(1, words_S1, -torch.ones_like(words_S1, dtype=probs_SV.dtype))
    grad_SV = grad_SV.to(x_NC.dtype)
    hidden_grad_NC[rows] = matmul(grad_SV, w_VC) * is_kept_S1
    x_SC = x_NC[rows] * is_kept_S1
    if prefers_onednn(x_SC):  # it copies a factor that lies transposed, and x is the smaller one
        add_matmul(weight_grad_VC.t(), x_SC.t(), grad_SV)
    else:
        add_matmul(weight_grad_VC, grad_SV.t(), x_SC)


class LossHead(Linear):
    """LitGPT's `lm_head` that can leave its product to `linear_cross_entropy`; see `defer_head`."""

    is_deferred = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., V), or `x` as it is while the loss multiplies by the weight itself."""
        return x if self.is_deferred else super().forward(x)


def defer_head(model: GPT) -> LossHead | None:
    """Let the loss do the head's product from now on, and return the head; None where it cannot.

    It cannot where something comes between them: a bias, or a soft cap on the logits.
    """
    head, config = model.lm_head, model.config
    is_plain = type(head) in (nn.Linear, Linear) and head.bias is None
    if not is_plain or config.final_logit_softcapping is not None:
        return None
    head.__class__ = LossHead  # the same module, hooks and parameters
    head.is_deferred = True
    return head


# --- balance: losses, selection bias, statistics ------------------------------------------------------------


def load_balancing_loss(router_probs_NE: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Return the Switch balance loss, 1.0 when every expert gets equal load and equal probability.

    E * sum over e of f_e * P_e, with f_e the share of all N*K choices that fell on expert e (no gradient) and
    P_e its mean probability. Switch Transformer, eq. 4 to 6 (arxiv.org/abs/2101.03961), f divided by top_k.
    """
    share_E = tokens_per_expert.to(router_probs_NE.dtype) / tokens_per_expert.sum()
    return router_probs_NE.size(1) * (share_E * router_probs_NE.mean(dim=0)).sum()


def router_z_loss(router_logits_NE: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of logsumexp(logits)^2. ST-MoE, eq. 5 (arxiv.org/abs/2202.08906)."""
    return router_logits_NE.logsumexp(dim=1).square().mean()


@dataclass
class Balance:
    """How one layer is balanced, and what it counted. See `set_balance`."""

    aux_loss_coef: float
    z_loss_coef: float
    bias_update_rate: float
    scale: float
    # Plain tensors, no buffers: DistributedDataParallel overwrites every rank's buffers with rank 0's.
    step_load: torch.Tensor  # (E,) int64, tokens of this optimizer step
    load: torch.Tensor  # (E,) int64, tokens since the last statistics
    sums: torch.Tensor  # (4,) float32: micro-batches, and the sums over them of entropy, aux loss, z loss


# A custom operator and no autograd.Function: Dynamo (torch 2.10) mixes up what the backward of the latter
# changes in place with sizes, once these are dynamic.
@torch.library.custom_op("moe::attach_loss", mutates_args=())
def _attach_loss(
    x: torch.Tensor,
    loss: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    means: torch.Tensor,
    counters: list[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Return `x`; backward gives `loss` the gradient `scale`, and adds to step_load, load and sums.

    Counting belongs there: backward runs once for a micro-batch, forward also to recompute activations.
    """
    return x.clone()


@_attach_loss.register_fake
def _(x: Any, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _attach_keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # the counters on ctx: a saved tensor must not change before backward, and another micro-batch may add
    _, loss, tokens_per_expert, means, ctx.counters, ctx.scale = inputs
    ctx.loss_dtype = loss.dtype
    ctx.save_for_backward(tokens_per_expert, means)


def _attach_backward(ctx: Any, grad: torch.Tensor):
    tokens_per_expert, means = ctx.saved_tensors
    for counter, value in zip(ctx.counters, (tokens_per_expert, tokens_per_expert, means), strict=True):
        counter.add_(value)
    loss_grad = torch.full((), ctx.scale, dtype=ctx.loss_dtype, device=grad.device)
    return grad, loss_grad, None, None, [None] * len(ctx.counters), None


_attach_loss.register_autograd(_attach_backward, setup_context=_attach_keep)


def set_balance(
    model: nn.Module,
    *,
    aux_loss_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    bias_update_rate: float = 0.0,
    scale: float = 1.0,
) -> None:
    """Balance the model's MoE layers while they train, and count their load. Call it on the final device.

    The losses act through the layers' backward alone: what the model returns and its loss stay as they are,
    and nothing happens in eval mode or without gradients. A rate above 0 puts the selection bias into the
    state dict, so call this (or `use_selection_bias`) before a checkpoint is loaded.

    Args:
        aux_loss_coef: weight of `load_balancing_loss`, over the micro-batch of one device; 0 is off.
        z_loss_coef: weight of `router_z_loss`; 0 is off.
        bias_update_rate: step of `update_selection_bias`; 0 is off.
        scale: what the loss is multiplied by outside the model, 1 / gradient accumulation steps. No factor
            for the number of processes: DDP and FSDP average these gradients with all others.
    """
    if bias_update_rate:
        use_selection_bias(model)
    for layer in moe_layers(model).values():
        device, n_expert = layer.gate.weight.device, layer.config.n_expert
        layer.balance = Balance(
            aux_loss_coef,
            z_loss_coef,
            bias_update_rate,
            scale,
            step_load=torch.zeros(n_expert, dtype=torch.int64, device=device),
            load=torch.zeros(n_expert, dtype=torch.int64, device=device),
            sums=torch.zeros(4, dtype=torch.float32, device=device),
        )


def use_selection_bias(model: nn.Module) -> None:
    """Let every MoE layer's bias take part in the choice and in the state dict (stock LitGPT's has none)."""
    for layer in moe_layers(model).values():
        layer.use_selection_bias()


def has_selection_bias(state_dict: dict[str, torch.Tensor]) -> bool:
    """Return whether these weights hold a selection bias.

    Stock LitGPT then refuses them as unexpected keys, except with expert groups, where its router has one.
    """
    return any(name.endswith(f".{BIAS_NAME}") for name in state_dict)


@torch.no_grad()
def update_selection_bias(
    model: nn.Module, all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> None:
    """Move each expert's bias by the update rate, up if it got less than the mean in this step.

    DeepSeek-V3, section 2.1.2 (arxiv.org/abs/2412.19437): b_e += rate * sign(mean load - load_e). Call it
    after each optimizer step, on all processes; `all_reduce` returns the sum over them. No host round trip.
    """
    layers = [layer for layer in moe_layers(model).values() if layer.balance is not None]
    if any(layer.balance.bias_update_rate for layer in layers):
        load_LE = torch.stack([layer.balance.step_load for layer in layers]).double()
        load_LE = load_LE if all_reduce is None else all_reduce(load_LE)
        direction_LE = (load_LE.mean(dim=1, keepdim=True) - load_LE).sign()
        for layer, direction_E in zip(layers, direction_LE, strict=True):
            bias = layer.selection_bias
            if bias.dtype != torch.float32:  # FSDP casts buffers to its compute dtype
                bias.data = bias.float()
            bias.add_(direction_E, alpha=layer.balance.bias_update_rate)
    discard_step_load(model)


def discard_step_load(model: nn.Module) -> None:
    """Forget the load of an optimizer step that is skipped, so that it does not move the bias."""
    for layer in moe_layers(model).values():
        if layer.balance is not None:
            layer.balance.step_load.zero_()


@torch.no_grad()
def router_statistics(
    model: nn.Module, all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], dict[str, float]]]:
    """Return the routers' statistics since the last call, on the device, and what reads its copy on the host.

    The tensor is (layers, E + 4) float32: tokens per expert, micro-batches, and sums over these of entropy,
    aux loss and z loss. The function turns it, once on the host (`.cpu()`), into `moe/NAME/layer_03` ->
    number, for the names

        load_imbalance  max over mean of the tokens per expert, 1.0 is even
        dead_experts    experts without a token
        router_entropy  mean over tokens, in nats; log(E) is undecided
        aux_loss        `load_balancing_loss`, not yet times its coefficient; 1.0 is even
        z_loss          `router_z_loss`, not yet times its coefficient

    so that all layers, and whatever else is logged, need one transfer. Before any backward it gives {}.
    """
    layers = {index: layer for index, layer in moe_layers(model).items() if layer.balance is not None}
    if not layers:
        return torch.zeros(0, 4), lambda _: {}
    balances = [layer.balance for layer in layers.values()]
    stacked = torch.stack([torch.cat([balance.load.float(), balance.sums]) for balance in balances])
    for balance in balances:
        balance.load.zero_()
        balance.sums.zero_()
    stacked = stacked if all_reduce is None else all_reduce(stacked)
    return stacked, partial(_read_statistics, list(layers))


def _read_statistics(indices: list[int], stacked: torch.Tensor) -> dict[str, float]:
    values: dict[str, float] = {}
    for index, row in zip(indices, stacked.double(), strict=True):
        load_E, (n_batches, *sums) = row[:-4], row[-4:].tolist()
        if not n_batches:
            continue
        means = [total / n_batches for total in sums]
        imbalance, dead = (load_E.max() / load_E.mean()).item(), float((load_E == 0).sum())
        for name, value in zip(STATISTICS, [imbalance, dead, *means], strict=True):
            values[f"moe/{name}/layer_{index:02d}"] = value
    return values


# --- what the layers of a model add up to -------------------------------------------------------------------


def moe_layers(model: nn.Module) -> dict[int, MoE]:
    """Return the model's MoE layers by their block's index (dense blocks are left out)."""
    blocks = enumerate(model.transformer.h)
    return {index: block.mlp for index, block in blocks if isinstance(block.mlp, MoE)}


def count_expert_load(model: nn.Module, enabled: bool) -> None:
    """Switch the counting of tokens per expert on or off, and set the counters to zero."""
    for layer in moe_layers(model).values():
        layer.count_load = enabled
        layer.tokens_per_expert.zero_()


def expert_load(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return block index -> tokens each expert got since counting began, (E,) float64 on the host."""
    return {index: layer.tokens_per_expert.double().cpu() for index, layer in moe_layers(model).items()}


# moved; the users follow

_MOVED = {
    "litgpt_moe.config": "MoEConfig config_problems",
    "litgpt_moe.hardware": "pick_device keep_freed_memory mallopt",
    "litgpt_moe.checkpoints.layout": "CHECKPOINT_FILE CONFIG_FILE RECORD_FILE MAX_RECORD_BYTES find_checkpoint",
    "litgpt_moe.checkpoints.reader": (
        "verify_checkpoint sha256_of load_model read_state read_weights check_weights MAX_PICKLE_BYTES"
    ),
}


def __getattr__(name: str) -> Any:
    import importlib

    for module, names in _MOVED.items():
        if name in names.split():
            return getattr(importlib.import_module(module), name)
    raise AttributeError(name)


def count_parameters(config: Config) -> tuple[int, int]:
    """Return (total_params, active_params); litgpt_moe.config.model_facts has both."""
    from litgpt_moe.config import model_facts

    facts = model_facts(config)
    return facts.total_params, facts.active_params
