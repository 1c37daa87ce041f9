"""Where training makes the host wait for the device: once a step, and at a row of the log."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import BALANCED, rows, run

pytestmark = pytest.mark.usefixtures("eager", "workspace")

# each reads a tensor's values, for which the host would wait if the tensor lay on a GPU
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")
# These read what lies on the CPU in every run: a batch before it is on the device, statistics after they
# were; the last four act when the steps are done.
OF_THE_CPU = ("data/batches.py", "kernels/cpu.py", "balance.py")
OF_THE_CPU += ("checkpoints/", "generation/", "kernels/decode.py", "tokenizer.py")
MICRO_BATCHES, STEPS, ROWS = 16, 8, 2


def place_of(frame: Any) -> tuple[str, str]:
    while "/torch/" in (path := Path(frame.f_code.co_filename).as_posix()):
        frame = frame.f_back
    return "/".join(path.split("/")[-3:]), frame.f_code.co_name


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each function has read the values of a tensor."""
    counts: Counter[tuple[str, str]] = Counter()

    def watch(name: str) -> None:
        read = getattr(torch.Tensor, name)

        def watched(*args: Any, **options: Any) -> Any:
            counts[place_of(sys._getframe(1))] += 1
            return read(*args, **options)

        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in READS:
        watch(name)
    return counts


def test_the_host_waits_once_a_step_and_at_a_row_of_the_log(reads: Counter[tuple[str, str]]) -> None:
    flags = ("--train.log_interval", 4, "--train.save_interval", 100, "--eval.interval", 100)
    assert run(*flags, *BALANCED, "--eval.final_validation", "false") == 0
    assert len(rows()) == ROWS
    assert reads["litgpt_moe/data/batches.py", "_checked"] >= MICRO_BATCHES
    during = {place: n for place, n in reads.items() if not any(part in place[0] for part in OF_THE_CPU)}
    assert during == {
        ("litgpt_moe/training/progress.py", "end"): STEPS,  # loss and norm, for the guard
        ("site-packages/litgpt/pretrain.py", "fit"): ROWS,
        ("litgpt_moe/training/hooks.py", "complete"): 2
        * ROWS,  # statistics: `cpu`, then `tolist` of the copy
        ("litgpt_moe/training/loop.py", "refuse_two_strategies"): 1,  # when the run is launched
        ("litgpt_moe/training/hooks.py", "validate"): 1,  # the trial before the first step
    }
