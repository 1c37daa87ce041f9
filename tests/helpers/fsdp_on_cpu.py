"""run_train.py with FSDP where there is no GPU: `torchrun --nproc_per_node 2 fsdp_on_cpu.py FLAGS`.

FSDP's own code runs, over gloo: it splits, gathers, reduces and saves. What it asks of an accelerator
(streams, events, a number of devices) is answered here for the CPU, where all happens in order anyway.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read by the first import of torch

import torch
from lightning.fabric import connector
from torch.distributed import fsdp

sys.path.insert(0, str(Path(__file__).parents[2]))
import run_train
from litgpt_moe.training import loop

CPU = torch.device("cpu")


class Order:
    """A stream or event of a device that does one thing after the other."""

    device = CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    wait_stream = wait_event = record = synchronize = wait

    def record_event(self, *_: Any) -> "Order":
        return self


def keep_on_device(config: type) -> None:
    """Gather into new memory: bringing a tensor to the CPU copies nothing here, and FSDP frees its own."""
    initialize = config.__init__
    config.__init__ = lambda self, offload_to_cpu=False, rank0_only=False: initialize(self, False, rank0_only)


def let_fsdp_run_on_the_cpu() -> None:
    connector._Connector._check_strategy_and_fallback = lambda self: None
    torch.cpu.Stream, torch.cpu.Event = Order, Order
    torch.cpu.current_stream = Order
    torch.cpu.stream = lambda stream: contextlib.nullcontext()
    torch.cpu.current_device = lambda: CPU
    torch.cpu.device_count = lambda: 2
    torch.Tensor.record_stream = lambda *_: None
    keep_on_device(fsdp.FullStateDictConfig)
    keep_on_device(fsdp.FullOptimStateDictConfig)
    initialize = fsdp.FullyShardedDataParallel.__init__
    fsdp.FullyShardedDataParallel.__init__ = lambda self, *args, **options: initialize(
        self, *args, **{**options, "device_id": CPU}
    )
    # it is refused on CPUs by its name
    loop.make_fabric, loop.choose_strategy = make_fabric, lambda *_: ("fsdp", "asked for here")


def make_fabric(*args: Any, make: Any = loop.make_fabric) -> Any:
    fabric = make(*args)
    print(type(fabric.strategy).__name__)
    return fabric


if __name__ == "__main__":
    let_fsdp_run_on_the_cpu()
    raise SystemExit(run_train.main())
