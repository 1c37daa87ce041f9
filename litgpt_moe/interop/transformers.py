"""LitGPT's configuration and weights in the words of Transformers, and back. Nothing to run here.

Four classes compute what LitGPT computes, to the last rounding. Mixtral and Qwen3-MoE take a softmax over all
experts and divide the K largest by their sum; LitGPT takes a softmax over the K largest logits: the same.

    LitGPT                          Transformers
    LLaMAMoE                        MixtralForCausalLM
    LLaMAMoE, norm_qk               Qwen3MoeForCausalLM   (norm_topk_prob; dense layers first, if any)
    LLaMAMLP                        LlamaForCausalLM
    LLaMAMLP, norm_qk               Qwen3ForCausalLM

The weights are renamed by LitGPT's own converters. Everything without an exact counterpart is refused.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from moe_layers import MoEConfig

Weights = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Family:
    """A model class of Transformers."""

    architecture: str
    model_type: str
    is_moe: bool
    norm_qk: bool

    @property
    def has_qwen_names(self) -> bool:
        return self.model_type.startswith("qwen3")


FAMILIES = (
    Family("MixtralForCausalLM", "mixtral", is_moe=True, norm_qk=False),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", is_moe=True, norm_qk=True),
    Family("LlamaForCausalLM", "llama", is_moe=False, norm_qk=False),
    Family("Qwen3ForCausalLM", "qwen3", is_moe=False, norm_qk=True),
)

# Config keys that config.json tells, or that the computation does not depend on. Any other one must have the
# value that all four classes are built with: PLAIN's, or else LitGPT's default.
TOLD = {
    *("name", "hf_config", "block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple"),
    *("padded_vocab_size", "norm_eps", "norm_qk", "n_head", "head_size", "n_query_groups", "rope_base"),
    *("rope_adjustments", "mlp_class_name", "intermediate_size", "moe_intermediate_size", "n_expert"),
    *("n_expert_per_token", "first_k_dense_replace", "gelu_approximate", "attention_scores_scalar"),
    *("norm_topk_prob", "sliding_window_indices", "rope_indices"),
}
PLAIN = {"norm_class_name": "RMSNorm", "parallel_residual": False, "bias": False, "rotary_percentage": 1.0}
WHY = {
    "n_shared_expert": "experts that every token visits",
    "n_expert_groups": "sigmoid routing within groups",
    "routed_scaling_factor": "expert weights that do not sum to one",
    "bias": "biases in every layer",
    "attn_bias": "a bias in q, k and v alone",
    "lm_head_bias": "a bias on the logits",
    "norm_class_name": "another norm than RMSNorm",
    "parallel_residual": "attention and MLP side by side",
    "rotary_percentage": "rotary positions on part of each head",
    "rope_interleave": "rotary positions on neighbouring columns",
    "latent_attention": "latent attention",
}
KINDS_OF_ROPE = {  # LitGPT's rope_adjustments -> rope_type of Transformers, by their keys
    frozenset({"factor"}): "linear",
    frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}): "llama3",
}
MAX_JSON_BYTES = 64 << 20  # a tokenizer.json of 128,000 pieces has 9 MB


# --- LitGPT -> Transformers ---------------------------------------------------------------------------------


def family_of(config: "MoEConfig") -> Family:
    """Return the class that computes what `config` says. ValueError, in one sentence, if there is none."""
    is_moe = config.mlp_class_name == "LLaMAMoE"
    family = next(f for f in FAMILIES if (f.is_moe, f.norm_qk) == (is_moe, config.norm_qk))
    for field in fields(config):
        value, plain = getattr(config, field.name), PLAIN.get(field.name, field.default)
        if field.name not in TOLD and value != plain and (value or plain):
            why = f" ({WHY[field.name]})" if field.name in WHY else ""
            _refuse(family, f"{field.name} is {value!r}{why}")
    if config.mlp_class_name not in ("LLaMAMoE", "LLaMAMLP"):
        _refuse(family, f"mlp_class_name is {config.mlp_class_name}")
    if config.first_k_dense_replace and not config.norm_qk:
        _refuse(family, f"first_k_dense_replace is {config.first_k_dense_replace} (dense layers first)")
    if config.attention_scores_scalar not in (None, config.head_size):
        _refuse(family, f"attention_scores_scalar is {config.attention_scores_scalar}")
    if re.search("Gemma|OLMo", config.name):
        _refuse(family, f"name is {config.name} (LitGPT then takes another norm)")
    _rope_type(family, config.rope_adjustments)
    return family


def _refuse(family: Family, what: str) -> None:
    raise ValueError(
        f"{what}, which {family.architecture}, the nearest class of Transformers, cannot express; "
        "LitGPT and generate.py read the checkpoint as it is"
    )


def _rope_type(family: Family, adjustments: dict[str, Any] | None) -> str:
    if not adjustments:
        return "default"
    kind = KINDS_OF_ROPE.get(frozenset(adjustments))
    if kind is None:
        _refuse(family, f"rope_adjustments has the keys {', '.join(adjustments)}")
    return kind


def to_hf_config(
    config: "MoEConfig", tied: bool, dtype: "torch.dtype", ids: dict[str, Any]
) -> dict[str, Any]:
    """Return the config.json of a checkpoint; `ids` has `bos_token_id` and `eos_token_id`.

    Both spellings of the rotary settings are given: Transformers 4 reads `rope_theta` and `rope_scaling`,
    Transformers 5 `rope_parameters`, and each would take a default in silence where its own is missing.
    """
    family = family_of(config)
    adjustments = dict(config.rope_adjustments or {})
    rope = {"rope_type": _rope_type(family, config.rope_adjustments)}
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
    if family.model_type == "mixtral":
        values["intermediate_size"] = config.moe_intermediate_size
        values["num_local_experts"] = config.n_expert
    elif family.is_moe:
        values |= {"num_experts": config.n_expert, "moe_intermediate_size": config.moe_intermediate_size}
        values |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "use_sliding_window": False}
        values["mlp_only_layers"] = list(range(config.first_k_dense_replace or 0))
    if family.is_moe:
        values |= {"num_experts_per_tok": config.n_expert_per_token, "router_aux_loss_coef": 0.0}
    return values


def to_hf_weights(config: "MoEConfig", weights: Weights) -> Weights:
    """Return LitGPT's weights under the names of Transformers; tied ones once.

    Raises:
        ValueError: there is a weight that the class has no place for, such as a selection bias.
    """
    from litgpt.scripts import convert_lit_checkpoint as converter

    family = family_of(config)
    rename = converter.copy_weights_qwen_3 if family.has_qwen_names else converter.copy_weights_llama
    renamed: Weights = {}
    for part, some in _by_kind(config, weights, r"transformer\.h\.(\d+)\."):
        for name, weight in some.items():
            try:
                rename(part, renamed, {name: weight}, is_tied(weights))
            except KeyError:
                _refuse(family, f"the weights hold {name}")
    return renamed


def is_tied(weights: Weights) -> bool:
    """Return whether head and word embeddings are the same values."""
    head, words = weights["lm_head.weight"], weights["transformer.wte.weight"]
    return head.data_ptr() == words.data_ptr() or head.equal(words)


def _by_kind(config: "MoEConfig", weights: Weights, layer: str) -> list[tuple["MoEConfig", Weights]]:
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


def to_hf_tokenizer(folder: Path, block_size: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the tokenizer's files by name, and its `bos_token_id` and `eos_token_id`.

    LitGPT puts BOS before a text if tokenizer_config.json says so; here tokenizer.json itself does, and the
    class is the one that takes it as it is. (`LlamaTokenizer` would build a pipeline of its own from it.)
    """
    from litgpt.tokenizer import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    bos, eos = (None if i is None else tokenizer.processor.id_to_token(i) for i in ids.values())
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if tokenizer.use_bos:
        before = {"single": f"{bos}:0 $A:0", "pair": f"{bos}:0 $A:0 {bos}:1 $B:1"}
        tokenizer.processor.post_processor = TemplateProcessing(
            **before, special_tokens=[(bos, ids["bos_token_id"])]
        )
        whole["post_processor"] = json.loads(tokenizer.processor.to_str())["post_processor"]
    else:
        whole["post_processor"] = None
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(tokenizer.use_bos)}
    settings |= {"add_eos_token": False, "clean_up_tokenization_spaces": False}
    settings |= {"model_max_length": block_size, "bos_token": bos, "eos_token": eos}
    if unk := whole["model"].get("unk_token"):
        settings["unk_token"] = unk
    files = {"tokenizer.json": whole, "tokenizer_config.json": settings, "generation_config.json": ids}
    return {name: to_json(content) for name, content in files.items()}, ids


