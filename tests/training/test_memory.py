"""DDP where the plan of a step fits the GPUs, FSDP elsewhere; and what a run is told about its memory."""

import dataclasses

import pytest
import torch

from litgpt_moe.hardware import RESERVED_BYTES, fits
from litgpt_moe.training import memory
from litgpt_moe.training import run as runs
from litgpt_moe.training.loop import refuse_two_strategies
from litgpt_moe.training.memory import (
    choose_strategy,
    out_of_memory,
    planner_of,
    smaller_micro_batches,
)
from litgpt_moe.training.steps import RunFailed

pytestmark = pytest.mark.usefixtures("workspace")


def run_of(*flags: object) -> runs.Run:
    return runs.set_up(["--config", "train_config.yaml", *map(str, flags)])


def test_ddp_is_chosen_where_it_fits_and_fsdp_elsewhere_with_the_reason() -> None:
    run = run_of("--devices", 2, "--global_batch_size", 32, "--micro_batch_size", 16)
    peak = planner_of(run, "cuda").memory(16, accumulates=False, has_buckets=True).peak
    enough = next(size for size in range(RESERVED_BYTES, 2 * RESERVED_BYTES, 1000) if fits(peak, size))
    strategy, reason = choose_strategy(run, enough)
    assert strategy == "ddp" and reason.startswith("its plan fits a GPU's 1.1 GB: weights ")
    assert "buckets" in reason
    strategy, reason = choose_strategy(run, enough - 1000)
    assert strategy == "fsdp" and reason.startswith("DDP does not fit a GPU's 1.1 GB: weights ")
    assert reason.endswith("; DDP fits with train.micro_batch_size 8")
    strategy, reason = choose_strategy(run, RESERVED_BYTES)
    assert strategy == "fsdp" and "; DDP" not in reason


@pytest.mark.parametrize(
    ("flags", "gpu_bytes", "expected"),
    [
        ((), 1, ("auto", "one device")),
        (("--devices", 2), None, ("ddp", "FSDP needs GPUs")),
        (("--devices", 2, "--strategy", "ddp"), 1, ("ddp", "strategy: ddp")),
        (("--devices", 2, "--optimizer", "torch.optim.Muon"), 1, ("ddp", "Muon needs whole matrices")),
    ],
)
def test_the_choice_is_made_without_a_plan_where_it_is_clear(
    flags: tuple[object, ...], gpu_bytes: int | None, expected: tuple[str, str]
) -> None:
    assert choose_strategy(run_of(*flags), gpu_bytes) == expected


def test_without_a_plan_it_is_fsdp_and_out_of_memory_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "make_optimizer", lambda *_: 1 / 0)
    assert choose_strategy(run_of("--devices", 2), 10**12) == ("fsdp", "its memory cannot be planned")
    assert out_of_memory(run_of(), []).startswith("out of memory with train.micro_batch_size 2; --activation")


def test_what_fits_is_proposed_when_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--global_batch_size", 64, "--micro_batch_size", 64, "--max_tokens", 8192)
    run = run_of(*sizes, "--activation_checkpointing")
    small = planner_of(run, "cpu").memory(4).peak
    has = next(size for size in range(RESERVED_BYTES, 2 * RESERVED_BYTES, 1000) if fits(small, size))
    monkeypatch.setattr(memory, "memory_bytes", lambda: has)
    told = out_of_memory(run, ["--seed", "1"])
    beginning = "out of memory with train.micro_batch_size 64 (MoE-tiny, 21.7K parameters; planned: weights "
    assert told.startswith(beginning)
    assert told.endswith(
        ", of 1.1); with less memory it goes on by: uv run python run_train.py --seed 1 "
        "--micro_batch_size 4 --resume auto"
    )


def test_fsdp_is_taken_when_it_is_asked_for() -> None:
    run = run_of("--devices", 2)
    asked = dataclasses.replace(run, settings=dataclasses.replace(run.settings, strategy="fsdp"))
    assert choose_strategy(asked, 10**12) == ("fsdp", "strategy: fsdp")


def test_smaller_micro_batches_divide_the_global_batch() -> None:
    run = run_of("--global_batch_size", 24, "--micro_batch_size", 12, "--devices", 2)
    assert smaller_micro_batches(run) == [6, 4, 3, 2, 1]
    assert smaller_micro_batches(run_of("--micro_batch_size", 1)) == []


class OneOfTwo:
    """A Fabric of two ranks, of which the other has chosen FSDP."""

    device, world_size = torch.device("cpu"), 2

    def all_reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        return tensor + 1


def test_machines_that_choose_differently_do_not_train() -> None:
    with pytest.raises(RunFailed, match="choose --strategy ddp or --strategy fsdp"):
        refuse_two_strategies(OneOfTwo(), "ddp")  # type: ignore[arg-type]
    refuse_two_strategies(OneOfTwo(), "fsdp")  # type: ignore[arg-type]
