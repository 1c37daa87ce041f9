"""What a run says of itself: at its end, when it was stopped, and when it fails."""

import errno
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from litgpt_moe.files import FolderInUse
from litgpt_moe.training import summary
from litgpt_moe.training.settings import Settings
from litgpt_moe.training.steps import RunFailed
from litgpt_moe.training.summary import Result, failure, report

RESULT: dict[str, Any] = {
    "step": 8,
    "ending": "",
    "loss": 3.14159,
    "val_loss": 2.5,
    "n_skipped": 0,
    "tokens_per_s": 1234.5,
    "log": Path("out/logs/csv/metrics.csv"),
}


def a_run(**values: Any) -> Any:
    settings = Settings(out_dir=Path("out"))
    facts = {"settings": settings, "data": None, "start_step": 0, "n_steps": 8, "tokens_per_step": 256}
    return SimpleNamespace(**{**facts, "demo_data": False, **values})


def test_the_report_has_the_figures_of_this_process_and_the_next_commands() -> None:
    text = report(a_run(start_step=4), Result(**RESULT), "unused").replace("\\", "/")
    assert "Trained    1,024 tokens in 4 steps, 1,234 tokens/s with validation and saving\n" in text
    assert "Loss       3.142 in training, 2.500 in validation\n" in text
    assert "Checkpoint out/final\nLog        out/logs/csv/metrics.csv\n" in text
    assert "generate.py --ckpt_dir out/final --prompt" in text and "Skipped" not in text
    assert text.endswith("tools/report.py out")


def test_the_report_leaves_out_what_there_was_not() -> None:
    none = {"loss": math.nan, "val_loss": None, "tokens_per_s": None, "n_skipped": 2}
    text = report(a_run(start_step=8), Result(**RESULT | none), "unused")
    assert "Trained    0 tokens in 0 steps\n" in text and "Loss" not in text
    assert "Skipped    2 steps without a finite gradient" in text


def test_a_stopped_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "final_story", lambda _: pytest.fail("there is no final/"))
    text = report(a_run(), Result(**RESULT | {"step": 5, "ending": "SIGTERM"}), "run_train.py --resume auto")
    assert text == "Stopped after step 5 of 8 (SIGTERM). To go on:\n  run_train.py --resume auto"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RunFailed("the loss is nan"), "the loss is nan"),
        (FolderInUse("out: a run is live there"), "out: a run is live there"),
        (RuntimeError("Connection reset by peer"), "another process of this run has ended, see its message"),
        (OSError(errno.ENOSPC, "No space left on device"), "out: the disk is full; make room"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), "out: the disk is full"),
        (PermissionError(errno.EACCES, "no"), "put it right and continue with --resume auto"),
    ],
)
def test_a_failure_that_a_user_can_cause_is_one_sentence(error: Exception, expected: str) -> None:
    text = failure(error, Path("out"))
    assert text is not None and expected in text and "\n" not in text


def test_a_failure_that_only_a_bug_can_cause_keeps_its_traceback() -> None:
    assert failure(RuntimeError("shape mismatch"), Path("out")) is None
