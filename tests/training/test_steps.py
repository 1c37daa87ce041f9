"""What is decided at a step: a skip, a spike, the end or failure of the run; signals and the time limit."""

import math
import os
import signal

import pytest

from litgpt_moe.checkpoints.layout import CheckpointArgs
from litgpt_moe.training import steps
from litgpt_moe.training.guard import Spike
from litgpt_moe.training.settings import GuardArgs, Settings, TrainArgs
from litgpt_moe.training.steps import Judge, StopSignals, Verdict


def judge(
    stops: StopSignals | None = None,
    limit_s: float | None = None,
    stops_on_full_disk: bool = False,
    world_size: int = 1,
) -> Judge:
    settings = Settings(
        train=TrainArgs(max_time=limit_s),
        guard=GuardArgs(max_skipped_steps=3),
        checkpoints=CheckpointArgs(on_full_disk="stop" if stops_on_full_disk else "continue"),
    )
    return Judge(settings, 100.0, stops or StopSignals(), world_size)


def vote(judge: Judge, now: float = 100.0, must_fail: bool = False) -> int:
    return judge.vote(now, step_s=2.0, save_s=1.0, must_fail=must_fail)


def test_a_step_with_finite_figures_goes_through() -> None:
    assert judge().verdict(2.0, 1.0, votes=0, failed_save=None) == Verdict()


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_step_without_finite_figures_is_skipped_and_the_third_in_a_row_gives_up(
    loss: float, norm: float
) -> None:
    one = judge()
    found = [one.verdict(loss, norm, 0, None) for _ in range(2)]
    assert found == [Verdict(skip=True)] * 2
    assert one.verdict(1.0, 1.0, 0, None) == Verdict()
    found = [one.verdict(loss, norm, 0, None) for _ in range(3)]
    assert found == [Verdict(skip=True), Verdict(skip=True), Verdict(skip=True, give_up=True)]
    assert one.guard.n_skipped == 5


def test_a_spike_is_reported_and_the_step_goes_through() -> None:
    one = judge()
    for loss in [3.0, 5.0] * 16:
        assert one.verdict(loss, 1.0, 0, None).spike is None
    assert one.verdict(20.0, 1.0, 0, None) == Verdict(spike=Spike(4.0, 1.0))


def test_a_skipped_step_is_no_spike_and_not_remembered() -> None:
    one = judge()
    for _ in range(40):
        one.verdict(math.inf, 1.0, 0, None)
    assert one.guard.losses == []


# --- the end of a run ---------------------------------------------------------------------------------------


def test_a_signal_ends_the_run_after_its_step() -> None:
    with StopSignals() as stops:
        one = judge(stops)
        assert vote(one) == 0
        signal.raise_signal(signal.SIGTERM)
        assert vote(one) == 1
    assert one.verdict(1.0, 1.0, votes=1, failed_save=None) == Verdict(end="SIGTERM")


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses with which the process would have left at once."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


def test_a_second_signal_leaves_at_once(left: list[int]) -> None:
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
        assert left == []
        signal.raise_signal(signal.SIGTERM)
    assert left == [128 + signal.SIGTERM]


def test_one_request_that_comes_twice_is_one(left: list[int]) -> None:
    # a process group gets SIGTERM, and `uv run` passes its own one on to us
    with StopSignals() as stops:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert left == [] and stops.reason == "SIGTERM"
        stops._first_at -= 2 * steps.ECHO_S
        signal.raise_signal(signal.SIGTERM)
    assert left == [128 + signal.SIGTERM]


def test_a_first_signal_after_the_time_is_up_lets_the_save_end(left: list[int]) -> None:
    with StopSignals() as stops:
        judge(stops, limit_s=10.0).check_time(1000.0, 1.0)
        assert stops.reason.startswith("train.max_time")
        signal.raise_signal(signal.SIGTERM)
    assert left == [] and stops.reason.startswith("train.max_time")


def test_another_process_s_request_ends_this_one_too() -> None:
    two = judge(world_size=2)
    assert vote(two) == 0
    assert two.verdict(1.0, 1.0, votes=1, failed_save=None).end == "the request of another process"


@pytest.mark.parametrize(
    ("now", "is_near"),
    [(105.9, False), (106.0, True), (1000.0, True)],  # 1.5 steps of 2 s and a save of 1 s before 110
)
def test_a_step_and_a_save_must_still_fit_into_the_time(now: float, is_near: bool) -> None:
    one = judge(limit_s=10.0)
    assert vote(one, now) == int(is_near)
    assert one.verdict(1.0, 1.0, int(is_near), None).end == ("train.max_time of 10 s" if is_near else "")


def test_without_a_limit_the_time_never_ends() -> None:
    assert vote(judge(), now=1e9) == 0


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("must_fail", [False, True])
def test_a_failed_save_that_must_not_be_fails_the_run_on_every_rank(must_fail: bool, world_size: int) -> None:
    failure = "step-1 could not be saved: it needs 9 bytes"
    one = judge(world_size=world_size)
    votes = vote(one, must_fail=must_fail)
    fail = one.verdict(1.0, 1.0, votes, failure).fail
    assert fail == (f"{failure}; continue with --resume auto" if must_fail else "")
    if must_fail:  # the other ranks, which know nothing of it
        other = judge(world_size=world_size).verdict(1.0, 1.0, votes, None)
        assert other.fail == "another process could not save; continue with --resume auto"


def test_requests_of_all_ranks_to_stop_are_no_failure() -> None:
    assert judge(world_size=4).verdict(1.0, 1.0, votes=4, failed_save=None).fail == ""
