"""A run whose learning rate follows the clock: it is down when the time is up, over interruptions too."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from helpers.runs import go_back, losses, refusal, rows, run

from litgpt_moe.checkpoints.reader import checkpoint_flaw
from litgpt_moe.training.clock import NO_TIME, TimeBudget, UsedTime, used_time
from litgpt_moe.training.schedule import rate_at_share
from litgpt_moe.training.settings import ScheduleArgs, Settings, TrainArgs

TIMED = ScheduleArgs(progress="time")


def settings(limit_s: float | None = 100.0, schedule: ScheduleArgs = TIMED) -> Settings:
    return Settings(train=TrainArgs(max_time=limit_s), schedule=schedule)


# --- the rate, worked out by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # from 1.0 to 0.2; cosine: 0.2 + 0.4 (1 + cos(pi share))
        ("cosine", {0.25: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.5: 0.6, 1.0: 0.2}),
        # the last 40% of the time go down: 0.2 + 0.8 (1 - sqrt(done))
        ("wsd", {0.25: 1.0, 0.6: 1.0, 0.7: 0.2 + 0.8 * 0.5, 1.0: 0.2}),
        ("constant", {0.25: 1.0, 1.0: 1.0}),
    ],
)
def test_the_rate_at_a_share_of_the_time_is_the_one_worked_out_by_hand(
    name: Literal["cosine", "wsd", "constant"], expected: dict[float, float]
) -> None:
    args = ScheduleArgs(name=name, decay_fraction=0.4)
    found = {share: rate_at_share(args, share, 100, 10, peak=1.0, lowest=0.2) for share in expected}
    assert found == pytest.approx(expected)


def test_the_warm_up_goes_by_steps_and_does_not_hold_the_rate_up_at_the_end() -> None:
    rates = [rate_at_share(TIMED, step / 20, step, 10, peak=1.0, lowest=0.0) for step in range(1, 21)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert max(rates) == rates[6] and rates[7:] == sorted(rates[7:], reverse=True) and rates[-1] == 0.0


def test_no_share_of_a_decay_that_takes_no_time_fails() -> None:
    assert rate_at_share(ScheduleArgs(name="wsd", decay_fraction=0.0), 1.0, 5, 0, 1.0, 0.2) == 1.0


# --- the time -----------------------------------------------------------------------------------------------


def test_the_time_for_steps_ends_where_no_other_fits_before_the_last_validation_and_save() -> None:
    budget = TimeBudget(settings(), began=1000.0, before=UsedTime(30.0))
    budget.end_step(50.0)  # the first one prepares much
    budget.end_step(2.0)
    # 100 s but 7 for the rest, and 1.5 steps
    assert budget.share(1015.0, last_s=7.0) == pytest.approx(45 / 90)
    # a validation that is due before the next step counts where it decides
    assert budget.share(1015.0, last_s=7.0, next_s=44.0) == pytest.approx(45 / 90)
    assert budget.share(1015.0, last_s=7.0, next_s=45.0) == 1.0
    assert not budget.is_up and budget.left_s(1015.0) == pytest.approx(55.0)
    assert budget.share(1060.0, last_s=7.0) == 1.0
    assert budget.settle(1.0) == 1.0 and budget.is_up


def test_the_share_never_falls() -> None:
    budget = TimeBudget(settings(), began=0.0, before=NO_TIME)
    assert budget.settle(budget.share(40.0, last_s=20.0)) == pytest.approx(0.5)
    # the validation took much less than was thought
    assert budget.share(41.0, last_s=1.0) == pytest.approx(0.5)


def test_without_time_for_a_step_the_first_is_the_last() -> None:
    budget = TimeBudget(settings(5.0), began=0.0, before=NO_TIME)
    assert budget.share(1.0, last_s=10.0) == 1.0


def test_by_tokens_the_time_is_only_counted() -> None:
    budget = TimeBudget(settings(schedule=ScheduleArgs()), began=0.0, before=UsedTime(5.0))
    assert budget.share(1e9, 0.0) == 0.0 and budget.settle(0.0) is None and not budget.is_up
    assert budget.left_s(3.0) is None and budget.state_dict(3.0) == {"used_s": 8.0, "share": 0.0}


def opened(state: dict[str, Any], **saved: object) -> Any:
    return SimpleNamespace(folder=Path("out/step-1"), state={"run": state}, settings=saved)


def test_the_time_in_a_checkpoint_goes_on_with_its_share_where_the_limit_is_the_same() -> None:
    state = {"budget": {"used_s": 40.0, "share": 0.5}, "time_s": 30.0}
    same = {"schedule.progress": "time", "train.max_time": 100.0}
    assert used_time(opened(state, **same), settings()) == UsedTime(40.0, 0.5)
    assert used_time(opened(state, **same), settings(200.0)) == UsedTime(40.0)
    assert used_time(opened(state), settings(schedule=ScheduleArgs())) == UsedTime(40.0)
    # earlier versions recorded the time of training alone; LitGPT's own loop none
    assert used_time(opened({"time_s": 30.0}), settings()) == UsedTime(30.0)
    assert used_time(opened({}), settings()) == NO_TIME
    told = r"out.step-1 is past the end of the run: it has used 40 s, and train\.max_time is 20; raise that"
    with pytest.raises(ValueError, match=told):
        used_time(opened(state, **same), settings(20.0))


# --- runs ---------------------------------------------------------------------------------------------------

# far more tokens than fit
BY_TIME = ("--schedule.progress", "time", "--max_tokens", "1B", "--train.lr_warmup_steps", 0)


@pytest.fixture
def second_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes a second by the clock of the budget, and nothing else any time."""
    monkeypatch.setattr(TimeBudget, "used_s", lambda self, _: self.before.seconds + self._n_steps)
    monkeypatch.setattr("litgpt_moe.training.hooks.LoopHooks.ahead_s", (0.0, 0.0))
    monkeypatch.setattr(TimeBudget, "end_step", lambda self, _: setattr(self, "_n_steps", self._n_steps + 1))


