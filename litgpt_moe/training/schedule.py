"""The learning rate of each optimizer step: pure functions of how far the run is, and one that sets it.

After a resume with another batch size it follows the tokens: steps of the earlier sizes then count as parts
or multiples of a present one. A warm-up that is given in steps goes on by steps.
"""

import functools
import math
from collections.abc import Callable

from torch.optim import Optimizer

from litgpt_moe.training.recipe import set_rates
from litgpt_moe.training.run import Run
from litgpt_moe.training.settings import ScheduleArgs, TrainArgs


def set_learning_rate(
    optimizer: Optimizer,
    run: Run,
    step: int,
    batches_in_epoch: Callable[[], int],
    time_share: float | None = None,
) -> float:
    """Set the learning rate of optimizer step `step`, and return it.

    `time_share` of the run's time is over, None if the tokens alone count. Of both shares the larger counts,
    since the run ends with what is used up first.
    """
    settings, train = run.settings, run.settings.train
    rate = functools.partial(learning_rate, settings.schedule, peak=float(optimizer.defaults["lr"]))
    # the loader of an endless stream has no length: it is asked for only where it is needed
    steps_in_epoch = batches_in_epoch() / run.accumulation if train.lr_warmup_fraction else 0.0
    warm_by_steps = settings.schedule.warmup_tokens is None and not train.lr_warmup_fraction
    n_steps = run.n_steps if warm_by_steps else math.ceil(present_steps(run, run.n_steps))
    warmup = warmup_steps(settings.schedule, train, n_steps, run.tokens_per_step, steps_in_epoch)
    done = (step - 1) / max(1, run.n_steps - 1)
    if time_share is not None:
        done = share = max(time_share, present_steps(run, step) / present_steps(run, run.n_steps))
        peak, lowest = float(optimizer.defaults["lr"]), train.min_lr
        lr = rate_at_share(settings.schedule, share, step, warmup, peak, lowest)
    elif warm_by_steps and step <= warmup:
        lr = rate(step, n_steps, warmup, lowest=train.min_lr)
    else:
        warmed = present_steps(run, warmup) if warm_by_steps else warmup
        now, end = present_steps(run, step), present_steps(run, run.n_steps)
        lr = rate(now, end, warmed, lowest=train.min_lr)
    set_rates(optimizer, lr, done, settings.recipe)
    return lr


def present_steps(run: Run, n_steps: int) -> float:
    """Return the tokens of the run's first `n_steps` steps as a number of steps of the present size.

    It is `n_steps` itself, exactly, where the size has never changed.
    """
    return run.batch_sizes.sequences(n_steps) / run.settings.train.global_batch_size


def learning_rate(
    args: ScheduleArgs, step: float, n_steps: float, warmup_steps: float, peak: float, lowest: float
) -> float:
    """Return the learning rate of optimizer step 1 <= `step` <= `n_steps`; a decay ends at `lowest`.

    litgpt 0.5.13 counts micro-batches instead, so that its rate changes with devices and micro_batch_size.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if args.name == "constant":
        return peak
    if args.name == "cosine":
        done = (step - warmup_steps) / max(1, n_steps - warmup_steps)
    else:
        n_decay = min(round(args.decay_fraction * n_steps), n_steps - warmup_steps)
        done = max(0.0, (step - (n_steps - n_decay)) / n_decay) if n_decay else 0.0
    return _decayed(args, done, peak, lowest)


def _decayed(args: ScheduleArgs, done: float, peak: float, lowest: float) -> float:
    """Return the learning rate when a share `done` of the decay is over."""
    if args.name == "cosine":
        return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * done))
    # warmup-stable-decay with 1 - sqrt: Haegele et al., arxiv.org/abs/2405.18392, eq. 2
    return lowest + (peak - lowest) * (1 - math.sqrt(done))


def rate_at_share(
    args: ScheduleArgs, share: float, step: int, warmup_steps: float, peak: float, lowest: float
) -> float:
    """Return the learning rate of optimizer step `step` when 0 < `share` <= 1 of the run is over.

    The decay begins with the run, since the time at which the warm-up will end is not known; until then the
    smaller of both rates holds.
    """
    begins = {"cosine": 0.0, "wsd": 1 - args.decay_fraction, "constant": 1.0}[args.name]
    done = max(0.0, (share - begins) / (1 - begins)) if begins < 1 else 0.0
    rate = _decayed(args, done, peak, lowest)
    return min(rate, peak * step / warmup_steps) if step < warmup_steps else rate


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
