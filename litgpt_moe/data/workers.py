"""The worker processes that tokenize, and the memory that they need."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

MIN_MEMORY = 512 << 20  # of address space; with 300 to 410 MB tokenizers 0.22 aborted or never ended


def start_worker() -> None:
    """Make a worker process ignore Ctrl-C, which its parent handles, and end when its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a process already
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def n_workers(wanted: int, n_shards: int) -> int:
    """Return the number of workers for a text of so many shards; `wanted` of 0 means one per core."""
    wanted = wanted or os.cpu_count() or 1
    if sys.platform == "win32":
        wanted = min(wanted, 61)  # a pool cannot wait for more processes there
    # one per two shards: starting a process takes as long as tokenizing some megabytes
    return min(wanted, 1 + n_shards // 2)


def memory_limit() -> int | None:
    """Return the limit of a process's address space (`ulimit -v`) in bytes, None without one."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0] if resource else -1
    return limit if resource and limit != resource.RLIM_INFINITY else None


def check_memory_limit() -> None:
    """Raise ValueError if the limit of memory is so low that the tokenizers library would abort or hang."""
    if (limit := memory_limit()) is not None and limit < MIN_MEMORY:
        has = f"a process may use {limit >> 20:,} MiB of memory here (ulimit -v)"
        raise ValueError(f"{has}, but tokenizing needs {MIN_MEMORY >> 20:,} MiB; raise the limit")


def start_pool(workers: int) -> Executor:
    """Return a pool of worker processes, or of one thread, which starts at once, for a single worker.

    Where memory has a limit even a single worker is a process: the tokenizers library aborts the one that it
    is in when memory ends, and the main process has to say so.
    """
    is_alone = workers == 1 and memory_limit() is None
    spawn = multiprocessing.get_context("spawn")  # safe where the parent has threads; Windows has no other
    return ThreadPoolExecutor(1) if is_alone else ProcessPoolExecutor(workers, spawn, start_worker)
