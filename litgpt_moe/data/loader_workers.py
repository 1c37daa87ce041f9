"""The workers of a DataLoader outlive what stops a run, which needs batches to end its step and save."""

import atexit
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

# A terminal sends SIGINT, SIGBREAK and SIGHUP to each of its processes, Slurm SIGUSR1 to each of a job.
IGNORED = ("SIGINT", "SIGBREAK", "SIGHUP", "SIGUSR1")


def outlive_stop_signals(loader: Any) -> None:
    """Let the workers of a torch DataLoader live on when their process group is asked to stop.

    They end when their loader is closed, or within seconds of the end of the process that started them.
    """
    if isinstance(loader, DataLoader) and loader.num_workers:
        loader.worker_init_fn = functools.partial(_start, _has_ended(), loader.worker_init_fn)


@functools.cache
def _has_ended() -> Any:
    """Return a number that the workers share with this process: 0 while this process runs, 1 once it ends."""
    has_ended = multiprocessing.RawValue("b", 0)
    # Registered after multiprocessing's own function, and so called before it: that one sends SIGTERM to
    # workers which are still there, and waits for them.
    atexit.register(setattr, has_ended, "value", 1)
    return has_ended


def _start(has_ended: Any, own_init: Callable[[int], None] | None, worker_id: int) -> None:
    """Set a worker's signals, and call `own_init`, which is the loader's own worker_init_fn."""
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    # systemd, Slurm and `timeout` send SIGTERM to every process of a run. Torch also sends it to a worker
    # that is slow to end: the worker ignores it while its parent runs, and ends by itself.
    def end_with_parent(*_: object) -> None:
        if has_ended.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, end_with_parent)
    if own_init is not None:
        own_init(worker_id)
