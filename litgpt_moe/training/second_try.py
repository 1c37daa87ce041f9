"""A second try with half the micro-batch, where the GPU's memory runs out before the first optimizer step."""

import gc
import sys
from dataclasses import replace

import torch

from litgpt_moe.checkpoints import reader
from litgpt_moe.processes import note_once
from litgpt_moe.training.resume import OpenCheckpoint
from litgpt_moe.training.run import Run
from litgpt_moe.training.steps import RunFailed


def may_try_again(run: Run, step: int) -> bool:
    """Return whether a run whose memory ran out after `step` steps may start anew with half the micro-batch.

    Not one of several processes: the others wait for it in an all-reduce, and cannot be told.
    """
    is_first_step = step == run.start_step and not run.is_second_try
    return is_first_step and run.world_size == 1 and run.settings.train.micro_batch_size % 2 == 0


def second_try(run: Run) -> Run:
    """Return the run with half its micro-batch, once nothing of the first try is left in memory.

    Call it outside the `except` block of the error, whose traceback refers to tensors of the first try.
    """
    gc.collect()
    # the graphs of the first try have its shapes: a second size would make them dynamic, and slower
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train, moe = run.settings.train, run.settings.moe
    size = train.micro_batch_size // 2
    is_balanced = moe.aux_loss_coef or moe.z_loss_coef
    means = "; the balance losses are then means over the smaller micro-batches" if is_balanced else ""
    note_once(
        f"The GPU's memory ran out before the first step with train.micro_batch_size {2 * size}: "
        f"starting anew with {size} and twice the gradient accumulation{means}."
    )
    return replace(
        run,
        settings=replace(run.settings, train=replace(train, micro_batch_size=size)),
        resume=_opened_again(run.resume),
        initial=_opened_again(run.initial),
        is_second_try=True,
    )


def _opened_again(opened: OpenCheckpoint | None) -> OpenCheckpoint | None:
    """Return the checkpoint with its state, which is emptied when it is loaded."""
    if opened is None:
        return None
    try:
        return OpenCheckpoint(opened.folder, reader.read_state(opened.file))
    except ValueError as error:
        raise RunFailed(f"{opened.folder} cannot be read any more: {error}") from error
