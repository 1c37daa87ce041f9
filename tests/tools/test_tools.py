"""Each tool of tools/ on small inputs: numbers against those worked out by hand, refusals, exit status."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from litgpt_moe.checkpoints.state import tokens_seen
from tools import count_params, env_sanity_check, inspect_checkpoint

# --- count_params -------------------------------------------------------------------------------------------

# tiny_config: C=16, V=512, 2 layers, 2 heads of 8, E=4, K=2, F=8, T=64, no bias
ATTENTION, GATE, EXPERT, NORMS = 3 * 16 * 16 + 16 * 16, 4 * 16, 3 * 8 * 16, 2 * 16
TOTAL = 2 * 512 * 16 + 2 * (ATTENTION + GATE + 4 * EXPERT + NORMS) + 16
ACTIVE = TOTAL - 2 * 2 * EXPERT
FLOPS = 6 * (512 * 16 + 2 * (ATTENTION + GATE + 2 * EXPERT)) + 12 * 2 * 2 * 8 * 64


def test_counts_are_those_worked_out_by_hand(tiny_config) -> None:
    count = count_params.count_params(tiny_config)
    assert (count.total_params, count.active_params) == (TOTAL, ACTIVE)
    assert count.embedding_params == 2 * 512 * 16
    assert count.flops_per_token == FLOPS


def test_flops_formula_agrees_with_those_counted_on_the_meta_device(tiny_config) -> None:
    import torch
    from lightning.fabric.utilities.throughput import measure_flops
    from litgpt.model import GPT

    with torch.device("meta"):
        model = GPT(tiny_config)
        tokens = torch.randint(0, 1, (1, tiny_config.block_size))
    counted = measure_flops(model, lambda: model(tokens), lambda logits: logits.sum())
    # the formula leaves out the weighted sum of the experts' outputs, 6 K C = 192 flops a layer
    assert counted / tiny_config.block_size == pytest.approx(FLOPS, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("MoE-200M", 200_000_000),
        ("moe-1.5b", 1_500_000_000),
        ("MoE-30M-debug", 30_000_000),
        ("pythia-14m", 14_000_000),
        ("MoE-tiny", None),
        ("moe_4x8", None),
        ("M4Max", None),
    ],
)
def test_size_in_name_is_the_number_before_its_unit(name: str, size: int | None) -> None:
    assert count_params.size_in_name(name) == size


def write_config(folder: Path, checkpoint: Path, **changes: object) -> Path:
    """A model configuration like the checkpoint's, with keys changed."""
    values = yaml.safe_load((checkpoint / "model_config.yaml").read_text(encoding="utf-8"))
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "status"), [("MoE-22K", 0), ("MoE-23K", 1), ("MoE-200M", 1)])
def test_count_params_fails_for_a_name_off_by_more_than_5_percent(
    name: str, status: int, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 21,712 parameters: 1.3% below 22K, 5.6% below 23K
    assert count_params.main([str(write_config(tmp_path, tiny_checkpoint, name=name))]) == status
    assert f"{TOTAL:,}" in capsys.readouterr().out


def test_count_params_refuses_a_bad_configuration_with_status_2(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, tiny_checkpoint, n_expert_per_token=8)
    assert count_params.main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err


# --- inspect_checkpoint -------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "final"))


def test_inspect_calls_a_whole_checkpoint_complete(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_checkpoint.main([str(tiny_checkpoint)]) == 0
    out = capsys.readouterr().out
    assert f"{TOTAL:,} parameters, {ACTIVE:,} active per token, in float32" in out
    assert out.endswith("complete: generate and evaluate need nothing else\n")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_inspect_names_the_file_that_is_missing(
    name: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / name).unlink()
    assert inspect_checkpoint.main([str(checkpoint)]) == 1
    assert f"incomplete: {name} is missing" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_inspect_ends_truncated_weights_in_one_sentence(
    kept: float, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoint / "lit_model.pth"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * kept)])
    assert inspect_checkpoint.main([str(checkpoint)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {weights} is damaged") and error.count("\n") == 1


def test_inspect_refuses_weights_of_another_shape(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(checkpoint, checkpoint, n_layer=3).replace(checkpoint / "model_config.yaml")
    assert inspect_checkpoint.main([str(checkpoint)]) == 1
    assert "transformer.h.2" in capsys.readouterr().err


def test_inspect_counts_values_that_are_not_finite(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    state = torch.load(checkpoint / "lit_model.pth", weights_only=True)
    state["model"]["lm_head.weight"][0, :3] = float("nan")
    torch.save(state, checkpoint / "lit_model.pth")
    inspect_checkpoint.main([str(checkpoint), "--tensors"])
    assert re.search(r"lm_head\.weight +512x16 +float32 +nan +nan +3\n", capsys.readouterr().out)


def test_inspect_of_no_checkpoint_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_checkpoint.main([str(tmp_path / "nowhere")]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_tokens_seen_are_those_of_all_devices() -> None:
    settings = {"train": {"global_batch_size": 12, "micro_batch_size": 2, "max_seq_length": 32}}
    # 10 steps of 12 sequences of 32 tokens, whatever the devices and micro-batches
    assert tokens_seen({"step_count": 10}, settings, block_size=64) == 3840


def test_tokens_seen_fall_back_to_the_whole_context() -> None:
    settings = {"train": {"global_batch_size": 12, "max_seq_length": None}}
    assert tokens_seen({"step_count": 10}, settings, block_size=64) == 7680


def test_tokens_seen_are_unknown_without_a_counter() -> None:
    assert tokens_seen({}, {"train": {"global_batch_size": 4}}, block_size=64) is None


# --- env_sanity_check ---------------------------------------------------------------------------------------


def test_sanity_check_of_this_machine_ends_in_a_good_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKIP_BNB_RUNTIME", "1")
    assert env_sanity_check.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("verdict: ready")


def test_sanity_check_ends_in_a_verdict_where_no_package_is_installed() -> None:
    command = [sys.executable, "-I", "-S", str(Path(env_sanity_check.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("verdict: broken: python, packages, ")


def test_sanity_check_finds_a_package_that_is_not_installed() -> None:
    (check,) = env_sanity_check.check_packages({"dependencies": ["no-such-package-at-all>=1"]})
    assert (check.state, check.subject) == ("BROKEN", "no-such-package-at-all")


def test_sanity_check_finds_a_package_of_the_wrong_version() -> None:
    (check,) = env_sanity_check.check_packages({"dependencies": ["numpy>=999"]})
    assert check.state == "BROKEN" and ">=999" in check.detail


def test_sanity_check_finds_the_wrong_python() -> None:
    (check,) = env_sanity_check.check_python({"requires-python": "<3"})
    assert check.state == "BROKEN"


def test_sanity_check_goes_on_after_a_check_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_disk() -> None:
        raise OSError("no such mount")

    monkeypatch.setattr(env_sanity_check, "check_disk", broken_disk)
    lines = env_sanity_check.run_checks({"requires-python": ">=3", "dependencies": []})
    assert env_sanity_check.Check("BROKEN", "disk", "OSError: no such mount") in lines
    assert lines[-1].subject == "compile"


def test_sanity_check_calls_a_kernel_that_computes_garbage_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    true_to = torch.Tensor.to
    # the operands as a device with a broken cast would hold them: the product no longer agrees
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *args, **kwargs: true_to(self, *args, **kwargs).flip(0)
    )
    assert env_sanity_check.matmul_check("cpu", torch.bfloat16).state == "BROKEN"


def test_sanity_check_says_why_a_gpu_would_train_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    from litgpt_moe import hardware

    monkeypatch.setattr(hardware, "training_device", lambda *_: ("16-mixed", 1))
    lines = {check.subject: check.detail for check in env_sanity_check.check_plan()}
    assert lines["precision"] == "16-mixed (fp16 with loss scaling: this GPU has no bf16)"
    assert "scaling" not in lines["compile"]


def test_sanity_check_leaves_bitsandbytes_alone_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIP_BNB_RUNTIME", "1")
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert env_sanity_check.check_bitsandbytes("0.45.0").state == "note"


def test_inspect_tells_a_damaged_tokenizer_file_in_one_sentence(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "final"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    assert inspect_checkpoint.main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1


def test_inspect_tells_the_step_and_whether_the_digests_hold(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    assert inspect_checkpoint.main([str(folder)]) == 0
    assert "no digests to verify" in capsys.readouterr().out
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    digests = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
    record = {"format": 1, "step": 7, "files": digests}
    (folder / "checkpoint.json").write_text(json.dumps(record), encoding="utf-8")
    assert inspect_checkpoint.main([str(folder)]) == 0
    assert "verified: 5 files are as checkpoint.json recorded them at step 7" in capsys.readouterr().out
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"] + b" ")
    assert inspect_checkpoint.main([str(folder)]) == 1
    assert "tokenizer.json is damaged" in capsys.readouterr().err
