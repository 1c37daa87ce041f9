"""Write an exported folder as one GGUF file for llama.cpp, with the `gguf` package.

llama.cpp computes Mixtral as `llama` with experts and Qwen3-MoE as `qwen3moe`: softmax over all experts,
the K largest divided by their sum. Its `llama` rotates neighbouring columns of a head where Transformers
rotates the two halves, so the rows of q and k are permuted.
"""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFWriter
from tqdm import tqdm

from litgpt_moe.cli import no_bar
from litgpt_moe.config import MoEConfig
from litgpt_moe.data.tokenizer import BYTE_PIECES
from litgpt_moe.interop.families import FAMILIES, family_of
from litgpt_moe.interop.transformers import Weights

ARCHITECTURES = dict(zip(FAMILIES, ("llama", "qwen3moe", "llama", "qwen3"), strict=True))
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)\.weight")
SPACE = "\u2581"
# torch's name of a dtype, or --gguf's -> GGUF's names of a tensor and of a file
KINDS: dict[str, tuple[str, str]] = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
KINDS |= {"f32": KINDS["float32"], "f16": KINDS["float16"], "bf16": KINDS["bfloat16"]}
# 8 bits for a weight, and a scale for each so many neighbours of a row
BLOCK = 32


def check_gguf(config: MoEConfig, folder: Path, kind: str) -> None:
    """Raise ValueError, in one sentence, if llama.cpp cannot express the model or its tokenizer."""
    instead = "export without --gguf"
    widths = {"n_embd": config.n_embd, "n_head times head_size": config.n_head * (config.head_size or 0)}
    widths["the width of an MLP"] = _mlp_width(config)
    if kind == "q8_0" and (odd := [f"{name} is {n}" for name, n in widths.items() if n % BLOCK]):
        rule = f"q8_0 needs multiples of {BLOCK}"
        raise ValueError(f"{', '.join(odd)}, and {rule}; export with --gguf bf16")
    if config.rope_adjustments:
        raise ValueError(f"rope_adjustments is set, which this GGUF writer does not know; {instead}")
    if config.first_k_dense_replace:
        key = f"first_k_dense_replace is {config.first_k_dense_replace}"
        raise ValueError(f"{key}; llama.cpp's qwen3moe has no dense layers; {instead}")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if tokenizer_kind(spec) is None:
        only = "the only kinds of tokenizer that llama.cpp reproduces exactly"
        neither = "is neither a Llama-style nor a GPT-2-style BPE"
        raise ValueError(f"{folder / 'tokenizer.json'} {neither}, {only}; {instead}")


