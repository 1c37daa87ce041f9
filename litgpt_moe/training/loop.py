"""How we hook into LitGPT's training loop: a Fabric of our own, and replaced functions of litgpt.pretrain.

It was checked against litgpt 0.5.13; tests/training/test_litgpt_contract.py fails where another differs.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from litgpt import GPT, pretrain
from litgpt.utils import choose_logger

from litgpt_moe.checkpoints.overwrite import delete_run
from litgpt_moe.checkpoints.writer import CheckpointWriter, tidy
from litgpt_moe.hardware import (
    avoid_wrong_gradients,
    gpu_bytes,
    has_cuda,
    keep_freed_memory,
    precision_dtype,
    will_compile,
)
from litgpt_moe.loss import linear_cross_entropy
from litgpt_moe.processes import note_once
from litgpt_moe.threads import usable_cores
from litgpt_moe.training.fabric import TrainingFabric
from litgpt_moe.training.facts import write_run_facts
from litgpt_moe.training.hooks import LoopHooks
from litgpt_moe.training.loss_scaling import MixedLossScaling, ShardedLossScaling
from litgpt_moe.training.memory import choose_strategy
from litgpt_moe.training.optimizer import make_optimizer
from litgpt_moe.training.progress import LatestLoss
from litgpt_moe.training.resume import OpenCheckpoint
from litgpt_moe.training.run import Run
from litgpt_moe.training.settings import Settings, plain_settings
from litgpt_moe.training.sharding import ShardedStrategy
from litgpt_moe.training.steps import RunFailed
from litgpt_moe.training.summary import describe


class BackgroundIO(TorchCheckpointIO):
    """Lightning's plugin that receives the whole state on rank 0; the writer saves it in the background."""

    def __init__(self, writer: CheckpointWriter, opened: OpenCheckpoint | None) -> None:
        super().__init__()
        self._writer, self._opened = writer, opened

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy the state to host memory; the writer's thread writes it to disk."""
        self._writer.hold(checkpoint)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Return the content of the checkpoint that the run has opened and checked."""
        assert self._opened is not None and self._opened.file == Path(path)
        return self._opened.state


def make_fabric(run: Run, hooks: LoopHooks, loggers: list[Any], strategy: str) -> TrainingFabric:
    """Return the Fabric that LitGPT's loop runs on; `strategy` is what `choose_strategy` returns."""
    settings, opened = run.settings, run.resume or run.initial
    # Fabric's "auto" takes a Mac's MPS, on which nothing of this has been tried
    is_mac = torch.backends.mps.is_available() and not has_cuda()
    accelerators = {"gpu": "cuda", "auto": "cpu" if is_mac else "auto"}
    # litgpt.pretrain.setup always takes FSDP, which needs GPUs
    is_fsdp = strategy == "fsdp"
    plugins: list[Any] = [] if is_fsdp else [BackgroundIO(hooks.writer, opened)]
    precision: Any = run.precision
    if precision == "16-mixed":
        device_type = "cuda" if settings.accelerator != "cpu" and has_cuda() else "cpu"
        plugins.append((ShardedLossScaling if is_fsdp else MixedLossScaling)(device_type))
        precision = None
    return TrainingFabric(
        hooks,
        accelerator=accelerators.get(settings.accelerator, settings.accelerator),
        devices=run.devices,
        num_nodes=settings.num_nodes,
        strategy=ShardedStrategy(hooks.writer, opened) if is_fsdp else strategy,
        plugins=plugins,
        precision=precision,
        loggers=loggers,
    )


def set_up_torch(settings: Settings, device: torch.device) -> tuple[bool, str]:
    """Set torch up for the whole process; return whether the model is compiled, and why."""
    is_compiled, why = will_compile(settings.compile, settings.accelerator)
    # `replaced_functions` keeps the model from being compiled, this keeps functions of optimizers from it
    torch.compiler.set_stance("default" if is_compiled else "force_eager")
    if is_compiled:
        avoid_wrong_gradients()
    if device.type == "cuda":
        # on CUDA alone: elsewhere it brings no speed and may round differently
        torch.set_float32_matmul_precision(settings.float32_matmul_precision)
    elif device.type == "cpu":
        keep_freed_memory()
    return is_compiled, why


def keep_threads(run: Run) -> None:
    """Compute with as many threads as the run did before: another number adds up sums in another order."""
    recorded = run.resume.state.get("run", {}) if run.resume else {}
    before, now = recorded.get("n_threads", 0), torch.get_num_threads()
    if before in (0, now) or run.world_size > 1:
        return
    if "OMP_NUM_THREADS" not in os.environ and before <= usable_cores():
        torch.set_num_threads(before)
        return
    note_once(
        f"The run had {before} threads so far, now it has {now}: it goes on, but not bit for bit "
        f"(OMP_NUM_THREADS={before} would, with as many cores)."
    )


