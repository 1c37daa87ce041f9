"""Activation checkpointing changes memory alone: gradients, counters and names are those of a plain model."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import TINY_CONFIG
from helpers.runs import BALANCED, assert_same_run, go_back, run
from litgpt.model import GPT

from litgpt_moe import balance
from litgpt_moe.config import MoEConfig
from litgpt_moe.kernels.matmul import use_fast_linear
from litgpt_moe.loss import defer_head, linear_cross_entropy
from litgpt_moe.recompute import recompute_blocks

GROUPS = {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 1, "norm_topk_prob": True}
CONFIGS = {
    "plain": {},
    "expert groups": GROUPS,
    "shared expert": {"n_shared_expert": 1},
    "bias": {"bias": True},
    "a dense block first": {"first_k_dense_replace": 1, "intermediate_size": 24},
}


def two_micro_batches(
    recomputed: bool, config: MoEConfig, wrap: Callable = lambda model: model, autocasts: bool = False
) -> GPT:
    """Return a model after two forward and backward passes, with gradients and the routers' counters."""
    torch.manual_seed(0)
    model = GPT(config)
    use_fast_linear(model)
    balance.set_balance(model, aux_loss_coef=0.01, z_loss_coef=0.001, bias_update_rate=0.01, scale=0.5)
    head = defer_head(model)
    if recomputed:
        recompute_blocks(model)
    called = wrap(model)
    for _ in range(2):
        ids = torch.randint(0, 512, (2, 64))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            output = called(ids).float()
        loss = torch.nn.functional.cross_entropy(output.mT, ids) if head is None else None
        (linear_cross_entropy(output, model.lm_head.weight, ids) if loss is None else loss).backward()
    return model


def assert_equal(one: GPT, other: GPT) -> None:
    for (name, weight), twin in zip(one.named_parameters(), other.parameters(), strict=True):
        assert weight.grad is not None and twin.grad is not None, name
        assert torch.equal(weight.grad, twin.grad), name
    counts = [balance.router_statistics(model)[0] for model in (one, other)]
    assert counts[0][:, -4].tolist() == [2.0] * len(counts[0]) != []
    assert torch.equal(*counts)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_gradients_and_counters_are_equal_bit_for_bit(changes: dict) -> None:
    config = MoEConfig(**{**TINY_CONFIG, **changes})
    plain, recomputed = (two_micro_batches(flag, config) for flag in (False, True))
    assert_equal(recomputed, plain)
    assert list(recomputed.state_dict()) == list(plain.state_dict())


@pytest.mark.usefixtures("eager")
def test_a_block_is_computed_again_in_the_precision_of_the_first_time(tiny_config: MoEConfig) -> None:
    plain, recomputed = (two_micro_batches(flag, tiny_config, autocasts=True) for flag in (False, True))
    assert_equal(recomputed, plain)


def test_a_compiled_model_recomputes_without_a_graph_break(tiny_config: MoEConfig) -> None:
    # without Inductor, whose kernels would take minutes to compile; AOTAutograd decides what is recomputed
    def compiled(model: GPT) -> Callable:
        return torch.compile(model, backend="aot_eager", fullgraph=True)

    torch.compiler.reset()
    expected, recomputed = (two_micro_batches(flag, tiny_config, compiled) for flag in (False, True))
    assert_equal(recomputed, expected)
    torch.compiler.reset()


@contextlib.contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Count what autograd saves for the backward pass."""
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
        yield saved


@pytest.mark.usefixtures("eager")
def test_only_the_blocks_inputs_are_saved_and_nothing_changes_without_gradients(tiny_config) -> None:
    ids = torch.zeros(1, 64, dtype=torch.int64)
    plain, model = GPT(tiny_config), GPT(tiny_config)
    model.load_state_dict(plain.state_dict())
    recompute_blocks(model)
    with saved_bytes() as expected:
        plain(ids)
    with saved_bytes() as saved:
        model(ids)
    assert 0 < sum(saved) < sum(expected) / 3
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(ids), plain(ids))


@pytest.mark.usefixtures("eager", "workspace")
def test_a_run_gives_the_same_checkpoints_and_either_resumes_the_other() -> None:
    flag = "--activation_checkpointing"
    assert run("--out_dir", "plain", *BALANCED) == 0
    assert run("--out_dir", "recomputed", *BALANCED, flag) == 0
    assert_same_run("recomputed", "plain")
    for out_dir, flags in (("plain", [flag]), ("recomputed", [])):
        go_back(4, out_dir)
        assert run("--out_dir", out_dir, *BALANCED, *flags, "--resume", "auto") == 0
    assert_same_run("recomputed", "plain")
