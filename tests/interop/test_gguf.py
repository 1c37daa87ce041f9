"""export_hf.py --gguf, read back by gguf's own reader."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.interop import QWEN, TEXTS, refusal, weights_of
from litgpt.tokenizer import Tokenizer

from litgpt_moe.interop.gguf import tokenizer_kind
from tools import export_hf


def read_gguf(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Settings and tensors of a GGUF file, read back by the gguf package; shapes as (rows, columns)."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    in_bits = {"BF16": np.uint16}  # which numpy does not have: the reader gives bytes
    tensors = ((t.name, t.data.view(in_bits.get(t.tensor_type.name, t.data.dtype))) for t in reader.tensors)
    return settings, {name: np.array(data).reshape(shapes[name]) for name, data in tensors}


def test_gguf_holds_the_settings_of_the_model(mixtral: SimpleNamespace) -> None:
    settings, _ = read_gguf(mixtral.out / "MoE-tiny-float32.gguf")
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 8,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 4,
        "llama.rope.freq_base": 10000.0,
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
        "llama.vocab_size": 512,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert {name: settings[name] for name in expected} == expected
    assert settings["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_a_bpe_without_a_type_is_known_as_one() -> None:
    spec = {
        "model": {"vocab": {}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel"},
    }  # GPT-2's on the hub
    assert tokenizer_kind(spec) == "gpt2" and tokenizer_kind({"model": {"vocab": {}}}) is None


def test_gguf_holds_every_weight(mixtral: SimpleNamespace) -> None:
    weights = {name: weight.numpy() for name, weight in weights_of(mixtral.checkpoint).items()}
    _, tensors = read_gguf(mixtral.out / "MoE-tiny-float32.gguf")
    assert np.array_equal(tensors.pop("token_embd.weight"), weights["transformer.wte.weight"])
    assert np.array_equal(tensors.pop("output_norm.weight"), weights["transformer.ln_f.weight"])
    assert np.array_equal(tensors.pop("output.weight"), weights["lm_head.weight"])
    for layer in range(2):
        lit, block = f"transformer.h.{layer}", f"blk.{layer}"
        same = {"attn_norm": "norm_1", "ffn_norm": "norm_2", "attn_output": "attn.proj"}
        for theirs, ours in {**same, "ffn_gate_inp": "mlp.gate"}.items():
            assert np.array_equal(tensors.pop(f"{block}.{theirs}.weight"), weights[f"{lit}.{ours}.weight"])
        for theirs, ours in {"gate": "fc_1", "up": "fc_2", "down": "proj"}.items():
            stacked = np.stack([weights[f"{lit}.mlp.experts.{e}.{ours}.weight"] for e in range(4)])
            assert np.array_equal(tensors.pop(f"{block}.ffn_{theirs}_exps.weight"), stacked)
        q, k, v = np.split(weights[f"{lit}.attn.qkv.weight"], [16, 24])
        # row 2 i + j of a head in llama.cpp is row 2 j + i here: halves of 4 columns become neighbours
        order = [0, 2, 1, 3]
        for name, expected in (("q", q), ("k", k)):
            turned = expected.reshape(-1, 4, 16)[:, order].reshape(-1, 16)
            assert np.array_equal(tensors.pop(f"{block}.attn_{name}.weight"), turned)
        assert np.array_equal(tensors.pop(f"{block}.attn_v.weight"), v)
    assert not tensors


def sentencepiece_ids(settings: dict[str, object], text: str) -> list[int]:
    """Tokenize as llama.cpp's `llama` tokenizer does: merge the pair whose result has the highest score."""
    tokens, scores = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.scores"]
    id_of = {token: i for i, token in enumerate(tokens)}
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        neighbours = enumerate(itertools.pairwise(pieces))
        pairs = [(-scores[id_of[a + b]], i) for i, (a, b) in neighbours if a + b in id_of]
        if not pairs:
            break
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = [settings["tokenizer.ggml.bos_token_id"]]
    for piece in pieces:
        ids += [id_of[piece]] if piece in id_of else [id_of[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return ids


def test_gguf_tokenizes_by_scores_as_we_do_by_merges(mixtral: SimpleNamespace) -> None:
    settings, _ = read_gguf(mixtral.out / "MoE-tiny-float32.gguf")
    tokenizer = Tokenizer(mixtral.checkpoint)
    for text in [*TEXTS[:3], "Mia went to the garden and saw a big bird. Sam, happily, too: yellowish!"]:
        assert sentencepiece_ids(settings, text) == tokenizer.encode(text).tolist()


def test_gguf_tells_kinds_of_pieces_and_fills_up_to_the_models_vocabulary(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(vocab_size=512, padded_vocab_size=576)
    assert export_hf.main([str(checkpoint), str(tmp_path / "out"), "--gguf", "--no_check"]) == 0
    settings, tensors = read_gguf(tmp_path / "out" / "MoE-tiny-float32.gguf")
    n_pieces = Tokenizer(checkpoint).processor.get_vocab_size()
    kinds = settings["tokenizer.ggml.token_type"]
    assert len(kinds) == len(settings["tokenizer.ggml.tokens"]) == 576 == len(tensors["output.weight"])
    assert kinds[:4] == [2, 3, 3, 6]  # <unk>, <s>, </s>, the first byte
    assert kinds[n_pieces - 1 :] == [1, *[5] * (576 - n_pieces)]


def test_gguf_of_qwen3_moe_keeps_halves_and_norms_and_names_its_widths(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(**QWEN, dtype=torch.bfloat16)
    assert export_hf.main([str(checkpoint), str(tmp_path / "out"), "--gguf", "--no_check"]) == 0
    settings, tensors = read_gguf(tmp_path / "out" / "MoE-tiny-bfloat16.gguf")
    weights = weights_of(checkpoint)
    assert settings["general.architecture"] == "qwen3moe"
    assert settings["qwen3moe.expert_feed_forward_length"] == 8
    q = weights["transformer.h.1.attn.qkv.weight"][:16]
    assert np.array_equal(tensors["blk.1.attn_q.weight"], q.view(torch.uint16).numpy())
    norm = weights["transformer.h.0.attn.norm_q.weight"].float().numpy()
    assert np.array_equal(tensors["blk.0.attn_q_norm.weight"], norm)
    gate = weights["transformer.h.0.mlp.gate.weight"].float().numpy()
    assert np.array_equal(tensors["blk.0.ffn_gate_inp.weight"], gate)


def test_q8_0_rounds_each_block_of_a_row_to_8_bits_but_norms_and_router(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, dequantize

    checkpoint = make_checkpoint(n_embd=64, moe_intermediate_size=32)
    assert export_hf.main(["--gguf", "q8_0", str(checkpoint), str(tmp_path / "out"), "--no_check"]) == 0
    path = tmp_path / "out" / "MoE-tiny-q8_0.gguf"
    reader = GGUFReader(path)
    assert reader.fields["general.file_type"].contents() == LlamaFileType.MOSTLY_Q8_0
    exact = {t.name for t in reader.tensors if t.tensor_type == GGMLQuantizationType.F32}
    assert {t.tensor_type.name for t in reader.tensors} == {"F32", "Q8_0"}
    assert exact == {t.name for t in reader.tensors if "norm" in t.name or "gate_inp" in t.name}
    weights = weights_of(checkpoint)
    found = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    expected = weights["transformer.wte.weight"].numpy()
    # a block's largest value becomes 127, so that rounding is off by half of a 127th of it, at most
    blocks = np.abs(expected).reshape(-1, 32)
    error = np.abs(found["token_embd.weight"].reshape(-1, 32) - expected.reshape(-1, 32))
    assert error.max() > 0 and (error.max(1) <= blocks.max(1) * (0.51 / 127 + 2**-10)).all()
    quantized = sum(t.n_bytes for t in reader.tensors if t.name not in exact)
    assert quantized == sum(t.n_elements for t in reader.tensors if t.name not in exact) // 32 * 34


def test_q8_0_needs_widths_that_are_multiples_of_a_block(
    mixtral: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [str(mixtral.checkpoint), str(tmp_path / "out"), "--gguf", "q8_0"]
    line = refusal(capsys, export_hf.main, *words)
    assert "n_embd is 16" in line and "the width of an MLP is 8" in line and "--gguf bf16" in line
    assert list(tmp_path.iterdir()) == []


def test_the_flag_without_a_type_may_stand_before_the_folders(
    mixtral: SimpleNamespace, tmp_path: Path
) -> None:
    words = ["--gguf", str(mixtral.checkpoint), str(tmp_path / "out"), "--no_check", "--dtype", "bfloat16"]
    assert export_hf.main(words) == 0
    assert (tmp_path / "out" / "MoE-tiny-bfloat16.gguf").is_file()
