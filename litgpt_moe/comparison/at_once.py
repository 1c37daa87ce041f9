"""Make several runs at once: each on a GPU of its own, or with its share of the cores."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from litgpt_moe.comparison.processes import POLL_S, Stop, signals_interrupt
from litgpt_moe.hardware import has_cuda
from litgpt_moe.threads import usable_cores


@dataclass(frozen=True)
class Lane:
    """What one of the runs at once has for itself."""

    environment: dict[str, str]
    """Variables of its processes."""
    stop: Stop
    """Asks its process to end; all lanes share it."""


def make_lanes(count: int) -> list[Lane]:
    """Return the lanes of `count` runs at once; ValueError if the machine has not so many GPUs, or cores."""
    if has_cuda():
        # numbers or names of those that the user lets us see
        given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        own = [{"CUDA_VISIBLE_DEVICES": device} for device in given.split(",")]
        what = "GPUs"
    else:
        cores = usable_cores()
        own = [{"OMP_NUM_THREADS": str(max(1, cores // max(1, count)))}] * cores
        what = "cores"
    if not 1 <= count <= len(own):
        raise ValueError(f"--at_once is {count}; choose 1 to {len(own)}, the {what} of this machine")
    stop = Stop()
    return [Lane(variables, stop) for variables in own[:count]]


def each_at_once[Item, Result](
    make: Callable[[Item, Lane], Result],
    items: Iterable[Item],
    lanes: list[Lane],
    done: Callable[[Item, Result], object],
) -> None:
    """Call `make(item, lane)` for each item in a thread per lane, and here `done(item, result)` as they end.

    After Ctrl-C, or the first error, the processes of all lanes are asked to end and waited for; a second
    Ctrl-C kills them.
    """
    free: SimpleQueue[Lane] = SimpleQueue()
    errors: list[BaseException] = []
    for lane in lanes:
        free.put(lane)

    def work(item: Item) -> Result:
        lane = free.get()
        try:
            if errors:
                raise errors[0]
            return make(item, lane)
        except BaseException as error:
            errors.append(error)
            raise
        finally:
            free.put(lane)

    with signals_interrupt(), ThreadPoolExecutor(len(lanes), "run") as pool:
        waiting = {pool.submit(work, item): item for item in items}
        try:
            while waiting:
                for future in _wait(waiting):
                    done(waiting.pop(future), future.result())
        except BaseException as error:
            errors.append(error)
            lanes[0].stop.ask()
            pool.shutdown(wait=False, cancel_futures=True)
            try:
                while any(future.running() for future in waiting):
                    _wait([future for future in waiting if future.running()])
            except KeyboardInterrupt:
                lanes[0].stop.ask()
            raise


def _wait(futures: Iterable[Future]) -> set[Future]:
    """Return those that have ended, after a while at most: on Windows Ctrl-C ends no wait without limit."""
    return wait(futures, POLL_S, FIRST_COMPLETED).done