def tokenizer_kind(spec: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the kind of a tokenizer.json: llama, gpt2, or None."""
    model, before = spec.get("model") or {}, spec.get("pre_tokenizer") or {}
    if model.get("type", "BPE" if "merges" in model else None) != "BPE":  # GPT-2's on the hub has no type
        return None
    normalizer = json.dumps(spec.get("normalizer"), ensure_ascii=True)
    if model.get("byte_fallback") and "Replace" in normalizer and json.dumps(SPACE) in normalizer:
        steps = set(re.findall(r'"type": "(\w+)"', normalizer)) - {"Sequence", "Prepend", "Replace"}
        return None if steps else "llama"
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True)
    return "gpt2" if plain and not before.get("add_prefix_space") and not spec.get("normalizer") else None


def write_gguf(path: Path, config: MoEConfig, weights: Weights, tokenizer_dir: Path, dtype: str) -> None:
    """Write `weights`, under the names of Transformers, and the tokenizer to the GGUF file `path`.

    `dtype` is a key of KINDS. Norms and the router stay float32, which llama.cpp requires.
    """
    family = family_of(config)
    architecture = ARCHITECTURES[family]
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH(kinds[architecture]), config.n_layer)
    assert config.head_size  # LitGPT's Config computes it
    writer = gguf.GGUFWriter(path, architecture)
    try:
        _add_settings(writer, config, dtype)
        _add_tokenizer(writer, config, tokenizer_dir)
        for name, weight in tqdm(_stacked(weights), unit="tensor", desc="GGUF", disable=no_bar()):
            if architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
                # rows of a head that are rotated together become neighbours
                halves = weight.view(-1, 2, config.head_size // 2, weight.size(1))
                weight = halves.transpose(1, 2).reshape(weight.shape)
            is_exact = weight.dim() == 1 or name.endswith(".gate.weight")
            kind = gguf.GGMLQuantizationType[KINDS["float32" if is_exact else dtype][0]]
            gguf_name = names.get_name(name, try_suffixes=(".weight",))
            assert gguf_name, name
            array = gguf.quantize(weight.float().contiguous().numpy(), kind)
            writer.add_tensor(gguf_name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _stacked(weights: Weights) -> list[tuple[str, torch.Tensor]]:
    """Return the weights with each layer's experts in one tensor, (E, out, in)."""
    plain, experts = [], {}
    for name, weight in weights.items():
        if match := EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = weight
        else:
            plain.append((name, weight))
    return plain + [(name, torch.stack([some[e] for e in sorted(some)])) for name, some in experts.items()]


def _mlp_width(config: MoEConfig) -> int:
    width = config.moe_intermediate_size if config.n_expert else config.intermediate_size
    assert width
    return width


def _add_settings(writer: GGUFWriter, config: MoEConfig, dtype: str) -> None:
    width = _mlp_width(config)
    assert config.head_size and config.padded_vocab_size and config.n_query_groups
    writer.add_name(config.name or "model")
    writer.add_file_type(gguf.LlamaFileType[KINDS[dtype][1]])
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_query_groups)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(float(config.rope_base))
    if config.n_expert:
        writer.add_expert_count(config.n_expert)
        writer.add_expert_used_count(config.n_expert_per_token)
        if config.norm_qk:
            writer.add_expert_feed_forward_length(width)
    writer.add_feed_forward_length(width)


def _add_tokenizer(writer: GGUFWriter, config: MoEConfig, folder: Path) -> None:
    """Add the pieces, the merges and the special ids; padded rows of the embedding are UNUSED pieces."""
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kind, vocabulary = tokenizer_kind(spec), dict(spec["model"]["vocab"])
    assert kind and config.padded_vocab_size
    added = {token["content"]: token for token in spec.get("added_tokens") or []}
    vocabulary |= {content: token["id"] for content, token in added.items()}
    pieces = {i: piece for piece, i in vocabulary.items() if i < config.padded_vocab_size}
    types = {i: _type_of(piece, spec["model"].get("unk_token"), added, kind) for i, piece in pieces.items()}
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in spec["model"]["merges"]]
    ids = range(config.padded_vocab_size)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("default" if kind == "llama" else "gpt-2")
    writer.add_token_list([pieces.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types([types.get(i, gguf.TokenType.UNUSED) for i in ids])
    if kind == "llama":
        # llama.cpp first merges the pair whose result has the highest score
        scores = {left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(merges, 1)))}
        writer.add_token_scores([scores.get(pieces.get(i), 0.0) for i in ids])
        writer.add_add_space_prefix("Prepend" in json.dumps(spec["normalizer"]))
    else:
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id}
    for name, add_id in add.items():
        if settings.get(f"{name}_token") in vocabulary:
            add_id(vocabulary[settings[f"{name}_token"]])
    writer.add_add_bos_token(settings["add_bos_token"])
    writer.add_add_eos_token(False)


def _type_of(piece: str, unknown: str | None, added: dict[str, dict[str, Any]], kind: str | None) -> Any:
    types = gguf.TokenType
    if piece == unknown:
        return types.UNKNOWN
    if piece in added:
        return types.CONTROL if added[piece].get("special") else types.USER_DEFINED
    return types.BYTE if kind == "llama" and piece in BYTE_PIECES else types.NORMAL
