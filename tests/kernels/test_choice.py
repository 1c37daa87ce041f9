"""Which kernel runs the experts on which device and in which dtype."""

import pytest
import torch
from conftest import TINY_CONFIG

from litgpt_moe.config import MoEConfig
from litgpt_moe.kernels import choice


def test_ways_are_chosen_by_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, config = torch.device("cuda"), MoEConfig(**TINY_CONFIG)
    fast = lambda device, dtype: dtype == torch.bfloat16  # noqa: E731
    monkeypatch.setattr(choice, "has_fast_grouped_mm", fast)
    monkeypatch.setattr(choice, "has_triton", lambda device_type, dtype: dtype != torch.float64)
    chosen = {
        dtype: choice.choose_kernel(config, cuda, dtype)
        for dtype in (torch.bfloat16, torch.float32, torch.double)
    }
    assert list(chosen.values()) == ["grouped_mm", "triton", "segments"]
    assert "waits" not in choice.describe_kernel(config, cuda, torch.float32)
    assert "waits" in choice.describe_kernel(config, cuda, torch.float64)


def test_experts_of_unaligned_width_are_not_sent_to_the_grouped_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_fast_grouped_mm", lambda device, dtype: True)
    wide, narrow = (MoEConfig(**{**TINY_CONFIG, "moe_intermediate_size": width}) for width in (16, 12))
    assert choice.choose_kernel(wide, torch.device("cpu"), torch.bfloat16) == "grouped_mm"
    assert choice.choose_kernel(narrow, torch.device("cpu"), torch.bfloat16) == "segments"


def test_grouped_gemm_is_not_called_fast_on_the_cpu() -> None:
    assert not choice.has_fast_grouped_mm(torch.device("cpu"), torch.bfloat16)


def test_experts_with_biases_are_run_as_modules_and_others_are_not() -> None:
    cpu = torch.device("cpu")
    assert choice.choose_kernel(MoEConfig(**{**TINY_CONFIG, "bias": True}), cpu, torch.float32) == "loop"
    assert choice.choose_kernel(MoEConfig(**TINY_CONFIG), cpu, torch.float32) == "segments"
    assert "one GEMM" in choice.describe_kernel(MoEConfig(**TINY_CONFIG), "cpu", torch.float32)
