"""upcycle: the dense model's logits to the last digits, experts as told, and training from there."""

import csv
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DENSE_CONFIG

import run_train
from litgpt_moe.checkpoints.reader import load_model, read_weights, verify_checkpoint
from litgpt_moe.config import MoEConfig
from tools import export_hf, import_hf, upcycle


def run(folder: Path, *flags: object) -> int:
    return upcycle.main([str(folder), str(folder.parent / "moe"), *map(str, flags)])


def logits(folder: Path) -> torch.Tensor:
    ids = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return load_model(folder)(ids)


@pytest.mark.parametrize("name", ["final", "step-00000050", "logs", "superseded-step-00000004"])
def test_nothing_is_written_where_a_run_writes(
    name: str, dense: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, flags = dense(), ["--n_expert", "4", "--n_expert_per_token", "2"]
    # a run that has begun, and one that was saved
    (tmp_path / "begun/logs/csv").mkdir(parents=True)
    (tmp_path / "saved/step-00000004").mkdir(parents=True)
    tools = ((upcycle.main, flags), (import_hf.main, []), (export_hf.main, []))
    for main, options in tools:
        for run_dir in ("begun", "saved"):
            out = tmp_path / run_dir / name
            if out.exists():
                continue
            assert main([str(folder), str(out), *options]) == 2
            told = f"error: {out}: the run in {tmp_path / run_dir} keeps this name for itself; choose another"
            assert told in capsys.readouterr().err and not out.exists()
    # other names there, and these names elsewhere, are free
    assert upcycle.main([str(folder), str(tmp_path / "saved/upcycled"), *flags]) == 0
    assert upcycle.main([str(folder), str(tmp_path / "elsewhere" / name), *flags]) == 0


@pytest.mark.parametrize(
    "flags",
    [("--n_expert", 4, "--n_expert_per_token", 2),
     ("--n-expert", 8, "--n-expert-per-token", 3),
     ("--n_expert", 6, "--n_expert_per_token", 3, "--moe_intermediate_size", 8),
     ("--n_expert", 16, "--n_expert_per_token", 4, "--moe_intermediate_size", 12)],
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_equal_experts_give_the_dense_models_logits(flags: tuple, bias: bool, dense: Callable) -> None:
    folder = dense(bias=bias)
    assert run(folder, *flags) == 0
    expected, got = logits(folder), logits(folder.parent / "moe")
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-6)


def test_the_checkpoint_is_whole_and_named_by_its_size(
    dense: Callable, capsys: pytest.CaptureFixture
) -> None:
    folder = dense()
    assert run(folder, "--n_expert", 4, "--n_expert_per_token", 2) == 0
    moe = folder.parent / "moe"
    verify_checkpoint(moe)
    config = MoEConfig.from_file(moe / "model_config.yaml")
    assert (config.n_expert, config.n_expert_per_token, config.moe_intermediate_size) == (4, 2, 24)
    n_parameters = sum(weight.numel() for weight in read_weights(moe / "lit_model.pth").values())
    assert config.name == f"MoE-{n_parameters / 1e6:.3g}M"
    out = capsys.readouterr().out
    assert f"{n_parameters:,} parameters" in out and "logits, within" in out
    assert f"--initial_checkpoint_dir {moe} --tokenizer_dir {moe}" in out.splitlines()[-1]
    assert "--config" not in out  # nothing is known of the run that made it


def test_noise_is_a_fraction_of_each_matrix_and_makes_experts_differ(dense: Callable) -> None:
    folder = dense(n_embd=64, intermediate_size=64)
    assert run(folder, "--n_expert", 4, "--n_expert_per_token", 2, "--noise", 0.05) == 0
    before, after = (read_weights(path / "lit_model.pth") for path in (folder, folder.parent / "moe"))
    for part in ("fc_1", "fc_2", "proj"):
        copied = before[f"transformer.h.1.mlp.{part}.weight"]
        experts = [after[f"transformer.h.1.mlp.experts.{e}.{part}.weight"] for e in range(4)]
        for e, expert in enumerate(experts):
            assert (expert - copied).std() / copied.std() == pytest.approx(0.05, rel=0.05)
            assert all(not expert.equal(other) for other in experts[:e])
    assert before["transformer.wte.weight"].equal(after["transformer.wte.weight"])


def test_a_seed_repeats_the_router_and_another_does_not(dense: Callable) -> None:
    folder, gates = dense(), []
    for number, seed in enumerate((7, 7, 8)):
        out = folder.parent / str(number)
        flags = ["--n_expert", "4", "--n_expert_per_token", "2", "--noise", "0.1", "--seed", str(seed)]
        assert upcycle.main([str(folder), str(out), *flags]) == 0
        gates.append(read_weights(out / "lit_model.pth"))
    assert all(gates[0][name].equal(gates[1][name]) for name in gates[0])
    assert not gates[0]["transformer.h.0.mlp.gate.weight"].equal(gates[2]["transformer.h.0.mlp.gate.weight"])


def test_bfloat16_stays_bfloat16(dense: Callable) -> None:
    folder = dense(torch.bfloat16)
    assert run(folder, "--n_expert", 4, "--n_expert_per_token", 2, "--noise", 0.1) == 0
    weights = read_weights(folder.parent / "moe" / "lit_model.pth")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.usefixtures("eager")
def test_training_goes_on_from_where_the_dense_model_stood(
    tmp_path: Path,
    tiny_data: Path,
    tiny_tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dense.yaml").write_text(yaml.dump(DENSE_CONFIG), encoding="utf-8")
    init_args = {"train_data_path": str(tiny_data / "train"), "val_data_path": str(tiny_data / "val")}
    settings = {
        "accelerator": "cpu",
        "precision": "32-true",
        "tokenizer_dir": str(tiny_tokenizer_dir),
        "data": {"class_path": "prepare_data.TextShards", "init_args": init_args},
        "train": {"global_batch_size": 4, "micro_batch_size": 4, "lr_warmup_steps": 2, "log_interval": 1},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    }
    Path("train.yaml").write_text(yaml.dump(settings), encoding="utf-8")

    def train(out_dir: str, n_steps: int, *flags: str) -> list[float]:
        given = [
            "--config",
            "train.yaml",
            "--out_dir",
            out_dir,
            "--max_tokens",
            str(n_steps * 4 * 64),
            *flags,
        ]
        assert run_train.main(given) == 0
        return losses(out_dir)

    def losses(out_dir: str) -> list[float]:
        with Path(out_dir, "logs/csv/metrics.csv").open(encoding="utf-8", newline="") as file:
            return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]

    dense_losses = train("dense", 40, "--model_config", "dense.yaml")
    capsys.readouterr()
    Path("moe_trained").mkdir()  # of an earlier try
    assert upcycle.main(["dense", "moe", "--n_expert", "4", "--n_expert_per_token", "2"]) == 0
    # pasted, the last line trains with the dense run's data and settings, which lie at no default place
    uv, run, python, script, *flags = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (uv, run, python, script) == ("uv", "run", "python", "run_train.py")
    assert run_train.main([*flags, "--max_tokens", str(12 * 4 * 64)]) == 0
    moe_losses = losses("moe_trained_2")
    assert dense_losses[0] > 5.5 and dense_losses[-1] < dense_losses[0] - 1
    assert moe_losses[0] == pytest.approx(dense_losses[-1], abs=0.5)  # another batch, the same model
    assert moe_losses[-1] < moe_losses[0]
    trained = read_weights(Path("moe_trained_2/final/lit_model.pth"))
    experts = [trained[f"transformer.h.0.mlp.experts.{e}.fc_1.weight"] for e in range(4)]
    assert not experts[0].equal(experts[1])  # they see different tokens, so they part


@pytest.mark.parametrize(
    ("n_expert", "top_k", "flags", "told"),
    [
        (1, 1, (), "n_expert is 1; choose 2 or more"),
        (4, 5, (), "n_expert_per_token is 5 but n_expert is 4"),
        (4, 1, (), "the router gets no gradient"),
        (4, 2, ("--noise", -1), "noise is -1.0; choose 0 (off) or more"),
        (4, 2, ("--moe_intermediate_size", 7), "divisor of the dense width 24"),
        (4, 3, ("--moe_intermediate_size", 12), "n_expert_per_token is 3, not a multiple of 2"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(
    n_expert: int, top_k: int, flags: tuple, told: str, dense: Callable, capsys: pytest.CaptureFixture
) -> None:
    folder = dense()
    assert run(folder, "--n_expert", n_expert, "--n_expert_per_token", top_k, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line
    assert not (folder.parent / "moe").exists()


def test_other_models_and_taken_folders_are_refused(
    dense: Callable, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--n_expert", "4", "--n_expert_per_token", "2"]
    folder = dense(mlp_class_name="GemmaMLP")
    for source, out, told in (
        (tiny_checkpoint, tmp_path / "moe", "the model has 4 experts already"),
        (folder, tmp_path / "moe", "mlp_class_name is GemmaMLP"),
        (tmp_path / "none", tmp_path / "moe", "no such checkpoint directory"),
        (tiny_checkpoint, folder, "is not empty"),
    ):
        assert upcycle.main([str(source), str(out), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
    assert not (tmp_path / "moe").exists()
