"""The balance of the experts in real runs: its settings, its log, its checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from helpers.runs import loss_times, losses, rows, run, weights
from litgpt import GPT
from litgpt.config import Config

import evaluate
import generate
from litgpt_moe.checkpoints.reader import load_model

pytestmark = pytest.mark.usefixtures("eager", "workspace")

BIAS = "e_score_correction_bias"


def biases(folder: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(folder).items() if name.endswith(BIAS)}


def test_the_auxiliary_losses_move_the_router_and_leave_the_logged_loss_alone() -> None:
    assert run("--out_dir", "plain") == 0
    assert run("--out_dir", "balanced", "--moe.aux_loss_coef", 1.0, "--moe.z_loss_coef", 0.1) == 0
    assert losses("balanced")[0] == losses("plain")[0]  # before the first update nothing differs
    plain, balanced = weights("plain/final"), weights("balanced/final")
    assert plain.keys() == balanced.keys()
    name = "transformer.h.0.mlp.gate.weight"
    assert not torch.allclose(plain[name], balanced[name])


@pytest.mark.parametrize(
    "flag", ["z_loss_coef", "bias_update_rate"]
)  # aux: of a micro-batch, test_balance.py
def test_accumulation_changes_nothing_about_the_balance(flag: str) -> None:
    assert run("--out_dir", "one", "--micro_batch_size", 4, f"--moe.{flag}", 0.1) == 0
    assert run("--out_dir", "four", "--micro_batch_size", 1, f"--moe.{flag}", 0.1) == 0
    assert losses("four") == pytest.approx(losses("one"), abs=1e-4)
    for name, bias in biases("one/final").items():
        assert torch.equal(bias, biases("four/final")[name]) and bias.any()


def test_every_row_tells_the_load_of_every_layer_and_the_console_the_worst(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--train.log_interval", 4) == 0
    logged = [row for row in rows() if row["loss"]]
    n_expert = 4
    for row in logged:
        for layer in ("00", "01"):
            assert 1.0 <= float(row[f"moe/load_imbalance/layer_{layer}"]) <= n_expert
            assert 0 <= float(row[f"moe/router_entropy/layer_{layer}"]) <= torch.tensor(4.0).log() + 1e-6
            assert 0.9 < float(row[f"moe/aux_loss/layer_{layer}"]) < n_expert
    worst = max(float(logged[-1][f"moe/load_imbalance/layer_{layer}"]) for layer in ("00", "01"))
    assert f"load x{worst:.2f} in layer" in capsys.readouterr().err


def test_a_selection_bias_is_told_of_read_by_our_scripts_and_refused_by_stock(tiny_data: Path) -> None:
    assert run("--moe.bias_update_rate", 0.01) == 0
    assert json.loads(Path("out/final/checkpoint.json").read_text(encoding="utf-8"))["selection_bias"] is True
    assert all(bias.dtype == torch.float32 and bias.any() for bias in biases("out/final").values())
    model = load_model(Path("out/final"))
    for name, bias in biases("out/final").items():
        assert torch.equal(model.state_dict()[name], bias)
    stock = GPT(Config.from_file("out/final/model_config.yaml"))
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{BIAS}"):
        stock.load_state_dict(weights("out/final"))
    assert generate.main(["--ckpt_dir", "out/final", "--prompt", "the cat", "--max_tokens", "4"]) == 0
    data = ["--data_dir", str(tiny_data)]
    assert evaluate.main(["--ckpt_dir", "out/final", "--max_batches", "1", *data]) == 0


def test_without_a_bias_the_checkpoint_is_stock_and_says_nothing_of_one() -> None:
    assert run("--moe.aux_loss_coef", 0.01, "--moe.z_loss_coef", 0.001) == 0
    assert "selection_bias" not in json.loads(Path("out/final/checkpoint.json").read_text(encoding="utf-8"))
    GPT(Config.from_file("out/final/model_config.yaml")).load_state_dict(weights("out/final"))


def test_a_trained_bias_goes_on_choosing_where_nothing_updates_it() -> None:
    assert run("--moe.bias_update_rate", 0.01) == 0
    assert run("--out_dir", "more", "--initial_checkpoint_dir", "out/final") == 0
    for name, bias in biases("out/final").items():
        assert torch.equal(biases("more/final")[name], bias)


def test_a_bias_cannot_begin_in_the_middle_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--max_tokens", 4 * 256) == 0
    flags = ("--resume", "out/step-00000004", "--moe.bias_update_rate", 0.01)
    assert run("--max_tokens", 8 * 256, *flags) == 2
    assert "was trained without a selection bias" in capsys.readouterr().err
    assert (
        run("--out_dir", "new", "--initial_checkpoint_dir", "out/final", "--moe.bias_update_rate", 0.01) == 0
    )
    assert all(bias.any() for bias in biases("new/final").values())


def test_a_skipped_step_does_not_move_the_bias() -> None:
    with loss_times(float("inf"), *range(1, 17)):  # all steps
        assert run("--moe.bias_update_rate", 0.01, "--guard.max_skipped_steps", 9) == 0
    assert not any(bias.any() for bias in biases("out/final").values())
