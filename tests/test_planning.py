"""The memory that is planned for a step is what a step allocates, counted by torch's profiler."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY_CONFIG
from helpers.runs import edit_yaml, run
from litgpt.model import GPT
from torch.profiler import ProfilerActivity, profile

from litgpt_moe.checkpoints.writer import CheckpointWriter
from litgpt_moe.config import MoEConfig
from litgpt_moe.planning import StepMemory, StepPlanner
from litgpt_moe.training import memory
from litgpt_moe.training import run as runs


def adamw(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True)


@contextlib.contextmanager
def allocations_until_the_save(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the bytes that are allocated after each call of the allocator, until a checkpoint is copied."""
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    recorded: list[int] = []
    hold = CheckpointWriter.hold

    def stop() -> None:
        profiler.__exit__(None, None, None)
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events = list(profiler.profiler.kineto_results.experimental_event_tree())
        sizes = []
        for event in events:
            events += event.children
            if "Allocation" in str(event.tag):
                sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
        for _, size in sorted(sizes):
            recorded.append(size + (recorded[-1] if recorded else 0))

    def hold_after_stop(writer: CheckpointWriter, checkpoint: dict) -> None:
        if not recorded:
            stop()
        hold(writer, checkpoint)

    monkeypatch.setattr(CheckpointWriter, "hold", hold_after_stop)
    profiler.__enter__()
    yield recorded


RUNS = {
    "activation checkpointing": ({}, ["--activation_checkpointing"]),
    "Muon": ({"n_embd": 64, "moe_intermediate_size": 64}, ["--optimizer", "torch.optim.Muon"]),
    "tied embeddings in bf16": ({"n_embd": 64}, ["--train.tie_embeddings", True, "--precision", "bf16-true"]),
    "mixed precision": ({"n_embd": 64}, ["--precision", "bf16-mixed"]),
    "experts with biases": ({"bias": True}, []),
    "MoE-4M, a step of one micro-batch": ("configs/demo_model.yaml", ["--micro_batch_size", 4]),
    "MoE-30M": ("configs/moe_30m_debug.yaml", ["--max_seq_length", 256, "--max_tokens", 2048]),
}
SLOW = ("tied embeddings in bf16", "experts with biases", "MoE-30M")


@pytest.mark.usefixtures("eager", "workspace")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RUNS]
)
def test_a_run_on_the_cpu_allocates_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, flags = RUNS[name]
    values = TINY_CONFIG | model if isinstance(model, dict) else yaml.safe_load((ROOT / model).read_text())
    Path("model_config.yaml").write_text(yaml.dump(values), encoding="utf-8")
    edit_yaml("train_config.yaml", "train.save_interval", 100)
    flags = [*map(str, flags), "--moe.aux_loss_coef", "0.01"]
    if "--max_tokens" not in flags:
        flags += ["--max_tokens", str(2 * 4 * values["block_size"])]
    planned = memory.try_plan(runs.set_up(["--config", "train_config.yaml", *flags]), "cpu")
    assert planned is not None
    with allocations_until_the_save(monkeypatch) as recorded:
        assert run(*flags) == 0
    assert planned[1].peak == pytest.approx(max(recorded), rel=0.1)


@pytest.fixture(scope="module")
def on_cuda() -> dict[str, StepPlanner]:
    """Planners of the tiny model on CUDA, by what is special in them."""
    config = MoEConfig(**TINY_CONFIG)
    return {
        "plain": StepPlanner(config, "bf16-true", adamw, kernel="triton"),
        "recomputed": StepPlanner(config, "bf16-true", adamw, kernel="triton", is_recomputed=True),
        "8-bit": StepPlanner(config, "bf16-true", None, kernel="triton"),
        "whole logits": StepPlanner(config, "bf16-true", adamw, kernel="grouped_mm", is_deferred=False),
    }


def test_the_parts_of_a_step_on_cuda_are_what_they_must_be(on_cuda: dict[str, StepPlanner]) -> None:
    weights = sum(weight.numel() for weight in GPT(MoEConfig(**TINY_CONFIG)).parameters())
    plain = on_cuda["plain"].memory(2)
    # bf16: two bytes a value; AdamW's step counts are a float32 for each weight
    assert plain.gradients == 2 * weights
    assert 4 * weights < plain.optimizer < 4 * weights + 1000
    assert 2 * weights < plain.weights < 2 * weights + 20_000
    # logits in bf16 and float32, and both gradients of the loss; 128 tokens, 512 words, C=16
    logits, float32 = 128 * 512, 4
    assert plain.logits >= logits * (2 + float32 + 2) + (512 + 128) * 16 * float32
    assert plain.buckets == 0 and on_cuda["plain"].memory(2, has_buckets=True).buckets == 2 * weights
    assert plain.peak == sum(vars(plain).values())
    twice = on_cuda["plain"].memory(4)
    assert twice.activations == pytest.approx(2 * plain.activations, rel=0.2)
    assert twice.peak > plain.peak > on_cuda["recomputed"].memory(2).peak
    # the largest matrices alone have 4,096 values, from which on they are kept in 8 bits
    assert on_cuda["8-bit"].memory(2).optimizer == 2 * 2 * (8192 + 4 * 32) + 8 * (weights - 2 * 8192)
    assert (
        plain.peak - plain.optimizer == on_cuda["8-bit"].memory(2).peak - on_cuda["8-bit"].memory(2).optimizer
    )
    assert on_cuda["whole logits"].memory(2).peak > plain.peak


def test_the_parts_are_told_with_their_sum() -> None:
    memory = StepMemory(1_000_000_000, 500_000_000, 0, 10, 2_000_000_000, 0, 0)
    assert str(memory) == "weights 1 + gradients 0.5 + activations 2 = 3.5 GB"
