"""How a run that must end early leaves LitGPT's loop: between two batches, its last whole step saved."""

import contextlib
import time
from typing import TYPE_CHECKING, NoReturn

from litgpt_moe.checkpoints.layout import CHECKPOINT_FILE, checkpoints_of, step_name
from litgpt_moe.training.steps import Ending, RunFailed

if TYPE_CHECKING:
    from litgpt_moe.training.hooks import LoopHooks


class EarlyEnd:
    """Looks between the batches of training and validation whether the run must end, and leaves the loop."""

    def __init__(self, hooks: "LoopHooks") -> None:
        self.hooks = hooks
        self.is_failing = False
        """Whether this process and all others fail after the same step."""

    def between_batches(self) -> None:
        """Leave the loop if the run must end: after a whole step, or amid one that would take long."""
        hooks = self.hooks
        if hooks.in_progress.n_batches == 0:
            if hooks.ending:
                raise Ending(hooks.ending)
            hooks.in_progress.begin()
            return
        batch_s = hooks.in_progress.seconds_per_batch()
        left_s = batch_s * (hooks.run.accumulation - hooks.in_progress.n_batches)
        if self._must_leave(batch_s, left_s):
            hooks.metrics.print(f"Step {hooks.step + 1} takes {left_s:.0f} s more: left to the resumed run.")
            self._leave()

    def between_val_batches(self, n_done: int, n_batches: float) -> None:
        """Leave the loop if the run must end and the validation would take long."""
        began, max_iters = self.hooks.validation
        batch_s = (time.perf_counter() - began) / n_done
        if self._must_leave(batch_s, batch_s * (min(max_iters, n_batches) - n_done)):
            self.hooks.metrics.print(f"The validation at step {self.hooks.step} is cut off.")
            self._leave()

    def _must_leave(self, batch_s: float, left_s: float) -> bool:
        """Return whether to leave amid a step or validation with `left_s` to go, `batch_s` a micro-batch."""
        # 1.5 as in `vote`; as long as another micro-batch fits, the estimate of the rest may still shrink
        needed_s = min(1.5 * batch_s, left_s) + self.hooks.save_s
        # where the learning rate follows the clock, what has begun is ended: the run is not to be resumed
        if self.hooks.budget.limit_s is None:
            self.hooks.judge.check_time(time.monotonic(), needed_s)
        return self.hooks.in_progress.must_leave(left_s)

    def fail(self, reason: str) -> NoReturn:
        """End the run with its earlier checkpoints; all ranks call it after the same step."""
        self.is_failing = True
        raise RunFailed(reason)

    def give_up(self, problem: str) -> NoReturn:
        """Fail for too many skipped steps; all ranks call it after the same step."""
        run = self.hooks.run
        self.hooks.writer.wait()
        # all ranks name the newest checkpoint, which rank 0 may still have been writing
        self._wait_for_all()
        saved, n_steps = checkpoints_of(run.settings.out_dir), self.hooks.judge.guard.n_in_a_row
        way_on = f"continue from {saved[0]} with --resume auto" if saved else "there is no checkpoint yet"
        remedy = "lower optimizer.init_args.lr" + (" or use precision 32-true" if self.hooks.scaling else "")
        self.fail(f"{problem} in {n_steps} steps in a row; {remedy}; {way_on}")

    def close(self) -> None:
        """Wait for all ranks if they fail together: when one ends, Lightning and torchrun kill the others.

        Call it once the save in progress is done and the loggers are closed, which takes rank 0 alone time.
        """
        if self.is_failing:
            self._wait_for_all()

    def _wait_for_all(self) -> None:
        # the barrier fails if another rank has died: this rank must still report its own reason
        with contextlib.suppress(RuntimeError):
            self.hooks.fabric.barrier()

    def _leave(self) -> None:
        """Save the last whole step, unless that is done, and leave the loop."""
        hooks, run = self.hooks, self.hooks.run
        hooks.ending = hooks.judge.stops.reason or "the request of another process"
        if hooks.step == run.start_step and hooks.ending.startswith("train.max_time"):
            hooks.ending += ", in which no step was done: raise it"
        if not self._is_saved():
            hooks.in_progress.roll_back()
            state = {"model": hooks.module, "optimizer": hooks.optimizer, "train_dataloader": hooks.loader}
            state |= {"iter_num": hooks.step * run.accumulation, "step_count": hooks.step}
            file = run.settings.out_dir / step_name(hooks.step) / CHECKPOINT_FILE
            hooks.save(hooks.fabric, state, run.settings.tokenizer_dir, file)
        raise Ending(hooks.ending)

    def _is_saved(self) -> bool:
        """Return whether the last whole step is saved, the same on every rank; wait for its save to end."""
        if self.hooks.saved_step != self.hooks.step:
            return False
        self.hooks.writer.wait()
        # rank 0 alone writes; where that has failed there may be room by now
        return self.hooks.fabric.broadcast(self.hooks.writer.failure is None)
