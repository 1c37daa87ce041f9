"""A line when steps have become slow, by injected times: once, with what else the machine does."""

import time
from collections.abc import Callable, Iterable

import pytest
from helpers.runs import run

from litgpt_moe.training import hooks
from litgpt_moe.training.guard import Guard
from litgpt_moe.training.slowness import Slowdown, SlowSteps, warning


def found(
    times: Iterable[float], load: Callable[[], float | None] = lambda: 1.4
) -> list[tuple[int, Slowdown]]:
    """The begin of each episode, by the number of its step."""
    steps = SlowSteps(load)
    return [(number, slow) for number, s in enumerate(times, 1) if (slow := steps.add(s)) is not None]


def test_steps_that_take_twice_their_best_for_a_while_are_told_once_an_episode() -> None:
    ((number, slow),) = found([2.0] * 10 + [4.5] * 20)
    # with the third of five slow periods
    assert number == 13 and slow == Slowdown(4.5, 2.0, 1.4)
    # it wavers about the limit, gets well, and gets slow again
    assert [number for number, _ in found([2.0] * 10 + [4.1, 3.9] * 10 + [2.5] * 10 + [4.5] * 10)] == [15, 43]


def test_outliers_and_what_is_not_twice_as_slow_are_no_episode() -> None:
    assert found([2.0] * 10 + [60.0, 60.0] + [2.0] * 10 + [60.0, 2.0, 2.0] * 5) == []
    assert found([2.0] * 10 + [3.9] * 50) == []
    # slow from the start: nothing is known of a better time
    assert found([9.0] * 50) == [] and found([9.0] * 10 + [2.0] * 50) == []


def test_short_steps_are_compared_over_periods() -> None:
    # 200 steps of 10 ms are a period, 100 of 20 ms
    quick, slow = [0.01] * 2000, [0.03] * 2000
    assert found([*quick, 1.0, *quick]) == []
    ((number, slowdown),) = found(quick + slow)
    assert 2000 + 2 * 66 < number <= 2000 + 3 * 68 and slowdown.step_s == pytest.approx(0.03)


def test_the_load_is_that_of_the_slow_periods() -> None:
    loads = iter([0.1] * 10 + [1.5] * 20)
    ((_, slow),) = found([2.0] * 10 + [4.5] * 20, lambda: next(loads))
    assert slow.others == 1.5
    ((_, slow),) = found([2.0] * 10 + [4.5] * 20, lambda: None)
    assert slow.others is None


def test_the_line_says_how_to_go_on_quicker() -> None:
    line = warning(Slowdown(1.31, 0.5, 1.42), 1234, "cpu", 2, 2)
    assert line == (
        "Step 1,234: steps take 2.6 times as long as at best, 1.31 s for 0.5 s. Other processes use 1.4 of 2 "
        "cores: end them to go on quicker. If they are to stay, start a new run with OMP_NUM_THREADS=1; this "
        "run keeps its 2 threads, so that a resume is bit for bit."
    )
    assert warning(Slowdown(1.31, 0.5, 1.42), 1, "cpu", 2, 1).endswith("end them to go on quicker.")
    assert "whether the machine swaps" in warning(Slowdown(1.31, 0.5, 0.1), 1, "cpu", 2, 2)
    assert "nvidia-smi" in warning(Slowdown(1.31, 0.5, 3.0), 1, "cuda", 8, 8)
    assert "end them" in warning(Slowdown(1.31, 0.5, None), 1, "cpu", 8, 8)


@pytest.mark.usefixtures("eager", "workspace")
def test_a_run_tells_of_slow_steps_and_not_of_slow_validations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, count_bad, validate = time.perf_counter, Guard.count_bad, hooks.LoopHooks.validate
    passed, calls = [0.0], []

    def at_each_step(guard: Guard, *figures: float) -> bool:
        calls.append(1)
        # the first step prepares much
        passed[0] += 60.0 if len(calls) == 1 else 2.0 if len(calls) <= 20 else 4.5
        return count_bad(guard, *figures)

    def at_each_validation(*args: object, **options: object) -> object:
        passed[0] += 100.0
        return validate(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])
    monkeypatch.setattr(Guard, "count_bad", at_each_step)
    monkeypatch.setattr(hooks.LoopHooks, "validate", at_each_validation)
    monkeypatch.setattr(hooks, "load_of_others", lambda: lambda: 1.25)
    assert run("--max_tokens", 40 * 256, "--eval.interval", 3, "--train.save_interval", 100) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "times as long as at best" in line]
    assert line.startswith("Step 23: steps take 2.") and "Other processes use 1.2 of " in line
