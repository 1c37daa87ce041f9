"""What LitGPT's loop and Fabric call during a run, and which part of the run acts there."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.strategy import Strategy
from litgpt import GPT
from litgpt.args import EvalArgs, TrainArgs
from torch.optim import Optimizer

from litgpt_moe import balance
from litgpt_moe.checkpoints.layout import FINAL, is_saved
from litgpt_moe.checkpoints.writer import CheckpointWriter
from litgpt_moe.cli import first_line
from litgpt_moe.data.manifest import manifest_fingerprint, read_manifest
from litgpt_moe.files import remove
from litgpt_moe.hardware import peak_flops
from litgpt_moe.loss import LossHead, defer_head
from litgpt_moe.threads import load_of_others, usable_cores
from litgpt_moe.training.batches import TrainLoader, ValLoader
from litgpt_moe.training.clock import TimeBudget
from litgpt_moe.training.csv_log import RunLogs
from litgpt_moe.training.ending import EarlyEnd
from litgpt_moe.training.logs import MetricLog, StepFigures, metric_row, validation_row
from litgpt_moe.training.loss_scaling import LossScaling, loss_scaling
from litgpt_moe.training.model import prepare_model
from litgpt_moe.training.progress import StepInProgress, collect, restore
from litgpt_moe.training.resume import say_if_data_changed
from litgpt_moe.training.run import Run
from litgpt_moe.training.schedule import set_learning_rate
from litgpt_moe.training.settings import saved_text
from litgpt_moe.training.sharding import is_sharded
from litgpt_moe.training.slowness import SlowSteps, warning
from litgpt_moe.training.steps import Clock, Judge, StopSignals, Verdict
from litgpt_moe.training.stories import StoryLog

# assumed for the first save, until its time has been measured: a slow disk
ASSUMED_BYTES_PER_S = 200e6
MAX_LOSS = 700.0


class LoopHooks:
    """Holds the parts of a run and calls each at its place in LitGPT's loop.

    Fabric calls the methods whose names begin with on_; TrainingFabric and LitGPT's loop call the others.
    """

    # set once Fabric has set up the model and the data
    fabric: Fabric
    module: Any
    optimizer: Optimizer
    gpt: GPT
    head: LossHead | None
    scaling: LossScaling | None
    """None in other precisions than 16-mixed."""
    loader: TrainLoader
    val_loader: ValLoader

    def __init__(self, run: Run, stops: StopSignals, train_args: TrainArgs, eval_args: EvalArgs) -> None:
        settings = run.settings
        self.run, self.train_args, self.step = run, train_args, run.start_step
        self.eval_args = eval_args
        self.is_compiled = False
        """Set when the run is launched."""
        # LitGPT's loop takes all steps of a run as equally large
        train_args.max_tokens = run.n_steps * run.tokens_per_step
        self.ending = ""
        """Why the run ends early, after this step; empty while it goes on."""
        self.budget = TimeBudget(settings, run.started, run.used_time)
        self.judge = Judge(settings, run.started, stops, run.world_size)
        self.clock = Clock(run.start_step)
        self.logs = RunLogs(settings.out_dir / "logs", run.config, run.precision)
        self.metrics, self.stories = MetricLog(run, self.logs), StoryLog(self.logs.stories, run)
        text = saved_text(settings)
        self.writer = CheckpointWriter(settings.out_dir, settings.checkpoints, text, self.metrics.print)
        self.writer.keep_tokenizer(settings.tokenizer_dir)
        self.figures = StepFigures()
        self.in_progress, self.early_end = StepInProgress(self), EarlyEnd(self)
        # a run of several processes would take its own for others
        is_alone = run.devices == 1 and not getattr(run.data, "num_workers", 0)
        self.slow_steps = SlowSteps(load_of_others() if is_alone else lambda: None)
        self.saved_step = run.start_step
        self.has_validated = False
        self.cut_loss: float | None = None
        """The latest validation loss, if it is above what LitGPT's loop was given for it."""
        self.is_discarded = False
        """Whether the run starts anew, and the logs of this try are to go."""
        self.validation = (0.0, 0)
        """When the latest validation began, on time.perf_counter(), and its micro-batches at most."""
        self.val_batch_s = math.inf
        """Seconds of a batch in the latest validation, its story included."""

    def on_after_setup(self, fabric: Fabric, module: Any) -> None:
        """Prepare the model, which Fabric has just wrapped."""
        self.metrics.show("reading the data")
        self.fabric, self.module, self.gpt = fabric, module, module.module
        self.scaling = loss_scaling(fabric)
        if prepare_model(fabric, module, self.run):
            self.writer.notes["selection_bias"] = True
        # the loader reports a manifest that has become unreadable
        with contextlib.suppress(ValueError, OSError):
            if self.run.data_dir is not None:
                self.writer.notes["data"] = manifest_fingerprint(read_manifest(self.run.data_dir, False))
        # FSDP's weights are whole only inside the model's forward
        self.head = None if is_sharded(fabric) else defer_head(self.gpt)

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks; the tensor itself may be overwritten."""
        return self.fabric.strategy.all_reduce(tensor, reduce_op="sum")

    @functools.cached_property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of all devices; None on CPUs, where a measurement gives what other programs leave."""
        if self.fabric.device.type == "cpu":
            return None
        return peak_flops(self.fabric.device, self.run.precision) * self.run.world_size

    @property
    def save_s(self) -> float:
        """Seconds that a save takes."""
        return self.writer.lasting_s or self.run.checkpoint_bytes / ASSUMED_BYTES_PER_S

    @property
    def is_finished(self) -> bool:
        """Whether the run has had its last step."""
        return self.step >= self.run.n_steps or self.budget.is_up

    @property
    def ahead_s(self) -> tuple[float, float]:
        """Seconds for the last validation and save, and for a validation before the next step."""
        # a batch takes less than one of training, and no more than in the trial, which may compile
        batch_s = min(self.val_batch_s, self.budget.longest_step_s / self.run.accumulation)
        val_s = batch_s * min(self.eval_args.max_iters, self.val_loader.n_batches)
        return self.eval_args.final_validation * val_s + self.save_s, self.is_validation_due * val_s

    @property
    def is_validation_due(self) -> bool:
        """Whether LitGPT's loop validates after the step in progress."""
        return (self.step + 1) % self.eval_args.interval == 0

    @property
    def now(self) -> str:
        """What the bar calls the work of the loop: nothing, but for the first step, which takes longest."""
        first = "compiling, and the first step" if self.is_compiled else "the first step"
        return first if self.step == self.run.start_step else ""

    def before_step(self, optimizer: Optimizer, norm: torch.Tensor) -> None:
        """Judge the step, whose gradient is complete, and set its learning rate."""
        self.optimizer = optimizer
        # in this order: a save may fail in between, and a failure without its reason helps nobody
        must_fail, failed_save = self.writer.must_end_run, self.writer.failure
        step_s = max(self.clock.longest_step_s, self.in_progress.seconds)
        vote = self.judge.vote(time.monotonic(), step_s, self.save_s, must_fail)
        share = self.budget.share(time.monotonic(), *self.ahead_s) if self.run.is_timed else 0.0
        loss, grad_norm, votes, share = self.in_progress.end(norm, vote, share)
        self.budget.end_step(self.in_progress.seconds)
        time_share = self.budget.settle(share)
        lr = set_learning_rate(optimizer, self.run, self.step + 1, lambda: len(self.loader), time_share)
        self.figures = StepFigures(loss, grad_norm, lr)
        can_lower = not math.isfinite(grad_norm) and self.scaling is not None and self.scaling.can_lower()
        verdict = self.judge.verdict(loss, grad_norm, votes, failed_save, can_lower)
        if verdict.fail:
            self.early_end.fail(verdict.fail)
        if self.budget.is_up and self.is_validation_due:
            # the loop validates after this step: once more would find the same, and there is no time for it
            self.eval_args.final_validation = False
        # the last step ends the run anyway
        if verdict.end and not self.budget.is_up and self.step + 1 < self.run.n_steps:
            self.ending = verdict.end
            # LitGPT reads this copy of the settings after each step: it saves, and the loader ends the run
            self.train_args.save_interval = 1
        if verdict.spike is not None:
            self.metrics.report_spike(self.step + 1, self.figures, verdict.spike)
        if verdict.skip:
            balance.discard_step_load(self.gpt)
            # an optimizer leaves weights without a gradient as they are
            optimizer.zero_grad(set_to_none=True)
            self._report_skip(verdict)

    def _report_skip(self, verdict: Verdict) -> None:
        if verdict.overflow and self.scaling is not None:
            self.metrics.print(f"step {self.step + 1}: {self.scaling.count_overflow()}: step skipped")
            return
        problem = f"the loss is {self.figures.loss:g}, its gradient's norm {self.figures.grad_norm:g}"
        in_a_row = f"({self.judge.guard.n_in_a_row} in a row)"
        self.metrics.print(f"step {self.step + 1}: {problem}: step skipped {in_a_row}")
        if verdict.give_up:
            self.early_end.give_up(problem)

    def on_after_optimizer_step(self, strategy: Strategy, optimizer: Optimizer) -> None:
        """Move the selection bias, and count the step."""
        balance.update_selection_bias(self.gpt, self.sum_over_ranks)
        self.step += 1
        self.clock.end_step()
        self._watch_speed()
        self.metrics.advance(self.step, self.budget.used_s(time.monotonic()))

    def _watch_speed(self) -> None:
        """Say so when steps have become slow; the first one prepares much, and a save takes a core."""
        if self.step == self.run.start_step + 1 or self.in_progress.was_saving or self.writer.is_writing:
            return
        if slow := self.slow_steps.add(self.in_progress.seconds):
            counts = usable_cores(), torch.get_num_threads()
            self.metrics.print(warning(slow, self.step, self.fabric.device.type, *counts))

    def complete(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the row for the loop's `metrics`: figures of all ranks, and the routers' statistics."""
        # read before peak_flops, which is measured at the first row where it is not known
        seconds = self.clock.seconds
        if "loss" not in metrics:
            if self.cut_loss is not None:
                metrics |= {"val_loss": self.cut_loss, "val_ppl": math.inf}
            return validation_row(self.run, self.step, seconds, metrics)
        if (left_s := self.budget.left_s(time.monotonic())) is not None:
            metrics["remaining_time"] = min(left_s, metrics["remaining_time"])
        rate = self.clock.steps_per_s(self.step, seconds)
        row = metric_row(self.run, self.step, seconds, rate, self.figures, self.peak_flops, metrics)
        row["epoch"] = self.loader.state_dict().get("epoch", 0)
        row["skipped_steps"] = self.judge.guard.n_skipped
        if self.scaling is not None:
            row |= {"overflow_steps": self.scaling.n_overflows, "loss_scale": self.scaling.current.item()}
        counts, read = balance.router_statistics(self.gpt, self.sum_over_ranks)
        counts = counts.cpu()
        self.logs.write_loads(self.step, balance.layers_of(self.gpt), counts.tolist())
        return row | read(counts)

    def validate(self, validate: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
        """Return LitGPT's validation loss; write a story, and warn of a loss that is not finite."""
        self.metrics.show("validating" if self.has_validated else "checking by two batches")
        self.validation = time.perf_counter(), options["max_iters"]
        with self.clock.pause():
            val_loss = validate(*args, **options)
            # the first validation of each process is a trial of two batches
            if self.has_validated and not is_sharded(self.fabric):
                self.stories.tell(self.gpt, self.head, self.step)
        n_batches = min(options["max_iters"], self.val_loader.n_batches)
        self.val_batch_s = (time.perf_counter() - self.validation[0]) / n_batches
        self.has_validated = True
        # LitGPT takes its exponential, which raises OverflowError above 709, and prints that
        self.cut_loss = loss if (loss := val_loss.item()) > MAX_LOSS else None
        if self.cut_loss is not None or not math.isfinite(loss):
            self.metrics.print(f"Warning: the validation loss is {loss:g} at step {self.step}.")
        self.metrics.show(self.now)
        return val_loss.clamp(max=MAX_LOSS)

    def save(self, fabric: Fabric, state: dict[str, Any], tokenizer_dir: Path, checkpoint_file: Path) -> None:
        """Save the loop's `state`, and what `resume` needs besides; not what was saved before the resume."""
        is_old = self.run.resume is not None and state["step_count"] == self.run.start_step
        # one decision for all ranks, which save together
        if is_old and fabric.broadcast(is_saved(checkpoint_file.parent, self.run.start_step)):
            self.metrics.print(f"{checkpoint_file.parent} is there already")
            return
        self.metrics.show("saving")
        self.logs.sync()
        self.saved_step = state["step_count"]
        self.writer.is_last = bool(self.ending) or self.is_finished
        state = {**state, **collect(self).state_dict()}
        self.writer.save(fabric, state, tokenizer_dir, checkpoint_file)
        self.metrics.show(self.now)

    def resume(self, state: dict[str, Any], left_over: dict[str, Any]) -> None:
        """Restore what `save` added to the loop's `state`; `left_over` is what Fabric has not loaded."""
        # with another number of devices a step has another number of micro-batches
        state["iter_num"] = state["step_count"] * self.run.accumulation
        restore(self, left_over)
        assert self.run.resume is not None
        is_end = self.is_finished and self.run.resume.folder.name == FINAL
        # final/ is saved after the last validation, whose row ends the log
        if is_end and self.fabric.broadcast(val_loss := self.logs.metrics.last_val_loss) is not None:
            self.eval_args.final_validation = False
            self.metrics.latest |= {"val_loss": val_loss} if val_loss is not None else {}
        say_if_data_changed(self.run.resume.folder, self.writer.notes.get("data"))

    def close(self, fabric: Fabric) -> None:
        """Wait for the save in progress, and finish the loggers."""
        self.writer.wait()
        try:
            for logger in fabric.loggers:
                logger.finalize("finished")
        except OSError as error:
            self.lose_logger(fabric, error)
        self.early_end.close()
        # our own logs are cut when the run starts anew; TensorBoard's would stay, in a folder for each try
        for folder in [getattr(logger, "log_dir", None) for logger in fabric.loggers]:
            if self.is_discarded and folder is not None:
                remove(Path(folder))

    def lose_logger(self, fabric: Fabric, error: OSError) -> None:
        """Go on without TensorBoard, whose thread ends with its first error. Our loggers raise none."""
        del fabric.loggers[1:]
        self.metrics.print(f"Warning: TensorBoard's log is lost ({first_line(error)}); metrics.csv has all")
