"""The ways into LitGPT's loop: what is replaced and put back, which Fabric, and what a step costs."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import litgpt.model
import pytest
import torch
from helpers.runs import run
from lightning.fabric.strategies import SingleDeviceStrategy
from litgpt import pretrain
from torch._inductor import config as inductor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.torch_version import TorchVersion

from litgpt_moe.flags import normalize_flags
from litgpt_moe.training import loop
from litgpt_moe.training.hooks import LoopHooks
from litgpt_moe.training.loop import make_fabric, replaced_functions, set_up_torch
from litgpt_moe.training.loss_scaling import MixedLossScaling, ShardedLossScaling
from litgpt_moe.training.run import set_up, to_litgpt
from litgpt_moe.training.settings import plain_settings
from litgpt_moe.training.sharding import ShardedStrategy
from litgpt_moe.training.steps import StopSignals
from litgpt_moe.training.summary import describe

pytestmark = pytest.mark.usefixtures("eager", "workspace")

REPLACED = (
    "save_checkpoint",
    "validate",
    "get_dataloaders",
    "instantiate_torch_optimizer",
    "chunked_cross_entropy",
)


def hooks_of(*flags: object) -> LoopHooks:
    run = set_up(normalize_flags(["--config", "train_config.yaml", *map(str, flags)]))
    return LoopHooks(run, StopSignals(), *to_litgpt(run.settings))


def test_the_replaced_functions_are_back_afterwards_even_after_an_error() -> None:
    before = [getattr(pretrain, name) for name in REPLACED] + [torch.compile]
    with pytest.raises(RuntimeError, match="in the loop"), replaced_functions(hooks_of(), compiled=False):
        during = [getattr(pretrain, name) for name in REPLACED] + [torch.compile]
        assert all(one is not other for one, other in zip(before, during, strict=True))
        raise RuntimeError("in the loop")
    assert [getattr(pretrain, name) for name in REPLACED] + [torch.compile] == before


@pytest.mark.parametrize("compile", ["on", "off"])
def test_a_compiled_run_goes_without_the_fusion_that_gives_wrong_gradients(compile: str) -> None:
    settings = set_up(["--config=train_config.yaml", f"--compile={compile}"]).settings
    with inductor.patch({"triton.mix_order_reduction": True}):
        set_up_torch(settings, torch.device("cpu"))
        is_wrong = TorchVersion(torch.__version__) < "2.14"
        assert inductor.triton.mix_order_reduction == (compile == "off" or not is_wrong)


def test_only_the_model_is_left_uncompiled() -> None:
    hooks, compiled = hooks_of(), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", lambda model=None, **_: compiled.append(model) or model)
        with replaced_functions(hooks, compiled=False):
            model, function = litgpt.GPT(hooks.run.config), torch.relu
            assert torch.compile(model) is model and torch.compile(function) is function
    assert compiled == [function]


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_the_chosen_strategy_is_what_fabric_gets(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = hooks_of("--devices", 2)
    made: dict[str, Any] = {}
    monkeypatch.setattr(loop, "TrainingFabric", lambda hooks, **options: made.update(options))
    make_fabric(hooks.run, hooks, [], strategy)
    assert type(made["strategy"]) is ShardedStrategy if strategy == "fsdp" else made["strategy"] == strategy
    # FSDP's strategy saves by itself, all others by a plugin
    assert len(made["plugins"]) == (strategy != "fsdp")
    assert made["devices"] == 2


@pytest.mark.parametrize(
    ("accelerator", "devices", "kind"),
    [("auto", 1, MixedLossScaling), ("cuda", 2, ShardedLossScaling), ("cpu", 2, MixedLossScaling)],
)
def test_fp16_comes_with_loss_scaling_on_the_device_of_the_run(
    accelerator: Literal["auto", "cuda", "cpu"], devices: int, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = hooks_of()
    settings = dataclasses.replace(hooks.run.settings, accelerator=accelerator)
    run = dataclasses.replace(hooks.run, settings=settings, precision="16-mixed", devices=devices)
    monkeypatch.setattr(loop, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made: dict[str, Any] = {}
    monkeypatch.setattr(loop, "TrainingFabric", lambda hooks, **options: made.update(options))
    make_fabric(run, hooks, [], "fsdp" if kind is ShardedLossScaling else "auto")
    plugin = made["plugins"][-1]
    assert type(plugin) is kind and made["precision"] is None
    assert plugin.scaler.is_enabled() and plugin.scaler._device == accelerator.replace("auto", "cuda")
    assert type(plugin.scaler) is (ShardedGradScaler if kind is ShardedLossScaling else GradScaler)


@pytest.mark.parametrize(
    ("accelerator", "cuda", "expected"),
    [("auto", False, "cpu"), ("auto", True, "auto"), ("mps", False, "mps"), ("gpu", True, "cuda")],
)
def test_on_a_mac_only_who_asks_for_mps_gets_it(
    accelerator: str, cuda: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    hooks = hooks_of()
    settings = dataclasses.replace(hooks.run.settings, accelerator=accelerator)
    monkeypatch.setattr(loop, "has_cuda", lambda: cuda)
    made: dict[str, Any] = {}
    monkeypatch.setattr(loop, "TrainingFabric", lambda hooks, **options: made.update(options))
    make_fabric(dataclasses.replace(hooks.run, settings=settings), hooks, [], "auto")
    assert made["accelerator"] == expected
    device = torch.device(expected.replace("auto", "cuda"))
    said = describe(hooks.run, device, "eager", "compile: off")
    assert ("try it by --accelerator mps" in said) == (expected == "cpu")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An item for each model that is built."""
    built, init = [], litgpt.model.GPT.__init__

    def counted(self: Any, *args: Any, **options: Any) -> None:
        built.append(1)
        init(self, *args, **options)

    monkeypatch.setattr(litgpt.model.GPT, "__init__", counted)
    return built


