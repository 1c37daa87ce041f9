"""The memory of a run's steps by plan: it chooses between DDP and FSDP, and says what would fit."""

import torch

from litgpt_moe.budget import count_words
from litgpt_moe.hardware import fits, gpu_bytes, has_cuda, memory_bytes, precision_dtype
from litgpt_moe.kernels.choice import choose_kernel
from litgpt_moe.planning import StepMemory, StepPlanner
from litgpt_moe.training.optimizer import make_optimizer
from litgpt_moe.training.parse import resume_command
from litgpt_moe.training.run import Run


def out_of_memory(run: Run, argv: list[str]) -> str:
    """Return the sentence for a run whose memory ran out: what a step takes by plan, and what would fit."""
    size, smaller = run.settings.train.micro_batch_size, smaller_micro_batches(run)
    planned, fitting = _figures(run) if run.world_size == 1 else ("", None)
    told = f"out of memory with train.micro_batch_size {size}{planned}"
    saving = "" if run.settings.activation_checkpointing else "--activation_checkpointing"
    if not smaller:
        others = "a smaller model, a shorter train.max_seq_length or a machine with more memory"
        return f"{told}, and none is smaller; choose {', '.join(filter(None, [saving, others]))}"
    command = resume_command(argv, micro_batch_size=fitting or smaller[0])
    saving = saving and f"{saving} saves some; "
    return f"{told}; {saving}with less memory it goes on by: {command}"


def _figures(run: Run) -> tuple[str, int | None]:
    """Return the plan of a step in words, and the largest smaller micro-batch that fits the device."""
    is_on_gpu = run.settings.accelerator != "cpu" and has_cuda()
    if (planned := try_plan(run, "cuda" if is_on_gpu else "cpu")) is None:
        return "", None
    planner, step = planned
    has = gpu_bytes(run.devices) if is_on_gpu else memory_bytes()
    model = f"{run.config.name}, {count_words(run.facts.total_params)} parameters"
    return f" ({model}; planned: {step}, of {has / 1e9:.1f})", largest_that_fits(run, planner, has)


def planner_of(run: Run, device_type: str) -> StepPlanner:
    """Return what counts the memory of the run's steps on one device of this type; it takes seconds."""
    settings, kernel = run.settings, None
    if device_type != "cpu":
        kernel = choose_kernel(run.config, torch.device(device_type), precision_dtype(run.precision))
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


def try_plan(run: Run, device_type: str) -> tuple[StepPlanner, StepMemory] | None:
    """Return what counts the run's steps on one device, and their memory; None where counting fails.

    Where there are several devices, DDP trains them.
    """
    micro_batch_size, has_buckets = run.settings.train.micro_batch_size, run.world_size > 1
    try:
        planner = planner_of(run, device_type)
        return planner, planner.memory(micro_batch_size, run.accumulation > 1, has_buckets)
    # an optimizer may know no fake tensors, or memory be short; the run itself must not fail for that
    except Exception:  # noqa: BLE001
        return None


def choose_strategy(run: Run, gpu_bytes: int | None) -> tuple[str, str]:
    """Return how several devices train, `ddp` or `fsdp`, or `auto` for a single one, and the reason.

    `gpu_bytes` is the memory of the smallest GPU, None on CPUs. DDP keeps whole weights on each device, which
    Muon needs, and the loss that never has all logits in memory.
    """
    if run.world_size == 1:
        return "auto", "one device"
    if run.settings.strategy != "auto":
        return run.settings.strategy, f"strategy: {run.settings.strategy}"
    if gpu_bytes is None:
        return "ddp", "FSDP needs GPUs"
    if "Muon" in run.optimizer["class_path"]:
        return "ddp", "Muon needs whole matrices"
    if (planned := try_plan(run, "cuda")) is None:
        return "fsdp", "its memory cannot be planned"
    planner, step = planned
    if fits(step.peak, gpu_bytes):
        return "ddp", f"its plan fits a GPU's {gpu_bytes / 1e9:.1f} GB: {step}"
    smaller = largest_that_fits(run, planner, gpu_bytes)
    way_on = f"; DDP fits with train.micro_batch_size {smaller}" if smaller else ""
    return "fsdp", f"DDP does not fit a GPU's {gpu_bytes / 1e9:.1f} GB: {step}{way_on}"


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
