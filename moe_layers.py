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

CHECKPOINT_FILE = "lit_model.pth"
CONFIG_FILE = "model_config.yaml"
RECORD_FILE = "checkpoint.json"  # what a whole checkpoint holds: its step, each file's size and SHA-256
RECORD_FORMAT = 1
MAX_RECORD_BYTES = 1 << 20
MAX_PICKLE_BYTES = 4 << 20  # of what describes the tensors; 400M parameters and AdamW take 0.4 MB
MAX_TUPLE_PARTS = 10_000  # nested in one another; Python's random state, a large one, has 627
MAX_BLOCK_SIZE = 1 << 18  # the rotary table of 128 columns then takes 268 MB
MAX_EXPERTS = 20_000  # over all layers; each is an object that takes time to make
PICKLE_GLOBALS = re.compile(  # what the pickle of a checkpoint names, and none of it can do harm
    r"collections\.OrderedDict|torch\.(Size|bool|u?int\d+|b?float\d+|[A-Z][A-Za-z\d]*Storage)"
    r"|torch\._utils\._rebuild_(tensor_v2|parameter)"
)
# op -> bytes of its argument or of that argument's length, values it takes from the stack (None: to the mark)
PICKLE_OPS: dict[bytes, tuple[int, int | None]] = {
    **dict.fromkeys((pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.EMPTY_DICT), (0, 0)),
    **dict.fromkeys((pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.GLOBAL, pickle.MARK), (0, 0)),
    **dict.fromkeys((pickle.PROTO, pickle.BININT1, pickle.BINPUT, pickle.BINGET), (1, 0)),
    **dict.fromkeys((pickle.SHORT_BINSTRING, pickle.LONG1), (1, 0)),
    **dict.fromkeys((pickle.BININT, pickle.BINUNICODE, pickle.LONG_BINPUT, pickle.LONG_BINGET), (4, 0)),
    **dict.fromkeys((pickle.APPEND, pickle.BUILD, pickle.BINPERSID, pickle.TUPLE1), (0, 1)),
    **dict.fromkeys((pickle.SETITEM, pickle.REDUCE, pickle.TUPLE2), (0, 2)),
    **dict.fromkeys((pickle.APPENDS, pickle.SETITEMS, pickle.TUPLE), (0, None)),
    pickle.BININT2: (2, 0),
    pickle.BINFLOAT: (8, 0),
    pickle.TUPLE3: (0, 3),
}
WITH_LENGTH = (pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.LONG1)
TUPLES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
FILLS = (
    pickle.APPEND,
    pickle.APPENDS,
    pickle.SETITEM,
    pickle.SETITEMS,
    pickle.BUILD,
)  # what is there already
BIAS_NAME = "e_score_correction_bias"  # as in LitGPT and Hugging Face
STATISTICS = ("load_imbalance", "dead_experts", "router_entropy", "aux_loss", "z_loss")
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


# --- configuration ------------------------------------------------------------------------------------------


@dataclass
class MoEConfig(Config):
    """LitGPT's `Config` whose MoE layer is ours, and whose mistakes are all told at once, with the way out.

    It has LitGPT's keys and no more: what `litgpt.utils.save_config` writes is read by stock LitGPT.
    """

    def __post_init__(self) -> None:
        problems = config_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        super().__post_init__()

    @classmethod
    def from_file(cls, path: str | Path, **kwargs: Any) -> "MoEConfig":
        """Return the configuration in the YAML file `path`, keys in `kwargs` replaced.

        Raises:
            ValueError: with one line per problem, each naming the file, the key and the way out.
            OSError: when the file cannot be read.
        """
        values = typed({**read_mapping(Path(path)), **kwargs}, Config, Path(path))
        try:
            config = cls(**values)
            with torch.device("meta"):
                GPT(config)  # takes no memory, and trips over the values that no check of ours knows
            return config
        except (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, IndexError) as error:
            lines = str(error).splitlines()[:12] or ["LitGPT refuses these values"]
            raise ValueError("\n".join(f"{path}: {line}" for line in lines)) from error

    @property
    def mlp_class(self) -> type:
        # Block builds `config.mlp_class(config)`. The *name* stays LLaMAMoE, so a saved config is LitGPT's.
        return MoE if self.mlp_class_name == "LLaMAMoE" else super().mlp_class


