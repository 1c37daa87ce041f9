"""What a run says of itself: at its end, when it was stopped, and when it fails."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from litgpt_moe.locks import FolderInUse
from litgpt_moe.training import summary
from litgpt_moe.training.settings import Settings
from litgpt_moe.training.steps import RunFailed
from litgpt_moe.training.summary import failure, report

LATEST = {"loss": 3.14159, "step": 8, "val_loss": 2.5}


def finished(
    start_step: int = 0,
    step: int = 8,
    ending: str = "",
    latest: dict[str, float] | None = None,
    n_skipped: int = 0,
    rate: float | None = 4.82226,
) -> Any:
    """The hooks of a run of 8 steps of 256 tokens."""
    settings = Settings(out_dir=Path("out"))
    run = SimpleNamespace(settings=settings, data_dir=None, start_step=start_step, demo_data=False)
    run.n_steps, run.tokens_per_step, run.world_size = 8, 256, 1
    return SimpleNamespace(
        run=run,
        step=step,
        ending=ending,
        metrics=SimpleNamespace(latest=LATEST if latest is None else latest),
        judge=SimpleNamespace(guard=SimpleNamespace(n_skipped=n_skipped)),
        clock=SimpleNamespace(overall_steps_per_s=lambda step: rate),
        scaling=None,
        logs=SimpleNamespace(metrics=SimpleNamespace(path=Path("out/logs/csv/metrics.csv"))),
    )


def test_the_report_has_the_figures_of_this_process_and_the_next_commands() -> None:
    text = report(finished(start_step=4), []).replace("\\", "/")
    assert "Trained    1,024 tokens in 4 steps, 1,234 tokens/s with validation and saving\n" in text
    assert "Loss       3.142 in training, 2.500 in validation\n" in text
    assert "Checkpoint out/final\nLog        out/logs/csv/metrics.csv\n" in text
    assert "generate.py --ckpt_dir out/final --prompt" in text and "Skipped" not in text
    assert text.endswith("tools/report.py out")


def test_the_report_leaves_out_what_there_was_not() -> None:
    text = report(finished(start_step=8, latest={}, rate=None, n_skipped=2), [])
    assert "Trained    0 tokens in 0 steps\n" in text and "Loss" not in text
    assert "Skipped    2 steps without a finite gradient" in text


def test_a_stopped_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "final_story", lambda _: pytest.fail("there is no final/"))
    text = report(finished(step=5, ending="SIGTERM"), ["--seed", "1"])
    assert text.startswith("Stopped after step 5 of 8 (SIGTERM). To go on:\n  uv run python run_train.py")
    assert text.endswith(" --seed 1 --resume auto")


class InductorError(RuntimeError):
    """As that of torch._inductor.exc, whose import takes a second."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RunFailed("the loss is nan"), "the loss is nan"),
        (FolderInUse("out: a run is live there"), "out: a run is live there"),
        (RuntimeError("Connection reset by peer"), "another process of this run has ended, see its message"),
        (OSError(errno.ENOSPC, "No space left on device"), "out: the disk is full; make room"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), "out: the disk is full"),
        (PermissionError(errno.EACCES, "no"), "put it right and continue with --resume auto"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "lower data.init_args.num"),
        (
            FileNotFoundError(
                "Caught FileNotFoundError in DataLoader worker process 0.\nTraceback:\n  f()\nno a.bin"
            ),
            "no a.bin; put it right and continue",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory with train.micro_batch_size 4"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
            "--micro_batch_size 2 --resume",
        ),
        (
            InductorError("CppCompileError: it fails\n\nSet TORCHDYNAMO_VERBOSE=1"),
            "(CppCompileError: it fails)",
        ),
    ],
)
def test_a_failure_that_a_user_can_cause_is_one_sentence(error: Exception, expected: str) -> None:
    text = failure(error, finished().run, [])
    assert text is not None and expected in text and "\n" not in text


def test_a_failure_that_only_a_bug_can_cause_keeps_its_traceback() -> None:
    assert failure(RuntimeError("shape mismatch"), finished().run, []) is None
