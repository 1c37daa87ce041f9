"""The checks of a run before its first file is written: one sentence for each problem."""

import functools
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from litgpt_moe.checkpoints.layout import CheckpointArgs
from litgpt_moe.hardware import has_cuda, memory_bytes, missing_compiler
from litgpt_moe.processes import note_once
from litgpt_moe.training.fit import vocabulary_size
from litgpt_moe.training.settings import LogArgs, Settings, TrainArgs

if TYPE_CHECKING:
    from litgpt_moe.training.run import Run

# keys by the lowest value that makes sense; where 0 is allowed, it switches something off
LOWEST = {
    1: "num_nodes train.global_batch_size train.micro_batch_size train.epochs train.max_tokens "
    "train.max_seq_length "
    "train.log_interval train.save_interval train.max_time checkpoints.keep_last checkpoints.keep_every "
    "guard.max_skipped_steps eval.interval eval.max_iters",
    0: "seed train.lr_warmup_steps train.lr_warmup_fraction train.min_lr train.max_norm moe.aux_loss_coef "
    "moe.z_loss_coef moe.bias_update_rate schedule.warmup_tokens schedule.decay_fraction guard.spike_sigma "
    "eval.max_new_tokens recipe.embedding_lr recipe.head_lr recipe.other_lr",
}
MAY_BE_INF = ("train.max_norm", "guard.spike_sigma")


def train_problems(settings: Settings, block_size: int | None, world_size: int) -> list[str]:
    """Return a sentence for each setting that is out of range, that LitGPT ignores, or that does not fit.

    `block_size` is the model's, None where its configuration has problems of its own.
    """
    problems = [*_value_problems(settings), *_ignored_problems(settings)]
    if settings.strategy == "fsdp" and world_size > 1:
        if not has_cuda() or settings.accelerator == "cpu":
            problems.append("strategy is fsdp, which needs GPUs; use strategy: ddp")
        if "Muon" in str(settings.optimizer):
            problems.append("torch.optim.Muon needs whole matrices, which FSDP splits; use strategy: ddp")
    is_on_cpu = settings.accelerator == "cpu" or not has_cuda()
    if settings.compile == "on" and is_on_cpu and (name := missing_compiler()):
        problems.append(f"compile is on, but there is no C++ compiler {name}; install it, or drop compile")
    problems += _recipe_problems(settings)
    return problems or list(_batch_problems(settings.train, block_size, world_size))


def _recipe_problems(settings: Settings) -> Iterator[str]:
    name = str(settings.optimizer.get("class_path"))
    if settings.recipe.cautious_decay and "AdamW" not in name and "Muon" not in name:
        yield f"recipe.cautious_decay needs AdamW or Muon, whose decay is no gradient; optimizer is {name}"
    if settings.recipe.zero_head and settings.train.tie_embeddings:
        yield "recipe.zero_head would set the tied embedding to zero; drop it or train.tie_embeddings"


def _value_problems(settings: Settings) -> Iterator[str]:
    for key, lowest in ((key, lowest) for lowest, keys in LOWEST.items() for key in keys.split()):
        value: Any = functools.reduce(getattr, key.split("."), settings)
        highest = 2**32 - 1 if key == "seed" else 10**15
        is_off = value == float("inf") and key in MAY_BE_INF
        if isinstance(value, int | float) and not lowest <= value <= highest and not is_off:
            above = f", up to {highest}" if value > highest else ""
            yield f"{key} is {value}; choose {lowest} or more{above}"
        elif key.endswith("_fraction") and value is not None and value > 1:
            yield f"{key} is {value}; choose 0 to 1"
    epochs, max_tokens = settings.train.epochs, settings.train.max_tokens
    if epochs is not None and isinstance(max_tokens, int):
        yield f"train.epochs is {epochs} and train.max_tokens is {max_tokens}, two lengths; drop one"
    if not settings.train.max_norm:
        yield "train.max_norm is null or 0; LitGPT needs a number above 0 (1.0 is usual, .inf is off)"
    steps, fraction = settings.train.lr_warmup_steps, settings.train.lr_warmup_fraction
    if fraction and steps:
        yield (
            f"train.lr_warmup_steps is {steps} and train.lr_warmup_fraction is {fraction}: "
            "Can't provide both; set one of them to null"
        )
    if settings.schedule.progress == "time" and settings.train.max_time is None:
        yield "schedule.progress is time, which needs the time; set it by --train.max_time 3h, or use tokens"
    if settings.schedule.warmup_tokens is not None and fraction:
        yield "schedule.warmup_tokens and train.lr_warmup_fraction exclude each other; drop one"


