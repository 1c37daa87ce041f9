"""What settings may leave to the data and the model: the vocabulary, the length and the learning rate."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from litgpt.model import GPT

from litgpt_moe import budget
from litgpt_moe.checkpoints.layout import CONFIG_FILE, find_checkpoint
from litgpt_moe.cli import first_line
from litgpt_moe.config import (
    AUTO,
    ModelFacts,
    MoEConfig,
    has_open_vocabulary,
    hidden_params,
    model_facts,
)
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.data.module import TextShards
from litgpt_moe.data.tokenizer import read_tokenizer_facts
from litgpt_moe.processes import note_once
from litgpt_moe.training.changes import changed_keys
from litgpt_moe.training.resume import OpenCheckpoint
from litgpt_moe.training.settings import Settings, TrainArgs

# pieces of the tokenizer that is trained on the demo stories
DEMO_VOCABULARY = 2048


def vocabulary_size(tokenizer_dir: Path) -> int | None:
    """Return the number of pieces of the tokenizer, None until preparing the data has got one."""
    if not (tokenizer_dir / "tokenizer.json").is_file():
        return None
    return read_tokenizer_facts(tokenizer_dir).vocab_size


def leaves_vocabulary_open(settings: Settings) -> bool:
    """Return whether the tokenizer decides the vocabulary of the model."""
    return settings.model_config is not None and has_open_vocabulary(settings.model_config)


def with_own_model(settings: Settings, resume: OpenCheckpoint | None, is_model_named: bool) -> Settings:
    """Return the settings with the model's file of the checkpoint that is resumed, unless one is named.

    A default file may have changed since the run began: the run goes on with the model that it has. A file
    that is named has to be that model.
    """
    assert settings.model_config is not None  # `load_settings` has chosen one
    if resume is None or is_model_named:
        return settings
    own = resume.folder / CONFIG_FILE
    _say_if_other(own, settings.model_config)
    return replace(settings, model_config=own)


def _say_if_other(own: Path, default: Path) -> None:
    """Say in a line how the default file of a model differs from that of a checkpoint."""
    before = MoEConfig.untried_from_file(own, is_foreign=True)
    sizes = {}
    try:
        if has_open_vocabulary(default):
            sizes = {"vocab_size": before.vocab_size, "padded_vocab_size": before.padded_vocab_size}
        keys = [*changed_keys(before, MoEConfig.untried_from_file(default, **sizes))]
    except (ValueError, OSError) as error:
        note_once(
            f"The model is that of {own}, not of the default, which cannot be read: {first_line(error)}."
        )
        return
    if keys:
        differs = "; ".join(f"{key} {was} (there {value})" for key, was, value in keys)
        note_once(f"The model is that of {own}, not of {default}, which differs: {differs}.")


def fitting_model(
    settings: Settings, resume: OpenCheckpoint | None, has_demo_data: bool
) -> tuple[MoEConfig, GPT]:
    """Return the configuration of a run and its model on the meta device.

    `vocab_size: auto` becomes what the checkpoint has that the run starts from, else the number of pieces of
    the tokenizer, else what the tokenizer will have that is made with the data.
    """
    assert settings.model_config is not None  # `load_settings` has chosen one
    path = settings.model_config
    is_own = resume is not None and path == resume.folder / CONFIG_FILE
    if is_own or not leaves_vocabulary_open(settings):
        return MoEConfig.model_from_file(path, is_foreign=is_own)
    sizes = _vocabulary_of(resume.folder if resume else settings.initial_checkpoint_dir)
    if not sizes:
        n_pieces = vocabulary_size(settings.tokenizer_dir) or (DEMO_VOCABULARY if has_demo_data else None)
        sizes = {"vocab_size": n_pieces} if n_pieces else {}
    return MoEConfig.model_from_file(path, False, **sizes)


def _vocabulary_of(checkpoint: Path | None) -> dict[str, Any]:
    """Return the two sizes in a checkpoint's configuration; {} where there is none that can be read."""
    if checkpoint is None:
        return {}
    # another check says what is wrong with it
    with contextlib.suppress(ValueError, OSError):
        config = MoEConfig.untried_from_file(find_checkpoint(checkpoint) / CONFIG_FILE, is_foreign=True)
        return {key: getattr(config, key) for key in ("vocab_size", "padded_vocab_size")}
    return {}


