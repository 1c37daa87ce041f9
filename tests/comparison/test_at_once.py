"""Runs at once: each in a lane of its own, and all of them end when one has to."""

import dataclasses
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt_moe.comparison import at_once
from litgpt_moe.comparison.at_once import each_at_once, make_lanes
from litgpt_moe.comparison.processes import Lane, Stop, run_to_end
from litgpt_moe.comparison.runs import RunSpec
from litgpt_moe.comparison.train import Trainer
from litgpt_moe.training.settings import Settings

TWO_LANES = [{"LANE": "0"}, {"LANE": "1"}]


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, with two cores."""
    monkeypatch.setattr(at_once, "has_cuda", lambda: False)
    monkeypatch.setattr(at_once, "usable_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def lanes(stop: Stop) -> list[Lane]:
    return [Lane(variables, stop) for variables in TWO_LANES]


def test_two_are_made_at_once_each_in_a_lane_of_its_own() -> None:
    both, made, ended = threading.Barrier(2), [], []

    def make(item: int, lane: Lane) -> int:
        # breaks after the time limit unless another one is made at the same time
        both.wait(timeout=30)
        made.append((item // 2, lane.environment["LANE"]))
        both.wait(timeout=30)
        return 10 * item

    each_at_once(make, range(6), lanes(Stop()), lambda item, result: ended.append((item, result)))
    assert sorted(ended) == [(item, 10 * item) for item in range(6)]
    assert sorted(made) == [(pair, lane) for pair in range(3) for lane in "01"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_error_the_others_are_asked_to_end_and_no_more_begin(error: type[BaseException]) -> None:
    stop, begun, interrupted = Stop(), [], []

    def make(item: int, lane: Lane) -> None:
        begun.append(item)
        if item == 0:
            while len(begun) < 2:
                time.sleep(0.01)
            raise error("the first one")
        try:
            while True:
                lane.stop.check()
                time.sleep(0.01)
        except KeyboardInterrupt:
            interrupted.append(item)
            raise

    with pytest.raises(error, match="the first one"):
        each_at_once(make, range(5), lanes(stop), lambda *_: None)
    assert sorted(begun) == [0, 1] and interrupted == [1]


def test_a_process_of_another_thread_is_asked_to_end_and_the_second_time_killed(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: pathlib.Path('asked').touch())\n"
        "signal.signal(signal.SIGTERM, lambda *_: pathlib.Path('asked').touch())\n"
        "pathlib.Path('there').write_text(os.environ['LANE'])\n"
        "while True: time.sleep(0.1)\n"
    )
    stop, ends = Stop(), []

    def work() -> None:
        try:
            command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{code}"]
            run_to_end(command, tmp_path / "log.txt", lane=Lane({"LANE": "1"}, stop))
        except KeyboardInterrupt:
            ends.append("interrupted")

    def wait_for(name: str) -> None:
        limit = time.monotonic() + 60
        while not (tmp_path / name).exists():
            assert time.monotonic() < limit, name
            time.sleep(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for("there")
    stop.ask()
    if sys.platform != "win32":
        wait_for("asked")
    stop.ask()
    thread.join(timeout=60)
    assert ends == ["interrupted"]
    assert (tmp_path / "there").read_text() == "1"


# the third device that the user names is none
@pytest.mark.parametrize(("seen", "expected"), [(None, ["0", "1"]), ("2,GPU-5a,-1", ["2", "GPU-5a"])])
def test_each_run_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, seen: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(at_once, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert [lane.environment for lane in make_lanes(2, [Settings()])] == [
        {"CUDA_VISIBLE_DEVICES": device} for device in expected
    ]
    with pytest.raises(ValueError, match="choose 1 to 2, the GPUs"):
        make_lanes(3, [Settings()])
    with pytest.raises(ValueError, match="set devices: 1 or auto"):
        make_lanes(2, [Settings(), Settings(devices=2)])
    # runs on the CPU share the cores on this machine too
    monkeypatch.setattr(at_once, "usable_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    on_cpu = make_lanes(3, [Settings(accelerator="cpu")])
    assert [lane.environment for lane in on_cpu] == [{"OMP_NUM_THREADS": "2"}] * 3


def test_on_a_cpu_the_runs_share_the_cores_unless_the_user_says_how_many(
    two_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_once, "usable_cores", lambda: 6)
    assert [lane.environment["OMP_NUM_THREADS"] for lane in make_lanes(4, [Settings()])] == ["1"] * 4
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [lane.environment["OMP_NUM_THREADS"] for lane in make_lanes(4, [Settings()])] == ["2"] * 4


@pytest.mark.parametrize(("count", "choice"), [(0, "1 or more"), (-1, "1 or more"), (3, "1 to 2, the cores")])
def test_a_wrong_number_is_refused_before_anything_is_measured(
    compare: Callable, starts: Any, two_cores: None, count: int, choice: str
) -> None:
    with pytest.raises(ValueError, match=f"--at_once is {count}; choose {choice}"):
        compare(at_once=count, measure=True)
    assert not starts.commands


def test_a_run_that_is_listed_twice_is_not_made_twice_at_the_same_time(
    compare: Callable, two_cores: None
) -> None:
    # without experts the coefficient means nothing: two dense twins under two names, and one run
    variants = [("no balance", {"moe.aux_loss_coef": "0.5"})]
    comparison, live, results = compare(seeds=1, variants=variants), [], []

    class Recorder(Trainer):
        def result(self, spec: RunSpec) -> dict[str, Any]:
            identity = spec.identity(self.facts.fingerprint)
            assert identity not in live
            live.append(identity)
            time.sleep(0.05)
            live.remove(identity)
            assert self.lane is None or self.lane.environment == {"OMP_NUM_THREADS": "1"}
            return {}

    trainer = comparison.trainer
    specs = [spec for contestant in comparison.contestants for spec in comparison.specs(contestant)]
    assert len(specs) == 4
    recorder = Recorder(dataclasses.replace(trainer.place, at_once=2), trainer.facts, trainer.file)
    recorder.make_all([*specs, specs[0]], lambda spec, row: results.append(spec.contestant.name))
    assert sorted(results) == sorted(spec.contestant.name for spec in [*specs, specs[0]])


def test_a_sweep_whose_best_rate_is_inside_the_grid_asks_for_no_more_runs(
    compare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    # lanes for no run would be those of the CPU, and may be too few on a machine with many GPUs
    rounds: list[list[float]] = []

    def make_all(self: Trainer, specs: list[RunSpec], done: Callable) -> None:
        rounds.append([spec.lr for spec in specs])
        for spec in specs:
            done(spec, {"loss": abs(spec.lr - 0.02)})

    monkeypatch.setattr(Trainer, "make_all", make_all)
    comparison = compare(rate=None, lr_first=0.01, lr_count=3, sweep_tokens=512, dense=False)
    assert rounds == [[0.01, 0.02, 0.04]] and comparison.rates == {"MoE-tiny": 0.02}
