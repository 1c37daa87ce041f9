"""Worker processes of a DataLoader: what stops a run leaves them alone, and they end when it does."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import pytest
from conftest import ROOT, wait_until
from torch.utils.data import DataLoader, Dataset

from litgpt_moe.data.loader_workers import IGNORED, outlive_stop_signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals for other processes")


def note_start(worker_id: int) -> None:
    os.environ["STARTED"] = str(worker_id)


class Numbers(Dataset[tuple[int, str]]):
    """0, 1, 2, ... with what `note_start` has left in the worker."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index, os.environ.get("STARTED", "")


def test_workers_outlive_the_signals_of_their_group_and_end_with_their_loader() -> None:
    # of any data module, with a worker_init_fn of its own
    loader = DataLoader(Numbers(), None, num_workers=2, worker_init_fn=note_start)
    outlive_stop_signals(loader)
    batches = iter(loader)
    assert [tuple(batch) for batch in islice(batches, 3)] == [(0, "0"), (1, "1"), (2, "0")]
    workers = multiprocessing.active_children()
    for name in ("SIGTERM", *IGNORED):
        for worker in workers if hasattr(signal, name) else []:
            assert worker.pid is not None
            os.kill(worker.pid, getattr(signal, name))
    # many more than were read ahead
    assert [number for number, _ in islice(batches, 50)] == list(range(3, 53))
    began = time.monotonic()
    del batches
    assert [worker.exitcode for worker in workers] == [0, 0]
    # torch ends a worker that has not ended by itself after 5 s
    assert time.monotonic() - began < 4


def test_a_loader_without_workers_stays_as_it_is() -> None:
    loader = DataLoader(Numbers(), None)
    outlive_stop_signals(loader)
    assert loader.worker_init_fn is None


ENDS = {
    # its iterator is alive until Python ends, as where an error's traceback refers to it
    "amid its batches": "sys.exit(3)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.slow  # torch's workers look for their parent every 5 s
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("end", ENDS)
def test_workers_do_not_outlive_their_parent(end: str, method: str) -> None:
    code = (
        "import multiprocessing, os, signal, sys, time; sys.path[:0] = sys.argv[1:3]\n"
        "from data.test_loader_workers import Numbers\n"
        "from torch.utils.data import DataLoader\n"
        "from litgpt_moe.data.loader_workers import outlive_stop_signals\n"
        "if __name__ == '__main__':\n"
        "    loader = DataLoader(Numbers(), None, num_workers=1, multiprocessing_context=sys.argv[3])\n"
        "    outlive_stop_signals(loader); batches = iter(loader); next(batches)\n"
        "    (worker,) = multiprocessing.active_children(); os.kill(worker.pid, signal.SIGTERM)\n"
        "    time.sleep(0.2); next(batches); assert worker.is_alive(); print(worker.pid, flush=True)\n"
        f"    {ENDS[end]}\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests"), method]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert parent.wait(timeout=30) != 0

    def is_gone() -> bool:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(is_gone)
