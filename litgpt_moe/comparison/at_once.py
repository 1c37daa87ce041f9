"""Make several runs at once: each on a GPU of its own, or with its share of the cores."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue

import torch

from litgpt_moe.comparison.processes import POLL_S, Lane, Stop, signals_interrupt
from litgpt_moe.hardware import has_cuda
from litgpt_moe.threads import usable_cores
from litgpt_moe.training.settings import Settings


def make_lanes(count: int, settings: Sequence[Settings]) -> list[Lane]:
    """Return the lanes of `count` runs at once with these settings of training.

    Raises ValueError if the machine has not so many GPUs, or on a CPU not so many cores.
    """
    if has_cuda() and any(one.accelerator != "cpu" for one in settings):
        n_gpus, unit = torch.cuda.device_count(), "GPUs"
        if count > 1 and any(str(one.devices) not in ("auto", "-1", "1") for one in settings):
            raise ValueError("--at_once gives each run a GPU; set devices: 1 or auto")
        # numbers, or names, of those that the user lets us see
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
        own = [{"CUDA_VISIBLE_DEVICES": device} for device in seen.split(",")[:n_gpus]]
    else:
        cores, unit = usable_cores(), "cores"
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
        own = [{"OMP_NUM_THREADS": threads}] * cores
    if count > len(own):
        raise ValueError(f"--at_once is {count}; choose 1 to {len(own)}, the {unit} of this machine")
    stop = Stop()
    return [Lane(variables, stop) for variables in own[:count]]


def each_at_once[Item, Result](
    make: Callable[[Item, Lane], Result],
    items: Iterable[Item],
    lanes: list[Lane],
    done: Callable[[Item, Result], object],
) -> None:
    """Call `make(item, lane)` for each item in a thread per lane, and here `done(item, result)` as they end.

    After Ctrl-C, or the first error, the processes of all lanes are asked to end and waited for; a Ctrl-C
    after that kills them.
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

    waiting: dict[Future[Result], Item] = {}
    with signals_interrupt(), ThreadPoolExecutor(len(lanes), "run") as pool:
        try:
            for item in items:
                waiting[pool.submit(work, item)] = item
            while waiting:
                for future in _wait(waiting):
                    done(waiting.pop(future), future.result())
        except BaseException as error:
            errors.append(error)
            _end_all(pool, waiting, lanes[0].stop)
            raise


def _end_all(pool: ThreadPoolExecutor, futures: Iterable[Future], stop: Stop) -> None:
    """Ask what is running to end and wait for it; begin nothing more. Another signal kills."""
    try:
        stop.ask()
        pool.shutdown(wait=False, cancel_futures=True)
        while running := [future for future in futures if future.running()]:
            _wait(running)
    except KeyboardInterrupt:
        # the second of two signals may have come before the first line
        stop.ask()
        stop.ask()
        pool.shutdown(wait=False, cancel_futures=True)


def _wait(futures: Iterable[Future]) -> set[Future]:
    """Return those that have ended, after a while at most: on Windows Ctrl-C ends no wait without limit."""
    return wait(futures, POLL_S, FIRST_COMPLETED).done