def _ignored_problems(settings: Settings) -> Iterator[str]:
    # LitGPT accepts these and never reads them in pretraining
    if (steps := settings.train.max_steps) is not None:
        yield f"train.max_steps is {steps}, which LitGPT ignores in pretraining; use train.max_tokens"
    if settings.eval.evaluate_example != "first":
        yield "eval.evaluate_example is for finetuning; remove it"
    is_wandb = settings.logger_name == "wandb"
    for name, value in asdict(settings.log).items():
        is_read = is_wandb and name in ("project", "run", "group")
        if value != getattr(LogArgs(), name) and not is_read:
            yield f"log.{name} is {value}, which logger_name {settings.logger_name} does not read"
    if settings.checkpoints.to_wandb != CheckpointArgs.to_wandb and not is_wandb:
        yield f"checkpoints.to_wandb needs logger_name wandb; it is {settings.logger_name}"


def _batch_problems(train: TrainArgs, block_size: int | None, world_size: int) -> Iterator[str]:
    unit, length = train.micro_batch_size * world_size, train.max_seq_length or block_size
    if train.global_batch_size % unit:
        yield (
            f"train.global_batch_size is {train.global_batch_size}, not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} times {world_size} device(s); choose a multiple of {unit}"
        )
    if block_size is None or length is None:
        return
    step_tokens = train.global_batch_size * length
    if not 1 <= length <= block_size:
        yield (
            f"train.max_seq_length is {length} but the model's block_size is {block_size}; "
            f"choose 1 to {block_size}"
        )
    elif isinstance(train.max_tokens, int) and train.max_tokens < step_tokens:
        yield (
            f"train.max_tokens is {train.max_tokens}, less than one step of {train.global_batch_size} x "
            f"{length} = {step_tokens} tokens; raise it or lower train.global_batch_size"
        )


def warn_of_rates(run: "Run") -> None:
    """Warn of a learning rate whose warm-up does not end, or whose decay ends above its beginning."""
    settings, n_warmup = run.settings, run.settings.train.lr_warmup_steps or 0
    if n_warmup > run.n_steps:
        note_once(
            f"Warning: train.lr_warmup_steps is {n_warmup} but the run has {run.n_steps} steps: "
            "the learning rate never gets to its top."
        )
    lowest, peak = settings.train.min_lr, run.optimizer["init_args"].get("lr")
    if isinstance(peak, float) and lowest > peak and settings.schedule.name != "constant":
        note_once(f"Warning: train.min_lr is {lowest:g}, above the learning rate {peak:g}, which then rises.")


def check_tokenizer(run: "Run") -> None:
    """Raise ValueError if the tokenizer has more pieces than the model has vocabulary rows."""
    folder, n_rows = run.settings.tokenizer_dir, run.config.padded_vocab_size or 0
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"tokenizer_dir is {folder}, a file; name the folder that has tokenizer.json")
    size = vocabulary_size(folder)
    if size is not None and size > n_rows:
        # a run that goes on keeps its model
        open_it = "" if run.resume else "set vocab_size: auto there, without padded_vocab_size, or "
        raise ValueError(
            f"{folder}: the tokenizer has {size} pieces but padded_vocab_size in {run.settings.model_config} "
            f"is {n_rows}; {open_it}name another --tokenizer_dir"
        )


def warn_of_unused_rows(run: "Run") -> None:
    """Warn of a model with more than twice as many vocabulary rows as the tokenizer has pieces."""
    folder, n_rows = run.settings.tokenizer_dir, run.config.padded_vocab_size or 0
    size = vocabulary_size(folder)
    # in a run that goes on it was said, and cannot be changed
    if size is not None and 2 * size < n_rows and run.resume is None:
        note_once(
            f"Warning: {folder}: the tokenizer has {size} pieces but padded_vocab_size in "
            f"{run.settings.model_config} is {n_rows}: the other rows take memory and time in each step and "
            f"are never used; set that and vocab_size to {size}, or vocab_size: auto alone."
        )


def check_memory(run: "Run") -> None:
    """Raise ValueError if the weights and their gradients alone need more memory than the machine has."""
    needed, has = 2 * run.weight_bytes, memory_bytes()
    if has_cuda() and run.settings.accelerator in ("auto", "cuda", "gpu"):
        has = torch.cuda.mem_get_info()[1] * run.world_size
    if needed > has:
        raise ValueError(
            f"{run.settings.model_config}: {run.facts.total_params:,} parameters and their gradients need "
            f"{needed / 1e9:.4g} GB of memory but there are {has / 1e9:.4g}; choose a smaller model"
        )