def config_problems(config: Config) -> list[str]:
    """Return one sentence per value of `config` that LitGPT would fail on later, or silently ignore."""
    problems = []
    for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "intermediate_size"):
        value = getattr(config, key)
        if value is not None and value < 1:
            problems.append(f"{key} is {value}; choose 1 or more")
    if not problems:
        problems = _size_problems(config)
    if problems:
        return problems
    if config.head_size is None and config.n_embd % config.n_head:
        problems.append(
            f"n_embd is {config.n_embd}, which n_head {config.n_head} does not divide; change either"
        )
    groups = config.n_query_groups
    if groups is not None and (groups < 1 or config.n_head % groups):
        problems.append(f"n_query_groups is {groups}, which does not divide n_head {config.n_head}")
    if not 0.0 <= config.rotary_percentage <= 1.0:
        problems.append(f"rotary_percentage is {config.rotary_percentage}; choose 0.0 to 1.0")
    if config.mlp_class_name == "LLaMAMoE":
        problems += _expert_problems(config)
    elif config.n_expert or config.first_k_dense_replace is not None:
        problems.append(
            f"mlp_class_name is {config.mlp_class_name}, which has no experts; "
            "set mlp_class_name: LLaMAMoE or remove n_expert and first_k_dense_replace"
        )
    return problems


def _size_problems(config: Config) -> list[str]:
    """Return one sentence per value that would take minutes or gigabytes before anything else can be said."""
    in_layer = 1 + max(config.n_expert or 0, 0) + max(config.n_shared_expert or 0, 0)
    problems = []
    if config.block_size > MAX_BLOCK_SIZE:
        problems.append(f"block_size is {config.block_size:.6g}; choose {MAX_BLOCK_SIZE:,} or less")
    if config.n_layer * in_layer > MAX_EXPERTS:
        problems.append(
            f"n_layer {config.n_layer:.6g} times {in_layer:.6g} MLPs in a layer is over {MAX_EXPERTS:,}; "
            "lower n_layer or n_expert"
        )
    return problems


def _expert_problems(config: Config) -> list[str]:
    n_expert, top_k, width = config.n_expert, config.n_expert_per_token, config.moe_intermediate_size
    if n_expert < 1:
        return [
            f"n_expert is {n_expert}; an LLaMAMoE model needs 1 or more (LitGPT would run without any MLP)"
        ]
    problems = []
    if not 1 <= top_k <= n_expert:
        problems.append(f"n_expert_per_token is {top_k} but n_expert is {n_expert}; choose 1 to {n_expert}")
    if width is None or width < 1:
        problems.append(f"moe_intermediate_size is {width}; give the width inside one expert, 1 or more")
    if (config.n_shared_expert or 0) < 0:
        problems.append(f"n_shared_expert is {config.n_shared_expert}; choose 0 or more")
    dense = config.first_k_dense_replace
    if dense is not None and not 0 <= dense <= config.n_layer:
        problems.append(
            f"first_k_dense_replace is {dense} but n_layer is {config.n_layer}; choose 0 to n_layer"
        )
    if config.n_expert_groups:
        problems += _group_problems(config)
    elif config.n_topk_groups is not None or config.n_topk_scores_per_group is not None:
        problems.append(
            "n_topk_groups and n_topk_scores_per_group are ignored without n_expert_groups; remove them"
        )
    # Weights normalised over one choice are the constant 1: the router would never get a gradient.
    if top_k == 1 and n_expert > 1 and (not config.n_expert_groups or config.norm_topk_prob):
        problems.append(
            "n_expert_per_token is 1 and weights are normalised after top-k, so the router gets no gradient; "
            "choose 2 or more, or expert groups (n_expert_groups) with norm_topk_prob: false"
        )
    return problems


def _group_problems(config: Config) -> list[str]:
    n_groups, n_expert = config.n_expert_groups, config.n_expert
    if n_groups < 2 or n_expert % n_groups:
        return [f"n_expert_groups is {n_groups}, which must be 2 or more and divide n_expert {n_expert}"]
    problems, size = [], n_expert // n_groups
    if config.n_topk_groups is None or not 1 <= config.n_topk_groups <= n_groups:
        problems.append(f"n_topk_groups is {config.n_topk_groups}; choose 1 to n_expert_groups {n_groups}")
    elif config.n_expert_per_token > config.n_topk_groups * size:
        reach = config.n_topk_groups * size
        problems.append(
            f"n_expert_per_token is {config.n_expert_per_token} but the chosen groups hold {reach}"
        )
    if config.n_topk_scores_per_group is None or not 1 <= config.n_topk_scores_per_group <= size:
        problems.append(
            f"n_topk_scores_per_group is {config.n_topk_scores_per_group}; "
            f"choose 1 to the experts per group {size}"
        )
    return problems


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
    inside: each matrix is cast as it is used.
    """
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

    for e in range(len(fc_1)):
        work(e)
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

    for e in range(len(fc_1)):
        work(e)
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


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to this process's peak, for the next chunk of logits or step.

    It gives blocks of more than 32 MB back each time, and the top of its heap. To fetch them again is 80,000
    page faults in a step of MoE-30M (2,048 tokens, chunks of logits of 64 MB, Xeon): a tenth of its time. 100
    steps of 4,096 tokens with ten checkpoints take 2.96 GB at their peak, 2.72 without. evaluate.py scores
    the same model 1.7 times as fast as with chunks of 128 MB given back (EPYC), in 1.9 GB, before 1.4.
    """
    mallopt(mmap_max=0, trim_threshold=-1)


