"""Balanced experts: the auxiliary losses against autograd, the selection bias, the statistics, collapse."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIG
from litgpt.model import GPT, LLaMAMoE
from torch.utils.checkpoint import checkpoint

from litgpt_moe.balance import (
    discard_step_load,
    has_selection_bias,
    layers_of,
    load_balancing_loss,
    router_statistics,
    router_z_loss,
    set_balance,
    update_selection_bias,
    use_selection_bias,
)
from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.config import MoEConfig
from moe_layers import MoE

pytestmark = pytest.mark.usefixtures("eager")

GROUPS = {"n_expert_groups": 2, "n_topk_groups": 2, "n_topk_scores_per_group": 2}
KINDS = pytest.mark.parametrize("overrides", [{}, GROUPS], ids=["softmax", "groups"])
COEFFICIENTS = {"aux_loss_coef": 0.3, "z_loss_coef": 0.2}


def make_model(dtype: torch.dtype = torch.float64, **overrides: object) -> GPT:
    torch.manual_seed(3)
    model = GPT(MoEConfig(**{**TINY_CONFIG, **overrides})).to(dtype)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.gate.weight.normal_()
    return model


def tokens(seed: int, n: int = 24) -> torch.Tensor:
    return torch.randint(0, 512, (2, n), generator=torch.Generator().manual_seed(seed))


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def micro_batch(model, ids: torch.Tensor) -> torch.Tensor:
    """LitGPT's loss of one micro-batch."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def written_out_losses(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The weighted balance and z losses of a layer with input `x`, from their definitions, token by token."""
    config, total_z, counts, total_P = layer.config, 0.0, [0] * layer.config.n_expert, 0.0
    rows = x.reshape(-1, x.size(-1))
    for row in rows:
        # with groups LitGPT routes in float32
        logits = (
            layer.gate.weight.float() @ row.float() if config.n_expert_groups else layer.gate.weight @ row
        )
        scores = logits.sigmoid() if config.n_expert_groups else logits.exp()
        total_P = total_P + scores / scores.sum()
        total_z = total_z + logits.exp().sum().log() ** 2
        for e in scores.topk(config.n_expert_per_token).indices.tolist():
            counts[e] += 1
    share = torch.tensor(counts, dtype=x.dtype) / (len(rows) * config.n_expert_per_token)
    balance = config.n_expert * (share * total_P / len(rows)).sum()
    return COEFFICIENTS["aux_loss_coef"] * balance + COEFFICIENTS["z_loss_coef"] * total_z / len(rows)


@KINDS
def test_gradients_are_those_of_the_written_out_losses(overrides: dict) -> None:
    model, ids = make_model(**overrides), tokens(0)
    plain, inputs = copy.deepcopy(model), []
    layers = layers_of(plain).values()
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0])) for layer in layers
    ]
    loss = micro_batch(plain, ids)
    (loss + sum(written_out_losses(layer, x) for layer, x in zip(layers, inputs, strict=True))).backward()
    [handle.remove() for handle in handles]

    set_balance(model, **COEFFICIENTS)
    got = micro_batch(model, ids)
    got.backward()
    assert torch.equal(got, loss)
    tolerance = 1e-6 if overrides else 1e-11  # float32 inside LitGPT's grouped router
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=tolerance, atol=tolerance, msg=name)


def test_the_losses_change_the_router_s_gradient_and_not_the_head_s() -> None:
    model, ids = make_model(), tokens(0)
    without = copy.deepcopy(model)
    set_balance(model, **COEFFICIENTS)
    for each in (model, without):
        micro_batch(each, ids).backward()
    changed = (
        model.transformer.h[1].mlp.gate.weight.grad - without.transformer.h[1].mlp.gate.weight.grad
    ).norm()
    assert changed > 0.1 * without.transformer.h[1].mlp.gate.weight.grad.norm()
    assert torch.equal(model.lm_head.weight.grad, without.lm_head.weight.grad)


def test_balance_loss_is_1_when_even_and_n_expert_when_one_expert_has_all() -> None:
    even = load_balancing_loss(torch.full((6, 4), 0.25), torch.tensor([3, 3, 3, 3]))
    alone = load_balancing_loss(F.one_hot(torch.tensor([2, 2, 2]), 4).float(), torch.tensor([0, 0, 3, 0]))
    assert even.item() == pytest.approx(1.0)
    assert alone.item() == pytest.approx(4.0)


