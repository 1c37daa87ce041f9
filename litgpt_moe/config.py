"""The model's configuration: LitGPT's keys, checked together, and the facts that follow from them."""

import contextlib
import itertools
import math
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT, LLaMAMoE

from litgpt_moe.files import fits
from litgpt_moe.yaml_files import read_mapping, typed
from moe_layers import MoE

# the rotary tables (cos and sin, 128 columns) then take 268 MB
MAX_BLOCK_SIZE = 1 << 18
# over all layers; building the module of each takes time
MAX_EXPERTS = 20_000
# the mappings in LitGPT's configuration, of which it ignores other keys
ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
ROPE_KEYS += ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
# vocab_size: auto, a word of ours: as many words as the tokenizer of the data has pieces
AUTO = "auto"
# pieces of TinyLlama's tokenizer, which prepare_data.py downloads where none is named
DEFAULT_VOCABULARY = 32_000
HEADER_VOCABULARY = re.compile(r"vocabulary of (\d[\d,]*)")
# of the rows of embedding and head, where the vocabulary is open: GPUs multiply such matrices faster
ROWS_MULTIPLE = 64


@dataclass
class MoEConfig(Config):
    """LitGPT's `Config` whose MoE layer is ours, and whose mistakes are all reported at once.

    It has LitGPT's keys and no more: what `litgpt.utils.save_config` writes is read by stock LitGPT.
    """

    def __post_init__(self) -> None:
        if self.mlp_class_name == "LLaMAMoE" and self.moe_intermediate_size is None:
            # as LitGPT's layer does: LitGPT's Mixtral configurations give intermediate_size alone
            self.moe_intermediate_size = self.intermediate_size
        if problems := config_problems(self):
            raise ValueError("\n".join(problems))
        super().__post_init__()

    @classmethod
    def from_file(cls, path: str | Path, is_foreign: bool = False, **overrides: Any) -> "MoEConfig":
        """Return the configuration in the YAML file `path`, keys in `overrides` replaced.

        `is_foreign`: the file came with a checkpoint, and is refused if it holds YAML aliases.
        `vocab_size: auto` is the number that the file's header names; see `header_vocabulary`.
        """
        return cls.model_from_file(path, is_foreign, **overrides)[0]

    @classmethod
    def model_from_file(
        cls, path: str | Path, is_foreign: bool = False, **overrides: Any
    ) -> tuple["MoEConfig", GPT]:
        """Return what `from_file` does, and the configuration's model on the meta device."""
        config = cls.untried_from_file(path, is_foreign, **overrides)
        with _problems_in(path):
            return config, meta_model(config)  # trips over the values that no check of ours knows

    @classmethod
    def untried_from_file(cls, path: str | Path, is_foreign: bool = False, **overrides: Any) -> "MoEConfig":
        """Return what `from_file` does, without the time to build a model, for a comparison."""
        values = read_mapping(Path(path), is_foreign)
        if values.get("vocab_size") == AUTO and not is_foreign:
            values = _with_vocabulary(values, Path(path))
        values = typed({**values, **overrides}, Config, Path(path))
        with _problems_in(path):
            return cls(**values)

    @property
    def mlp_class(self) -> type:
        """The class that LitGPT's `Block` builds as its MLP."""
        # `mlp_class_name` stays LLaMAMoE, so that stock LitGPT reads a saved config
        return MoE if self.mlp_class_name == "LLaMAMoE" else super().mlp_class


def has_open_vocabulary(path: str | Path) -> bool:
    """Return whether a configuration leaves the vocabulary to the tokenizer: `vocab_size: auto`."""
    return read_mapping(Path(path)).get("vocab_size") == AUTO


def header_vocabulary(path: str | Path) -> int:
    """Return the vocabulary at which a model's name says its size: "a vocabulary of 8,192" in its header.

    The header is the comment that opens the file; without such words there it is DEFAULT_VOCABULARY.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    found = HEADER_VOCABULARY.search(" ".join(line.lstrip("# ") for line in comment))
    return int(found[1].replace(",", "")) if found else DEFAULT_VOCABULARY


def _with_vocabulary(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the values with the header's number for `vocab_size: auto`; LitGPT rounds the rows up."""
    if (rows := values.get("padded_vocab_size")) is not None:
        text = f"{path}: vocab_size is auto but padded_vocab_size is {rows}"
        raise ValueError(f"{text}; remove that, or give both as numbers")
    return {"padding_multiple": ROWS_MULTIPLE, **values, "vocab_size": header_vocabulary(path)}


