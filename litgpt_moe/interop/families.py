"""Find the class of Transformers that computes exactly what a configuration of LitGPT describes.

Mixtral and Qwen3-MoE take a softmax over all experts and divide the K largest by their sum; LitGPT takes a
softmax over the K largest logits, which is the same.

    LitGPT                          Transformers
    LLaMAMoE                        MixtralForCausalLM
    LLaMAMoE, norm_qk               Qwen3MoeForCausalLM   (norm_topk_prob; dense layers first, if any)
    LLaMAMLP                        LlamaForCausalLM
    LLaMAMLP, norm_qk               Qwen3ForCausalLM

Configurations without an exact counterpart are refused.
"""

import re
from dataclasses import fields
from typing import Any, NamedTuple, NoReturn

from litgpt_moe.config import MoEConfig


class Family(NamedTuple):
    """A model class of Transformers."""

    architecture: str
    model_type: str
    is_moe: bool
    norm_qk: bool


FAMILIES = (
    Family("MixtralForCausalLM", "mixtral", is_moe=True, norm_qk=False),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", is_moe=True, norm_qk=True),
    Family("LlamaForCausalLM", "llama", is_moe=False, norm_qk=False),
    Family("Qwen3ForCausalLM", "qwen3", is_moe=False, norm_qk=True),
)

# Config keys that have a counterpart in config.json or do not change the computation. Any other key must have
# the value that all four classes assume, which is that of PLAIN or else LitGPT's default.
FREE_KEYS = {
    *("name", "hf_config", "block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple"),
    *("padded_vocab_size", "norm_eps", "norm_qk", "n_head", "head_size", "n_query_groups", "rope_base"),
    *("rope_adjustments", "mlp_class_name", "intermediate_size", "moe_intermediate_size", "n_expert"),
    *("n_expert_per_token", "first_k_dense_replace", "gelu_approximate", "attention_scores_scalar"),
    *("norm_topk_prob", "routed_scaling_factor", "sliding_window_indices", "rope_indices"),
}
PLAIN = {"norm_class_name": "RMSNorm", "parallel_residual": False, "bias": False, "rotary_percentage": 1.0}
WHY = {
    "n_shared_expert": "experts that every token visits",
    "n_expert_groups": "sigmoid routing within groups",
    "bias": "biases in every layer",
    "attn_bias": "a bias in q, k and v alone",
    "lm_head_bias": "a bias on the logits",
    "norm_class_name": "another norm than RMSNorm",
    "parallel_residual": "attention and MLP side by side",
    "rotary_percentage": "rotary positions on part of each head",
    "rope_interleave": "rotary positions on neighbouring columns",
    "latent_attention": "latent attention",
}
ROPE_TYPES = {  # LitGPT's rope_adjustments -> rope_type of Transformers, by their keys
    frozenset({"factor"}): "linear",
    frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}): "llama3",
}


def family_of(config: MoEConfig) -> Family:
    """Return the class that computes what `config` describes; ValueError if there is none."""
    is_moe = config.mlp_class_name == "LLaMAMoE"
    family = next(f for f in FAMILIES if (f.is_moe, f.norm_qk) == (is_moe, config.norm_qk))
    for field in fields(config):
        value, plain = getattr(config, field.name), PLAIN.get(field.name, field.default)
        if field.name not in FREE_KEYS and value != plain and (value or plain):
            why = f" ({WHY[field.name]})" if field.name in WHY else ""
            refuse(family, f"{field.name} is {value!r}{why}")
    if config.mlp_class_name not in ("LLaMAMoE", "LLaMAMLP"):
        refuse(family, f"mlp_class_name is {config.mlp_class_name}")
    if config.first_k_dense_replace and not config.norm_qk:
        refuse(family, f"first_k_dense_replace is {config.first_k_dense_replace} (dense layers first)")
    if config.attention_scores_scalar not in (None, config.head_size):
        refuse(family, f"attention_scores_scalar is {config.attention_scores_scalar}")
    if re.search("Gemma|OLMo", config.name):
        refuse(family, f"name is {config.name} (LitGPT then takes another norm)")
    rope_type(family, config.rope_adjustments)
    return family


def rope_type(family: Family, adjustments: dict[str, Any] | None) -> str:
    """Return the name that Transformers has for LitGPT's rope_adjustments. ValueError if it has none."""
    if not adjustments:
        return "default"
    kind = ROPE_TYPES.get(frozenset(adjustments))
    if kind is None:
        refuse(family, f"rope_adjustments has the keys {', '.join(adjustments)}")
    return kind


def refuse(family: Family, what: str) -> NoReturn:
    """Raise ValueError: no class of Transformers computes `what`."""
    cannot = f"which {family.architecture}, the nearest class of Transformers, cannot express"
    raise ValueError(f"{what}, {cannot}; LitGPT and generate.py read the checkpoint as it is")
