"""Atomic checkpoints, written in the background: to a staging folder, flushed, then renamed."""

import contextlib
import errno
import functools
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from litgpt.config import Config
from litgpt.utils import save_config

from litgpt_moe.checkpoints.layout import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    FINAL,
    LEFT_OVER,
    RECORD_FILE,
    SETTINGS_FILE,
    SUPERSEDED,
    CheckpointArgs,
    is_checkpoint,
    moved_aside,
    read_record,
    step_name,
    step_of,
    steps_of,
    write_record,
)
from litgpt_moe.checkpoints.state import non_finite, tensor_bytes
from litgpt_moe.checkpoints.state_file import write_state
from litgpt_moe.checkpoints.tokenizer_files import COPIED_FILES, read_tokenizer_files
from litgpt_moe.files import free_name, is_disk_full, is_link, no_room, patient_rename, remove
from litgpt_moe.folders import delete_whole, make_staging, move_into, new_folder, put_in_place, staging_for
from litgpt_moe.processes import note_once

SMALL_FILES_BYTES = 1 << 20  # for the small files and the zip directory
# what a save needs beside weights and moments; 64 KiB: random generators and counters
BESIDE_BYTES = SMALL_FILES_BYTES + (1 << 16)


class CheckpointWriter:
    """Writes checkpoint directories in the background; training waits only for the copy to host memory.

    A step-* or final directory is complete at any time. A killed process leaves only names with a leading
    dot, which `tidy` removes.
    """

    def __init__(
        self, out_dir: Path, args: CheckpointArgs, settings_text: str, tell: Callable[[str], None]
    ) -> None:
        self.out_dir, self.args, self.tell = out_dir, args, tell
        self.settings_text = settings_text  # content of each checkpoint's train_config.yaml
        # called in the background thread with each new checkpoint and its step
        self.on_saved: Callable[[Path, int], None] = lambda folder, step: None
        self.failure: str | None = None  # why the latest save failed
        self.is_last = False  # whether the run ends with the save in progress
        self.lasting_s = 0.0  # duration of the latest save
        # for checkpoint.json: selection_bias (stock LitGPT cannot load such weights), the data's fingerprint
        self.notes: dict[str, Any] = {}
        # read once: what another command writes into that folder during the run is not what it trains with
        self._tokenizer_files: dict[str, bytes] | None = None
        self._is_finite = True
        self._kept: set[Path] = set()
        self._host: dict[str, Any] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None

    def keep_tokenizer(self, folder: Path) -> None:
        """Read the tokenizer that every checkpoint will hold, unless that has been done."""
        if self._tokenizer_files is None:
            self._tokenizer_files = read_tokenizer_files(folder)

    @property
    def must_end_run(self) -> bool:
        """Whether the run must not go on after the latest save, which failed."""
        # weights that are not finite will not be finite at the next save either
        return self.failure is not None and (self.args.on_full_disk == "stop" or not self._is_finite)

    @property
    def is_writing(self) -> bool:
        """Whether a save is in progress in the background."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, fabric: Fabric, state: dict[str, Any], tokenizer_dir: Path, checkpoint_file: Path) -> None:
        """Copy the state to host memory and start the thread that writes it."""
        self.wait()  # the previous save still reads the buffers
        target = checkpoint_file.parent
        # Fabric's strategy gathers the state and calls `hold` on rank 0; nothing is written yet
        fabric.save(checkpoint_file, state)
        if fabric.global_rank == 0:
            self.keep_tokenizer(tokenizer_dir)
            write = functools.partial(self._write, target, state["step_count"], state["model"].config)
            self._thread = threading.Thread(target=write, name="checkpoint")
            self._thread.start()

    def hold(self, checkpoint: dict[str, Any]) -> None:
        """Copy the tensors to host memory; on CUDA into pinned buffers, which all saves share."""
        copies: dict[Any, torch.Tensor] = {}

        def copy(value: Any, name: str) -> Any:
            if isinstance(value, dict):
                return {key: copy(item, f"{name}.{key}") for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copy(item, f"{name}.{i}") for i, item in enumerate(value))
            if not isinstance(value, torch.Tensor):
                return value
            # tied weights are one tensor under two names, and stay tied
            key = (value.data_ptr(), value.shape, value.dtype) if value.numel() else name
            if key not in copies:
                copies[key] = self._buffer(name, value).copy_(value.detach(), non_blocking=True)
            return copies[key]

        self._host = copy(checkpoint, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
            self._buffers[name] = buffer
        return buffer

    def wait(self) -> None:
        """Wait for the save in progress, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, target: Path, step: int, config: Config) -> None:
        """Write the directory and rename it into place; report an error and remove the staging folder."""
        started = time.perf_counter()
        needed = tensor_bytes(self._host) + SMALL_FILES_BYTES
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)  # somebody may have moved it
            if shutil.disk_usage(self.out_dir).free < needed:
                raise OSError(errno.ENOSPC, "known before a byte is written")
            staging = make_staging(target)
            if name := non_finite(self._host):
                self._is_finite = False
                raise ValueError(f"{name} holds values that are no numbers")
            files = {SETTINGS_FILE: self.settings_text.encode("utf-8")} | (self._tokenizer_files or {})
            _fill(staging, step, self._host, config, files, **self.notes)
            put_in_place(staging, target, foreign_files)
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            remove(staging_for(target))
            reason = str(error) or type(error).__name__
            if is_disk_full(error):
                reason = no_room(self.out_dir, needed)
            self.failure = f"{target} could not be saved: {reason}"
            goes_on = "" if self.must_end_run or self.is_last else "; training goes on"
            self.tell(f"Warning: {self.failure}{goes_on}")
            return
        self.failure, self.lasting_s = None, time.perf_counter() - started
        self.tell(f"Saved {target}")
        with contextlib.suppress(OSError):  # the next save tries again
            self._prune()
        self.on_saved(target, step)

    def _prune(self) -> None:
        """Delete the step-* that neither keep_last nor keep_every keeps, unless other files are in it."""
        steps = list(steps_of(self.out_dir).items())
        for step, path in steps[: -self.args.keep_last] if self.args.keep_last else []:
            if self.args.keeps(step) or path in self._kept:
                continue
            if foreign := foreign_files(path):
                self._kept.add(path)
                self.tell(f"{path} is kept: {foreign[0].name} in it is not the run's")
                continue
            doomed = staging_for(path)  # so that a kill leaves no half-deleted step-*
            # on Windows renaming fails while a file is open; the next save tries again
            with contextlib.suppress(OSError):
                path.rename(doomed)
                remove(doomed)


