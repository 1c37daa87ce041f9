"""The MoE layer against stock LitGPT and its definition; configuration checks; checkpoint -> model."""

import math

import pytest
import torch
from conftest import TINY_CONFIG
from helpers.layers import GROUPS, pair, per_token, run
from lightning.fabric import Fabric
from lightning.fabric.utilities.throughput import measure_flops
from litgpt.model import GPT, LLaMAMLP, LLaMAMoE
from litgpt.pretrain import initialize_weights

from litgpt_moe import balance
from litgpt_moe.config import MoEConfig
from litgpt_moe.kernels import choice
from moe_layers import MoE, SimplifiedLLaMAMoE

pytestmark = pytest.mark.usefixtures("eager")

VARIANTS = {
    "plain": {},
    "all experts": {"n_expert_per_token": 4},
    "shared": {"n_shared_expert": 2},
    "scaled": {"routed_scaling_factor": 2.5},
    "bias": {"bias": True},
    "groups": GROUPS,
    "groups, normalised and scaled": {**GROUPS, "norm_topk_prob": True, "routed_scaling_factor": 1.7},
    "groups, one expert": {**GROUPS, "n_expert_per_token": 1, "norm_topk_prob": False},
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_moe_gives_stock_outputs_and_every_gradient_in_float64(overrides: dict) -> None:
    stock, ours = pair(LLaMAMoE, torch.float64, **overrides)
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    expected, got = run(stock, x), run(ours, x)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_moe_follows_the_definition_written_per_token() -> None:
    _, ours = pair(LLaMAMoE, torch.float64)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), per_token(ours, x), rtol=1e-12, atol=1e-12)


def test_simplified_layer_gives_stock_outputs_and_gradients() -> None:
    simple, _ = pair(SimplifiedLLaMAMoE, torch.float64, n_shared_expert=1)
    stock = LLaMAMoE(simple.config).double()
    stock.load_state_dict(simple.state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected, got = run(stock, x), run(simple, x)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("n_tokens", [1, 2, 4, 5])
def test_decoding_without_gradients_gives_the_sorted_path_s_output(n_tokens: int) -> None:
    _, ours = pair(LLaMAMoE, torch.float64, n_shared_expert=1)
    x = torch.randn(1, n_tokens, 16, dtype=torch.float64)
    with torch.no_grad():
        got = ours(x)
    torch.testing.assert_close(got, ours(x).detach(), rtol=1e-12, atol=1e-12)


def test_weights_packed_for_decoding_give_the_same_output_and_state_dict() -> None:
    _, ours = pair(LLaMAMoE, torch.float64, n_shared_expert=1, routed_scaling_factor=1.5)
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    expected, before = ours(x).detach(), {name: t.clone() for name, t in ours.state_dict().items()}
    ours.pack_for_decoding()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x).detach(), expected, rtol=1e-12, atol=1e-12)  # the sorted path
    after = ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_packed_weights_are_left_alone_once_the_model_is_converted() -> None:
    _, ours = pair(LLaMAMoE, torch.float64)
    ours.pack_for_decoding()
    ours.float()
    x = torch.randn(1, 2, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), per_token(ours, x), rtol=1e-5, atol=1e-6)


def test_grouped_gemm_gives_the_loop_s_outputs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(LLaMAMoE, torch.float32)
    x = torch.randn(4, 16, 16)
    expected = run(ours, x)
    monkeypatch.setattr(choice, "has_fast_grouped_mm", lambda device, dtype: True)
    got = run(ours, x)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    _, ours = pair(LLaMAMoE, torch.float32)
    with torch.no_grad():
        ours.gate.weight.zero_()
        ours.gate.weight[:2, 0] = 5.0  # a token with a positive first coordinate goes to experts 0 and 1
    grads = run(ours, torch.rand(1, 8, 16) + 0.1)
    assert torch.equal(grads["experts.3.fc_1.weight"], torch.zeros(8, 16))
    assert grads["experts.0.fc_1.weight"].abs().sum() > 0


def test_router_works_in_float32_when_the_model_is_bf16() -> None:
    _, ours = pair(LLaMAMoE, torch.bfloat16)
    with torch.no_grad():
        ours.gate.weight.zero_()
        ours.gate.weight[:, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0])
        ours.gate.weight[3, 1] = 2**-7  # 1 + 2**-7 * 2**-7 is not a bf16 number: bf16 logits would tie
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([1.0, 2**-7])
    *_, indices_NK = ours.route(x)
    assert indices_NK[0, 0] == 3


