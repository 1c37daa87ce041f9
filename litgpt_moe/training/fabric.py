"""The Fabric that LitGPT's loop runs on: its methods call the hooks of the run too."""

import functools
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer

from litgpt_moe.checkpoints.state import check_moments, damage_in
from litgpt_moe.data.loader_workers import outlive_stop_signals
from litgpt_moe.training.batches import TrainLoader, ValLoader
from litgpt_moe.training.compiled import check_compiled
from litgpt_moe.training.hooks import LoopHooks
from litgpt_moe.training.optimizer import clone_state
from litgpt_moe.training.steps import RunFailed

# the beginnings of all that LitGPT's loop prints: our own lines say it, or it is for LitGPT's developers
LITGPT_LINES = (
    *("Time to instantiate model", "Total parameters", "Resuming training from", "Verifying settings"),
    *("Measured TFLOPs", "Epoch ", "iter ", "Validating ", "Final evaluation"),
    # its summary divides by a clock reading, and its epochs restart at 1 after a resume
    *("| ", "-----"),
)


def before_training(hooks: LoopHooks, batch: torch.Tensor) -> None:
    """Check what was compiled on the first micro-batch, and begin to count the time of the steps."""
    if hooks.is_compiled:
        check_compiled(hooks, batch)
    # from here on: what setting up and compiling took says nothing of how long another step takes
    hooks.in_progress.began = time.perf_counter()
    hooks.clock.begin_steps()


class TrainingFabric(L.Fabric):
    """Fabric whose methods, which LitGPT's loop calls, call the hooks too."""

    def __init__(self, hooks: LoopHooks, **options: Any) -> None:
        super().__init__(callbacks=[hooks], **options)
        self.hooks = hooks

    def setup_dataloaders(self, *loaders: Any, **options: Any) -> list[Any]:
        """Return the loaders, the one for training wrapped so that a checkpoint can hold its position."""
        hooks, (train, val) = self.hooks, super().setup_dataloaders(*loaders, **options)
        run = hooks.run
        for loader in (train, val):
            # without Fabric's wrapper: a data module of LitGPT's may have workers too
            outlive_stop_signals(getattr(loader, "_dataloader", loader))
        size = run.settings.train.micro_batch_size * run.world_size
        hooks.loader = TrainLoader(
            train,
            run.settings.seed,
            lambda: hooks.is_finished,
            hooks.early_end.between_batches,
            size,
            functools.partial(before_training, hooks),
        )
        hooks.val_loader = ValLoader(val, hooks.early_end.between_val_batches)
        return [hooks.loader, hooks.val_loader]

    def backward(self, tensor: torch.Tensor, *args: Any, **options: Any) -> None:
        """Add the loss of a micro-batch to that of its step."""
        self.hooks.in_progress.add(tensor)
        super().backward(tensor, *args, **options)

    def clip_gradients(self, module: Any, optimizer: Any, *args: Any, **options: Any) -> torch.Tensor:
        """Clip, and decide on the step: the loop calls this once before each optimizer step."""
        norm = super().clip_gradients(module, optimizer, *args, **options, error_if_nonfinite=False)
        assert norm is not None
        self.hooks.before_step(optimizer, norm)
        return norm

    def load(self, path: Any, state: Any = None, strict: bool = True, **_: Any) -> dict[str, Any]:
        """Load a checkpoint; into the loop's own state, with everything else that a resumed run needs."""
        if "iter_num" not in (state or {}):
            return super().load(path, state, strict=strict, weights_only=True)
        # without Fabric's wrapper
        optimizer: Optimizer = state["optimizer"].optimizer
        own = [{k: value for k, value in group.items() if k != "params"} for group in optimizer.param_groups]
        try:
            with damage_in(Path(path).parent):
                left_over = super().load(path, state, strict=strict, weights_only=True)
                check_moments(optimizer)
                self.hooks.resume(state, left_over)
        except ValueError as error:
            raise RunFailed(str(error)) from error
        # this run's settings hold, not the checkpoint's: weight_decay may have changed
        for group, settings in zip(optimizer.param_groups, own, strict=True):
            group.update(settings)
        clone_state(optimizer)
        left_over.clear()
        return {}

    def log_dict(self, metrics: Any, step: int | None = None) -> None:
        """Log the row that the hooks make of the loop's metrics."""
        row = self.hooks.complete(dict(metrics))
        try:
            super().log_dict(row, step)
        except OSError as error:
            self.hooks.lose_logger(self, error)

    def print(self, *texts: Any, **_: Any) -> None:
        """Print what the loop says, but for the lines that ours replace."""
        line = " ".join(map(str, texts))
        if not line.startswith(LITGPT_LINES):
            self.hooks.metrics.print(line)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed as Fabric does, without its line about it: `describe` names the seed."""
        return L.Fabric.seed_everything(seed, workers, verbose=False)