def launch(run: Run, hooks: LoopHooks) -> tuple[TrainingFabric, bool]:
    """Start the processes, open the output folder; return the Fabric and whether the model is compiled."""
    loggers = other_loggers(run, hooks)
    is_on_gpus = run.settings.accelerator != "cpu" and has_cuda()
    strategy, reason = choose_strategy(run, gpu_bytes(run.devices) if is_on_gpus else None)
    fabric = make_fabric(run, hooks, [hooks.metrics, *loggers], strategy)
    is_compiled, why = set_up_torch(run.settings, fabric.device)
    hooks.is_compiled = is_compiled
    if fabric.device.type == "cpu":
        keep_threads(run)
    fabric.launch()
    refuse_two_strategies(fabric, strategy)
    if fabric.is_global_zero:
        if run.settings.overwrite:
            delete_run(run.settings.out_dir)
        # renames the checkpoints of later steps, which this run writes anew
        tidy(run.settings.out_dir, run.start_step)
        if run.resume is None:
            hooks.logs.keep({})
        write_run_facts(run, fabric.device)
    for logger in loggers:
        logger.log_hyperparams(plain_settings(run.settings))
    tell = hooks.metrics.print
    tell(describe(run, fabric.device, "compiled" if is_compiled else "eager", why))
    if run.world_size > 1:
        tell(f"Devices {run.world_size} by {strategy.upper()} ({reason})")
    hooks.metrics.show("building the model")
    return fabric, is_compiled


def refuse_two_strategies(fabric: TrainingFabric, strategy: str) -> None:
    """Raise RunFailed on all ranks if machines with other GPUs have chosen another strategy."""
    n_fsdp = fabric.all_reduce(torch.tensor(float(strategy == "fsdp"), device=fabric.device), reduce_op="sum")
    if n_fsdp not in (0, fabric.world_size):
        raise RunFailed("the machines' GPUs have different memory: choose --strategy ddp or --strategy fsdp")


def other_loggers(run: Run, hooks: LoopHooks) -> list[Any]:
    """Return the loggers beside metrics.csv: none, TensorBoard's or W&B's."""
    if run.settings.logger_name == "tensorboard":
        return [choose_logger("tensorboard", run.settings.out_dir, f"pretrain-{run.config.name}")]
    if run.settings.logger_name == "wandb":
        from litgpt_moe.training.wandb_log import WandbLog  # not at the top: importing wandb takes a second

        wandb = WandbLog(run, hooks.metrics.print)
        hooks.writer.on_saved = wandb.log_checkpoint
        return [wandb]
    return []


@contextlib.contextmanager
def replaced_functions(hooks: LoopHooks, compiled: bool) -> Iterator[None]:
    """Replace functions that litgpt.pretrain calls and takes no argument for; checked against 0.5.13.

    Above each stands what LitGPT's own function does that does not fit.
    """
    replacements: dict[tuple[Any, str], Callable[..., Any]] = {
        # writes the weights in place, and re-parses sys.argv, which exits on our flags
        (pretrain, "save_checkpoint"): hooks.save,
        # ignores a loss that is not finite, and `fit` fails on one over 709
        (pretrain, "validate"): functools.partial(hooks.validate, pretrain.validate),
        # may find data that were changed or removed since they were checked
        (pretrain, "get_dataloaders"): functools.partial(_get_dataloaders, pretrain.get_dataloaders),
        # puts all weights into one group, and sets `fused` by the device alone
        (pretrain, "instantiate_torch_optimizer"): lambda spec, *_, **__: make_optimizer(
            hooks.run.settings, hooks.gpt, spec
        ),
        # waits for the device at each micro-batch to ask whether the loss is NaN
        (pretrain, "RunningMean"): LatestLoss,
        # needs all logits at once
        (pretrain, "chunked_cross_entropy"): functools.partial(_loss, hooks, pretrain.chunked_cross_entropy),
    }
    if not compiled:
        # main compiles unconditionally; even where nothing is compiled, loading Inductor takes a second
        replacements[torch, "compile"] = functools.partial(_compile_all_but_model, torch.compile)
    with contextlib.ExitStack() as at_exit:
        for (owner, name), replacement in replacements.items():
            at_exit.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def _get_dataloaders(get: Callable[..., Any], *args: Any) -> Any:
    try:
        return get(*args)
    except (ValueError, ImportError) as error:
        raise RunFailed(f"{error}; then continue with --resume auto") from error


def _loss(
    hooks: LoopHooks, cross_entropy: Callable[..., torch.Tensor], output: Any, targets: Any, **options: Any
) -> torch.Tensor:
    head = hooks.head
    # `fit` passes chunk_size=0 when it counts FLOPs on a model of its own, which returns logits
    if head is None or options.get("chunk_size") == 0:
        return cross_entropy(output, targets, **options)
    # autocast does not reach into a custom autograd function
    dtype = precision_dtype(hooks.run.precision) if hooks.run.precision.endswith("mixed") else None
    scale = hooks.scaling and hooks.scaling.current / hooks.run.accumulation
    return linear_cross_entropy(output, head.weight, targets, dtype, scale)


def _compile_all_but_model(compile: Callable[..., Any], model: Any = None, **options: Any) -> Any:
    return model if isinstance(model, GPT) else compile(model, **options)
