"""Threads that stop spinning while other programs need the cores."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from litgpt_moe import threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only there torch comes with libgomp")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the environment without a choice of the user, before and after the test."""
    for name in threads.OWN_CHOICE:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have /proc/stat and the clocks be the test's: 100 ticks a second, two cores."""
    path = tmp_path / "stat"
    monkeypatch.setattr(threads, "STAT", path)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    return path


def write(path: Path, idle: int, waiting: int, other: int = 0) -> None:
    """Write /proc/stat after so many ticks, of which core 2 has idled and waited for a disk."""
    path.write_text(
        f"cpu  9 9 9 9 9 9 9\ncpu0 1 2 3 0 0 6 7\ncpu1 0 0 0 {other} 0 0 0\n"
        f"cpu2 1 2 3 {idle} {waiting} 6 7\nctxt 12\n",
        encoding="ascii",
    )


@pytest.mark.parametrize(
    ("idle", "own_s", "missing"),
    [(0, 20, 0.0), (0, 10, 1.0), (1000, 10, 0.0), (500, 10, 0.5), (2000, 0, 0.0)],
    ids=["all is ours", "a neighbour", "one core idles", "half a neighbour", "nobody works"],
)
def test_missing_cores_are_those_that_other_programs_use(
    stat: Path, monkeypatch: pytest.MonkeyPatch, idle: int, own_s: float, missing: float
) -> None:
    write(stat, 5, 5)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(time, "process_time", lambda: 7.0)
    use = threads.CpuUse(2)
    write(stat, 5 + idle // 2, 5 + idle - idle // 2, other=4321)
    monkeypatch.setattr(time, "monotonic", lambda: 110.0)
    monkeypatch.setattr(time, "process_time", lambda: 7.0 + own_s)
    assert use.missing_cores() == pytest.approx(missing)


def n_tasks() -> int:
    """Return how many threads this process has, Python's and OpenMP's."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture
def several_threads() -> Iterator[None]:
    """Let torch have three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.ones(1 << 20).add_(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("several_threads")
def test_an_idle_team_has_threads_of_its_own_until_it_leaves() -> None:
    before, team = n_tasks(), threads.IdleTeam()
    team.form()
    assert team.is_there and n_tasks() == before + 3
    team.leave()
    assert not team.is_there
    while n_tasks() > before:
        time.sleep(0.01)


def test_no_team_forms_where_a_thread_is_alone() -> None:
    before, team = torch.get_num_threads(), threads.IdleTeam()
    torch.set_num_threads(1)
    try:
        team.form()
        assert not team.is_there
        team.leave()
    finally:
        torch.set_num_threads(before)
    assert "idle team" not in {thread.name for thread in threading.enumerate() if thread.is_alive()}


def test_the_users_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    threads.limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
    with threads.sleep_when_busy():
        assert "core use" not in {thread.name for thread in threading.enumerate()}


WATCH = """
import os, sys, threading, time
from litgpt_moe import threads
threads.limit_spinning()
import torch
torch.set_num_threads(len(os.sched_getaffinity(0)) + 1)  # one more than there are: always short of a core
with threads.sleep_when_busy():
    names = set()
    while "idle team" not in names:
        torch.ones(1 << 20).add_(1)
        names = {thread.name for thread in threading.enumerate()}
print(threading.active_count(), os.environ["GOMP_SPINCOUNT"])
"""


def test_a_team_forms_while_a_core_is_missing_and_ends_with_the_process() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WATCH], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, f"1 {threads.SPINS}\n", "")


def test_without_memory_for_a_team_none_forms_and_nothing_is_printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    team = threads.IdleTeam()
    team.form()
    assert not team.is_there
    team.leave()
    assert capfd.readouterr() == ("", "")


def test_the_idle_team_ends_after_an_error_that_nobody_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    # else the process would wait for it at its end
    missing = iter([9.0])
    left = []
    monkeypatch.setattr(threads.CpuUse, "__init__", lambda self, n_threads: None)
    monkeypatch.setattr(threads.CpuUse, "missing_cores", lambda self: next(missing))
    monkeypatch.setattr(threads.IdleTeam, "form", lambda self: None)
    monkeypatch.setattr(threads.IdleTeam, "leave", lambda self: left.append(True))
    end = threading.Event()
    monkeypatch.setattr(end, "wait", lambda _: False)
    with pytest.raises(StopIteration):
        threads._watch(2, end)
    assert left and threads.free_threads() >= 1


@pytest.mark.usefixtures("several_threads")
def test_threads_that_have_no_core_are_not_used_where_that_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing, seen, asked, end = iter([0.2, 1.7, 9.0, 0.45, 0.0]), [], threading.Event(), threading.Event()

    class Scripted(threads.CpuUse):
        def missing_cores(self) -> float:
            seen.append(threads.free_threads())  # what the call before has led to
            return next(missing)

    monkeypatch.setattr(threads, "CpuUse", Scripted)
    monkeypatch.setattr(end, "wait", lambda _: len(seen) == 5)
    monkeypatch.setattr(threads.IdleTeam, "form", lambda self: setattr(self, "_end", asked))
    monkeypatch.setattr(threads.IdleTeam, "leave", lambda self: setattr(self, "_end", None))
    threads._watch(3, end)
    assert seen == [3, 3, 1, 1, 2] and threads.free_threads() == 3
