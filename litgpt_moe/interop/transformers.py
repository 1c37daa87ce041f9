"""Convert configuration and weights between LitGPT and Transformers, for the classes in families.py.

The weights are renamed by LitGPT's own converters, the configuration by the code below.
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from litgpt.scripts import convert_hf_checkpoint, convert_lit_checkpoint

from litgpt_moe.cli import first_line
from litgpt_moe.config import MoEConfig, meta_model
from litgpt_moe.files import read_json
from litgpt_moe.interop.families import FAMILIES, PLAIN, ROPE_TYPES, Family, family_of, refuse, rope_type

Weights = dict[str, torch.Tensor]
EXPERT_OUT = re.compile(r"\.experts\.\d+\.proj\.weight$")
KEYS = {  # LitGPT's key -> key of config.json
    "padded_vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_query_groups": "num_key_value_heads",
    "head_size": "head_dim",
    "block_size": "max_position_embeddings",
    "intermediate_size": "intermediate_size",
}
# key of config.json -> the values that LitGPT can compute (None: a missing key), and why not others
COMPUTED = {
    "hidden_act": ((None, "silu", "swish"), "LitGPT's MLP has SiLU"),
    "attention_bias": ((None, False), "LitGPT has no bias on the attention's output alone"),
    "mlp_bias": ((None, False), "LitGPT has a bias everywhere or nowhere"),
    "quantization_config": ((None, False, {}), "quantized weights cannot be trained on"),
    "partial_rotary_factor": ((None, 1), "rotary positions on part of each head"),
}
COMPUTED_QWEN = {
    "norm_topk_prob": ((True,), "LitGPT's expert weights sum to one"),
    "decoder_sparse_step": ((None, 1), "LitGPT has experts in every layer"),
}


def to_hf_config(config: MoEConfig, tied: bool, dtype: str, ids: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a checkpoint; `ids` has `bos_token_id` and `eos_token_id`.

    The rotary settings are written twice: Transformers 4 reads `rope_theta` and `rope_scaling`, Transformers
    5 `rope_parameters`, and each silently uses a default if its own key is missing.
    """
    family = family_of(config)
    rope: dict[str, Any] = {"rope_type": rope_type(family, config.rope_adjustments)}
    for key, value in (config.rope_adjustments or {}).items():
        rope[key.replace("max_seq_len", "max_position_embeddings")] = value
    values = {
        "_name_or_path": config.name,
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: getattr(config, ours) for ours, key in KEYS.items()},
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "rope_theta": float(config.rope_base),
        "rope_parameters": {"rope_theta": float(config.rope_base), **rope},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        **ids,
    }
    if config.rope_adjustments:
        values["rope_scaling"] = rope
    if not family.is_moe:
        return values
    if family.norm_qk:
        values |= {"num_experts": config.n_expert, "moe_intermediate_size": config.moe_intermediate_size}
        values |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "use_sliding_window": False}
        values |= {"mlp_only_layers": list(range(config.first_k_dense_replace or 0))}
    else:
        values |= {"intermediate_size": config.moe_intermediate_size, "num_local_experts": config.n_expert}
    return values | {"num_experts_per_tok": config.n_expert_per_token, "router_aux_loss_coef": 0.0}


def to_hf_weights(config: MoEConfig, weights: Weights) -> Weights:
    """Return LitGPT's weights under the names of Transformers, a tied head left out.

    The classes have no routed_scaling_factor, so that the experts' last matrices are multiplied by it. Raises
    ValueError if the class has no weight of that kind, such as a selection bias.
    """
    if (factor := config.routed_scaling_factor) != 1.0:
        weights = {name: w * factor if EXPERT_OUT.search(name) else w for name, w in weights.items()}
    family, converter, tied = family_of(config), convert_lit_checkpoint, is_tied(weights)
    rename = converter.copy_weights_qwen_3 if config.norm_qk else converter.copy_weights_llama
    renamed: Weights = {}
    for part, some in _by_kind(config, weights, r"transformer\.h\.(\d+)\."):
        for name, weight in some.items():
            try:
                rename(part, renamed, {name: weight}, tied)
            except KeyError:
                refuse(family, f"the weights hold {name}")
    return renamed


def is_tied(weights: Weights) -> bool:
    """Return whether head and word embeddings have the same values."""
    head, words = weights["lm_head.weight"], weights["transformer.wte.weight"]
    return head.data_ptr() == words.data_ptr() or head.equal(words)


def _by_kind(config: MoEConfig, weights: Weights, layer: str) -> list[tuple[MoEConfig, Weights]]:
    """Return the weights of the dense layers that come first, if any, and the others, each with a config.

    LitGPT's converters (0.5.13) rename the weights of only one kind of MLP per call.
    """
    dense = copy.copy(config)
    dense.mlp_class_name = "LLaMAMLP"
    first: Weights = {}
    others: Weights = {}
    for name, weight in weights.items():
        match = re.search(layer, name)
        is_first = match and int(match[1]) < (config.first_k_dense_replace or 0)
        (first if is_first else others)[name] = weight
    return [(dense, first), (config, others)]


