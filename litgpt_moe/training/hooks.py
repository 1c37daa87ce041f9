"""What LitGPT's loop and Fabric call during a run, and which part of the run acts there."""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.strategy import Strategy
from litgpt import GPT
from litgpt.args import TrainArgs
from torch.optim import Optimizer

from litgpt_moe import balance
from litgpt_moe.checkpoints.layout import checkpoints_of
from litgpt_moe.checkpoints.state import RunState, rng_state, set_rng_state
from litgpt_moe.checkpoints.writer import CheckpointWriter
from litgpt_moe.hardware import peak_flops
from litgpt_moe.kernels.matmul import use_fast_linear
from litgpt_moe.loss import LossHead, defer_head
from litgpt_moe.training import steps
from litgpt_moe.training.batches import TrainLoader
from litgpt_moe.training.logs import MetricLog, RunLogs, StepFigures, metric_row, validation_row
from litgpt_moe.training.run import Run
from litgpt_moe.training.schedule import learning_rate, warmup_steps
from litgpt_moe.training.settings import saved_text
from litgpt_moe.training.sharding import is_sharded
from litgpt_moe.training.stories import StoryLog

# of a slow disk, until a first save has been timed
ASSUMED_BYTES_PER_S = 200e6


class LoopHooks:
    """Holds the parts of a run, and lets each act at its place in LitGPT's loop.

    Fabric calls the methods that begin with on_, and TrainingFabric or LitGPT's loop the others.
    """

    # from Fabric's setup on
    fabric: Fabric
    gpt: GPT
    head: LossHead | None
    loader: TrainLoader

    def __init__(self, run: Run, stops: steps.StopSignals, train_args: TrainArgs) -> None:
        settings = run.settings
        self.run, self.train_args, self.step = run, train_args, run.start_step
        self.ending = ""
        """Why the run ends after this step, if it does."""
        self.judge = steps.Judge(settings, run.started, stops, run.world_size)
        self.guard = self.judge.guard
        self.clock, self.logs = steps.Clock(run.start_step), RunLogs(settings.out_dir / "logs", run.config)
        self.metrics, self.stories = MetricLog(run, self.logs), StoryLog(self.logs.stories, run)
        text = saved_text(settings)
        self.writer = CheckpointWriter(settings.out_dir, settings.checkpoints, text, self.metrics.print)
        self.figures = StepFigures()
        self.loss_sum: torch.Tensor | float = 0.0
        """Loss of this step's micro-batches so far, each divided by their number, on the device."""
        self.has_validated = False

    def is_finished(self) -> bool:
        """Whether the last step of the run is done."""
        return self.step >= self.run.n_steps

    def on_after_setup(self, fabric: Fabric, module: Any) -> None:
        """Prepare the model, which Fabric has just wrapped."""
        self.fabric, self.gpt = fabric, module.module
        has_selection_bias = prepare_model(fabric, module, self.run)
        # FSDP's weights are whole only inside the model's forward
        self.head = None if is_sharded(fabric) else defer_head(self.gpt)
        self.writer.selection_bias = has_selection_bias

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks, which may take the tensor's own memory."""
        return self.fabric.strategy.all_reduce(tensor, reduce_op="sum")

    @functools.cached_property
    def peak_flops(self) -> float:
        """FLOP/s of all devices at their best; the first row of the log measures it where it is not known."""
        return peak_flops(self.fabric.device, self.run.precision) * self.run.world_size

    # --- one optimizer step ---

    def before_step(self, optimizer: Optimizer, norm: torch.Tensor) -> None:
        """Decide what becomes of the step whose gradient is known, and set its learning rate."""
        save_s = self.writer.lasting_s or self.run.checkpoint_bytes / ASSUMED_BYTES_PER_S
        failed_save = self.writer.failure
        vote = self.judge.vote(time.monotonic(), self.clock.longest_step_s, save_s, failed_save)
        loss, grad_norm, votes = self._to_host(norm, vote)
        self.figures = StepFigures(loss, grad_norm, self._set_learning_rate(optimizer))
        verdict = self.judge.verdict(loss, grad_norm, round(votes), failed_save)
        if verdict.fail:
            raise steps.RunFailed(verdict.fail)
        if verdict.end:
            self.ending = verdict.end
            # LitGPT reads this copy of the settings, which is its own, after each step: it saves, then ends
            self.train_args.save_interval = 1
        if verdict.spike is not None:
            self.metrics.report_spike(self.step + 1, self.figures, verdict.spike)
        if verdict.skip:
            self._skip(optimizer, verdict)

    def _to_host(self, norm: torch.Tensor, vote: int) -> list[float]:
        """Return the mean loss of all ranks, the norm, and the sum of the votes, by one copy to the host."""
        # float32: a loss in bf16 would be rounded to three digits
        loss = torch.as_tensor(self.loss_sum, dtype=torch.float32, device=norm.device)
        self.loss_sum = 0.0
        # the vote rides along: one all-reduce for both
        loss, votes = self.sum_over_ranks(torch.stack([loss, loss.new_tensor(vote)]))
        return torch.stack([loss / self.run.world_size, norm.detach().float(), votes]).tolist()

    def _set_learning_rate(self, optimizer: Optimizer) -> float:
        args, run, peak = self.run.settings, self.run, float(optimizer.defaults["lr"])
        lr = learning_rate(
            args.schedule, self.step + 1, run.n_steps, self._warmup_steps, peak, args.train.min_lr
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr

    @functools.cached_property
    def _warmup_steps(self) -> int:
        run, args = self.run, self.run.settings
        # a loader of an endless stream has no length, and needs none where the fraction is not used
        in_epoch = len(self.loader) / run.accumulation if args.train.lr_warmup_fraction else 0.0
        return warmup_steps(args.schedule, args.train, run.n_steps, run.tokens_per_step, in_epoch)

    def _skip(self, optimizer: Optimizer, verdict: steps.Verdict) -> None:
        balance.discard_step_load(self.gpt)
        # an optimizer leaves weights without a gradient as they are
        optimizer.zero_grad(set_to_none=True)
        problem = f"the loss is {self.figures.loss:g}, its gradient's norm {self.figures.grad_norm:g}"
        n = self.guard.n_in_a_row
        self.metrics.print(f"step {self.step + 1}: {problem}: step skipped ({n} in a row)")
        if verdict.give_up:
            self.writer.wait()
            saved = checkpoints_of(self.run.settings.out_dir)
            way_on = f"continue from {saved[0]} with --resume auto" if saved else "there is no checkpoint yet"
            raise steps.RunFailed(f"{problem} in {n} steps in a row; lower optimizer.init_args.lr; {way_on}")

    def on_after_optimizer_step(self, strategy: Strategy, optimizer: Optimizer) -> None:
        """Move the selection bias, and count the step."""
        balance.update_selection_bias(self.gpt, self.sum_over_ranks)
        self.step += 1
        self.clock.end_step()
        self.metrics.advance(self.step)

    # --- between steps ---

    def complete(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the row for the loop's `metrics`, with figures of all ranks and the routers' statistics."""
        # read before peak_flops, whose first measurement takes half a second on a CPU
        seconds = self.clock.seconds
        if "loss" not in metrics:
            return validation_row(self.run, self.step, seconds, metrics)
        rate = self.clock.steps_per_s(self.step, seconds)
        row = metric_row(self.run, self.step, seconds, rate, self.figures, self.peak_flops, metrics)
        epoch = self.loader.state_dict().get("epoch", 0)
        row |= {"epoch": epoch, "skipped_steps": self.guard.n_skipped}
        counts, read = balance.router_statistics(self.gpt, self.sum_over_ranks)
        counts = counts.cpu()
        self.logs.write_loads(self.step, balance.layers_of(self.gpt), counts.tolist())
        return row | read(counts)

    def validate(self, validate: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
        """Return LitGPT's validation loss; write a story, and warn of a loss that is not finite."""
        with self.clock.pause():
            val_loss = validate(*args, **options)
            # the first validation of each process is fit's trial of two batches
            if self.has_validated and not is_sharded(self.fabric):
                self.stories.tell(self.gpt, self.head, self.step)
            self.has_validated = True
        if not val_loss.isfinite():
            self.metrics.print(f"Warning: the validation loss is {val_loss.item():g} at step {self.step}.")
        # fit takes its exponential, which overflows at 709 and raises
        return val_loss.clamp(max=700.0)

    def save(self, fabric: Fabric, state: dict[str, Any], tokenizer_dir: Path, checkpoint_file: Path) -> None:
        """Save the loop's `state`, and what `resume` needs besides."""
        self.logs.sync()
        ours = RunState(
            time_s=self.clock.seconds,
            guard=self.guard.state_dict(),
            told_step=self.stories.last_step,
            router=[
                {name: self.sum_over_ranks(getattr(counters, name).clone()) for name in ("load", "sums")}
                for counters in _counters(self.gpt)
            ],
            rng=rng_state(),
            **self.logs.lengths(),
        )
        self.writer.save(fabric, {**state, **ours.state_dict()}, tokenizer_dir, checkpoint_file)

    def resume(self, state: dict[str, Any], left_over: dict[str, Any]) -> None:
        """Go on where the checkpoint was made, whose part for the loop has been loaded into `state`."""
        # another number of devices takes other micro-batches
        state["iter_num"] = state["step_count"] * self.run.accumulation
        if "run" not in left_over:
            # LitGPT's own loop wrote the checkpoint
            return
        saved = RunState()
        saved.load_state_dict(left_over)
        set_rng_state(saved.rng)
        # on one rank, since a row of the log sums over all
        if self.fabric.is_global_zero:
            for counters, saved_counts in zip(_counters(self.gpt), saved.router, strict=True):
                counters.load.copy_(saved_counts["load"])
                counters.sums.copy_(saved_counts["sums"])
        self.clock.resume(saved.time_s)
        self.guard.load_state_dict(saved.guard)
        self.stories.last_step = saved.told_step
        self.logs.keep(vars(saved))

    def close(self, fabric: Fabric) -> None:
        """Wait for the save in progress, and finish the loggers."""
        self.writer.wait()
        for logger in fabric.loggers:
            logger.finalize("finished")


def prepare_model(fabric: Fabric, module: Any, run: Run) -> bool:
    """Balance the model in Fabric's `module`, and load the weights to start from.

    Return whether experts are chosen with a selection bias, which makes stock LitGPT refuse the weights.
    """
    gpt: GPT = module.module
    use_fast_linear(gpt)
    # LitGPT divides its own loss by the number of micro-batches, not what a layer adds
    balance.set_balance(gpt, **asdict(run.settings.moe), scale=1 / run.accumulation)
    source = run.initial or run.resume
    was_biased = source is not None and source.has_selection_bias
    if was_biased:
        # trained with a selection bias, the experts are chosen with it even if nothing updates it
        balance.use_selection_bias(gpt)
    if run.initial is not None:
        # LitGPT's own initial_checkpoint_dir reads bare weights, not checkpoints. strict=False: the weights
        # were checked, and the optimizer's state stays behind
        if run.initial.is_bare:
            fabric.load_raw(run.initial.file, module, strict=False, weights_only=True)
        else:
            fabric.load(run.initial.file, {"model": module}, strict=False)
        # as long as something refers to a tensor in the mapped file, its disk space stays in use
        run.initial.state.clear()
    return was_biased or run.settings.moe.bias_update_rate > 0


def _counters(gpt: GPT) -> list[balance.Balance]:
    return [layer.balance for layer in balance.layers_of(gpt).values() if layer.balance is not None]