def with_learning_rate(
    settings: Settings, config: MoEConfig | None, resume: OpenCheckpoint | None
) -> Settings:
    """Return the settings with a number for `optimizer.init_args.lr: auto`; ValueError if no rule knows it.

    A run that is resumed keeps the number it had. `config` is None if it has problems of its own.
    """
    init_args = settings.optimizer.get("init_args") or {}
    if init_args.get("lr") != AUTO:
        return settings
    name = str(settings.optimizer.get("class_path")).rpartition(".")[2]
    # Muon's updates are scaled to AdamW's, see training/optimizer.py
    if "Adam" not in name and name != "Muon":
        raise ValueError(f"optimizer.init_args.lr is auto, a rule for AdamW; give a number for {name}")
    had = resume.settings.get("optimizer.init_args.lr") if resume else None
    rate = had if isinstance(had, float) else proposed_rate(config) if config else budget.HIGHEST_RATE
    return replace(settings, optimizer={**settings.optimizer, "init_args": {**init_args, "lr": rate}})


def proposed_rate(config: MoEConfig, facts: ModelFacts | None = None) -> float:
    """Return the learning rate for a model, see `budget.learning_rate`."""
    return budget.learning_rate(hidden_params(config, facts or model_facts(config)), config.n_expert)


def is_open(train: TrainArgs) -> bool:
    """Return whether the data decide how long a run is."""
    return train.epochs is not None or train.max_tokens in (None, AUTO)


def kept_length(train: TrainArgs, resume: OpenCheckpoint | None) -> TrainArgs:
    """Return the length of the run that is resumed, where the settings leave it open without train.epochs."""
    if resume is None or train.epochs is not None or not is_open(train):
        return train
    # LitGPT's own checkpoints may hold another type
    had = resume.settings.get("train.max_tokens")
    return replace(train, max_tokens=had) if isinstance(had, int) else train


def settled_length(train: TrainArgs, data: Any, block_size: int, facts: ModelFacts) -> TrainArgs:
    """Return the length in tokens, a number, for train.epochs or `train.max_tokens: auto`."""
    if not is_open(train):
        return train
    key = f"train.epochs is {train.epochs}" if train.epochs else "train.max_tokens is auto"
    if (in_pass := pass_tokens(data, block_size)) is None:
        kind = type(data).__name__
        raise ValueError(
            f"{key}, but how many tokens {kind} has is not known; give train.max_tokens a number"
        )
    if train.epochs:
        length = budget.Length(train.epochs * in_pass, f"{train.epochs} passes")
    else:
        length = budget.sensible_length(in_pass, facts.total_params)
    step_tokens = train.global_batch_size * block_size
    if length.tokens < step_tokens:
        raise ValueError(
            f"{key}, for these data {length.tokens:,} tokens ({length.why}): less than one step of "
            f"{train.global_batch_size} x {block_size} = {step_tokens:,}; lower train.global_batch_size, "
            "bring more text, or set train.max_tokens"
        )
    return replace(train, epochs=None, max_tokens=length.tokens)


def pass_tokens(data: Any, block_size: int) -> int | None:
    """Return the tokens of one pass through the prepared training data; None for others than TextShards."""
    if not isinstance(data, TextShards):
        return None
    n_tokens = read_manifest(data.data_dir, check_shards=False)["splits"]["train"]["n_tokens"]
    # as TokenBatches cuts them
    return max(1, (n_tokens - 1) // block_size) * block_size