def write_checkpoint(
    out: Path, weights: dict[str, torch.Tensor], config: Config, files: dict[str, bytes], **notes: Any
) -> None:
    """Write a checkpoint of weights and `files` without training state, as --initial_checkpoint_dir takes."""
    with new_folder(out, tensor_bytes(weights)) as staging:
        _fill(staging, 0, {"model": weights}, config, files, **notes)


def _fill(
    folder: Path,
    step: int,
    state: dict[str, Any],
    config: Config,
    files: dict[str, bytes],
    **notes: Any,
) -> None:
    entry = write_state(state, folder / CHECKPOINT_FILE)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    save_config(config, folder)
    write_record(folder, step, {CHECKPOINT_FILE: entry}, **notes)


def put_back(out_dir: Path) -> None:
    """Rename to its place what a killed process had moved aside for a replacement that never came."""
    for place, aside in moved_aside(out_dir).items():
        # another process of this run may be first
        with contextlib.suppress(FileNotFoundError):
            patient_rename(aside, place)


def tidy(out_dir: Path, start_step: int) -> None:
    """Remove staging folders of a killed process from `out_dir`, and rename steps after `start_step`."""
    put_back(out_dir)
    for path in out_dir.glob(".*"):
        if match := LEFT_OVER.fullmatch(path.name):
            if not match["mark"] and match["ending"] == "tmp" and holds_others(path):
                continue
            target = out_dir / match["target"]
            move_into(target, foreign_files(path) if match["ending"] == "old" else [])
            delete_whole(path, target)
    found = [*steps_of(out_dir).items()]
    if is_checkpoint(final := out_dir / FINAL) and (step := step_of(final)) is not None:
        found.append((step, final))
    for step, path in found:
        if step > start_step:
            superseded = free_name(out_dir / f"superseded-{step_name(step)}")
            patient_rename(path, superseded)
            note_once(f"{path} is not part of this run's history: renamed to {superseded.name}")


def holds_others(folder: Path) -> bool:
    """Return whether a folder holds what no save of a checkpoint writes."""
    own = (CHECKPOINT_FILE, CONFIG_FILE, SETTINGS_FILE, RECORD_FILE, *COPIED_FILES)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() and not folder.is_symlink() else []
    return any(name not in own and not re.fullmatch(r"checkpoint\.[0-9]+\.tmp", name) for name in names)


def foreign_files(folder: Path) -> list[Path]:
    """Return what is in a checkpoint's folder and not listed in its checkpoint.json.

    Without a record that is nothing, or all if nothing in it is a checkpoint's. Behind a link nothing is.
    """
    if is_link(folder):
        return []
    if folder.is_dir() and not is_checkpoint(folder):
        return list(folder.iterdir())
    try:
        own = {RECORD_FILE, *read_record(folder).get("files", {})}
    except (ValueError, OSError):
        return []
    return [path for path in folder.iterdir() if path.name not in own] if len(own) > 1 else []


def run_folders(out_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, those included that a resume has renamed."""
    superseded = [path for path in out_dir.glob("superseded-*") if SUPERSEDED.fullmatch(path.name)]
    folders = [out_dir / FINAL, *steps_of(out_dir).values(), *superseded]
    return [folder for folder in folders if is_checkpoint(folder)]