def to_lit_config(path: Path, name: str, vocab_size: int) -> MoEConfig:
    """Return the configuration that a config.json describes, with the tokenizer's `vocab_size`.

    ValueError if it is damaged, of another class, or of a variant that LitGPT would compute differently.
    """
    source = read_json(path)
    family = next((f for f in FAMILIES if f.model_type == source.get("model_type")), None)
    if family is None:
        known = ", ".join(f.model_type for f in FAMILIES)
        raise ValueError(f"{path}: model_type is {source.get('model_type')!r:.60}; {known} can be imported")
    try:
        variants = _variants(source, family)
        values = {} if variants else _lit_values(source, family)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error!r:.100}); get it again") from None
    if variants:
        key, why = variants[0]
        raise ValueError(f"{path}: {key} is {source.get(key)!r:.80}, {why}; it cannot be imported exactly")
    values["vocab_size"] = min(vocab_size, values["padded_vocab_size"])
    try:
        config = MoEConfig(name=name, **values)
        meta_model(config)  # takes no memory; LitGPT's layers check values that we do not
        return config
    except (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split()) or 'LitGPT refuses its values'}") from None


def _variants(source: dict[str, Any], family: Family) -> list[tuple[str, str]]:
    """Return each key of a config.json with a value that LitGPT cannot compute, and the reason."""
    rules = COMPUTED | (COMPUTED_QWEN if family.model_type == "qwen3_moe" else {})
    found = [(key, why) for key, (values, why) in rules.items() if source.get(key) not in values]
    window = source.get("use_sliding_window", True) and source.get("sliding_window")
    if window and window < (source.get("max_position_embeddings") or 0):
        found.append(("sliding_window", "a window shorter than the context"))
    dense = source.get("mlp_only_layers") or []
    if family.model_type == "qwen3_moe" and sorted(dense) != list(range(len(dense))):
        found.append(("mlp_only_layers", "LitGPT's dense layers come first"))
    return found


def _lit_values(source: dict[str, Any], family: Family) -> dict[str, Any]:
    values: dict[str, Any] = {ours: source.get(key) for ours, key in KEYS.items()}
    if values["n_query_groups"] is None:
        values["n_query_groups"] = values["n_head"]
    if values["head_size"] is None:
        values["head_size"] = values["n_embd"] // values["n_head"]
    if odd := [key for key, value in values.items() if type(value) is not int]:
        raise ValueError(f"{odd[0]} is {values[odd[0]]!r}, not a whole number")
    values |= PLAIN | {"norm_eps": float(source["rms_norm_eps"]), "norm_qk": family.norm_qk}
    values |= _lit_rope(source, family) | {"mlp_class_name": "LLaMAMoE" if family.is_moe else "LLaMAMLP"}
    if family.is_moe:
        width = source.get("moe_intermediate_size") if family.norm_qk else values["intermediate_size"]
        experts = source.get("num_local_experts") or source.get("num_experts")
        values |= {"n_expert": experts, "moe_intermediate_size": width}
        values["n_expert_per_token"] = source["num_experts_per_tok"]
        values["first_k_dense_replace"] = len(source.get("mlp_only_layers") or []) or None
    return values


def _lit_rope(source: dict[str, Any], family: Family) -> dict[str, Any]:
    given = [source[key] for key in ("rope_parameters", "rope_scaling") if source.get(key)]
    bases = [place["rope_theta"] for place in (*given, source) if place.get("rope_theta") is not None]
    ropes = [{key: value for key, value in rope.items() if key != "rope_theta"} for rope in given] or [{}]
    # the versions of Transformers differ in which of two they read
    if ropes[0] != ropes[-1] and {rope.get("rope_type", "default") for rope in ropes} != {"default"}:
        raise ValueError("rope_parameters and rope_scaling contradict each other")
    if len(set(bases)) > 1:
        raise ValueError(f"rope_theta is {' and '.join(map(str, bases))}")
    rope, base = ropes[0], bases[0] if bases else None
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
    """Return weights of Transformers under LitGPT's names; ValueError if one is missing or does not fit."""
    weights = {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if "model.embed_tokens.weight" not in weights:
        raise ValueError("the weights lack model.embed_tokens.weight; get the whole folder again")
    converter = convert_hf_checkpoint
    rename = converter.copy_weights_qwen_3 if config.norm_qk else converter.copy_weights_hf_llama
    # the converter copies a tied head, which has no weight in the file, from the word embeddings
    renamed: Weights = {"transformer.wte.weight": weights["model.embed_tokens.weight"]}
    for part, some in _by_kind(config, weights, r"model\.layers\.(\d+)\."):
        waiting: dict[int, Any] = {}  # q, k and v until all three are there
        for name, weight in some.items():
            try:
                rename(part, waiting, renamed, {name: weight})
            except KeyError:
                lacks = "which LitGPT's model has no place for"
                raise ValueError(f"the weights hold {name:.80}, {lacks}") from None
            except (RuntimeError, ValueError, IndexError) as error:
                why = f"do not fit ({first_line(error):.100})"
                raise ValueError(f"the weights for {name:.80} {why}; get the whole folder again") from None
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
