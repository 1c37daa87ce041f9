"""The checkpoint that a run resumes, or whose weights it starts from: found, checked and opened once."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from litgpt import GPT

from litgpt_moe.balance import has_selection_bias
from litgpt_moe.checkpoints import reader
from litgpt_moe.checkpoints.batch_sizes import BatchSizes
from litgpt_moe.checkpoints.layout import (
    CHECKPOINT_FILE,
    SETTINGS_FILE,
    checkpoints_of,
    find_checkpoint,
    moved_aside,
    read_record,
)
from litgpt_moe.checkpoints.read_errors import ReadFailed
from litgpt_moe.checkpoints.state import check_state, damage_in
from litgpt_moe.config import MoEConfig
from litgpt_moe.data.batches import POSITION_FORM
from litgpt_moe.files import fits
from litgpt_moe.processes import note_once
from litgpt_moe.training.changes import changed_meaning, changed_run, say_what_changed
from litgpt_moe.training.given import resumed_place
from litgpt_moe.training.parse import read_yaml
from litgpt_moe.training.settings import Settings

if TYPE_CHECKING:
    from litgpt_moe.training.run import Run


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

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The run's settings by their dotted names; {} where there is no file of them."""
        file = self.folder / SETTINGS_FILE
        if not file.is_file():
            return {}
        return {key: value for key, (value, _) in read_yaml(file, is_foreign=True).items()}


def find_resume(settings: Settings) -> OpenCheckpoint | None:
    """Return the checkpoint to continue from, or None for a fresh start."""
    resume, place = str(settings.resume), resumed_place(settings.resume, settings.out_dir)
    if place is None:
        return None
    if settings.overwrite:
        raise ValueError("resume and overwrite exclude each other; drop one")
    if settings.initial_checkpoint_dir:
        raise ValueError("resume and initial_checkpoint_dir exclude each other; drop one")
    newest_first = checkpoints_of(place)
    for lost, aside in moved_aside(place).items() if settings.plan else ():
        note_once(f"A kill left {aside}: a run would first rename it to {lost.name}, a plan does without it.")
    if place is not settings.out_dir and not newest_first:
        reader.verify_checkpoint(folder := find_checkpoint(place))
        # check_resume, which runs when the settings are right, says whether it holds more than weights
        return OpenCheckpoint(folder, reader.read_state(folder / CHECKPOINT_FILE))
    for folder in newest_first:
        try:
            return OpenCheckpoint(folder, reader.read_training_state(folder))
        except ReadFailed:
            raise
        except (ValueError, OSError) as error:
            note_once(f"Skipping {folder}: {reader.flaw_words(error, folder)}")
    if resume.lower() != "auto":
        raise FileNotFoundError(
            f"resume is {resume} but {place} holds no whole step-* or final; use resume: auto"
        )
    note_once(f"No checkpoint to resume from in {place}: starting from the beginning.")
    return None


def find_initial(settings: Settings, model: GPT) -> OpenCheckpoint | None:
    """Return the checkpoint whose weights to start from, or None; ValueError if they do not fit the model."""
    if settings.initial_checkpoint_dir is None:
        return None
    reader.verify_checkpoint(folder := find_checkpoint(settings.initial_checkpoint_dir))
    opened = OpenCheckpoint(folder, reader.read_state(folder / CHECKPOINT_FILE))
    reader.check_weights(folder, model, opened.weights)
    reader.check_finite({"model": opened.weights}, opened.file)
    if settings.train.tie_embeddings and not torch.equal(
        opened.weights["lm_head.weight"], opened.weights["transformer.wte.weight"]
    ):
        kept = "train.tie_embeddings keeps transformer.wte.weight for both"
        note_once(f"Warning: {folder}: its lm_head.weight is not its transformer.wte.weight; {kept}.")
    for text in changed_meaning(folder, settings, cast(MoEConfig, model.config)):
        note_once(f"Warning: {folder}: {text}; the weights were trained with what it was.")
    return opened


def place_of(opened: OpenCheckpoint, settings: Settings, block_size: int) -> tuple[int, BatchSizes]:
    """Return the steps done in a checkpoint and the sequences in each step of the run that goes on from it.

    ValueError if it holds no training state, or one that is past the end of the run.
    """
    check_state(opened.state, opened.folder)
    step, size = opened.state["step_count"], settings.train.global_batch_size
    before = opened.settings.get("train.global_batch_size", size)
    # LitGPT's own checkpoints may hold another type
    before = before if fits(before, 1) else size
    sizes = BatchSizes.from_state(opened.state, before)
    with damage_in(opened.folder):
        if (last := sizes.changes[-1][1]) != before:
            raise ValueError(f"run.batch_sizes ends with {last}, and {SETTINGS_FILE} says {before}")
    sizes = sizes.changed(step, size)
    if (n_tokens := sizes.sequences(step) * block_size) > (most := settings.train.n_tokens):
        raise ValueError(
            f"{opened.folder} is past the end of the run: it has been trained on {n_tokens} tokens, "
            f"and train.max_tokens is {most}; raise that"
        )
    return step, sizes


