"""The run on W&B: what fails there is reported, and training goes on (with a server: test_lineage.py)."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wandb import errors

from litgpt_moe.checkpoints.layout import CheckpointArgs
from litgpt_moe.training import wandb_log
from litgpt_moe.training.settings import Settings
from litgpt_moe.training.steps import RunFailed
from litgpt_moe.training.wandb_log import WandbLog, connect, run_id


class BrokenRun:
    """A W&B run whose every call fails."""

    def __getattr__(self, name: str) -> object:
        raise BrokenPipeError("the service has ended")


class Recorder:
    """Lightning's logger and W&B's run in one, which remember what they get."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.finished = False

    @property
    def experiment(self) -> "Recorder":
        return self

    def log_metrics(self, metrics: dict[str, Any], step: int | None) -> None:
        self.rows.append(metrics)

    def finish(self) -> None:
        self.finished = True


def a_run(out_dir: Path, resume: object = None, is_second_try: bool = False, **settings: Any) -> Any:
    config = SimpleNamespace(name="MoE-tiny")
    return SimpleNamespace(
        settings=Settings(out_dir=out_dir, **settings),
        data_dir=None,
        config=config,
        resume=resume,
        is_second_try=is_second_try,
        tokens_at=lambda step: step * 256,
    )


def test_a_wandb_that_fails_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(wandb_log, "connect", lambda *_: BrokenRun())
    log = WandbLog(a_run(tmp_path), told.append)
    for step in range(3):
        log.log_metrics({"loss": 1.0}, step)
    log.finalize("")
    assert len(told) == 1 and re.search(r"W&B is lost \(the service has ended\); training goes on", told[0])


def test_without_a_login_the_run_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb_log, "choose_logger", refuse)
    with pytest.raises(RunFailed, match=r"wandb login.*WANDB_MODE=offline"):
        connect(a_run(tmp_path), print)


def test_without_a_network_the_run_is_recorded_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def choose(*_: object, mode: str = "online", **__: object) -> Recorder:
        if mode == "online":
            raise errors.CommError("no route to host\nand much more")
        return Recorder()

    monkeypatch.setattr(wandb_log, "choose_logger", choose)
    assert isinstance(connect(a_run(tmp_path), told.append), Recorder)
    assert told == ["Warning: no W&B (no route to host): recording offline, for wandb sync"]


def test_another_process_connects_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(wandb_log, "connect", lambda *_: pytest.fail("rank 1 connects"))
    log = WandbLog(a_run(tmp_path), print)
    log.log_metrics({"loss": 1.0}, 1)
    log.finalize("")


@pytest.mark.parametrize(
    ("to_wandb", "expected"),
    [
        ("none", []),
        ("final", ["final"]),
        ("kept", ["step-00000004", "final"]),  # step 6 is deleted later
    ],
)
def test_the_checkpoints_that_the_settings_want_are_sent_with_what_they_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_wandb: Any, expected: list[str]
) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    recorder = Recorder()
    monkeypatch.setattr(wandb_log, "connect", lambda *_: recorder)
    monkeypatch.setattr(
        wandb_log,
        "log_checkpoint",
        lambda experiment, folder, name, metadata: sent.append((folder.name, metadata)),
    )
    args = CheckpointArgs(keep_last=1, keep_every=4, to_wandb=to_wandb)
    log = WandbLog(a_run(tmp_path, checkpoints=args), print)
    log.log_metrics({"loss": 3.0, "step": 4}, 4)
    for name, step in (("step-00000004", 4), ("step-00000006", 6), ("final", 8)):
        log.log_checkpoint(tmp_path / name, step)
    log.finalize("")
    assert [name for name, _ in sent] == expected
    assert all(metadata["loss"] == 3.0 for _, metadata in sent)
    assert [metadata["tokens"] for _, metadata in sent][-1:] == ([2048] if expected else [])
    assert recorder.finished and recorder.rows == [{"loss": 3.0, "step": 4}]


def test_the_id_of_a_run_is_kept_over_its_resumes_and_tries_and_new_otherwise(tmp_path: Path) -> None:
    first = run_id(a_run(tmp_path))
    assert run_id(a_run(tmp_path, resume=object())) == first
    assert run_id(a_run(tmp_path, is_second_try=True)) == first
    assert run_id(a_run(tmp_path)) != first
    assert re.fullmatch(r"[0-9a-f]{8}", first)
    assert [path.name for path in tmp_path.iterdir()] == [".wandb_run_id"]
