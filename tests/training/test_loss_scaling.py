"""Training in fp16 and bf16 by autocast: the run of float32 but for rounding, and the scale of the loss.

A user is refused 16-mixed on a CPU. Here it runs there all the same, with the plugin, scaler and optimizers
that run on CUDA.
"""

import functools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.runs import (
    assert_same_run,
    edit_yaml,
    fp16_on_the_cpu,
    gradient_times,
    loss_times,
    losses,
    rows,
    run,
    weights,
)
from torch.amp.grad_scaler import GradScaler

from litgpt_moe.loss import LossHead
from litgpt_moe.training import loss_scaling

pytestmark = pytest.mark.usefixtures("eager", "workspace")

FP16 = ("--precision", "16-mixed")
# strong enough to be seen in the losses
BALANCED = ("--moe.aux_loss_coef", 1.0, "--moe.z_loss_coef", 0.1)
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}}
UNFUSED = {**ADAMW, "init_args": {**ADAMW["init_args"], "fused": False}}
MUON = {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.01}}


@pytest.fixture(autouse=True)
def fp16_is_allowed() -> Iterator[None]:
    """Let a run have 16-mixed here."""
    with fp16_on_the_cpu():
        yield


@pytest.fixture
def scaler(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that sets arguments of the runs' torch.amp.GradScaler."""
    return lambda **options: monkeypatch.setattr(
        loss_scaling, "GradScaler", functools.partial(GradScaler, **options)
    )


@pytest.fixture
def linear_dtypes() -> Iterator[set[torch.dtype]]:
    """The dtypes of what linear layers return in training."""
    found: set[torch.dtype] = set()

    def note(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        # the head leaves its product to the loss
        is_linear = isinstance(module, torch.nn.Linear) and not isinstance(module, LossHead)
        if is_linear and torch.is_grad_enabled() and not output.is_meta:
            found.add(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    yield found
    handle.remove()


def column(name: str, out_dir: str = "out") -> list[float]:
    return [float(row[name]) for row in rows(out_dir) if row["loss"]]


def saved_scale(folder: str) -> dict[str, object] | None:
    state = torch.load(Path(folder, "lit_model.pth"), weights_only=True)
    return state["run"].get("loss_scale")


@pytest.mark.parametrize(
    ("precision", "optimizer", "dtype", "allowed"),
    [
        ("16-mixed", ADAMW, torch.float16, 0.01),
        ("16-mixed", MUON, torch.float16, 0.01),
        ("bf16-mixed", ADAMW, torch.bfloat16, 0.04),  # 8 bits of mantissa in place of 11
    ],
    ids=lambda value: value["class_path"] if isinstance(value, dict) else None,
)
def test_the_losses_and_the_balance_are_those_of_float32_but_for_rounding(
    precision: str, optimizer: dict, dtype: torch.dtype, allowed: float, linear_dtypes: set[torch.dtype]
) -> None:
    edit_yaml("train_config.yaml", "optimizer", optimizer)
    stories = ("--eval.interval", 15, "--eval.max_new_tokens", 5)
    flags = ("--max_tokens", 30 * 256, "--train.save_interval", 100, *stories, *BALANCED)
    assert run("--out_dir", "exact", *flags) == 0
    assert linear_dtypes == {torch.float32}
    linear_dtypes.clear()
    assert run("--out_dir", "rounded", *flags, "--precision", precision) == 0
    assert linear_dtypes == {dtype}
    assert losses("exact")[-1] < losses("exact")[0] - 1
    for name in ("loss", "moe/aux_loss/layer_00", "moe/z_loss/layer_01"):
        assert column(name, "rounded") != column(name, "exact")
        assert column(name, "rounded") == pytest.approx(column(name, "exact"), abs=allowed), name
    # later a token whose experts change by rounding changes the norm by percents
    norms = column("grad_norm", "rounded")[:5], column("grad_norm", "exact")[:5]
    assert norms[0] == pytest.approx(norms[1], rel=allowed / 2)
    assert {weight.dtype for weight in weights("rounded/final").values()} == {torch.float32}
    validations = [float(rows(name)[-1]["val_loss"]) for name in ("rounded", "exact")]
    assert validations[0] == pytest.approx(validations[1], abs=allowed)
    assert Path("rounded/logs/stories.csv").read_text(encoding="utf-8").count("Once upon a time") == 2 * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", ["off", "on"])
def test_on_a_gpu_the_losses_are_those_of_float32_but_for_rounding(
    compile: str, linear_dtypes: set[torch.dtype]
) -> None:
    flags = ("--accelerator", "cuda", "--max_tokens", 30 * 256, *BALANCED)
    assert run("--out_dir", "exact", *flags, "--float32_matmul_precision", "highest") == 0
    linear_dtypes.clear()
    assert run("--out_dir", "rounded", *flags, *FP16, "--compile", compile) == 0
    assert compile == "on" or linear_dtypes == {torch.float16}
    assert losses("rounded") == pytest.approx(losses("exact"), abs=0.02)
    assert column("overflow_steps", "rounded")[-1] == 0


def test_micro_batches_add_up_to_the_step_of_one() -> None:
    assert run("--out_dir", "one", "--micro_batch_size", 4, *FP16, "--moe.z_loss_coef", 0.1) == 0
    assert run("--out_dir", "four", "--micro_batch_size", 1, *FP16, "--moe.z_loss_coef", 0.1) == 0
    assert losses("four") == pytest.approx(losses("one"), abs=2e-3)
    assert column("grad_norm", "four") == pytest.approx(column("grad_norm", "one"), rel=5e-3)


@pytest.mark.parametrize("optimizer", [ADAMW, UNFUSED, MUON], ids=["fused", "unfused", "muon"])
def test_a_gradient_that_overflows_costs_its_step_and_half_the_scale(
    optimizer: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_yaml("train_config.yaml", "optimizer", optimizer)
    with gradient_times(math.inf, 6):  # the second micro-batch of step 3
        assert run("--train.save_interval", 1, *FP16, "--moe.bias_update_rate", 0.01) == 0
    said = (
        "step 3: the gradient overflows in fp16 at a loss scale of 65,536, which is now 32,768: step skipped"
    )
    assert said in capsys.readouterr().err
    before, skipped, after = (
        torch.load(f"out/step-0000000{step}/lit_model.pth", weights_only=True) for step in (2, 3, 4)
    )
    assert all(torch.equal(skipped["model"][name], tensor) for name, tensor in before["model"].items())
    for n, moments in before["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(skipped["optimizer"]["state"][n][name], value), name
    assert not all(torch.equal(after["model"][name], tensor) for name, tensor in before["model"].items())
    assert column("loss_scale") == [65536] * 2 + [32768] * 6
    assert column("overflow_steps") == [0] * 2 + [1] * 6
    # it is not the guard's: nothing is wrong with the loss
    assert column("skipped_steps") == [0] * 8
    assert [math.isfinite(norm) for norm in column("grad_norm")] == [True] * 2 + [False] + [True] * 5
    assert all(map(math.isfinite, losses()))


def test_a_scale_that_is_far_too_high_comes_down_and_training_goes_on(
    scaler: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    scaler(init_scale=2.0**33)  # the head's gradient alone is over 65,504 then
    flags = ("--max_tokens", 24 * 256, "--train.lr_warmup_steps", 16, "--guard.max_skipped_steps", 1)
    assert run(*flags, *FP16) == 0
    scales, n_overflows = column("loss_scale"), int(column("overflow_steps")[-1])
    assert 4 < n_overflows < 20 and scales[-1] == 2.0 ** (33 - n_overflows)
    assert losses()[-1] < losses()[0] - 0.3
    assert f"Loss scale {scales[-1]:,g}; {n_overflows} steps overflowed" in capsys.readouterr().out


def test_overflows_at_the_lowest_scale_end_the_run_with_a_way_out(
    scaler: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    scaler(init_scale=4.0)
    with gradient_times(math.inf, *range(5, 99)):  # from step 3 on
        assert run("--train.save_interval", 1, "--guard.max_skipped_steps", 3, *FP16) == 1
    error = capsys.readouterr().err
    assert "at a loss scale of 2, which is now 1: step skipped" in error
    assert (
        "in 3 steps in a row; lower optimizer.init_args.lr or use precision 32-true; continue from" in error
    )
    assert column("skipped_steps")[-1] == 2 and column("overflow_steps")[-1] == 2


def test_a_loss_that_is_no_number_is_the_guard_s_step() -> None:
    with loss_times(math.nan, 6):
        assert run(*FP16) == 0
    assert column("skipped_steps") == [0] * 2 + [1] * 6
    assert column("overflow_steps") == [0] * 8
    assert math.isfinite(losses()[-1])


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
def test_a_resumed_run_goes_on_with_the_scale_and_its_growth_bit_for_bit(
    optimizer: dict, scaler: Callable[..., None]
) -> None:
    edit_yaml("train_config.yaml", "optimizer", optimizer)
    scaler(growth_interval=3)
    flags = ("--max_tokens", 10 * 256, *FP16, *BALANCED, "--moe.bias_update_rate", 0.01)
    with gradient_times(math.inf, 6):  # step 3, from where the scale doubles after steps 6 and 9
        assert run("--out_dir", "whole", *flags) == 0
    assert column("loss_scale", "whole") == [65536] * 2 + [32768] * 3 + [65536] * 3 + [131072] * 2
    assert saved_scale("whole/step-00000004") == {"scale": 32768.0, "growth_tracker": 1, "n_overflows": 1}
    shutil.copytree("whole", "parts")
    for name in ("final", "step-00000008"):
        shutil.rmtree(Path("parts", name))
    assert run("--out_dir", "parts", "--resume", "auto", *flags) == 0
    assert_same_run("parts", "whole")
    assert saved_scale("parts/final") == saved_scale("whole/final")


def test_a_run_in_bf16_mixed_resumes_bit_for_bit() -> None:
    flags = ("--precision", "bf16-mixed", *BALANCED)
    assert run("--out_dir", "whole", *flags) == 0
    shutil.copytree("whole", "parts")
    for name in ("final", "step-00000008"):
        shutil.rmtree(Path("parts", name))
    assert run("--out_dir", "parts", "--resume", "auto", *flags) == 0
    assert_same_run("parts", "whole")
    assert saved_scale("parts/final") is None


def test_a_resumed_run_may_change_its_precision_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--max_tokens", 4 * 256) == 0
    assert saved_scale("out/final") is None
    assert run("--max_tokens", 8 * 256, "--resume", "auto", *FP16) == 0
    assert "precision 32-true -> 16-mixed" in capsys.readouterr().err
    assert [row["loss_scale"] for row in rows() if row["loss"]] == [""] * 4 + ["65536.0"] * 4
    assert saved_scale("out/final") == {"scale": 65536.0, "growth_tracker": 4, "n_overflows": 0}
    assert run("--max_tokens", 12 * 256, "--resume", "auto") == 0
    assert "precision 16-mixed -> 32-true" in capsys.readouterr().err
    assert saved_scale("out/final") is None and losses()[-1] < losses()[0]


@pytest.mark.parametrize("damage", [{"scale": 0.5}, {"scale": "much"}, {"growth_tracker": 2**40}])
def test_a_damaged_scale_is_told(damage: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--max_tokens", 4 * 256, *FP16) == 0
    path = Path("out/final/lit_model.pth")
    state = torch.load(path, weights_only=True)
    state["run"]["loss_scale"] |= damage
    torch.save(state, path)
    Path("out/final/checkpoint.json").unlink()
    capsys.readouterr()
    assert run("--resume", "out/final", "--out_dir", "more", *FP16) in (1, 2)
    error = capsys.readouterr().err
    assert "its training state is damaged: " in error and "Traceback" not in error
