"""The checkpoint that a run resumes, or whose weights it starts from: found, checked and opened once."""

from pathlib import Path
from typing import Any

import torch
from litgpt import GPT

from litgpt_moe.balance import has_selection_bias
from litgpt_moe.checkpoints import reader
from litgpt_moe.checkpoints.layout import CHECKPOINT_FILE, SETTINGS_FILE, checkpoints_of, find_checkpoint
from litgpt_moe.checkpoints.state import check_state
from litgpt_moe.processes import note_once
from litgpt_moe.training.parse import read_yaml
from litgpt_moe.training.settings import Settings


class OpenCheckpoint:
    """A checkpoint whose file is read once. Its tensors are memory-mapped: values are read when used."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        """Take the checkpoint in `folder`, whose file holds `state`; ValueError if it has no weights."""
        self.folder, self.file = folder, folder / CHECKPOINT_FILE
        # emptied once it is loaded: a memory-mapped file keeps its disk space in use
        self.state = state
        # the file holds the model's state dict alone
        self.is_bare = "model" not in state
        self.has_selection_bias = has_selection_bias(reader.weights_of(state, self.file))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict, until `state` is emptied."""
        return self.state.get("model", self.state)


def find_resume(settings: Settings) -> OpenCheckpoint | None:
    """Return the checkpoint to continue from, or None for a fresh start."""
    resume = str(settings.resume)
    if resume.lower() in ("false", "none", ""):
        return None
    if settings.overwrite:
        raise ValueError("resume and overwrite exclude each other; drop one")
    if settings.initial_checkpoint_dir:
        raise ValueError("resume and initial_checkpoint_dir exclude each other; drop one")
    out_dir = settings.out_dir if resume.lower() in ("auto", "true") else Path(resume)
    newest_first = checkpoints_of(out_dir)
    if out_dir is not settings.out_dir and not newest_first:
        reader.verify_checkpoint(folder := find_checkpoint(out_dir))
        # check_resume, which runs when the settings are right, says whether it holds more than weights
        return OpenCheckpoint(folder, reader.read_state(folder / CHECKPOINT_FILE))
    for folder in newest_first:
        try:
            return OpenCheckpoint(folder, reader.read_training_state(folder))
        except (ValueError, OSError) as error:
            note_once(f"Skipping {folder}: {reader.flaw_words(error, folder)}")
    if resume.lower() != "auto":
        raise FileNotFoundError(
            f"resume is {resume} but {out_dir} holds no whole step-* or final; use resume: auto"
        )
    note_once(f"No checkpoint to resume from in {out_dir}: starting from the beginning.")
    return None


def find_initial(settings: Settings, model: GPT) -> OpenCheckpoint | None:
    """Return the checkpoint whose weights to start from, or None; ValueError if they do not fit the model."""
    if settings.initial_checkpoint_dir is None:
        return None
    reader.verify_checkpoint(folder := find_checkpoint(settings.initial_checkpoint_dir))
    opened = OpenCheckpoint(folder, reader.read_state(folder / CHECKPOINT_FILE))
    reader.check_weights(folder, model, opened.weights)
    return opened


def check_resume(
    opened: OpenCheckpoint, settings: Settings, model: GPT, optimizer: str, tokens_per_step: int
) -> int:
    """Return the steps done in a checkpoint; ValueError if these settings cannot continue it."""
    check_state(opened.state, opened.folder)
    folder, step = opened.folder, opened.state["step_count"]
    reader.check_weights(folder, model, opened.weights)
    if settings.moe.bias_update_rate and not opened.has_selection_bias:
        raise ValueError(
            f"{folder} was trained without a selection bias; drop moe.bias_update_rate, or start "
            "from its weights with --initial_checkpoint_dir"
        )
    before = {key: value for key, (value, _) in read_yaml(folder / SETTINGS_FILE, is_foreign=True).items()}
    _check_unchanged(folder, before, settings, optimizer)
    n_steps = (settings.train.max_tokens or 0) // tokens_per_step
    if step > n_steps:
        raise ValueError(f"{folder} is past the {n_steps} steps of train.max_tokens; raise that")
    if step == n_steps:
        note_once(f"{folder} is at the last step of train.max_tokens; to train on, raise that.")
    total = before.get("train.max_tokens")
    # LitGPT's own checkpoints may hold another type
    n_before = total // tokens_per_step if isinstance(total, int) else n_steps
    if n_before != n_steps and settings.schedule.name != "constant":
        note_once(
            f"Warning: {folder} is of a run of {n_before:,} steps, now train.max_tokens makes it "
            f"{n_steps:,}; the learning rates so far followed the old total, the rest follows the new."
        )
    return step


def _check_unchanged(folder: Path, before: dict[str, Any], settings: Settings, optimizer: str) -> None:
    for key, value in (
        ("train.global_batch_size", settings.train.global_batch_size),
        ("train.max_seq_length", settings.train.max_seq_length),
        ("optimizer.class_path", optimizer),
        ("weight_decay_on", settings.weight_decay_on),
    ):
        # a class has several paths: torch.optim.AdamW is also torch.optim.adamw.AdamW
        names = [str(text).rpartition(".")[2] for text in (before.get(key, value), value)]
        if names[0] != names[1]:
            raise ValueError(f"{folder}: {key} was {before[key]}, now {value}; resume with what it was")
