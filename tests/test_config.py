"""The model's configuration: mistakes are named with file, key and way out; facts are worked out by hand."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY_CONFIG
from litgpt.config import Config, configs
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe.config import ModelFacts, MoEConfig, attention_problems, meta_model, model_facts

BAD_VALUES = {
    "n_expert_per_token": (8, "n_expert_per_token is 8 but n_expert is 4; choose 1 to 4"),
    "n_expert": (0, "n_expert is 0"),
    "moe_intermediate_size": (None, "moe_intermediate_size is None"),
    "n_head": (3, "n_embd is 16, which n_head 3 does not divide"),
    "n_query_groups": (4, "n_query_groups is 4, which does not divide n_head 2"),
    "n_layer": (0, "n_layer is 0; choose 1 or more"),
    "mlp_class_name": ("LLaMAMLP", "mlp_class_name is LLaMAMLP, which has no experts"),
    "n_expert_groups": (3, "n_expert_groups is 3, which must be 2 or more and divide n_expert 4"),
    "n_topk_groups": (1, "ignored without n_expert_groups"),
    "n_layers": (2, "unknown key 'n_layers'; did you mean n_layer?"),
    "bias": ("perhaps", "bias is 'perhaps'; it must be true or false"),
    "norm_class_name": ("BatchNorm", "norm_class_name is 'BatchNorm'; it must be one of LayerNorm, RMSNorm"),
    "final_logit_softcapping": (0.0, "final_logit_softcapping is 0.0; choose a number above 0, or null"),
    "attention_logit_softcapping": (-1.0, "attention_logit_softcapping is -1.0; choose a number above 0"),
    "attention_scores_scalar": (-4, "attention_scores_scalar is -4; choose 1 or more"),
    "rope_base": (0, "rope_base is 0; choose 1 or more"),
    "rope_condense_ratio": (0, "rope_condense_ratio is 0; choose 1 or more"),
    "rope_local_base_freq": (0.0, "rope_local_base_freq is 0.0; choose a number above 0, or null"),
    "norm_eps": (-1.0, "norm_eps is -1.0; choose 0 or more"),
    "head_size": (0, "head_size is 0; choose 1 or more"),
    "sliding_window_size": (0, "sliding_window_size is 0; choose 1 or more"),
    "rope_indices": ([0, 5], "rope_indices is [0, 5]; give 0 or 1 for each of n_layer 2 layers"),
    "sliding_window_indices": (
        [1],
        "sliding_window_indices is [1]; give 0 or 1 for each of n_layer 2 layers",
    ),
    "rope_adjustments": ({"factor": 2.0, "foo": 1}, "unknown key rope_adjustments.foo; LitGPT reads factor,"),
    "latent_attention": ({"q_lora_rank": 4}, "latent_attention lacks a whole number kv_lora_rank; it needs"),
}


@pytest.mark.parametrize("key", BAD_VALUES)
def test_a_bad_value_is_named_with_file_key_and_way_out(key: str, tmp_path: Path) -> None:
    value, message = BAD_VALUES[key]
    path = tmp_path / "model_config.yaml"
    path.write_text(yaml.dump({**TINY_CONFIG, key: value}), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        MoEConfig.from_file(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_no_model_that_litgpt_knows_is_refused_for_its_attention() -> None:
    assert len(configs) > 100
    assert [problem for config in configs for problem in attention_problems(Config(**config))] == []


def test_an_assertion_of_litgpt_without_a_message_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    dense = {"mlp_class_name": "LLaMAMLP", "n_expert": 0, "intermediate_size": 32, "n_expert_groups": 2}
    path.write_text(yaml.dump({**TINY_CONFIG, **dense}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"LitGPT refuses these values: assert self\.n_topk_groups"):
        MoEConfig.from_file(path)


def test_all_bad_values_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    values = {**TINY_CONFIG, "n_expert_per_token": 9, "moe_intermediate_size": -1, "n_head": 3}
    path.write_text(yaml.dump(values), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        MoEConfig.from_file(path)
    assert len(str(caught.value).splitlines()) == 3


def test_one_expert_per_token_without_router_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="router gets no gradient"):
        MoEConfig(**{**TINY_CONFIG, "n_expert_per_token": 1})


def test_the_width_of_an_expert_is_that_of_the_mlp_where_a_mixtral_configuration_says_no_other() -> None:
    values = {**TINY_CONFIG, "moe_intermediate_size": None, "intermediate_size": 24}
    ours, stock = (meta_model(kind(**values)).state_dict() for kind in (MoEConfig, Config))
    assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in stock.items()}
    assert ours["transformer.h.0.mlp.experts.3.fc_1.weight"].shape == (24, 16)
    assert MoEConfig(**values, n_shared_expert=2).moe_intermediate_size == 24


def test_a_number_that_plain_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    path.write_text(yaml.dump(TINY_CONFIG) + "norm_eps: 1e-6\n", encoding="utf-8")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["norm_eps"] == "1e-6"
    assert MoEConfig.from_file(path).norm_eps == 1e-6


@pytest.mark.parametrize("text", ["", "- 1\n", "n_layer: [1\n", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_config\.yaml"):
        MoEConfig.from_file(path)


def test_a_foreign_file_may_not_hold_yaml_aliases_and_one_s_own_may(tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    path.write_text(
        yaml.dump(TINY_CONFIG) + "n_shared_expert: &one 1\nfirst_k_dense_replace: *one\n", "utf-8"
    )
    assert MoEConfig.from_file(path).first_k_dense_replace == 1
    with pytest.raises(ValueError, match="it holds an alias"):
        MoEConfig.from_file(path, is_foreign=True)


def test_an_unknown_key_is_told_before_its_value_is_looked_at(tmp_path: Path) -> None:
    lines = (f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi"))
    path = tmp_path / "model_config.yaml"  # 9**8 values, of which a copy takes minutes
    path.write_text(f"{yaml.dump(TINY_CONFIG)}extra:\n  a: &a [x]\n{''.join(lines)}", encoding="utf-8")
    with pytest.raises(ValueError, match="unknown key 'extra'"):
        MoEConfig.from_file(path)


def test_values_given_beside_the_file_replace_those_in_it(tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    path.write_text(yaml.dump(TINY_CONFIG), encoding="utf-8")
    assert MoEConfig.from_file(path, block_size=32).block_size == 32


# --- facts --------------------------------------------------------------------------------------------------

# TINY_CONFIG: C=16, V=512, 2 layers, 2 heads of 8, E=4, K=2, F=8, T=64, no bias
ATTENTION, GATE, EXPERT, NORMS = 3 * 16 * 16 + 16 * 16, 4 * 16, 3 * 8 * 16, 2 * 16
TOTAL = 2 * 512 * 16 + 2 * (ATTENTION + GATE + 4 * EXPERT + NORMS) + 16
ACTIVE = TOTAL - 2 * 2 * EXPERT
FLOPS = 6 * (512 * 16 + 2 * (ATTENTION + GATE + 2 * EXPERT)) + 12 * 2 * 2 * 8 * 64


def test_facts_are_those_worked_out_by_hand(tiny_config: MoEConfig) -> None:
    assert model_facts(tiny_config) == ModelFacts(TOTAL, ACTIVE, FLOPS)
    assert model_facts(tiny_config, block_size=16).flops_per_token == FLOPS - 12 * 2 * 2 * 8 * (64 - 16)


def test_the_flops_of_moe_200m_are_those_worked_out_by_hand() -> None:
    head = 32_000 * 512
    attention, router, experts = 4 * 512 * 512, 32 * 512, 4 * 3 * 320 * 512  # of a layer; 4 experts of 32
    weights = head + 10 * (attention + router + experts)
    scores = 12 * 10 * 8 * 64 * 1024  # 12 L H Q T: 10 layers, 8 heads of 64, 1,024 tokens
    assert 6 * weights + scores == 343_080_960
    config = MoEConfig.from_file(ROOT / "configs/moe_200m.yaml")
    assert model_facts(config).flops_per_token == 343_080_960


VARIANTS = {
    "plain": {},
    "grouped queries": {"n_query_groups": 1},
    "shared and dense": {"n_shared_expert": 2, "first_k_dense_replace": 1, "intermediate_size": 24},
    "biases": {"bias": True},
    "expert groups": {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2},
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_flops_are_those_that_torch_counts_on_the_meta_device(overrides: dict) -> None:
    config = MoEConfig(**{**TINY_CONFIG, **overrides})
    model = meta_model(config)
    tokens = torch.zeros(1, config.block_size, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert counter.get_total_flops() == config.block_size * model_facts(config).flops_per_token


def test_a_meta_model_takes_no_memory_and_has_every_name(tiny_config: MoEConfig) -> None:
    model = meta_model(tiny_config)
    assert all(p.is_meta for p in model.parameters())
    assert "transformer.h.1.mlp.experts.3.proj.weight" in model.state_dict()