def test_a_resumed_run_builds_one_model_in_its_set_up_and_one_for_its_story(built: list[int]) -> None:
    assert run("--max_tokens", 4 * 256) == 0
    built.clear()
    set_up(["--config", "train_config.yaml", "--resume", "auto"])
    assert len(built) == 1
    built.clear()
    assert run("--resume", "auto") == 0
    # one for both, and two in LitGPT's loop: the one that is trained, and the one whose FLOPs are counted
    assert len(built) == 1 + 2 + 1


def test_a_run_from_the_weights_of_another_builds_one_model_in_its_set_up(built: list[int]) -> None:
    assert run("--max_tokens", 4 * 256) == 0
    built.clear()
    flags = ["--initial_checkpoint_dir", "out/final", "--out_dir", "next"]
    assert set_up(["--config", "train_config.yaml", *flags]).initial is not None
    assert len(built) == 1


def test_a_time_limit_costs_no_model_a_step(built: list[int]) -> None:
    assert run("--out_dir", "no_limit", "--train.save_interval", 100) == 0
    n_without = len(built)
    assert run("--out_dir", "limit", "--train.save_interval", 100, "--train.max_time", 10**6) == 0
    assert len(built) - n_without == n_without


def test_a_run_that_ends_early_changes_litgpt_s_settings_and_not_its_own() -> None:
    hooks = hooks_of()
    before = plain_settings(hooks.run.settings)
    hooks.judge.stops.reason = "SIGTERM"
    optimizer = SimpleNamespace(defaults={"lr": 0.01}, param_groups=[{"lr": 0.0}])
    hooks.fabric = SimpleNamespace(strategy=SingleDeviceStrategy())
    hooks.before_step(optimizer, torch.tensor(1.0))
    assert hooks.ending == "SIGTERM" and hooks.train_args.save_interval == 1
    assert hooks.run.settings.train.save_interval == 4
    assert plain_settings(hooks.run.settings) == before


def test_moments_of_another_size_are_refused_before_a_step_writes_beyond_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--max_tokens", 4 * 256) == 0
    path = Path("out/final/lit_model.pth")
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(state, path)
    Path("out/final/checkpoint.json").unlink()
    capsys.readouterr()
    assert run("--resume", "out/final", "--out_dir", "more") == 1
    assert "its training state is damaged: optimizer.state has a exp_avg of (1,)" in capsys.readouterr().err