def mallopt(**values: int) -> None:
    """Set glibc's malloc, see its manual, "Malloc Tunable Parameters"; where there is none, do nothing."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        numbers = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}  # in malloc.h
        for name, value in values.items():
            libc.mallopt(numbers[name], value)


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


def count_parameters(config: Config) -> tuple[int, int]:
    """Return (total_params, active_params): all parameters, and those that one token meets."""
    with torch.device("meta"):
        model = GPT(config)
    total = sum(p.numel() for p in model.parameters())
    in_experts = sum(p.numel() for layer in moe_layers(model).values() for p in layer.experts.parameters())
    idle = in_experts * (config.n_expert - config.n_expert_per_token) // max(config.n_expert, 1)
    return total, total - idle


# --- checkpoint -> model ------------------------------------------------------------------------------------


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint directory that `path` means: itself, its `final/`, or its newest whole `step-*`.

    Raises:
        FileNotFoundError, NotADirectoryError: naming what was looked for.
        ValueError: there are some, and none is whole; says what is wrong with the first.
    """
    if path.is_file() and path.name == CHECKPOINT_FILE:
        path = path.parent
    if path.is_file():
        raise NotADirectoryError(
            f"{path} is a file; name a checkpoint directory, which holds {CHECKPOINT_FILE}"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint directory; train one with run_train.py")
    if _has_model(path):  # named itself: verify_checkpoint tells what is wrong with it
        return path
    steps = sorted(path.glob("step-*"), key=_step_of, reverse=True)
    problems = []
    for candidate in filter(_has_model, (path / "final", *steps)):
        try:
            _recorded_files(candidate)
            return candidate
        except ValueError as problem:
            problems.append(problem)
    if problems:
        raise problems[0]
    raise FileNotFoundError(
        f"{path} holds no {CHECKPOINT_FILE} with a {CONFIG_FILE}, nor final/ or step-* that do"
    )


def _has_model(folder: Path) -> bool:
    return (folder / CHECKPOINT_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def _step_of(folder: Path) -> int:
    digits = re.fullmatch(r"step-(\d{1,18})", folder.name)
    return int(digits[1]) if digits else -1


def verify_checkpoint(checkpoint_dir: Path) -> None:
    """Check every file that checkpoint.json lists (LitGPT's own checkpoints have none: nothing to check).

    Raises:
        ValueError: one sentence, when a file is missing, has another size or another SHA-256 than recorded,
            or is a link out of the folder.
        OSError: a file cannot be read.
    """
    for path in checkpoint_dir.iterdir():
        if path.is_symlink() and checkpoint_dir.resolve() not in path.resolve().parents:
            raise ValueError(f"{path} is a link out of its folder; copy the file itself there")
    for path, entry in _recorded_files(checkpoint_dir).items():
        stat = path.stat()
        if sha256_of(path, stat.st_size, stat.st_mtime_ns) != entry["sha256"]:
            _refuse_damage(path, f"its content is not what {RECORD_FILE} recorded")


@lru_cache  # generate, evaluate and load_model each ask before they use a file
def sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    """Return the SHA-256 of a file's content; size and time tell whether it changed since."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded_files(checkpoint_dir: Path) -> dict[Path, dict[str, Any]]:
    """Return the files that checkpoint.json lists, {} without one; ValueError if one has another size."""
    record = checkpoint_dir / RECORD_FILE
    if not record.exists():
        return {}
    files = _read_record(record)
    for name, entry in files.items():
        path = checkpoint_dir / name
        if re.search(r"[/\\:\0]", name) or name in ("", ".", ".."):
            raise ValueError(
                f"{record} lists {name!r}, which is no file of its folder; use another checkpoint"
            )
        if not path.is_file():
            _refuse_damage(path, f"{RECORD_FILE} lists it and it is not there")
        if (size := path.stat().st_size) != entry["bytes"]:
            _refuse_damage(path, f"it has {size:,} bytes, {RECORD_FILE} says {entry['bytes']:,}")
    return {checkpoint_dir / name: entry for name, entry in files.items()}


def _read_record(record: Path) -> dict[str, dict[str, Any]]:
    """Return the checked `files` of a checkpoint.json; ValueError if it is damaged."""
    try:
        if record.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError("it is too large")
        content = json.loads(record.read_bytes())
        version, files = content["format"], content["files"]
        if version != RECORD_FORMAT:
            raise ValueError(f"its format is {version!r:.80}, not {RECORD_FORMAT}")
        kinds = [(type(entry["bytes"]), type(entry["sha256"])) for entry in files.values()]
        if CHECKPOINT_FILE not in files or set(kinds) != {(int, str)}:
            raise ValueError("it does not list the files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _refuse_damage(record, str(error).strip("'") or type(error).__name__)
    return files


def _refuse_damage(path: Path, reason: str) -> NoReturn:
    reason = " ".join(reason.split())[:200]
    raise ValueError(f"{path} is damaged or not a checkpoint's ({reason}); use another checkpoint")


def load_model(
    checkpoint_dir: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> GPT:
    """Return the checkpoint's model in eval mode on `device`, in `dtype` (default: as it was saved).

    Only the weights are read into memory, not the optimizer state that lies in the same file.

    Raises:
        ValueError: a file is damaged, the weights do not belong to the configuration, or one is not a number.
        OSError: a file cannot be read.
    """
    verify_checkpoint(checkpoint_dir)
    config = MoEConfig.from_file(checkpoint_dir / CONFIG_FILE)
    weights = check_weights(checkpoint_dir, config)
    with torch.device("meta"):
        model = GPT(config)
    if has_selection_bias(weights):
        use_selection_bias(model)
    for name, weight in weights.items() if torch.device(device).type != "meta" else ():
        # a finite sum says that all are, and takes a third of the time of asking each
        total = weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))
        if not total.isfinite() and not weight.isfinite().all():
            where = f"{checkpoint_dir / CHECKPOINT_FILE}: {name} holds values that are not finite"
            raise ValueError(f"{where} (the training diverged); use an earlier checkpoint")
    # clone: the weights leave the mapped file, which a running training may replace
    # the selection bias stays float32 in every dtype: the choice must be the one that was trained
    weights = {
        name: weight.to(device, torch.float32 if name.endswith(BIAS_NAME) else dtype, copy=True)
        for name, weight in weights.items()
    }
    model.load_state_dict(weights, assign=True)
    use_fast_linear(model)
    model.cos, model.sin = model.rope_cache(device=torch.device(device))
    for layer in moe_layers(model).values():
        layer.tokens_per_expert = torch.zeros(config.n_expert, dtype=torch.int64, device=device)
        if not layer.has_selection_bias:  # not in the weights, so still on meta
            layer.e_score_correction_bias = torch.zeros(config.n_expert, device=device)
    return model.requires_grad_(False).eval()


def pick_device(name: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Return what a script's --device and --precision mean; ValueError if this machine has no such thing."""
    if precision not in ("auto", *DTYPES):
        raise ValueError(f"--precision {precision} is unknown; choose auto, {', '.join(DTYPES)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError, ImportError) as error:  # without CUDA torch raises AssertionError
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # and thirty names of devices
            reason = "torch knows no such device"
        raise ValueError(f"--device {name} cannot be used here ({reason}); choose cpu or auto") from None
    if precision == "auto":
        precision = (
            "bf16-true" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "32-true"
        )
    return device, DTYPES[precision]


def read_state(path: Path) -> dict[str, Any]:
    """Return what the file `path` holds, tensors memory-mapped; never runs code (`weights_only`).

    Raises:
        ValueError: the file is damaged, no checkpoint, or made to do more than hold tensors.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if sum(tensor.nbytes for tensor in _tensors(state)) > 2 * path.stat().st_size:  # 2: tied weights
            raise ValueError("its tensors claim more values than it holds")
    except (
        Exception
    ) as error:  # a damaged file raises pickle, zip, runtime, key or (seeking too far) OS errors
        if isinstance(error, OSError) and error.filename:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({reason[:120]}); use another one"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no checkpoint; give one that run_train.py or LitGPT wrote")
    return dict(dict.items(state))  # an OrderedDict's own attributes may hide its methods


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in nested dicts, lists and tuples; one container is entered once."""
    todo, seen = [state], set()
    while todo:
        node = todo.pop()
        if isinstance(node, torch.Tensor):
            yield node
        elif isinstance(node, dict | list | tuple) and id(node) not in seen:
            seen.add(id(node))
            todo.extend(dict.values(node) if isinstance(node, dict) else node)


def _check_archive(path: Path) -> None:
    """Raise ValueError if the file is not as torch.save writes it: nothing packed, a pickle of data alone."""
    with zipfile.ZipFile(path) as archive:
        if len({entry.filename for entry in archive.infolist()}) < len(archive.infolist()):
            raise ValueError("two of its parts have one name")
        for entry in archive.infolist():
            name = entry.filename
            if ".." in re.split(r"[/\\]", name) or name.startswith(("/", "\\")):
                raise ValueError(f"its part {name!r} would lie outside")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise ValueError(f"its part {name!r} unpacks to {entry.file_size:,} bytes")
            if name.endswith(("data.pkl", "byteorder", "version")) and entry.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"its part {name!r} has {entry.file_size:,} bytes")
    _check_pickle(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))


def _check_pickle(data: bytes) -> None:
    """Raise ValueError if a pickle asks for more than tensors in dicts and lists, and plain values.

    `weights_only` runs no foreign code, but calls `bytearray(10**12)` when told to, and a tuple of a million
    tuples in one another, used as a key, ends the process (torch 2.10). Other errors mean a damaged file.
    """
    stack: list[int] = []  # of each value its size, where that counts: the parts of a tuple
    marks: list[list[int]] = []
    memo: dict[int, int] = {}
    at = 0
    while (op := data[at : at + 1]) != pickle.STOP:
        n_bytes, n_taken = PICKLE_OPS[op]
        number = int.from_bytes(data[at + 1 : at + 1 + n_bytes], "little")
        at += 1 + n_bytes
        if op == pickle.GLOBAL:
            end = data.index(b"\n", data.index(b"\n", at) + 1)
            name = data[at:end].decode().replace("\n", ".")
            if not PICKLE_GLOBALS.fullmatch(name):
                raise ValueError(f"it asks for {name[:60]}, which weights do not need and which may do harm")
            at = end + 1
        elif op in WITH_LENGTH:
            at += number
        if op == pickle.MARK:
            marks.append(stack)
            stack = []
        elif op in (pickle.BINPUT, pickle.LONG_BINPUT):
            memo[number] = stack[-1]
        elif op in (pickle.BINGET, pickle.LONG_BINGET):
            stack.append(memo[number])
        elif op != pickle.PROTO:
            if n_taken is None:
                taken, stack = stack, marks.pop()
            else:
                taken = [stack.pop() for _ in range(n_taken)]
            parts = 1 + sum(taken) if op in TUPLES else 1
            if parts > MAX_TUPLE_PARTS:
                raise ValueError(f"it nests over {MAX_TUPLE_PARTS:,} values in tuples")
            if op not in FILLS:
                stack.append(parts)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the model's state dict in the file `path`, memory-mapped. Raises as `read_state`."""
    state = read_state(path)
    weights = state.get("model", state)
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in dict.values(weights)):
        raise ValueError(
            f"{path} holds no model weights; give a checkpoint that run_train.py or LitGPT wrote"
        )
    return dict(dict.items(weights))


def check_weights(checkpoint_dir: Path, config: Config) -> dict[str, torch.Tensor]:
    """Return the weights in `checkpoint_dir`, memory-mapped. ValueError if they are not of `config`."""
    weights = read_weights(checkpoint_dir / CHECKPOINT_FILE)
    with torch.device("meta"):
        model = GPT(config)
    if has_selection_bias(weights):
        use_selection_bias(model)
    expected = model.state_dict()
    where = f"{checkpoint_dir}: the weights do not fit the model config {config.name}:"
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{where} they lack {missing[0]} ({len(missing)} missing)")
    if extra := [name for name in weights if name not in expected]:
        raise ValueError(f"{where} they have an unexpected {extra[0]!s:.80} ({len(extra)} too many)")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, the config wants {tuple(tensor.shape)}"
            raise ValueError(f"{where} {name} is {shapes}")
        if weights[name].dtype not in (*DTYPES.values(), torch.float64):
            raise ValueError(
                f"{where} {name} is of {weights[name].dtype}, not of float32, bfloat16 or float16"
            )
    return weights