def test_z_loss_is_the_mean_square_of_the_log_of_the_summed_exponentials() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert router_z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_eight_accumulation_steps_give_the_gradient_of_one() -> None:
    once, model = make_model(), make_model()
    set_balance(once, **COEFFICIENTS)
    set_balance(model, **COEFFICIENTS, scale=1 / 8)
    micro_batch(once, tokens(0)).backward()
    for _ in range(8):
        (micro_batch(model, tokens(0)) / 8).backward()
    for name, grad in gradients(once).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-11, atol=1e-11, msg=name)


def test_the_losses_are_scaled_by_loss_scaling_as_the_model_s_own_loss_is() -> None:
    plain, model, scale = make_model(), make_model(), torch.tensor(1024.0)
    set_balance(plain, **COEFFICIENTS, scale=1 / 2)
    set_balance(model, **COEFFICIENTS, scale=1 / 2, loss_scale=scale)
    for factor in (1024.0, 512.0):  # changed in place between two steps
        scale.fill_(factor)
        for each, by in ((plain, 1.0), (model, factor)):
            each.zero_grad()
            (micro_batch(each, tokens(0)) / 2 * by).backward()
        for name, grad in gradients(plain).items():
            torch.testing.assert_close(gradients(model)[name] / factor, grad, rtol=1e-9, atol=1e-9, msg=name)


