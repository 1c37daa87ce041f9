"""LitGPT's configuration and weights under the names of Transformers, and back; see families.py.

The weights are renamed by LitGPT's own converters.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from litgpt.scripts import convert_hf_checkpoint, convert_lit_checkpoint

from litgpt_moe.config import MoEConfig, meta_model
from litgpt_moe.files import read_json
from litgpt_moe.interop.families import FAMILIES, PLAIN, ROPE_TYPES, Family, family_of, refuse, rope_type

Weights = dict[str, torch.Tensor]


# --- LitGPT -> Transformers ---------------------------------------------------------------------------------


def to_hf_config(config: MoEConfig, tied: bool, dtype: torch.dtype, ids: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a checkpoint; `ids` has `bos_token_id` and `eos_token_id`.

    Both spellings of the rotary settings are given: Transformers 4 reads `rope_theta` and `rope_scaling`,
    Transformers 5 `rope_parameters`, and each would take a default in silence where its own is missing.
    """
    family = family_of(config)
    adjustments = dict(config.rope_adjustments or {})
    rope = {"rope_type": rope_type(family, config.rope_adjustments)}
    rope |= {key.replace("max_seq_len", "max_position_embeddings"): adjustments[key] for key in adjustments}
    values = {
        "_name_or_path": config.name,
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "max_position_embeddings": config.block_size,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "rope_theta": float(config.rope_base),
        "rope_parameters": {"rope_theta": float(config.rope_base), **rope},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **ids,
    }
    if adjustments:
        values["rope_scaling"] = rope
    return values | _hf_expert_values(config, family)


def _hf_expert_values(config: MoEConfig, family: Family) -> dict[str, Any]:
    if not family.is_moe:
        return {}
    if family.model_type == "mixtral":
        values = {"intermediate_size": config.moe_intermediate_size, "num_local_experts": config.n_expert}
    else:
        values = {"num_experts": config.n_expert, "moe_intermediate_size": config.moe_intermediate_size}
        values |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "use_sliding_window": False}
        values |= {"mlp_only_layers": list(range(config.first_k_dense_replace or 0))}
    return values | {"num_experts_per_tok": config.n_expert_per_token, "router_aux_loss_coef": 0.0}


def to_hf_weights(config: MoEConfig, weights: Weights) -> Weights:
    """Return LitGPT's weights under the names of Transformers; tied ones once.

    Raises:
        ValueError: there is a weight that the class has no place for, such as a selection bias.
    """
    family, converter = family_of(config), convert_lit_checkpoint
    rename = converter.copy_weights_qwen_3 if family.has_qwen_names else converter.copy_weights_llama
    renamed: Weights = {}
    for part, some in _by_kind(config, weights, r"transformer\.h\.(\d+)\."):
        for name, weight in some.items():
            try:
                rename(part, renamed, {name: weight}, is_tied(weights))
            except KeyError:
                refuse(family, f"the weights hold {name}")
    return renamed


def is_tied(weights: Weights) -> bool:
    """Return whether head and word embeddings are the same values."""
    head, words = weights["lm_head.weight"], weights["transformer.wte.weight"]
    return head.data_ptr() == words.data_ptr() or head.equal(words)


def _by_kind(config: MoEConfig, weights: Weights, layer: str) -> list[tuple[MoEConfig, Weights]]:
    """Return the weights of the dense layers that come first, if any, and the others, each with a config.

    LitGPT's converters (0.5.13) name the weights of one kind of MLP at a time.
    """
    n_dense = config.first_k_dense_replace or 0
    if not n_dense:
        return [(config, weights)]
    dense_config = copy.copy(config)
    dense_config.mlp_class_name = "LLaMAMLP"
    first = {name for name in weights if (m := re.search(layer, name)) and int(m[1]) < n_dense}
    parts = ({n: w for n, w in weights.items() if (n in first) == is_dense} for is_dense in (True, False))
    return list(zip((dense_config, config), parts, strict=True))


# --- Transformers -> LitGPT ---------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What a key of config.json must be so that LitGPT computes the same."""

    key: str
    holds: Callable[[Any], bool]
    """Whether a value, None where the key is missing, is the one that LitGPT has."""
    why: str
    """What LitGPT does, or what the value asks for and LitGPT lacks."""


def to_lit_config(path: Path, name: str, vocab_size: int | None) -> MoEConfig:
    """Return the configuration that a config.json describes, with the tokenizer's `vocab_size` if known.

    Raises:
        ValueError: it is damaged, of another class, or of a variant that LitGPT would compute otherwise.
    """
    source = read_json(path)
    family = next((f for f in FAMILIES if f.model_type == source.get("model_type")), None)
    if family is None:
        known = ", ".join(f.model_type for f in FAMILIES)
        raise ValueError(f"{path}: model_type is {source.get('model_type')!r:.60}; {known} can be imported")
    try:
        broken = next(
            (rule for rule in variants(source, family) if not rule.holds(source.get(rule.key))), None
        )
        values = _lit_values(source, family) if broken is None else {}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error!r:.100}); get it again") from None
    if broken is not None:
        found = f"{broken.key} is {source.get(broken.key)!r:.80}, {broken.why}"
        raise ValueError(f"{path}: {found}; it cannot be imported exactly")
    values["vocab_size"] = min(vocab_size or values["padded_vocab_size"], values["padded_vocab_size"])
    try:
        config = MoEConfig(name=name, **values)
        meta_model(config)  # takes no memory, and fails for values that no check of ours knows
        return config
    except (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split()) or 'LitGPT refuses its values'}") from None