@contextlib.contextmanager
def _problems_in(path: str | Path) -> Iterator[None]:
    """Turn what a configuration's values raise into one ValueError, whose lines begin with `path`."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, IndexError) as error:
        # an assertion of LitGPT without a message is told by its line
        line = traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        lines = str(error).splitlines()[:12] or [f"LitGPT refuses these values: {line}"]
        raise ValueError("\n".join(f"{path}: {line}" for line in lines)) from error


def config_problems(config: Config) -> list[str]:
    """Return one sentence per value of `config` that LitGPT would fail on later, or silently ignore."""
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "intermediate_size")
    given = {key: getattr(config, key) for key in sizes if getattr(config, key) is not None}
    if problems := [f"{key} is {size}; choose 1 or more" for key, size in given.items() if size < 1]:
        return problems
    # checked before the rest: to build such a model takes minutes or gigabytes
    in_layer = 1 + max(config.n_expert or 0, 0) + max(config.n_shared_expert or 0, 0)
    if config.block_size > MAX_BLOCK_SIZE:
        problems.append(f"block_size is {config.block_size:.6g}; choose {MAX_BLOCK_SIZE:,} or less")
    if config.n_layer * in_layer > MAX_EXPERTS:
        mlps = f"n_layer {config.n_layer:.6g} times {in_layer:.6g} MLPs in a layer"
        problems.append(f"{mlps} is over {MAX_EXPERTS:,}; lower n_layer or n_expert")
    if problems:
        return problems
    n_head, groups = config.n_head, config.n_query_groups
    if config.head_size is None and config.n_embd % n_head:
        problems.append(f"n_embd is {config.n_embd}, which n_head {n_head} does not divide; change either")
    if groups is not None and (groups < 1 or n_head % groups):
        problems.append(f"n_query_groups is {groups}, which does not divide n_head {n_head}")
    if not 0.0 <= config.rotary_percentage <= 1.0:
        problems.append(f"rotary_percentage is {config.rotary_percentage}; choose 0.0 to 1.0")
    problems += attention_problems(config)
    if config.mlp_class_name == "LLaMAMoE":
        problems += _expert_problems(config)
    elif config.n_expert or config.first_k_dense_replace is not None:
        way_out = "set mlp_class_name: LLaMAMoE or remove n_expert and first_k_dense_replace"
        problems.append(f"mlp_class_name is {config.mlp_class_name}, which has no experts; {way_out}")
    return problems


def attention_problems(config: Config) -> list[str]:
    """Return a sentence for each value of the attention and the logits that LitGPT computes nonsense with."""
    lowest = {"head_size": 1, "rope_base": 1, "rope_condense_ratio": 1, "attention_scores_scalar": 1}
    lowest |= {"sliding_window_size": 1, "norm_eps": 0}
    given = [(key, least, getattr(config, key)) for key, least in lowest.items()]
    problems = [
        f"{key} is {value}; choose {least} or more"
        for key, least, value in given
        if value is not None and not least <= value < math.inf
    ]
    for key in ("final_logit_softcapping", "attention_logit_softcapping", "rope_local_base_freq"):
        value = getattr(config, key)
        if value is not None and not 0 < value < math.inf:
            problems.append(f"{key} is {value}; choose a number above 0, or null for none")
    for key in ("rope_indices", "sliding_window_indices"):
        marks = getattr(config, key)
        if marks is not None and (len(marks) < config.n_layer or not {0, 1}.issuperset(marks)):
            problems.append(
                f"{key} is {marks!s:.60}; give 0 or 1 for each of n_layer {config.n_layer} layers"
            )
    if config.rope_indices is not None and config.rope_local_base_freq is None:
        problems.append("rope_indices are for two kinds of RoPE; set rope_local_base_freq, or remove them")
    return problems + _nested_problems(config)


def _nested_problems(config: Config) -> list[str]:
    """Return a sentence for each key that the mappings in a configuration lack, or that LitGPT ignores."""
    problems = []
    if config.latent_attention is not None:
        lacks = [key for key in LATENT_KEYS if not fits(config.latent_attention.get(key), 1)]
        if lacks:
            problems.append(
                f"latent_attention lacks a whole number {lacks[0]}; it needs {', '.join(LATENT_KEYS)}"
            )
    for key, known in (("rope_adjustments", ROPE_KEYS), ("latent_attention", LATENT_KEYS)):
        for name in getattr(config, key) or {}:
            if name not in known:
                problems.append(f"unknown key {key}.{name!s:.60}; LitGPT reads {', '.join(known)}")
    return problems


def _expert_problems(config: Config) -> list[str]:
    n_expert, top_k, width = config.n_expert, config.n_expert_per_token, config.moe_intermediate_size
    if n_expert < 1:
        needed = "an LLaMAMoE model needs 1 or more (LitGPT would run without any MLP)"
        return [f"n_expert is {n_expert}; {needed}"]
    dense, n_layer, n_shared = config.first_k_dense_replace, config.n_layer, config.n_shared_expert or 0
    problems = []
    if not 1 <= top_k <= n_expert:
        problems.append(f"n_expert_per_token is {top_k} but n_expert is {n_expert}; choose 1 to {n_expert}")
    if width is None or width < 1:
        problems.append(f"moe_intermediate_size is {width}; give the width inside one expert, 1 or more")
    if n_shared < 0:
        problems.append(f"n_shared_expert is {n_shared}; choose 0 or more")
    if dense is not None and not 0 <= dense <= n_layer:
        problems.append(f"first_k_dense_replace is {dense} but n_layer is {n_layer}; choose 0 to n_layer")
    if config.n_expert_groups:
        problems += _group_problems(config)
    elif config.n_topk_groups is not None or config.n_topk_scores_per_group is not None:
        ignored = "n_topk_groups and n_topk_scores_per_group are ignored without n_expert_groups"
        problems.append(f"{ignored}; remove them")
    # Weights normalised over one choice are the constant 1: the router would never get a gradient.
    if top_k == 1 and n_expert > 1 and (not config.n_expert_groups or config.norm_topk_prob):
        problems.append(
            "n_expert_per_token is 1 and weights are normalised after top-k, so the router gets no gradient; "
            "choose 2 or more, or expert groups (n_expert_groups) with norm_topk_prob: false"
        )
    return problems


def _group_problems(config: Config) -> list[str]:
    n_groups, n_expert, top_k = config.n_expert_groups or 0, config.n_expert, config.n_expert_per_token
    if n_groups < 2 or n_expert % n_groups:
        return [f"n_expert_groups is {n_groups}, which must be 2 or more and divide n_expert {n_expert}"]
    problems, size = [], n_expert // n_groups
    chosen, n_scores = config.n_topk_groups, config.n_topk_scores_per_group
    if chosen is None or not 1 <= chosen <= n_groups:
        problems.append(f"n_topk_groups is {chosen}; choose 1 to n_expert_groups {n_groups}")
    elif top_k > chosen * size:
        problems.append(f"n_expert_per_token is {top_k} but the chosen groups hold {chosen * size}")
    if n_scores is None or not 1 <= n_scores <= size:
        rule = f"choose 1 to the experts per group {size}"
        problems.append(f"n_topk_scores_per_group is {n_scores}; {rule}")
    return problems


@dataclass(frozen=True)
class ModelFacts:
    """What one configuration costs."""

    total_params: int
    active_params: int
    """Parameters that one token meets: all but the experts that it is not sent to."""
    flops_per_token: int
    """Forward and backward, at the full context length."""
    is_tied: bool = False
    """Whether the embedding and the head are one matrix, which counts once."""


def hidden_params(config: Config, facts: ModelFacts) -> int:
    """Return the parameters that a token meets between the embedding and the head."""
    n_outside = 1 if facts.is_tied else 2
    return facts.active_params - n_outside * (config.padded_vocab_size or 0) * config.n_embd


def meta_model(config: Config) -> GPT:
    """Return the model on the meta device: names and shapes without values, which takes no memory."""
    with torch.device("meta"):
        return GPT(config)


def model_facts(
    config: Config, block_size: int | None = None, model: GPT | None = None, is_tied: bool = False
) -> ModelFacts:
    """Return the facts of a model, at a context of `block_size` tokens (default: the configuration's own).

    `model` is the configuration's model, where it has been built already. With `is_tied` (as by
    train.tie_embeddings) its embedding is its head: one matrix, which is looked up and multiplied.

    FLOPs: PaLM, appendix B (arxiv.org/abs/2204.02311), 6 N + 12 L H Q T a token. N are the weights that
    multiply one token: matrices of active experts, attention, router and head, not the token embedding, which
    is looked up, nor norms and biases. Attention is counted in full, not halved for the causal mask, as usual
    for MFU.
    """
    model = model or meta_model(config)
    # with a matrix that is tied already once under each of its names
    everything = [weight for _, weight in model.named_parameters(remove_duplicate=False)]
    layers = [module for module in model.modules() if isinstance(module, LLaMAMoE)]
    in_experts = [weight for layer in layers for weight in layer.experts.parameters()]
    n_experts, n_idle = max(config.n_expert, 1), config.n_expert - config.n_expert_per_token
    total = sum(weight.numel() for weight in everything)
    active = total - sum(weight.numel() for weight in in_experts) * n_idle // n_experts
    look_up = model.get_parameter("transformer.wte.weight").numel()
    multiplied = _in_matrices(everything) - _in_matrices(in_experts) * n_idle // n_experts - look_up
    n_tokens, head_size = block_size or config.block_size, config.head_size or 0
    attention = 12 * config.n_layer * config.n_head * head_size * n_tokens
    shared = look_up if is_tied else 0
    return ModelFacts(total - shared, active - shared, 6 * multiplied + attention, is_tied)


def _in_matrices(weights: list[torch.nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights if weight.dim() >= 2)