class Recomputing(torch.nn.Module):
    """A block whose activations are computed again in backward."""

    def __init__(self, block: torch.nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.block, self.use_reentrant, self.mlp = block, use_reentrant, block.mlp

    def forward(self, *args):
        return checkpoint(self.block, *args, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_activations_count_once_and_give_the_same_gradients(use_reentrant: bool) -> None:
    model = make_model()
    recomputing = copy.deepcopy(model)
    blocks = [Recomputing(block, use_reentrant) for block in recomputing.transformer.h]
    recomputing.transformer.h = torch.nn.ModuleList(blocks)
    read = []
    for each in (model, recomputing):
        set_balance(each, **COEFFICIENTS, bias_update_rate=0.1)
        micro_batch(each, tokens(0)).backward()
        read.append(router_statistics(each)[0])
    torch.testing.assert_close(read[0], read[1])
    load = [layer.balance.step_load for layer in layers_of(recomputing).values()]
    assert [int(counts.sum()) for counts in load] == [2 * 23 * 2] * 2
    got = {name.replace(".block.", "."): grad for name, grad in gradients(recomputing).items()}
    for name, grad in gradients(model).items():
        torch.testing.assert_close(got[name], grad, rtol=1e-11, atol=1e-11, msg=name)


@KINDS
@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_compiled_layer_balances_as_the_eager_one(overrides: dict, dynamic: bool) -> None:
    torch.compiler.set_stance("default")
    model = make_model(**overrides)
    set_balance(model, **COEFFICIENTS, bias_update_rate=0.1, scale=0.5)
    layer = model.transformer.h[0].mlp
    read = []
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for run in (layer, compiled):
        layer.zero_grad()
        x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_(True)
        run(x).square().sum().backward()
        balance = layer.balance
        state = [layer.gate.weight.grad, x.grad, balance.step_load.clone(), balance.sums.clone()]
        read.append([tensor.double() for tensor in state])
        router_statistics(model)
        discard_step_load(model)
    for eager, compiled in zip(*read, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def test_a_compiled_layer_follows_the_loss_scale_without_being_compiled_again() -> None:
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    model, scale = make_model(torch.float32), torch.tensor(1.0)
    set_balance(model, **COEFFICIENTS, loss_scale=scale)
    layer = model.transformer.h[0].mlp
    compiled, norms = torch.compile(layer, backend="aot_eager", fullgraph=True), []
    for factor in (1.0, 1024.0, 512.0):
        scale.fill_(factor)
        layer.zero_grad()
        # the losses alone have a gradient
        (compiled(torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))) * 0).sum().backward()
        norms.append(layer.gate.weight.grad.norm().item())
        torch.compiler.set_stance("fail_on_recompile")
    assert norms[0] > 0 and norms[1:] == [1024 * norms[0], 512 * norms[0]]


def test_validation_and_generation_are_untouched() -> None:
    model, ids = make_model(), tokens(0)
    expected = copy.deepcopy(model).eval()(ids)
    set_balance(model, **COEFFICIENTS, bias_update_rate=0.1)
    got = model.eval()(ids)
    assert torch.equal(got, expected)
    got.sum().backward()
    model.train()
    with torch.no_grad():
        model(ids)
    assert all(not layer.balance.sums.any() for layer in layers_of(model).values())


def test_the_router_and_its_losses_stay_in_float32_in_a_bf16_model_and_under_autocast() -> None:
    ids, read = tokens(0), []
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model = make_model(dtype)
        set_balance(model, **COEFFICIENTS)
        seen = []
        layer = model.transformer.h[0].mlp
        attach = layer._attach_losses
        layer._attach_losses = lambda w, logits, *rest, attach=attach, seen=seen: (
            seen.append(logits) or attach(w, logits, *rest)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = micro_batch(model, ids)
        loss.backward()
        assert seen[0].dtype == torch.float32
        # not a bf16 number: computed and kept in float32
        aux = layer.balance.sums[2]
        assert aux.dtype == torch.float32 and aux.bfloat16().float() != aux
        read.append(aux)
    torch.testing.assert_close(read[0], read[1], rtol=0.05, atol=0.05)


def expected_bias(load: list[int], rate: float) -> torch.Tensor:
    mean = sum(load) / len(load)
    return torch.tensor([rate * ((mean > n) - (mean < n)) for n in load])


@KINDS
def test_the_bias_moves_once_per_step_by_the_sign_of_the_whole_batch_s_load(overrides: dict) -> None:
    model = make_model(**overrides)
    set_balance(model, bias_update_rate=0.25)
    layer = model.transformer.h[0].mlp
    for seed in (0, 1):  # two micro-batches
        micro_batch(model, tokens(seed)).backward()
        assert not layer.selection_bias.any()
    load = layer.balance.step_load.tolist()
    assert sum(load) == 2 * 2 * 23 * 2
    update_selection_bias(model)
    assert torch.equal(layer.selection_bias, expected_bias(load, 0.25))
    assert not layer.balance.step_load.any()
    update_selection_bias(model)  # no token since: nothing to balance
    assert torch.equal(layer.selection_bias, expected_bias(load, 0.25))


def test_the_bias_follows_the_load_of_all_processes() -> None:
    model = make_model()
    set_balance(model, bias_update_rate=0.25)
    micro_batch(model, tokens(0)).backward()
    other = torch.tensor([[1000.0, 0, 0, 0], [0, 0, 0, 1000.0]], dtype=torch.float64)
    seen = []

    def all_reduce(load: torch.Tensor) -> torch.Tensor:
        seen.append(load.clone())
        return load + other

    update_selection_bias(model, all_reduce)
    assert len(seen) == 1  # one call for all layers
    biases = [layer.selection_bias for layer in layers_of(model).values()]
    for bias, load in zip(biases, seen[0] + other, strict=True):
        assert torch.equal(bias, expected_bias(load.tolist(), 0.25))


def test_a_skipped_step_moves_nothing() -> None:
    model = make_model()
    set_balance(model, bias_update_rate=0.25)
    micro_batch(model, tokens(0)).backward()
    discard_step_load(model)
    update_selection_bias(model)
    assert not model.transformer.h[0].mlp.selection_bias.any()


@KINDS
def test_the_bias_chooses_and_leaves_the_weights_alone(overrides: dict) -> None:
    layer = make_model(**overrides, n_expert_per_token=2).transformer.h[0].mlp
    layer.use_selection_bias()
    x = torch.randn(5, 16, dtype=torch.float64)
    logits, before, chosen = layer.route(x)
    layer.selection_bias.fill_(7.0)  # the same for all: the same choice, the same weights
    _, after, still = layer.route(x)
    assert torch.equal(chosen.sort().values, still.sort().values)
    torch.testing.assert_close(before.sum(1), after.sum(1))
    layer.selection_bias.zero_()
    layer.selection_bias[1] = 100.0
    _, weights, indices = layer.route(x)
    assert (indices == 1).any(dim=1).all()
    raw = logits.gather(1, indices)
    wanted = raw.softmax(1) if not overrides else raw.sigmoid()
    torch.testing.assert_close(weights.double(), wanted.double(), rtol=1e-6, atol=1e-6)


def test_the_bias_is_in_the_state_dict_only_once_it_is_used() -> None:
    model = make_model()
    set_balance(model, **COEFFICIENTS)
    assert not has_selection_bias(model.state_dict())
    assert model.state_dict().keys() == GPT(model.config).state_dict().keys()
    set_balance(model, bias_update_rate=0.1)
    assert has_selection_bias(model.state_dict())
    extra = model.state_dict().keys() - GPT(model.config).state_dict().keys()
    assert sorted(extra) == [f"transformer.h.{i}.mlp.e_score_correction_bias" for i in (0, 1)]
    with pytest.raises(RuntimeError, match="e_score_correction_bias"):
        LLaMAMoE(model.config).double().load_state_dict(model.transformer.h[0].mlp.state_dict())


def test_the_bias_survives_a_checkpoint_in_float32_whatever_the_model_is_cast_to(
    tiny_checkpoint, tmp_path
) -> None:
    config = MoEConfig(**TINY_CONFIG)
    model = GPT(config)
    set_balance(model, bias_update_rate=0.001)
    for layer in layers_of(model).values():
        layer.selection_bias.copy_(torch.tensor([0.501, -0.25, 0.0, 3.001]))
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"model": model.bfloat16().state_dict()}, tmp_path / "lit_model.pth")
    for dtype in (None, torch.bfloat16, torch.float32):
        loaded = load_model(tmp_path, dtype=dtype)
        bias = loaded.transformer.h[1].mlp.selection_bias
        assert torch.equal(bias, torch.tensor([0.501, -0.25, 0.0, 3.001]))
        assert loaded.transformer.h[1].mlp.has_selection_bias
    fresh = GPT(config)
    use_selection_bias(fresh)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded(tokens(0)), fresh.eval()(tokens(0)))


