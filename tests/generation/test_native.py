"""Compiled decoding: the logits and routing of PyTorch, for every kind of model that it takes."""

import ctypes
import functools
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG
from helpers.native import need_compiler
from litgpt.model import GPT

from litgpt_moe.balance import layers_of, use_selection_bias
from litgpt_moe.config import MoEConfig
from litgpt_moe.generation import compiling
from litgpt_moe.generation.compiling import NoLibrary
from litgpt_moe.generation.decode import make_decoder
from litgpt_moe.generation.decoder import Decoder, Read, TorchDecoder
from litgpt_moe.generation.native import NativeDecoder
from litgpt_moe.generation.quantization import quantize_rows, round_weights

pytestmark = pytest.mark.usefixtures("eager", "library")
PROMPTS = ([5, 9, 300, 41, 7, 8, 2, 100, 77], [3], [12, 13, 14, 15, 16])
DENSE = {"mlp_class_name": "LLaMAMLP", "intermediate_size": 40, "n_expert": 0, "n_expert_per_token": 0}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped-query": {"n_query_groups": 1},
    "shared expert": {"n_shared_expert": 2, "routed_scaling_factor": 2.5},
    "dense": DENSE,
    "dense first": {"first_k_dense_replace": 1, "intermediate_size": 40},
    "odd widths": {"n_embd": 44, "moe_intermediate_size": 13, "padded_vocab_size": 513},
    "part of a head rotates": {"rotary_percentage": 0.5, "attention_scores_scalar": 3},
    "all experts": {"n_expert_per_token": 4},
    "norms with an offset": {"name": "Gemma-like"},  # LitGPT goes by the name
}


@pytest.fixture(scope="module")
def library() -> None:
    need_compiler()


def make_model(dtype: torch.dtype = torch.float32, **changes: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(MoEConfig(**{**TINY_CONFIG, **changes})).to(dtype).requires_grad_(False).eval()
    for name, weight in model.named_parameters():  # norms and biases too: ones and zeros would hide mistakes
        weight.add_(torch.randn_like(weight) * (0.3 if "norm" in name or "ln_f" in name else 0.05))
    return model


def read_all(decoder: Decoder, prompts: Sequence[list[int]] = PROMPTS) -> Read:
    """Read the prompts, then one more token of each, together."""
    caches = [decoder.open(len(prompt) + 1) for prompt in prompts]
    decoder.read([(cache, prompt) for cache, prompt in zip(caches, prompts, strict=True)])
    found = decoder.read([(cache, [11]) for cache in caches], with_routing=True)
    for cache in caches:
        decoder.close(cache)
    return found


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_logits_and_routing_are_pytorchs(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    ours, theirs = read_all(NativeDecoder(model)), read_all(TorchDecoder(model))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-5, rtol=1e-4)
    assert len(ours.routing) == len(theirs.routing) == len(layers_of(model))
    for mine, other in zip(ours.routing, theirs.routing, strict=True):
        assert torch.equal(mine.experts, other.experts)
        torch.testing.assert_close(mine.probs, other.probs)


def test_the_selection_bias_chooses_and_does_not_weigh() -> None:
    model = make_model()
    without = read_all(NativeDecoder(model))
    use_selection_bias(model)
    for layer in layers_of(model).values():
        layer.selection_bias.copy_(torch.tensor([3.0, -3.0, 3.0, -3.0]))
    ours, theirs = read_all(NativeDecoder(model)), read_all(TorchDecoder(model))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-5, rtol=1e-4)
    assert all(set(layer.experts.flatten().tolist()) == {0, 2} for layer in ours.routing)
    assert not torch.allclose(ours.logits, without.logits, atol=1e-3)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("width", [16, 20])
def test_a_sequences_logits_depend_on_neither_its_company_nor_the_threads(width: int, quantize: bool) -> None:
    # 20 numbers are no whole number of vector registers
    decoder = NativeDecoder(make_model(moe_intermediate_size=width), quantize)
    alone = torch.cat([read_all(decoder, [prompt]).logits for prompt in PROMPTS])
    assert torch.equal(read_all(decoder).logits, alone)
    torch.set_num_threads(2)
    assert torch.equal(read_all(decoder).logits, alone)
    piecewise = decoder.open(len(PROMPTS[0]) + 1)
    for token in PROMPTS[0]:
        decoder.read([(piecewise, [token])])
    torch.testing.assert_close(decoder.read([(piecewise, [11])]).logits, alone[:1])


