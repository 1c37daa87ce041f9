"""Dense twins and siblings have the FLOPs of the model they are made of; the shipped ones are the tool's."""

from pathlib import Path

import pytest
from conftest import ROOT, TINY_CONFIG

from litgpt_moe.comparison.twin import dense_twin, with_experts
from litgpt_moe.config import MoEConfig, model_facts
from tools import dense_twin as tool

MODELS = [
    path for path in sorted(ROOT.glob("configs/*.yaml")) if "mlp_class_name: LLaMAMoE" in path.read_text()
]


def test_a_twin_is_as_wide_as_the_chosen_experts_and_the_router(tiny_config: MoEConfig) -> None:
    # the router's 4 x 16 weights are not those of 8 columns, 3 x 16 x 8: two experts of 8 are 16 columns
    match = dense_twin(tiny_config)
    assert match.config.intermediate_size == 16
    assert (match.config.n_layer, match.config.n_head, match.config.n_embd) == (2, 2, 16)
    assert match.wanted - match.flops_per_token == 6 * 2 * 4 * 16
    assert match.left_over == pytest.approx(-6 * 2 * 4 * 16 / match.wanted)


def test_a_twin_counts_shared_experts_and_dense_layers() -> None:
    config = MoEConfig(
        **{**TINY_CONFIG, "n_shared_expert": 1, "first_k_dense_replace": 1, "intermediate_size": 40}
    )
    # layer 0: 40; layer 1: two experts of 8 and a shared one: 24; the mean is 32
    assert dense_twin(config).config.intermediate_size == 32


def test_a_sibling_keeps_the_flops_while_the_router_grows(tiny_config: MoEConfig) -> None:
    wide = MoEConfig(**{**TINY_CONFIG, "moe_intermediate_size": 64})
    match = with_experts(wide, 64)
    # 60 more rows of the router are 960 weights, of 2 x 3 x 16 x 8 = 768 in eight columns of the two experts
    assert (match.config.n_expert, match.config.moe_intermediate_size) == (64, 56)
    assert abs(match.left_over) < 0.02


def test_a_dense_model_has_no_twin(dense: object) -> None:
    config = dense_twin(MoEConfig(**TINY_CONFIG)).config
    with pytest.raises(ValueError, match="has no experts"):
        dense_twin(config)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_shipped_twin_is_what_the_tool_makes(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(path), str(tmp_path / "twin.yaml")]) == 0
    shipped = path.with_name(f"{path.stem}_dense.yaml")
    assert (tmp_path / "twin.yaml").read_text(encoding="utf-8") == shipped.read_text(encoding="utf-8")
    flops = [model_facts(MoEConfig.from_file(each)).flops_per_token for each in (path, shipped)]
    assert abs(flops[1] / flops[0] - 1) < 0.01
    assert "FLOPs a token" in capsys.readouterr().out


def test_another_file_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("name: mine\n", encoding="utf-8")
    assert tool.main([str(MODELS[0]), str(out)]) == 2
    assert out.read_text(encoding="utf-8") == "name: mine\n"
    assert "add --overwrite" in capsys.readouterr().err
    assert tool.main([str(MODELS[0]), str(out), "--overwrite"]) == 0
