"""Stop OpenMP's threads from spinning while other programs need the cores.

Between two parallel loops libgomp's threads spin for about 3 ms before they sleep. On an idle machine that
saves the time to wake them. Beside another program it takes the core that the slowest thread needs, and
training slows down tenfold. The spin time is fixed when torch is imported, with one exception: while a
process has more OpenMP threads than cores, libgomp lets all of them sleep nearly at once. So we keep a
second, idle team of threads for as long as other programs are busy. The number of threads that compute stays
the same, and with it the order in which sums are added up.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Half a millisecond. Spinning beyond that competes with the threads that run experts (kernels/cpu.py).
SPINS = "50000"
# with one of these the user has chosen the spin time (libgomp's manual)
OWN_CHOICE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
STAT = Path("/proc/stat")
_missing_cores = [0]  # whole cores that other programs keep from this process, as `_watch` found last


def limit_spinning() -> None:
    """Bound the spinning, unless the user has: libgomp reads the environment once, when torch is imported.

    On Windows and macOS torch comes with another OpenMP.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in OWN_CHOICE):
        # processes that this one starts inherit it
        os.environ["GOMP_SPINCOUNT"] = SPINS
        # for threads beyond the number of cores alone, which then do not spin at all
        os.environ["OMP_WAIT_POLICY"] = "passive"


@contextlib.contextmanager
def sleep_when_busy() -> Iterator[None]:
    """In the block, end spinning while other programs need the cores, if `limit_spinning` bounded it.

    Entered by the main thread, after torch is imported and its number of threads is set.
    """
    import torch  # not at the top: limit_spinning() must run before torch is imported

    if os.environ.get("GOMP_SPINCOUNT") != SPINS or (n_threads := torch.get_num_threads()) == 1:
        yield
        return
    end = threading.Event()
    watch = threading.Thread(target=_watch, args=(n_threads, end), name="core use")
    watch.start()
    try:
        yield
    finally:
        end.set()
        watch.join()


def _watch(n_threads: int, end: threading.Event) -> None:
    team = IdleTeam()
    try:
        # without /proc the load of other programs is unknown; RuntimeError: no thread can be started
        with contextlib.suppress(OSError, RuntimeError):
            use = CpuUse(n_threads)
            while not end.wait(1):
                missing = use.missing_cores()
                # hysteresis of a tenth of a core, so that the team does not form and leave all the time
                is_short = missing > (0.4 if team.is_there else 0.5)
                _missing_cores[0] = max(1, round(missing)) if is_short else 0
                if is_short and not team.is_there:
                    team.form()
                elif not is_short:
                    team.leave()
    finally:
        # also after an error that nobody expects: the process would wait for the team at its end
        team.leave()
        _missing_cores[0] = 0


def free_threads() -> int:
    """Return how many threads find a core of their own now: torch's number, less where others are busy.

    For work whose result does not depend on the number of threads. It needs `sleep_when_busy`.
    """
    import torch  # not at the top: limit_spinning() must run before torch is imported

    return max(1, torch.get_num_threads() - _missing_cores[0])


def usable_cores() -> int:
    """Return the number of cores that this process may use; on Windows and macOS all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_of_others() -> Callable[[], float | None]:
    """Return a function that returns the cores used by other processes since its last call.

    It returns None where that is not known: on Windows and macOS.
    """
    try:
        use = CpuUse(n_threads=0)
    except (OSError, AttributeError):
        return lambda: None

    def load() -> float | None:
        try:
            return max(0.0, use.other_cores())
        except OSError:
            return None

    return load


class CpuUse:
    """Measures, from one call of a method to the next, who uses the cores that this process may use."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads, self.cores = n_threads, os.sched_getaffinity(0)
        self.last = self._now()

    def missing_cores(self) -> float:
        """Return how many more cores than there are this process and all others could use on average."""
        return self.other_cores() + self.n_threads - len(self.cores)

    def other_cores(self) -> float:
        """Return how many cores other processes used on average."""
        before, self.last = self.last, self._now()
        elapsed, idle, own = (new - old for old, new in zip(before, self.last, strict=True))
        return (len(self.cores) * elapsed - idle - own) / elapsed

    def _now(self) -> tuple[float, float, float]:
        """Return the time, how long the cores have idled, and how long this process has computed, in s."""
        names = {f"cpu{core}" for core in self.cores}
        fields = (line.split() for line in STAT.read_text(encoding="ascii").splitlines())
        # proc(5): user, nice, system, idle, iowait
        ticks = sum(int(line[4]) + int(line[5]) for line in fields if line[0] in names)
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


class IdleTeam:
    """OpenMP threads that only wait, so that libgomp counts more threads than cores."""

    def __init__(self) -> None:
        self._end: threading.Event | None = None

    @property
    def is_there(self) -> bool:
        """Return whether the team waits."""
        return self._end is not None

    def form(self) -> None:
        """Have the team form in a thread of its own, where it stays. It may fail: `is_there` says so."""
        asked, end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._wait, args=(asked, end), name="idle team")
        self._thread.start()
        asked.wait()

    def leave(self) -> None:
        """End the thread, and the team with it."""
        if self._end is not None:
            self._end.set()
            self._thread.join()
        self._end = None

    def _wait(self, asked: threading.Event, end: threading.Event) -> None:
        import torch  # not at the top: limit_spinning() must run before torch is imported

        # without memory there is no team: training itself reports that it runs out
        with contextlib.suppress(RuntimeError, MemoryError):
            # a thread that starts during `for_each_expert` (kernels/cpu.py) may get a team of one
            if torch.get_num_threads() > 1:
                # so large that torch uses all threads
                torch.ones(1 << 20).add_(1)
                self._end = end
        asked.set()
        if self._end is end:
            end.wait()