@KINDS
def test_a_bf16_model_keeps_its_bias_in_float32(overrides: dict) -> None:
    layer = make_model(**overrides).transformer.h[0].mlp
    layer.use_selection_bias()
    layer.selection_bias.fill_(0.501)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.selection_bias, torch.full((4,), 0.501))
    with torch.device("meta"):
        unset = GPT(layer.config)
    unset.to(torch.bfloat16).to_empty(device="cpu")
    assert unset.transformer.h[0].mlp.selection_bias.dtype == torch.float32


def test_statistics_are_told_per_layer_and_start_afresh_each_time() -> None:
    model = make_model(first_k_dense_replace=1, intermediate_size=8, n_layer=3)
    assert router_statistics(model)[1](torch.zeros(0, 4)) == {}
    set_balance(model)
    layer = model.transformer.h[1].mlp
    with torch.no_grad():
        layer.gate.weight.zero_()  # all logits are 0: every token goes to the same two experts
    for seed in (0, 1):
        micro_batch(model, tokens(seed)).backward()
    stacked, read = router_statistics(model)
    values = read(stacked.cpu())
    assert len(values) == 2 * 5
    assert values["moe/load_imbalance/layer_01"] == 2.0
    assert values["moe/dead_experts/layer_01"] == 2.0
    assert values["moe/router_entropy/layer_01"] == pytest.approx(math.log(4), rel=1e-6)
    assert values["moe/aux_loss/layer_01"] == pytest.approx(1.0)
    assert values["moe/z_loss/layer_01"] == pytest.approx(math.log(4) ** 2, rel=1e-6)
    assert 1.0 < values["moe/load_imbalance/layer_02"] < 4.0
    assert router_statistics(model)[1](torch.zeros(2, 8)) == {}


def test_statistics_of_all_processes_are_added_up() -> None:
    model = make_model()
    set_balance(model)
    micro_batch(model, tokens(0)).backward()
    alone, read = router_statistics(model)
    micro_batch(model, tokens(0)).backward()
    doubled, _ = router_statistics(model, lambda stacked: stacked * 2)
    assert torch.equal(doubled, alone * 2)
    assert read(alone) == read(doubled)  # loads are compared, losses averaged over micro-batches


def skewed_model() -> GPT:
    """Eight experts of which two get nearly every token: a direction all embeddings share leads to them."""
    torch.manual_seed(0)
    config = {
        **TINY_CONFIG,
        "n_embd": 32,
        "n_expert": 8,
        "n_layer": 1,
        "padded_vocab_size": 64,
        "vocab_size": 64,
    }
    model = GPT(MoEConfig(**config))
    with torch.no_grad():
        model.transformer.wte.weight += 2.0
        model.transformer.h[0].mlp.gate.weight[:2] += 0.3
    return model


@pytest.mark.parametrize(
    ("balance", "is_even"),
    [({}, False), ({"aux_loss_coef": 0.2}, True), ({"bias_update_rate": 0.05}, True)],
    ids=["off", "aux loss", "selection bias"],
)
def test_a_skewed_start_collapses_without_balance_and_not_with_it(balance: dict, is_even: bool) -> None:
    model = skewed_model()
    set_balance(model, **balance)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    follows = torch.randperm(64)
    imbalances = []
    for step in range(200):
        ids = [torch.randint(0, 64, (8, 1), generator=torch.Generator().manual_seed(step))]
        for _ in range(32):
            ids.append(follows[ids[-1]])
        micro_batch(model, torch.cat(ids, dim=1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_selection_bias(model)
        if step % 50 == 49:
            stacked, read = router_statistics(model)
            imbalances.append(read(stacked)["moe/load_imbalance/layer_00"])
    assert (imbalances[-1] < 1.5) == is_even, imbalances
    assert is_even or imbalances[-1] > 3.0, imbalances