@pytest.mark.parametrize("overrides", [{}, GROUPS], ids=["plain", "groups"])
def test_autocast_leaves_the_router_in_float32(overrides: dict) -> None:
    _, ours = pair(LLaMAMoE, torch.float32, **overrides)
    x = torch.randn(6, 16)
    expected = ours.route(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours.route(x)[1]
    assert torch.equal(got, expected)


def test_training_under_autocast_stays_near_float32() -> None:
    _, ours = pair(LLaMAMoE, torch.float32)
    x = torch.randn(2, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(ours, x)
    torch.testing.assert_close(got["y"].float(), run(ours, x)["y"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bias", [False, True])
def test_flops_on_meta_are_the_active_ones(bias: bool) -> None:
    config = MoEConfig(**{**TINY_CONFIG, "n_expert": 8, "n_shared_expert": 1, "bias": bias})
    with torch.device("meta"):
        layer, x = MoE(config), torch.randn(2, 32, 16, requires_grad=True)
    flops = measure_flops(layer, lambda: layer(x))
    expert, gate = 3 * 16 * 8, 16 * 8  # multiply-adds a token: fc_1, fc_2, proj; router
    assert flops == 2 * 64 * (2 * expert + expert + gate)


def test_meta_forward_and_backward_count_three_times_the_forward() -> None:
    config = MoEConfig(**TINY_CONFIG)
    with torch.device("meta"):
        model, x = GPT(config), torch.randint(0, 1, (2, 64))
    forward = measure_flops(model, lambda: model(x))
    both = measure_flops(model, lambda: model(x), lambda y: y.float().mean())
    assert 2.5 < both / forward <= 3.0  # the embedding's gradient needs no matrix product


def test_expert_load_counts_each_choice_once_and_only_while_it_is_on(tiny_config: MoEConfig) -> None:
    model = GPT(tiny_config)
    tokens = torch.randint(0, 512, (2, 10))
    model(tokens)
    balance.count_expert_load(model, True)
    model(tokens)
    with torch.no_grad():
        model(tokens[:1, :2])
    load = balance.expert_load(model)
    assert [int(load[layer].sum()) for layer in (0, 1)] == [2 * (20 + 2)] * 2
    balance.count_expert_load(model, False)
    model(tokens)
    assert balance.expert_load(model)[0].sum() == 0


def test_every_parameter_is_initialised_under_empty_init() -> None:
    config = MoEConfig(**{**TINY_CONFIG, **GROUPS, "n_shared_expert": 1, "first_k_dense_replace": 1})
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(77)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    left = [name for name, tensor in model.named_parameters() if (tensor == 77).any()]
    left += [name for name, tensor in model.named_buffers() if (tensor == 77).any()]
    assert left == []
    gate = model.transformer.h[1].mlp.gate
    assert gate.weight.std().item() == pytest.approx(math.sqrt(2 / 5 / 16), rel=0.3)


def test_first_k_dense_replace_makes_the_first_blocks_dense() -> None:
    model = GPT(MoEConfig(**{**TINY_CONFIG, "first_k_dense_replace": 1, "intermediate_size": 24}))
    assert isinstance(model.transformer.h[0].mlp, LLaMAMLP)
    assert list(balance.layers_of(model)) == [1]


def test_one_small_layer_compiles_and_agrees_with_eager() -> None:
    torch.compiler.set_stance("default")
    _, ours = pair(LLaMAMoE, torch.float32)
    compiled = torch.compile(ours, backend="aot_eager")
    for n_tokens in (12, 20):
        x = torch.randn(1, n_tokens, 16)
        expected, got = run(ours, x), run(compiled, x)
        torch.testing.assert_close(got["y"], expected["y"])
        torch.testing.assert_close(got["x.grad"], expected["x.grad"])


def test_the_grouped_gemm_compiles_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.set_stance("default")
    monkeypatch.setattr(choice, "has_fast_grouped_mm", lambda device, dtype: True)
    _, ours = pair(LLaMAMoE, torch.bfloat16)
    x = torch.randn(1, 12, 16, dtype=torch.bfloat16)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x)["y"], run(ours, x)["y"], rtol=0.05, atol=0.05)


def test_a_router_with_groups_begins_with_random_weights_not_with_old_memory() -> None:
    config = MoEConfig(**TINY_CONFIG, n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=2)
    torch.manual_seed(0)
    gate = MoE(config).gate
    # 64 numbers of standard deviation sqrt(2 / 5 / 16) = 0.158
    assert 0.1 < gate.weight.std().item() < 0.25 and gate.weight.abs().max() < 1
