"""The learning rate of each optimizer step: pure functions of the progress of a run."""

import math

from litgpt_moe.training.settings import ScheduleArgs, TrainArgs


def learning_rate(
    args: ScheduleArgs, step: int, n_steps: int, warmup_steps: int, peak: float, lowest: float
) -> float:
    """Return the learning rate of optimizer step 1 <= `step` <= `n_steps`; a decay ends at `lowest`.

    It counts optimizer steps and not, as litgpt 0.5.13 does, micro-batches, so that neither the number of
    devices nor micro_batch_size changes it.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if args.name == "constant":
        return peak
    if args.name == "cosine":
        done = (step - warmup_steps) / max(1, n_steps - warmup_steps)
        return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * done))
    n_decay = min(round(args.decay_fraction * n_steps), n_steps - warmup_steps)
    done = max(0.0, (step - (n_steps - n_decay)) / n_decay) if n_decay else 0.0
    # warmup-stable-decay with 1 - sqrt: Haegele et al., arxiv.org/abs/2405.18392, eq. 2
    return lowest + (peak - lowest) * (1 - math.sqrt(done))


def warmup_steps(
    args: ScheduleArgs, train: TrainArgs, n_steps: int, tokens_per_step: int, steps_per_epoch: float
) -> int:
    """Return the optimizer steps of linear warm-up, at most all `n_steps`."""
    if args.warmup_tokens is not None:
        steps = math.ceil(args.warmup_tokens / tokens_per_step)
    elif train.lr_warmup_fraction:
        steps = math.ceil(train.lr_warmup_fraction * steps_per_epoch)
    else:
        steps = train.lr_warmup_steps or 0
    return min(steps, n_steps)
