"""run_train.py in 16-mixed on CPUs: `torchrun --nproc_per_node 2 fp16_on_cpu.py ddp|fsdp FLAGS`.

The fifth backward pass of rank 1 alone overflows.
"""

import math
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import fsdp_on_cpu
from helpers.runs import fp16_on_the_cpu, gradient_times

import run_train
from litgpt_moe.training import loop
from litgpt_moe.training.loss_scaling import ShardedLossScaling

if __name__ == "__main__":
    strategy = sys.argv.pop(1)
    if strategy == "fsdp":
        fsdp_on_cpu.let_fsdp_run_on_the_cpu()
        loop.ShardedLossScaling = lambda _: ShardedLossScaling("cpu")
    calls = (5,) if os.environ["RANK"] == "1" else ()
    with fp16_on_the_cpu(), gradient_times(math.inf, *calls):
        status = run_train.main()
    if torch.distributed.is_initialized():
        raise SystemExit("a thread of gloo that outlives Python may abort the process, after all its work")
    raise SystemExit(status)
