"""A compiled run compares its first micro-batch with eager, and goes on eager where they differ."""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG
from functorch.compile import make_boxed_func
from helpers.runs import BALANCED, fp16_on_the_cpu, losses, run, weights
from litgpt import GPT
from torch._dynamo.backends.common import aot_autograd

from litgpt_moe.config import MoEConfig
from litgpt_moe.training import compiled
from litgpt_moe.training.compiled import FLOAT32, HALF, compare
from tools.benchmarks.gpu_checks import check_model, check_norm

pytestmark = pytest.mark.usefixtures("eager", "workspace")


def compile_by(backend: Any, patch: pytest.MonkeyPatch) -> None:
    """Let LitGPT's loop compile by another backend than Inductor, whose compilation takes minutes."""
    torch._dynamo.reset()
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def boxed(graph: Any, _: Any) -> Any:
    return make_boxed_func(graph.forward)


def with_wrong_gradients(graph: Any, _: Any) -> Any:
    """A compiler whose gradients of vectors, which here are the norms' weights, are half of what they are."""

    def wrong(*args: Any) -> Any:
        found = graph.forward(*args)
        return [g / 2 if isinstance(g, torch.Tensor) and g.shape == (16,) else g for g in found]

    return make_boxed_func(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_compiler_that_is_right_is_kept(
    precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--precision", precision, *BALANCED)
    with fp16_on_the_cpu():
        assert run("--out_dir", "eager", *flags) == 0
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return boxed(graph, inputs)

    compile_by(aot_autograd(fw_compiler=counting, bw_compiler=counting), monkeypatch)
    capsys.readouterr()
    with fp16_on_the_cpu():
        assert run("--compile", "on", *flags) == 0
    said = capsys.readouterr().err
    assert "Compiled differs from eager by no more than rounding: the loss by 0.0" in said
    assert len(graphs) > 2  # of validation, and training's forward and backward
    close = 1e-4 if precision == "32-true" else 0.02
    torch.testing.assert_close(torch.tensor(losses()), torch.tensor(losses("eager")), rtol=close, atol=close)


def test_a_run_whose_compiler_gives_wrong_gradients_says_so_and_is_the_eager_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out_dir", "eager", *BALANCED) == 0
    compile_by(aot_autograd(fw_compiler=boxed, bw_compiler=with_wrong_gradients), monkeypatch)
    capsys.readouterr()
    assert run("--compile", "on", *BALANCED) == 0
    said = capsys.readouterr().err
    assert "Warning: compiled differs from eager beyond rounding: the loss by 0.00% (limit 0.3%)" in said
    assert "by 50.0% (limit 3%); the run goes on eager, slower" in said
    # nothing was updated, counted or drawn by the comparison
    assert losses() == losses("eager")
    for name, weight in weights("eager/final").items():
        assert torch.equal(weights("out/final")[name], weight), name


@pytest.mark.slow
def test_too_little_memory_for_eager_is_no_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_by("eager", monkeypatch)

    def none_left(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(compiled, "compare", none_left)
    assert run("--compile", "on", "--max_tokens", 256) == 0
    assert "Compiled and eager are not compared: eager needs more memory" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", [check_norm, check_model])
def test_gradients_that_a_gpu_computes_compiled_are_eager_s(check: Callable[..., dict[str, Any]]) -> None:
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    found = check("cuda", "bf16-true") if check is check_model else check("cuda")
    assert found["right"], found


def outcome(loss: float, **changes: float) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """A loss and gradients of a tiny model, those of the named weights multiplied."""
    torch.manual_seed(0)
    gradients: list[torch.Tensor | None] = []
    for name, weight in GPT(MoEConfig(**TINY_CONFIG)).named_parameters():
        factors = [factor for part, factor in changes.items() if part in name.replace(".", "_")]
        gradients.append(torch.randn_like(weight) * math.prod(factors))
    return torch.tensor(loss), gradients


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({}, ""),
        ({"h_1_norm_1": 1.2}, "transformer.h.1.norm_1.weight"),
        ({"h_0_mlp_gate": -1.0}, "transformer.h.0.mlp.gate.weight"),
        ({"h_0_mlp_gate": math.nan}, "transformer.h.0.mlp.gate.weight"),
        ({"h_1_mlp_experts_2_proj": 0.0}, "transformer.h.1.mlp.experts.proj.weight"),
        ({"ln_f": 1.05}, ""),  # as much as rounding in bf16
    ],
)
def test_the_worst_group_is_named(changes: dict[str, float], group: str) -> None:
    gpt = GPT(MoEConfig(**TINY_CONFIG))
    device = SimpleNamespace(device=torch.device("cpu"))
    hooks: Any = SimpleNamespace(gpt=gpt, fabric=device, sum_over_ranks=lambda tensor: tensor)
    found = compare(hooks, outcome(6.0, **changes), outcome(6.0), HALF)
    assert found is not None and found.is_beyond(HALF) == bool(group)
    assert group in ("", found.group)
    far = compare(hooks, outcome(6.1), outcome(6.0), HALF)
    assert far is not None and far.is_beyond(HALF) and far.excess(HALF) == 0
    assert compare(hooks, outcome(6.0), outcome(math.nan), FLOAT32) is None