def validated(out_dir: str) -> list[str]:
    return [row["step"] for row in rows(out_dir) if row["val_loss"]]


def rates(out_dir: str) -> list[float]:
    return [float(row["learning_rate"]) for row in rows(out_dir) if row["loss"]]


@pytest.mark.usefixtures("eager", "workspace", "second_a_step")
def test_the_rate_is_down_when_the_time_is_up_and_the_run_is_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    by_time = (*BY_TIME, "--train.max_time", 8, "--eval.interval", 3)
    assert run("--out_dir", "whole", *by_time) == 0
    told = capsys.readouterr()
    assert "Run     0:00:08 in all, at most 3,906,250 steps" in told.err
    assert "Trained    2,304 tokens in 9 steps" in told.out and "A story from it:" in told.out
    found = rates("whole")
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(0.01)
    assert found[-1] == pytest.approx(1e-4) and found[4] == pytest.approx((0.01 + 1e-4) / 2)
    # LitGPT's loop would validate twice after the last one, for which no time is kept
    assert validated("whole") == ["3", "6", "9"]
    # interrupted after step 4, it goes on with the time that was left
    assert run(*by_time, "--train.save_interval", 4) == 0
    go_back(4, "out")
    assert run(*by_time, "--resume", "auto") == 0
    assert rates("out") == found and losses("out") == losses("whole")
    assert validated("out") == validated("whole")
    before = rows("out")
    assert run(*by_time, "--resume", "auto") == 0
    assert rows("out") == before
    assert checkpoint_flaw(Path("out/final")) is None


@pytest.mark.usefixtures("eager", "workspace", "second_a_step")
def test_a_run_whose_time_is_up_goes_on_with_more_of_it_only(capsys: pytest.CaptureFixture[str]) -> None:
    by_time = [*BY_TIME, "--train.save_interval", 100]
    assert run(*by_time, "--train.max_time", 4) == 0
    before = Path("out/final/lit_model.pth").stat().st_mtime_ns, rows()
    assert run(*by_time, "--train.max_time", 4, "--resume", "auto") == 0
    assert (Path("out/final/lit_model.pth").stat().st_mtime_ns, rows()) == before
    assert "out/final is at the end of train.max_time; to train on, raise that." in capsys.readouterr().err
    assert run(*by_time, "--train.max_time", 2, "--resume", "auto") == 2
    assert "is past the end of the run: it has used 5 s, and train.max_time is 2" in capsys.readouterr().err
    assert run(*by_time, "--train.max_time", 8, "--resume", "auto") == 0
    told = capsys.readouterr().err
    assert "of a run of 4.0 s, of which it has used 5, now train.max_time makes it 8 s" in told
    assert len(rates("out")) == 9 and rates("out")[-1] == pytest.approx(1e-4)


@pytest.mark.usefixtures("eager", "workspace")
def test_tokens_that_are_used_up_first_bring_the_rate_down_too() -> None:
    assert run("--schedule.progress", "time", "--train.max_time", "1h") == 0
    assert len(rates("out")) == 8 and rates("out")[-1] == pytest.approx(1e-4)


@pytest.mark.usefixtures("workspace")
def test_the_clock_needs_a_time() -> None:
    told = "schedule.progress is time, which needs the time; set it by --train.max_time 3h, or use tokens"
    assert refusal("--schedule.progress", "time") == f"--schedule.progress: {told}"