def variants(source: dict[str, Any], family: Family) -> list[Rule]:
    """Return what a config.json may vary although LitGPT does not."""
    off = (None, False)
    window = source.get("sliding_window") if source.get("use_sliding_window", True) else None
    context = source.get("max_position_embeddings") or 0
    rules = [
        Rule("hidden_act", lambda v: v in (None, "silu", "swish"), "LitGPT's MLP has SiLU"),
        Rule("attention_bias", lambda v: v in off, "LitGPT has no bias on the attention's output alone"),
        Rule("mlp_bias", lambda v: v in off, "LitGPT has a bias everywhere or nowhere"),
        Rule("quantization_config", lambda v: not v, "quantized weights cannot be trained on"),
        Rule(
            "sliding_window", lambda _: not window or window >= context, "a window shorter than the context"
        ),
        Rule("partial_rotary_factor", lambda v: v in (None, 1, 1.0), "rotary positions on part of each head"),
    ]
    if family.model_type == "qwen3_moe":
        first = list(range(len(source.get("mlp_only_layers") or [])))
        rules += [
            Rule("norm_topk_prob", lambda v: v is True, "LitGPT's expert weights sum to one"),
            Rule("decoder_sparse_step", lambda v: v in (None, 1), "LitGPT has experts in every layer"),
            Rule("mlp_only_layers", lambda v: sorted(v or []) == first, "LitGPT's dense layers come first"),
        ]
    return rules


def _lit_values(source: dict[str, Any], family: Family) -> dict[str, Any]:
    heads, width = source["num_attention_heads"], source["hidden_size"]
    values = {
        "block_size": source["max_position_embeddings"],
        "n_layer": source["num_hidden_layers"],
        "n_embd": width,
        "n_head": heads,
        "n_query_groups": source.get("num_key_value_heads") or heads,
        "head_size": source.get("head_dim") or width // heads,
        "padded_vocab_size": source["vocab_size"],
        "intermediate_size": source["intermediate_size"],
    }
    if odd := [key for key, value in values.items() if type(value) is not int]:
        raise ValueError(f"{odd[0]} is {values[odd[0]]!r}, not a whole number")
    values |= PLAIN | {"norm_eps": float(source["rms_norm_eps"]), "norm_qk": family.norm_qk}
    values |= _lit_rope(source, family)
    values["mlp_class_name"] = "LLaMAMoE" if family.is_moe else "LLaMAMLP"
    if family.is_moe:
        experts = source.get("num_local_experts") or source.get("num_experts")
        width = source.get("moe_intermediate_size") if family.has_qwen_names else source["intermediate_size"]
        values |= {"n_expert": experts, "moe_intermediate_size": width}
        values["n_expert_per_token"] = source["num_experts_per_tok"]
        values["first_k_dense_replace"] = len(source.get("mlp_only_layers") or []) or None
    return values


def _lit_rope(source: dict[str, Any], family: Family) -> dict[str, Any]:
    rope = dict(source.get("rope_parameters") or source.get("rope_scaling") or {})
    base = rope.pop("rope_theta", None) or source.get("rope_theta")
    if base is None and family.model_type == "llama":
        base = 10000.0  # configurations of Llama 1 and 2 leave it out
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope = {key.replace("max_position_embeddings", "max_seq_len"): value for key, value in rope.items()}
    if kind != "default" and ROPE_TYPES.get(frozenset(rope)) != kind:
        raise ValueError(f"rope_type {kind} with {', '.join(rope)} is unknown to LitGPT")
    if base is None or int(base) != base:
        raise ValueError(f"rope_theta is {base}, LitGPT takes whole numbers")
    return {"rope_base": int(base), "rope_adjustments": None if kind == "default" else rope}


def to_lit_weights(config: MoEConfig, weights: Weights) -> Weights:
    """Return weights of Transformers under LitGPT's names.

    Raises:
        ValueError: one is missing, unknown or of another shape.
    """
    weights = {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if "model.embed_tokens.weight" not in weights:
        raise ValueError("the weights lack model.embed_tokens.weight; get the whole folder again")
    # a tied head has no weight of its own: the converter makes it of the word embeddings
    renamed: Weights = {"transformer.wte.weight": weights["model.embed_tokens.weight"]}
    for part, some in _by_kind(config, weights, r"model\.layers\.(\d+)\."):
        _rename_to_lit(part, some, renamed)
    expected = meta_model(config).state_dict()
    for name in [*expected, *renamed]:
        if name not in renamed:
            raise ValueError(f"the weights lack what becomes {name}; get the whole folder again")
        if name not in expected:
            raise ValueError(f"the weights hold what becomes {name}, which config.json does not have")
        if renamed[name].shape != expected[name].shape:
            shapes = f"{tuple(renamed[name].shape)}, config.json wants {tuple(expected[name].shape)}"
            raise ValueError(f"the weights for {name} are {shapes}; get the whole folder again")
    return {name: renamed[name] for name in expected}


def _rename_to_lit(config: MoEConfig, weights: Weights, renamed: Weights) -> None:
    converter = convert_hf_checkpoint
    rename = converter.copy_weights_qwen_3 if config.norm_qk else converter.copy_weights_hf_llama
    for name, weight in weights.items():  # one at a time: for an unknown name the converter raises KeyError
        try:
            rename(config, {}, {"transformer.wte.weight": weight}, {name: weight})
        except KeyError:
            raise ValueError(f"the weights hold {name:.80}, which LitGPT's model has no place for") from None
    rename(config, {}, renamed, {**weights})