def test_bfloat16_weights_are_multiplied_as_they_are() -> None:
    model = make_model(torch.bfloat16)
    exact = make_model()
    exact.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    exact.cos, exact.sin = model.cos.float(), model.sin.float()
    ours, theirs = read_all(NativeDecoder(model)), read_all(TorchDecoder(exact))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-5, rtol=1e-4)


def test_eight_bits_are_the_rounded_weights_and_nothing_else() -> None:
    model, rounded = make_model(n_shared_expert=1), make_model(n_shared_expert=1)
    round_weights(rounded)
    for weight, restored in zip(model.parameters(), rounded.parameters(), strict=True):
        step = weight.abs().amax(dim=-1, keepdim=True) / 127
        assert ((restored - weight).abs() <= 0.501 * step).all()
    ours, theirs = read_all(NativeDecoder(model, quantize=True)), read_all(TorchDecoder(rounded))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-5, rtol=1e-4)
    zero, scale = quantize_rows(torch.zeros(2, 3))
    assert not zero.any() and scale.isfinite().all()


def test_neither_tokens_nor_positions_reach_beyond_the_memory() -> None:
    decoder = NativeDecoder(make_model())
    for token in (-1, TINY_CONFIG["padded_vocab_size"]):
        with pytest.raises(AssertionError):
            decoder.read([(decoder.open(2), [token])])
    cache = decoder.open(2)
    decoder.read([(cache, [3, 4])])
    with pytest.raises(AssertionError):
        decoder.read([(cache, [5])])


# --- what it does not take ----------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "parallel_residual": {"parallel_residual": True},
    "norm_class_name": {"norm_class_name": "LayerNorm"},
    "bias": {"bias": True},
    "attn_bias": {"attn_bias": True},
    "norm_qk": {"norm_qk": True},
    "sliding_window_size": {"sliding_window_size": 16, "sliding_window_indices": [1, 1]},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "scale_embeddings": {"scale_embeddings": True},
    "n_expert_groups": {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2},
    "rope_interleave": {"rope_interleave": True},
    "rope_n_elem": {"n_embd": 20, "n_head": 4},
    "mlp_class_name": {**DENSE, "mlp_class_name": "GptNeoxMLP"},
}