def to_json(content: dict[str, Any]) -> str:
    """Return `content` as a JSON text for people to read."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


# --- Transformers -> LitGPT ---------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. ValueError if it holds none, OSError if it cannot be read."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; such a file has {MAX_JSON_BYTES:,} at most")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({str(error)[:100]}); get it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; get it again")
    return content


def to_lit_config(path: Path, name: str, vocab_size: int | None) -> "MoEConfig":
    """Return the configuration that a config.json stands for, with the tokenizer's `vocab_size` if known.

    Raises:
        ValueError: it is damaged, of another class, or of a variant that LitGPT would compute otherwise.
    """
    import torch
    from litgpt.model import GPT

    from moe_layers import MoEConfig

    source = read_json(path)
    family = next((f for f in FAMILIES if f.model_type == source.get("model_type")), None)
    if family is None:
        known = ", ".join(f.model_type for f in FAMILIES)
        raise ValueError(f"{path}: model_type is {source.get('model_type')!r:.60}; {known} can be imported")
    try:
        odd = next((rule for rule in variants(source, family) if not rule[1](source.get(rule[0]))), None)
        values = _lit_values(source, family) if odd is None else {}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error!r:.100}); get it again") from None
    if odd is not None:
        told = f"{odd[0]} is {source.get(odd[0])!r:.80}, {odd[2]}"
        raise ValueError(f"{path}: {told}; it cannot be imported exactly")
    values["vocab_size"] = min(vocab_size or values["padded_vocab_size"], values["padded_vocab_size"])
    try:
        config = MoEConfig(name=name, **values)
        with torch.device("meta"):
            GPT(config)  # takes no memory, and trips over the values that no check of ours knows
        return config
    except (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split()) or 'LitGPT refuses its values'}") from None


def variants(source: dict[str, Any], family: Family) -> list[tuple[str, Callable[[Any], bool], str]]:
    """Return (key, whether its value is what LitGPT computes, why not) for what a config.json may vary."""
    off = (None, False)
    window = source.get("sliding_window") if source.get("use_sliding_window", True) else None
    context = source.get("max_position_embeddings") or 0
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        ("hidden_act", lambda v: v in (None, "silu", "swish"), "LitGPT's MLP has SiLU"),
        ("attention_bias", lambda v: v in off, "LitGPT has no bias on the attention's output alone"),
        ("mlp_bias", lambda v: v in off, "LitGPT has a bias everywhere or nowhere"),
        ("quantization_config", lambda v: not v, "quantized weights cannot be trained on"),
        ("sliding_window", lambda _: not window or window >= context, "a window shorter than the context"),
        ("partial_rotary_factor", lambda v: v in (None, 1, 1.0), "rotary positions on part of each head"),
    ]
    if family.model_type == "qwen3_moe":
        first = list(range(len(source.get("mlp_only_layers") or [])))
        rules += [
            ("norm_topk_prob", lambda v: v is True, "LitGPT's expert weights sum to one"),
            ("decoder_sparse_step", lambda v: v in (None, 1), "LitGPT has experts in every layer"),
            ("mlp_only_layers", lambda v: sorted(v or []) == first, "LitGPT's dense layers come first"),
        ]
    return rules


def _lit_values(source: dict[str, Any], family: Family) -> dict[str, Any]:
    rope = dict(source.get("rope_parameters") or source.get("rope_scaling") or {})
    base = rope.pop("rope_theta", None) or source.get("rope_theta")
    if base is None and family.model_type == "llama":
        base = 10000.0  # configurations of Llama 1 and 2 leave it out
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope = {key.replace("max_position_embeddings", "max_seq_len"): value for key, value in rope.items()}
    if kind != "default" and KINDS_OF_ROPE.get(frozenset(rope)) != kind:
        raise ValueError(f"rope_type {kind} with {', '.join(rope)} is unknown to LitGPT")
    heads, width = source["num_attention_heads"], source["hidden_size"]
    values = {
        "block_size": source["max_position_embeddings"],
        "n_layer": source["num_hidden_layers"],
        "n_embd": width,
        "n_head": heads,
        "n_query_groups": source.get("num_key_value_heads") or heads,
        "head_size": source.get("head_dim") or width // heads,
        "padded_vocab_size": source["vocab_size"],
        "norm_class_name": "RMSNorm",
        "norm_eps": float(source["rms_norm_eps"]),
        "norm_qk": family.norm_qk,
        "parallel_residual": False,
        "bias": False,
        "rotary_percentage": 1.0,
        "rope_base": int(base),
        "rope_adjustments": None if kind == "default" else rope,
        "mlp_class_name": "LLaMAMoE" if family.is_moe else "LLaMAMLP",
        "intermediate_size": source["intermediate_size"],
    }
    sizes = [key for key in values if key.startswith(("n_", "block", "head", "padded", "inter"))]
    if odd := [key for key in sizes if type(values[key]) is not int]:
        raise ValueError(f"{odd[0]} is {values[odd[0]]!r}, not a whole number")
    if int(base) != base:
        raise ValueError(f"rope_theta is {base}, LitGPT takes whole numbers")
    if family.is_moe:
        experts = source.get("num_local_experts") or source.get("num_experts")
        width = source.get("moe_intermediate_size") if family.has_qwen_names else source["intermediate_size"]
        values |= {"n_expert": experts, "moe_intermediate_size": width}
        values["n_expert_per_token"] = source["num_experts_per_tok"]
        values["first_k_dense_replace"] = len(source.get("mlp_only_layers") or []) or None
    return values


def to_lit_weights(config: "MoEConfig", weights: Weights) -> Weights:
    """Return weights of Transformers under LitGPT's names.

    Raises:
        ValueError: one is missing, unknown or of another shape.
    """
    import torch
    from litgpt.model import GPT
    from litgpt.scripts import convert_hf_checkpoint as converter

    rename = converter.copy_weights_qwen_3 if config.norm_qk else converter.copy_weights_hf_llama
    renamed: Weights = {}
    weights = {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if "model.embed_tokens.weight" not in weights:
        raise ValueError("the weights lack model.embed_tokens.weight; get the whole folder again")
    renamed["transformer.wte.weight"] = weights["model.embed_tokens.weight"]  # stands in for a tied head
    for part, some in _by_kind(config, weights, r"model\.layers\.(\d+)\."):
        for name in some:  # the converter tells an unknown name as a KeyError of its template
            try:
                rename(part, {}, {"transformer.wte.weight": some[name]}, {name: some[name]})
            except KeyError:
                raise ValueError(
                    f"the weights hold {name:.80}, which LitGPT's model has no place for"
                ) from None
        rename(part, {}, renamed, some)
    with torch.device("meta"):
        expected = GPT(config).state_dict()
    for name in [*expected, *renamed]:
        if name not in renamed:
            raise ValueError(f"the weights lack what becomes {name}; get the whole folder again")
        if name not in expected:
            raise ValueError(f"the weights hold what becomes {name}, which config.json does not have")
        if renamed[name].shape != expected[name].shape:
            shapes = f"{tuple(renamed[name].shape)}, config.json wants {tuple(expected[name].shape)}"
            raise ValueError(f"the weights for {name} are {shapes}; get the whole folder again")
    return {name: renamed[name] for name in expected}