def say_if_batch_changed(run: "Run") -> None:
    """Say what another batch size than the checkpoint's means for the steps that follow."""
    start, sizes, n_steps = run.start_step, run.batch_sizes, run.n_steps
    if sizes.changes[-1][0] != start or n_steps == start:
        return
    left = run.settings.train.n_tokens - run.tokens_at(n_steps)
    end = f"{run.tokens_at(n_steps):,} tokens" + (f"; the last {left:,} fill no step" if left else "")
    note_once(
        f"From step {start + 1:,} on a step takes {sizes.size(start + 1):,} sequences, "
        f"{run.tokens_per_step:,} tokens; it took {sizes.size(start):,}. The data go on where they stopped, "
        f"at sequence {sizes.sequences(start):,}. The run ends after step {n_steps:,} with {end}. The "
        "learning rate follows the tokens; intervals, and a warm-up in steps, count steps as before."
    )


def check_resume(run: "Run", model: GPT) -> None:
    """Raise ValueError if these settings cannot continue the checkpoint that the run resumes."""
    opened, settings = cast(OpenCheckpoint, run.resume), run.settings
    folder = opened.folder
    reader.check_weights(folder, model, opened.weights)
    if settings.moe.bias_update_rate and not opened.has_selection_bias:
        raise ValueError(
            f"{folder} was trained without a selection bias; drop moe.bias_update_rate, or start "
            "from its weights with --initial_checkpoint_dir"
        )
    if changes := [
        *changed_meaning(folder, settings, cast(MoEConfig, model.config)),
        *changed_run(opened.settings, settings, run.optimizer["class_path"], model.config.block_size),
    ]:
        raise ValueError("\n".join(f"{folder}: {text}; resume with what it was" for text in changes))
    position = opened.state["train_dataloader"]
    if run.data_dir is not None and not fits(position, POSITION_FORM):
        what = f"its train_dataloader is {position!r:.60}, which is no position in token shards"
        way_out = "resume with the data module of before, or start from its weights"
        raise ValueError(f"{folder}: {what}; {way_out} with --initial_checkpoint_dir")
    say_what_changed(folder, opened.settings, settings)
    if run.start_step == run.n_steps:
        note_once(f"{folder} is at the last step of train.max_tokens; to train on, raise that.")
    elif run.is_timed and run.used_time.share >= 1:
        note_once(f"{folder} is at the end of train.max_time; to train on, raise that.")
    if (
        run.start_step
        and not opened.state["optimizer"].get("state")
        and "SGD" not in run.optimizer["class_path"]
    ):
        note_once(f"Warning: {folder} holds no moments of the optimizer, which begin anew.")
    _warn_of_another_end(run, opened)
    _warn_of_another_time(run, opened)


def _warn_of_another_end(run: "Run", opened: OpenCheckpoint) -> None:
    """Warn if the learning rate was to reach its end elsewhere."""
    before, now = opened.settings.get("train.max_tokens"), run.tokens_at(run.n_steps)
    # in whole steps: those of another size end elsewhere by less than one step
    step = run.block_size * max(size for _, size in run.batch_sizes.changes)
    # LitGPT's own checkpoints may hold another type
    if isinstance(before, int) and abs(before - now) >= step and run.settings.schedule.name != "constant":
        n_before = run.batch_sizes.steps(before // run.block_size)
        note_once(
            f"Warning: {opened.folder} is of a run of {n_before:,} steps, now train.max_tokens makes it "
            f"{run.n_steps:,}; the learning rates so far followed the old total, the rest follows the new."
        )


def _warn_of_another_time(run: "Run", opened: OpenCheckpoint) -> None:
    """Warn if the learning rate was to reach its end at another time."""
    before, now = opened.settings.get("train.max_time"), run.settings.train.max_time
    if run.is_timed and opened.settings.get("schedule.progress") == "time" and before != now:
        note_once(
            f"Warning: {opened.folder} is of a run of {before} s, of which it has used "
            f"{run.used_time.seconds:.0f}, now train.max_time makes it {now:g} s; the learning rates so far "
            "followed the old time, the rest follows the new."
        )


def say_if_data_changed(folder: Path, fingerprint: str | None) -> None:
    """Say so if a checkpoint was trained on other token shards; earlier versions did not record them."""
    before = read_record(folder).get("data")
    if before and fingerprint and before != fingerprint:
        note_once(f"Changed since {folder}: the data; its steps so far saw other text or another tokenizer.")
