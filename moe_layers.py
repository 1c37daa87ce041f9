"""The Mixture-of-Experts layer: first its definition, then the layer that trains. Nothing to run here.

`SimplifiedLLaMAMoE` is the definition in a dozen lines. `MoE` gives the same outputs and gradients, fast:

    x -> route -> plan (sort by expert) -> run experts -> combine -> + shared experts -> y
           |
           +---> attach the balance losses, which act in the backward pass (litgpt_moe/balance.py)

How sorted rows are multiplied on which device is in litgpt_moe/kernels/, one file for each kernel.

Parameters have LitGPT's names and shapes (`gate`, `experts.{e}.fc_1/fc_2/proj`, `shared_experts`), so that
LitGPT's initialisation, `litgpt generate`, `litgpt.LLM.load` and its converters read our checkpoints.

A tensor's name ends in its axes: `router_logits_NE` is (N, E).

    B  batch                        E  n_expert
    T  position in the sequence     K  n_expert_per_token
    N  tokens, B * T                F  moe_intermediate_size, the width inside an expert
    C  n_embd                       R  rows sent to experts, N * K: one for each token and choice
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from litgpt.config import Config
from litgpt.model import GroupedTopkRouter, LLaMAMoE

from litgpt_moe.balance import BIAS_NAME, Balance, attach_loss
from litgpt_moe.kernels.choice import choose_kernel, run_experts
from litgpt_moe.kernels.decode import PackedExperts, decode_experts, is_decoding
from litgpt_moe.kernels.matmul import compute_dtype, no_autocast
from litgpt_moe.kernels.rows import Plan, router_logits


class SimplifiedLLaMAMoE(LLaMAMoE):
    """The definition: each token goes to its K best experts, whose outputs are weighted by a softmax.

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

    An expert without a token gets a zero gradient instead of None, so that every process updates the same
    parameters.

    The selection bias (`e_score_correction_bias`, DeepSeek-V3) is added to the router's scores to choose
    experts, and to nothing else. It starts at 0 and unused; `use_selection_bias` switches it on and adds it
    to the state dict, which stock LitGPT then does not load. With expert groups it is the router's own
    buffer, which stock LitGPT has too.
    """

    tokens_per_expert: torch.Tensor
    e_score_correction_bias: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.n_expert_groups:
            self.gate = GroupedRouter(config)
        else:
            self.register_buffer(BIAS_NAME, torch.zeros(config.n_expert), persistent=False)
        # set by balance.set_balance; the next two by balance.count_expert_load
        self.balance: Balance | None = None
        self.count_load = False
        counts_E = torch.zeros(config.n_expert, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counts_E, persistent=False)
        # one of kernels.choice.KERNELS to use in place of the fastest
        self.kernel: str | None = None
        self._packed: PackedExperts | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, (B, T, C) like `x`."""
        x_NC = x.reshape(-1, x.size(-1))
        router_logits_NE, topk_weights_NK, topk_indices_NK = self.route(x_NC)
        if is_decoding(x_NC):
            y_NC = self._decode(x_NC, topk_weights_NK.to(x.dtype), topk_indices_NK)
        else:
            plan = Plan.of(topk_indices_NK, self.config.n_expert)
            if self.count_load:
                self.tokens_per_expert += plan.tokens_per_expert
            if self.balance is not None and self.training and torch.is_grad_enabled():
                topk_weights_NK = self._attach_losses(topk_weights_NK, router_logits_NE, plan, self.balance)
            y_NC = self._run_experts(x_NC, topk_weights_NK.to(x.dtype), plan).to(x.dtype)
        if self.config.n_shared_expert:
            y_NC = y_NC + self.shared_experts(x_NC)
        return y_NC.view_as(x)

    def route(self, x_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the router's logits (N, E), and each token's K weights and experts (N, K)."""
        # float32: bf16 rounds close logits to ties, and top-k then picks by position. float64 stays.
        dtype = torch.promote_types(x_NC.dtype, torch.float32)
        with no_autocast(x_NC):
            if isinstance(self.gate, GroupedRouter):
                # float32 even in float64, as LitGPT's router
                router_logits_NE = router_logits(x_NC, self.gate.weight, torch.float)
                topk_weights_NK, topk_indices_NK = self.gate.choose(router_logits_NE)
            else:
                router_logits_NE = router_logits(x_NC, self.gate.weight, dtype)
                topk_weights_NK, topk_indices_NK = self._choose(router_logits_NE)
                topk_weights_NK = topk_weights_NK.to(x_NC.dtype)
        if self.config.routed_scaling_factor != 1.0:
            topk_weights_NK = topk_weights_NK * self.config.routed_scaling_factor
        return router_logits_NE, topk_weights_NK, topk_indices_NK

    def _choose(self, router_logits_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the K experts with the highest logits, after a softmax over these K: weights and indices."""
        if self.has_selection_bias:
            scores_NE = router_logits_NE.detach() + self.e_score_correction_bias
            topk_indices_NK = scores_NE.topk(self.config.n_expert_per_token, dim=1).indices
            topk_logits_NK = router_logits_NE.gather(1, topk_indices_NK)
        else:
            topk_logits_NK, topk_indices_NK = router_logits_NE.topk(self.config.n_expert_per_token, dim=1)
        # float32 even in float64, as LitGPT's
        return topk_logits_NK.softmax(dim=1, dtype=torch.float), topk_indices_NK

    def _run_experts(self, x_NC: torch.Tensor, weights_NK: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, (N, C), from rows sorted by expert."""
        # cast before rows are gathered, which then moves half the bytes
        dtype = compute_dtype(x_NC)
        x_NC, weights_NK = x_NC.to(dtype), weights_NK.to(dtype)
        # The weights in sorted order too. The kernels multiply the hidden rows by them, not the outputs: that
        # is the same because `proj` is linear, and the outputs need not be saved for backward.
        weights_R1 = weights_NK.reshape(-1, 1).index_select(0, plan.order)
        kernel = self.kernel or choose_kernel(self.config, x_NC.device, dtype)
        return run_experts(kernel, x_NC, weights_R1, plan, self.experts)

    def _attach_losses(
        self, weights_NK: torch.Tensor, router_logits_NE: torch.Tensor, plan: Plan, balance: Balance
    ) -> torch.Tensor:
        """Return the weights unchanged; their backward pass adds the balance losses and counts the load."""
        with no_autocast(router_logits_NE):
            if self.config.n_expert_groups:
                scores_NE = router_logits_NE.sigmoid()  # DeepSeek-V3 eq. 18: normalised affinities
                probs_NE = scores_NE / scores_NE.sum(dim=1, keepdim=True)
            else:
                probs_NE = router_logits_NE.softmax(dim=1)
            return attach_loss(weights_NK, router_logits_NE, probs_NE, plan.tokens_per_expert, balance)

    # --- a few tokens at a time, without gradients ---

    def _decode(self, x_NC: torch.Tensor, weights_NK: torch.Tensor, indices_NK: torch.Tensor) -> torch.Tensor:
        """Return what `_run_experts` does, without sorting: only the chosen experts' weights are read."""
        if self.count_load:
            self.tokens_per_expert += torch.bincount(indices_NK.flatten(), minlength=self.config.n_expert)
        if self._packed is not None and self._packed.is_of(self.experts):
            return self._packed.run(x_NC, weights_NK, indices_NK)
        return decode_experts(x_NC, weights_NK, indices_NK, self.experts)

    def pack_for_decoding(self) -> None:
        """Lay the experts' weights out in memory for one-token steps on a CPU; values and names stay."""
        if not self.config.bias:
            self._packed = PackedExperts.of(self.experts)

    # --- the selection bias ---

    @property
    def selection_bias(self) -> torch.Tensor:
        """The bias that is added to the router's scores to choose experts: (E,), float32."""
        return (
            self.gate.e_score_correction_bias
            if isinstance(self.gate, GroupedRouter)
            else self.e_score_correction_bias
        )

    @property
    def has_selection_bias(self) -> bool:
        """Whether the bias takes part in the choice and in the state dict."""
        return bool(self.config.n_expert_groups) or BIAS_NAME not in self._non_persistent_buffers_set

    def use_selection_bias(self) -> None:
        """Let the bias take part in the choice and in the state dict; with expert groups it always does."""
        if not self.has_selection_bias:
            self.register_buffer(BIAS_NAME, self.e_score_correction_bias, persistent=True)

    # --- initialisation and casts ---

    def reset_parameters(self) -> None:
        """Zero the buffers, which `init_module(empty_init=True)` leaves unset; submodules reset their own."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "MoE":
        return _keep_float32(self, super()._apply, fn, recurse)


class GroupedRouter(GroupedTopkRouter):
    """LitGPT's sigmoid router with expert groups (DeepSeek-V3), and the initialisation that it lacks."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer(BIAS_NAME, torch.zeros(config.n_expert))
        # in the constructor, as nn.Linear does: litgpt 0.5.13 leaves the weight uninitialised
        self.reset_parameters()

    def choose(self, router_logits_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and indices (N, K); LitGPT's `forward` does the same, without giving the logits."""
        scores_NE = router_logits_NE.sigmoid()
        topk_indices_NK = self.get_topk_indices(scores_NE)
        topk_weights_NK = scores_NE.gather(1, topk_indices_NK)
        if self.config.norm_topk_prob:
            topk_weights_NK = topk_weights_NK / (topk_weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_weights_NK, topk_indices_NK

    def reset_parameters(self) -> None:
        """Draw the weights with the variance that LitGPT gives every nn.Linear, and zero the bias."""
        # litgpt.pretrain.initialize_weights
        nn.init.normal_(self.weight, mean=0.0, std=(2.0 / 5 / self.config.n_embd) ** 0.5)
        self.e_score_correction_bias.zero_()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GroupedRouter":
        return _keep_float32(self, super()._apply, fn, recurse)


def _keep_float32[Module: nn.Module](
    module: Module, apply: Callable[..., Any], fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool
) -> Module:
    """Call `apply(fn)`, as `.to(...)` does, but keep the bias in float32: in bf16, 0.5 + 0.001 is 0.5."""
    before = module._buffers.get(BIAS_NAME)
    apply(fn, recurse)
    after = module._buffers.get(BIAS_NAME)
    if before is not None and after is not None and after.dtype != before.dtype:
        kept = after.to(before.dtype) if before.is_meta else before.to(after.device)
        module._buffers[BIAS_NAME] = kept
    return module