@pytest.mark.parametrize(("key", "changes"), OTHERS.items(), ids=OTHERS)
def test_another_model_is_left_to_pytorch(key: str, changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    assert make_decoder(model).name == "torch"
    for options in ({"engine": "native"}, {"quantize": True}):
        with pytest.raises(ValueError, match=f"compiled code does not know {key} "):
            make_decoder(model, **options)
    assert read_all(make_decoder(model)).logits.isfinite().all()


def test_16_bit_floats_are_left_to_pytorch() -> None:
    model = make_model(torch.float16)
    assert make_decoder(model).name == "torch"
    with pytest.raises(ValueError, match=r"not torch\.float16 on cpu"):
        make_decoder(model, "native")


def test_eight_bits_need_compiled_code() -> None:
    with pytest.raises(ValueError, match="8-bit weights need compiled code"):
        make_decoder(make_model(), "torch", quantize=True)


# --- the compiler -------------------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for function in ("_load_once", "_own_folder"):
        monkeypatch.setattr(compiling, function, functools.cache(getattr(compiling, function).__wrapped__))
    return tmp_path / "cache/litgpt-moe"


def write_compiler(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.skipif(os.name != "posix", reason="the compiler is a script")
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import sys; sys.exit('native.cpp:1: error: no such thing')", "error: no such thing"),
        ("import sys; sys.exit(3)", "status"),
        (
            "import sys; open(sys.argv[-1], 'w').write('no library') if '-o' in sys.argv else 0",
            "kept or loaded",
        ),
    ],
)
def test_a_compiler_that_fails_is_named(
    text: str, told: str, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_compiler(tmp_path / "cc", f"import sys\nif '--version' in sys.argv: sys.exit()\n{text}\n")
    monkeypatch.setenv("CXX", str(tmp_path / "cc"))
    with pytest.raises(NoLibrary, match=f"(?s){told}.*use --engine torch"):
        compiling.load_library()
    assert not any(path.is_dir() for path in empty_cache.iterdir())  # nothing half-made stays


def test_without_a_compiler_pytorch_decodes(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NoLibrary, match="no C\\+\\+ compiler here; install g\\+\\+"):
        compiling.load_library()


def test_a_value_of_cxx_that_is_no_command_is_told(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "g++ -DNAME='a")
    with pytest.raises(NoLibrary, match=r"CXX is .*No closing quotation.*use --engine torch"):
        compiling.load_library()


@pytest.mark.skipif(os.name != "posix", reason="the compiler is a program for POSIX")
def test_cxx_may_be_a_compiler_behind_another_program(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    text = f"import sys; open({str(told)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n'); sys.exit(1)\n"
    write_compiler(tmp_path / "cache", text)
    monkeypatch.setenv("CXX", f"{tmp_path / 'cache'} g++")
    with pytest.raises(NoLibrary, match="status 1"):
        compiling.load_library()
    first = told.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("g++ ") and first.endswith(" --version")


def test_a_user_without_a_home_gets_compiled_code(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert compiling.load_library().decode_step


def test_a_compiler_that_fails_is_not_tried_at_every_story(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    write_compiler(tmp_path / "cc", f"open({str(told)!r}, 'a').write('called\\n'); raise SystemExit(1)\n")
    monkeypatch.setenv("CXX", str(tmp_path / "cc"))
    for _ in range(3):
        with pytest.raises(NoLibrary, match="status 1"):
            compiling.load_library()
    # for its version, and to compile
    assert told.read_text(encoding="utf-8") == "called\n" * 2


def test_it_is_compiled_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling.load_library()
    # as another process would
    monkeypatch.setattr(compiling, "_load_once", compiling._load_once.__wrapped__)
    [made] = empty_cache.iterdir()
    monkeypatch.setattr(compiling, "_compile", lambda *_: pytest.fail("compiled again"))
    compiling.load_library()
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700 and made.suffix == ".so"


def test_a_broken_file_in_the_cache_is_made_anew(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_load_once", compiling._load_once.__wrapped__)
    with monkeypatch.context() as patched:
        patched.setattr(compiling, "_compile", lambda _, target: target.write_bytes(b"no library"))
        with pytest.raises(NoLibrary, match="kept or loaded"):
            compiling.load_library()
    [kept] = empty_cache.iterdir()
    assert kept.read_bytes() == b"no library"
    assert compiling.load_library().decode_step
    assert kept.stat().st_size > 10_000


def test_where_the_cache_allows_no_code_a_copy_elsewhere_is_loaded(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, compile_, n_compiled = ctypes.CDLL, compiling._compile, 0

    def refuse(name: str) -> ctypes.CDLL:
        if Path(name).parent == empty_cache:
            raise OSError(f"{name}: failed to map segment from shared object")  # of a disk mounted noexec
        return load(name)

    def count(*args: Any) -> None:
        nonlocal n_compiled
        n_compiled += 1
        compile_(*args)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(compiling, "_compile", count)
    monkeypatch.setattr(compiling, "_load_once", compiling._load_once.__wrapped__)
    assert compiling.load_library().decode_step and compiling.load_library().decode_step
    assert n_compiled == 1


@pytest.mark.skipif(os.name != "posix", reason="the compiler is a script")
def test_without_room_in_the_cache_it_is_compiled_elsewhere(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = f"if {str(empty_cache)!r} in sys.argv[-1]: sys.exit('No space left on device')"
    go_on = "sys.exit(subprocess.run(['c++', *sys.argv[1:]]).returncode)"
    write_compiler(tmp_path / "cc", f"import subprocess, sys\n{full}\n{go_on}\n")
    monkeypatch.setenv("CXX", str(tmp_path / "cc"))
    assert compiling.load_library().decode_step
    assert not list(empty_cache.iterdir())


def test_another_torch_gets_code_of_its_own(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    monkeypatch.setattr(compiling, "_load_once", compiling._load_once.__wrapped__)
    monkeypatch.setattr(compiling, "_compile", lambda _, target: names.add(target.name))
    for version in ("a1", "b2"):
        library = tmp_path / version / "lib" / f"libgomp-{version}.so.1"
        library.parent.mkdir(parents=True)
        library.touch()
        monkeypatch.setattr(torch, "__file__", str(tmp_path / version / "__init__.py"))
        with pytest.raises(NoLibrary):
            compiling.load_library()
    assert len(names) == 2


@pytest.mark.skipif(os.name != "posix", reason="the rights of POSIX")
def test_what_others_may_write_is_not_loaded(empty_cache: Path) -> None:
    empty_cache.mkdir(parents=True)
    empty_cache.chmod(0o777)
    compiling.load_library()
    assert not list(empty_cache.iterdir())
