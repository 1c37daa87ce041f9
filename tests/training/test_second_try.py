"""A run whose GPU has too little memory for the first step starts anew once, with half the micro-batch."""

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import BALANCED, assert_same_run, go_back, run
from litgpt.model import GPT

pytestmark = pytest.mark.usefixtures("eager", "workspace")

TOLD = """The GPU's memory ran out before the first step with train.micro_batch_size 4: starting anew with 2
and twice the gradient accumulation; the balance losses are then means over the smaller micro-batches."""


def run_out() -> None:
    # the CUDA allocator's error; a new one, since a traceback holds the tensors of its frames
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TB")


def test_the_second_try_is_the_run_with_half_the_micro_batch_and_nothing_of_the_first_is_left(
    at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*BALANCED, "--eval.initial_validation", True)
    assert run("--out_dir", "half", *flags, "--micro_batch_size", 2) == 0
    capsys.readouterr()
    first: list[weakref.ref] = []
    left: list[object] = []

    def run_out_of_memory() -> None:
        # type(): isinstance would touch deprecated objects
        first.extend(weakref.ref(item) for item in gc.get_objects() if type(item) is GPT)
        run_out()

    def look() -> None:
        left.extend(model for model in (reference() for reference in first) if model is not None)
        left.extend(thread for thread in threading.enumerate() if thread.name == "checkpoint")
        assert Path("out/.run.json").is_file()  # the lock is held all the time

    at_step(1, run_out_of_memory)
    at_step(2, look)
    assert run(*flags, "--micro_batch_size", 4) == 0
    assert first and left == []
    assert_same_run("out", "half")
    assert capsys.readouterr().err.count(TOLD.replace("\n", " ")) == 1
    saved = yaml.safe_load(Path("out/final/train_config.yaml").read_text(encoding="utf-8"))
    assert saved["train"]["micro_batch_size"] == 2
    assert not Path("out/.run.json").exists()


def test_a_resumed_run_and_one_from_given_weights_may_try_again_too(at_step: Callable) -> None:
    assert run("--out_dir", "half", "--micro_batch_size", 2) == 0
    shutil.copytree("half", "out")
    go_back(4, "out")
    at_step(1, run_out)
    assert run("--resume", "auto", "--micro_batch_size", 4) == 0
    assert_same_run("out", "half")

    more = ("--initial_checkpoint_dir", "half/final", "--max_tokens", 512)
    assert run("--out_dir", "more_half", *more, "--micro_batch_size", 2) == 0
    at_step(1, run_out)
    assert run("--out_dir", "more", *more, "--micro_batch_size", 4) == 0
    assert_same_run("more", "more_half")


@pytest.mark.parametrize(
    ("steps", "flags", "told"),
    [
        # later it may be another program that took the memory
        ((2,), ("--micro_batch_size", 4), "with train.micro_batch_size 4 "),
        ((1, 2), ("--micro_batch_size", 4), "with train.micro_batch_size 2 "),
        ((1,), ("--micro_batch_size", 1), "with train.micro_batch_size 1 "),
    ],
)
def test_later_or_again_or_without_a_half_it_is_an_error(
    steps: tuple[int, ...], flags: tuple, told: str, at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in steps:
        at_step(step, run_out)
    assert run(*flags) == 1
    said = capsys.readouterr().err
    assert f"error: out of memory {told}" in said and "Traceback" not in said
    assert said.count("starting anew") == len(steps) - 1
    assert not Path("out/.run.json").exists()


def test_tensorboard_has_the_second_try_alone(at_step: Callable) -> None:
    at_step(1, run_out)
    assert run("--logger_name", "tensorboard", "--micro_batch_size", 4, "--max_tokens", 512) == 0
    assert [path.name for path in Path("out/logs").glob("*/version_*")] == ["version_0"]
