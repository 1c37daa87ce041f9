"""Training in fp16 and bf16 by autocast: the same run as in float32 but for rounding, and the loss scaling.

A user is refused 16-mixed on a CPU. Here it runs there all the same, with the plugin, scaler and optimizers that
run on CUDA.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.runs import (
    BALANCED,
    assert_same_run,
    edit_yaml,
    loss_times,
    losses,
    rows,
    run,
    weights,
)
from torch.nn.modules.module import register_module_forward_hook

from litgpt_moe.training import run as run_module
from litgpt_moe.training.hooks import LoopHooks

pytestmark = pytest.mark.usefixtures("eager", "workspace")

FP16 = ("--precision", "16-mixed")
MUON = {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.01}}


@pytest.fixture(autouse=True)
def fp16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run have 16-mixed here."""
    choose = run_module.training_device

    def choose_fp16_too(accelerator: str, devices: int | str, num_nodes: int, precision: str | None):
        if precision != "16-mixed":
            return choose(accelerator, devices, num_nodes, precision)
        return precision, choose(accelerator, devices, num_nodes, "32-true")[1]

    monkeypatch.setattr(run_module, "training_device", choose_fp16_too)


@pytest.fixture
def linear_dtypes() -> Iterator[set[torch.dtype]]:
    """The dtypes of what the linear layers return."""
    found: set[torch.dtype] = set()

    def note(module: torch.nn.Module, _: object, output: object) -> None:
        if isinstance(module, torch.nn.Linear) and isinstance(output, torch.Tensor) and not output.is_meta:
            found.add(output.dtype)

    handle = register_module_forward_hook(note)
    yield found
    handle.remove()


def test_fp16(linear_dtypes) -> None:
    flags = ("--max_tokens", 40 * 256, *BALANCED)
    assert run("--out_dir", "exact", *flags) == 0
    print(linear_dtypes)
    linear_dtypes.clear()
    assert run("--out_dir", "rounded", *flags, *FP16) == 0
    print(linear_dtypes)
    print(max(abs(a - b) for a, b in zip(losses("exact"), losses("rounded"))))
    print(losses("exact"), losses("rounded"))
    print(rows("rounded")[-2])
    assert 0
