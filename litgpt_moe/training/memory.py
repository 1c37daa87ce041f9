"""The memory of a run's steps by plan: it chooses between DDP and FSDP, and says what would fit."""

import torch

from litgpt_moe.hardware import DTYPES, fits
from litgpt_moe.kernels.choice import choose_kernel
from litgpt_moe.planning import StepMemory, StepPlanner
from litgpt_moe.training.optimizer import make_optimizer
from litgpt_moe.training.run import Run


def planner_of(run: Run, device_type: str) -> StepPlanner:
    """Return what counts the memory of the run's steps on one device of this type; it takes seconds."""
    settings, kernel = run.settings, None
    if device_type != "cpu":
        # autocast's products are in its 16 bits
        dtype = DTYPES[run.precision.replace("-mixed", "-true")]
        kernel = choose_kernel(run.config, torch.device(device_type), dtype)
    is_8bit = "8bit" in run.optimizer["class_path"]
    return StepPlanner(
        run.config,
        run.precision,
        None if is_8bit else lambda gpt: make_optimizer(settings, gpt, run.optimizer),
        kernel=kernel,
        block_size=run.block_size,
        is_recomputed=settings.activation_checkpointing,
        is_tied=bool(settings.train.tie_embeddings),
    )


def plan(run: Run, device_type: str) -> StepMemory:
    """Return the memory of the run's steps on one device, where several of them are trained by DDP."""
    micro_batch_size = run.settings.train.micro_batch_size
    return planner_of(run, device_type).memory(micro_batch_size, run.accumulation > 1, run.world_size > 1)


def smaller_micro_batches(run: Run) -> list[int]:
    """Return the smaller micro-batch sizes that global_batch_size allows, the largest first."""
    train = run.settings.train
    below = range(train.micro_batch_size - 1, 0, -1)
    return [size for size in below if train.global_batch_size % (size * run.world_size) == 0]


def largest_that_fits(run: Run, planner: StepPlanner, memory: int) -> int | None:
    """Return the largest smaller micro-batch size with which a step fits into this memory, None if none."""
    # the smallest have the most micro-batches in a step, and so always find gradients
    return next(
        (
            size
            for size in smaller_micro_batches(run)
            if fits(planner.memory(size, has_buckets=run.world_size > 1).peak, memory)
        ),
        None,
    )
