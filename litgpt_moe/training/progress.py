"""The state of a run beside weights and optimizer: saved, restored, or rolled back to a step's start."""

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from litgpt_moe.checkpoints.state import RunState, rng_state, set_rng_state
from litgpt_moe.training.model import router_counts, set_router_counts
from litgpt_moe.training.steps import GRACE_S

if TYPE_CHECKING:
    from litgpt_moe.training.hooks import LoopHooks


def collect(hooks: "LoopHooks") -> RunState:
    """Return what a resumed run needs beside LitGPT's own state; all ranks call it."""
    is_cpu = hooks.fabric.device.type == "cpu" and hooks.run.world_size == 1
    return RunState(
        n_threads=torch.get_num_threads() if is_cpu else 0,
        time_s=hooks.clock.seconds,
        budget=hooks.budget.state_dict(time.monotonic()),
        guard=hooks.judge.guard.state_dict(),
        told_step=hooks.stories.last_step,
        batch_sizes=hooks.run.batch_sizes.to_list(),
        router=router_counts(hooks.gpt, hooks.sum_over_ranks),
        loss_scale=hooks.scaling.state_dict() if hooks.scaling is not None else {},
        rng=rng_state(),
        **hooks.logs.lengths(),
    )


def restore(hooks: "LoopHooks", left_over: dict[str, Any]) -> None:
    """Restore what `collect` returned, from the entries of a checkpoint that LitGPT's loop does not load."""
    # absent from a checkpoint of LitGPT's own loop
    if "run" not in left_over:
        return
    saved = RunState()
    saved.load_state_dict(left_over)
    set_rng_state(saved.rng)
    # on one rank, since each row of the log sums over all ranks
    if hooks.fabric.is_global_zero:
        set_router_counts(hooks.gpt, saved.router)
    hooks.clock.resume(saved.time_s)
    hooks.judge.guard.load_state_dict(saved.guard)
    # empty in a checkpoint of another precision
    if hooks.scaling is not None and saved.loss_scale:
        hooks.scaling.load_state_dict(saved.loss_scale)
    hooks.stories.last_step = saved.told_step
    hooks.logs.keep(vars(saved))


class StepStart(NamedTuple):
    """What the micro-batches of a step change before its end, as it was when the step began."""

    position: dict[str, Any]
    """The loader's, in the training data."""
    router: list[dict[str, torch.Tensor]]
    """This rank's counters."""
    rng: dict[str, Any]


class StepInProgress:
    """An optimizer step from its first micro-batch to its last; until then it can be undone."""

    def __init__(self, hooks: "LoopHooks") -> None:
        self.hooks = hooks
        self.n_batches = 0
        self.loss_sum: torch.Tensor | float = 0.0
        """Loss of its micro-batches so far, each divided by their number in a step, on the device."""
        self.began = time.perf_counter()
        self.was_saving = False
        """Whether a save was in progress when the step began."""
        self.start: StepStart | None = None
        """None in the first step of a process, before which there is nothing to save."""
        self.are_long = True
        """Whether the steps of any rank take longer than GRACE_S; assumed until the first has ended."""

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.began

    def begin(self) -> None:
        """Remember the state before the first micro-batch."""
        self.began, self.was_saving = time.perf_counter(), self.hooks.writer.is_writing
        # a step of one micro-batch has no place to stop in
        if self.hooks.run.accumulation > 1:
            counts = router_counts(self.hooks.gpt, lambda tensor: tensor)
            self.start = StepStart(self.hooks.loader.state_dict(), counts, rng_state())

    def add(self, loss: torch.Tensor) -> None:
        """Count a micro-batch and its loss."""
        self.loss_sum = self.loss_sum + loss.detach().float()
        self.n_batches += 1

    def end(self, norm: torch.Tensor, vote: int, share: float = 0.0) -> tuple[float, float, int, float]:
        """Return the mean loss, the gradient's norm, the sum of votes and the mean share, of all ranks."""
        # float32: a loss in bf16 would be rounded to three digits
        loss = torch.as_tensor(self.loss_sum, dtype=torch.float32, device=norm.device)
        is_long = self.seconds > GRACE_S
        flags = loss.new_tensor([float(vote), float(is_long), share])
        # one copy to the device, one all-reduce and one copy to the host for all
        sums = self.hooks.sum_over_ranks(torch.cat([loss[None], flags]))
        total, votes, n_long, shares, grad_norm = torch.cat([sums, norm.detach().float()[None]]).tolist()
        self.loss_sum, self.n_batches, self.are_long = 0.0, 0, n_long > 0
        # the clocks differ, and all ranks must have one learning rate
        world_size = self.hooks.run.world_size
        return total / world_size, grad_norm, round(votes), shares / world_size

    def seconds_per_batch(self) -> float:
        """Return the mean time of the micro-batches so far."""
        return self.seconds / self.n_batches

    def must_leave(self, left_s: float) -> bool:
        """Return whether the run is asked to end and what it does takes too long; the same on every rank."""
        must_leave = bool(self.hooks.judge.stops.reason) and left_s > GRACE_S
        if self.hooks.run.world_size == 1:
            return must_leave
        # where steps are short, waiting for the device and the all-reduce would cost more than they save
        if not self.are_long:
            return False
        vote = torch.tensor(float(must_leave), device=self.hooks.fabric.device)
        return self.hooks.sum_over_ranks(vote).item() > 0

    def roll_back(self) -> None:
        """Undo the micro-batches of this step, if there are any."""
        if self.start is None or self.n_batches == 0:
            return
        self.hooks.loader.load_state_dict(self.start.position)
        set_router_counts(self.hooks.gpt, self.start.router)
        set_rng_state(self.start.rng)


class LatestLoss:
    """What LitGPT's loop fetches at a row of the log in place of the mean of torchmetrics."""

    def __init__(self, **_: Any) -> None:
        self._loss = torch.zeros(())

    def to(self, _: torch.device) -> "LatestLoss":
        """Return itself: the loss lies where the model does."""
        return self

    def update(self, loss: torch.Tensor) -> None:
        """Remember the loss of a micro-batch, on its device."""
        self._loss = loss

    def compute(self) -> torch.Tensor:
        """Return the loss of the latest micro-batch."""
        return self._loss
