"""The Mixture-of-Experts layer: first its definition, then the layer that trains. Nothing to run here.

`SimplifiedLLaMAMoE` is the definition in a dozen lines. `MoE` gives the same outputs and gradients, fast:

    x -> route -> plan (sort by expert) -> run experts -> combine -> + shared experts -> y
           |
           +---> attach the balance losses, which act in the backward pass (litgpt_moe/balance.py)

How sorted rows are multiplied on which device is in litgpt_moe/kernels/, one file for each way.

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
from litgpt_moe.kernels.choice import choose_way, run_experts
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

    An expert without a token gets a zero gradient, not none, so that every process updates the same
    parameters.

    The selection bias (`e_score_correction_bias`, DeepSeek-V3) is added to the router's scores to choose
    experts, and to nothing else. It is there from the start and 0; `use_selection_bias` makes it take part
    and puts it into the state dict, which stock LitGPT then does not load. With expert groups it is the
    router's own buffer, which stock LitGPT has too.
    """

    tokens_per_expert: torch.Tensor
    e_score_correction_bias: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.n_expert_groups:
            self.gate = GroupedRouter(config)
        else:
            self.register_buffer(BIAS_NAME, torch.zeros(config.n_expert), persistent=False)
        # balance.set_balance sets it, balance.count_expert_load the next two
        self.balance: Balance | None = None
        self.count_load = False
        counts_E = torch.zeros(config.n_expert, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counts_E, persistent=False)
        # one of kernels.choice.WAYS to use in place of the fastest
        self.way: str | None = None
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

    # renamed; the users follow
    _route = route

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
        # Sorted too: the kernels scale an expert's hidden rows, not its outputs, which is the same for a
        # linear `proj`. For the gradient of a weight autograd then keeps no copy of the outputs.
        weights_R1 = weights_NK.reshape(-1, 1).index_select(0, plan.order)
        way = self.way or choose_way(self.config, x_NC.device, dtype)
        return run_experts(way, x_NC, weights_R1, plan, self.experts)

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
        # in the constructor, as nn.Linear does: litgpt 0.5.13 leaves the memory as it was
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
    """Move the module by `apply(fn)`, its selection bias without a cast: in bf16, 0.5 + 0.001 is 0.5."""
    before = module._buffers.get(BIAS_NAME)
    apply(fn, recurse)
    after = module._buffers.get(BIAS_NAME)
    if before is not None and after is not None and after.dtype != before.dtype:
        kept = after.to(before.dtype) if before.is_meta else before.to(after.device)
        module._buffers[BIAS_NAME] = kept
    return module


# ============================================================================================================
# What follows to the end moves to litgpt_moe/config.py, hardware.py and checkpoints/; nothing above uses it.
# ============================================================================================================

import ctypes  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import pickle  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import zipfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import lru_cache  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NoReturn  # noqa: E402

from litgpt.model import GPT  # noqa: E402

# moved; the users follow
from litgpt_moe.balance import (  # noqa: E402, F401
    count_expert_load,
    discard_step_load,
    expert_load,
    has_selection_bias,
    router_statistics,
    set_balance,
    update_selection_bias,
    use_selection_bias,
)
from litgpt_moe.balance import layers_of as moe_layers  # noqa: E402
from litgpt_moe.kernels.choice import experts_path  # noqa: E402, F401
from litgpt_moe.kernels.matmul import matmul, prefers_onednn, use_fast_linear  # noqa: E402, F401
from litgpt_moe.kernels.triton import has_triton  # noqa: E402, F401
from litgpt_moe.loss import (  # noqa: E402, F401
    CHUNK_VALUES,
    IGNORED_TOKEN,
    chunk_rows,
    defer_head,
    linear_cross_entropy,
)
from litgpt_moe.yaml_files import read_mapping, typed  # noqa: E402

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
