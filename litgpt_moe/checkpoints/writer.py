"""Checkpoints are whole or not there: written beside their place in the background, flushed, then renamed."""

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from lightning.fabric import Fabric
from litgpt.config import Config
from litgpt.utils import save_config

from litgpt_moe.checkpoints.layout import (
    CHECKPOINT_FILE,
    FINAL,
    SETTINGS_FILE,
    TOKENIZER_FILES,
    CheckpointArgs,
    read_files,
    steps_of,
    write_record,
)
from litgpt_moe.files import free_name, is_disk_full, new_folder, put_in_place
from litgpt_moe.processes import note_once

SMALL_FILES_BYTES = 1 << 20  # beside the tensors: the small files and the zip's own lists
# tokenizer.model: LitGPT reads such a tokenizer too. Not litgpt.utils.copy_config_files: it also copies
# model_config.yaml and config.json, and a tokenizer folder may hold those of another model
COPIED_FILES = (*TOKENIZER_FILES, "tokenizer.model")


class CheckpointWriter:
    """Writes checkpoint directories in the background; training waits only for the copy to host memory.

    A directory named step-* or final is whole at every moment. What a killed process leaves has a name with a
    leading dot, and `tidy` removes it.
    """

    def __init__(
        self, out_dir: Path, args: CheckpointArgs, settings_text: str, tell: Callable[[str], None]
    ) -> None:
        self.out_dir, self.args, self.tell = out_dir, args, tell
        self.settings_text = settings_text  # content of each checkpoint's train_config.yaml
        # called with each new checkpoint and its step, in the background thread
        self.on_saved: Callable[[Path, int], None] = lambda folder, step: None
        self.failure: str | None = None  # why the latest save failed
        self.lasting_s = 0.0  # seconds that the latest save took, writing included
        self.selection_bias = False  # whether the weights have one, so that stock LitGPT refuses them
        self._host: dict[str, Any] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None

    def save(self, fabric: Fabric, state: dict[str, Any], tokenizer_dir: Path, checkpoint_file: Path) -> None:
        """Copy the state to host memory and begin to write it."""
        self.wait()  # for the buffers of the save before
        target = checkpoint_file.parent
        # through Fabric's strategy, which gives the whole state to `hold` on rank 0
        fabric.save(_staging(target) / checkpoint_file.name, state)
        if fabric.global_rank == 0:
            config = state["model"].config
            write = functools.partial(self._write, target, state["step_count"], config, tokenizer_dir)
            self._thread = threading.Thread(target=write, name="checkpoint")
            self._thread.start()

    def hold(self, checkpoint: dict[str, Any]) -> None:
        """Copy the tensors to host memory, on CUDA into pinned buffers that all saves share."""
        copies: dict[Any, torch.Tensor] = {}

        def copy(value: Any, name: str) -> Any:
            if isinstance(value, dict):
                return {key: copy(item, f"{name}.{key}") for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copy(item, f"{name}.{i}") for i, item in enumerate(value))
            if not isinstance(value, torch.Tensor):
                return value
            # tied weights are one tensor under two names, and stay so
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
        """Return when the save in progress, if any, has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, target: Path, step: int, config: Config, tokenizer_dir: Path) -> None:
        """Write the directory and rename it into place, or report why not and leave nothing behind."""
        started, staging = time.perf_counter(), _staging(target)
        needed, free = tensor_bytes(self._host) + SMALL_FILES_BYTES, 0
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)  # somebody may have moved it away
            free = shutil.disk_usage(self.out_dir).free
            if free < needed:
                raise OSError(errno.ENOSPC, "known before a byte is written")
            staging.mkdir(parents=True, exist_ok=True)
            if name := non_finite(self._host):
                raise ValueError(f"{name} holds values that are no numbers")
            files = {SETTINGS_FILE: self.settings_text.encode("utf-8")}
            files |= read_files(tokenizer_dir, COPIED_FILES)
            _fill(staging, step, self._host, config, files, self.selection_bias)
            put_in_place(staging, target)
            self.failure, self.lasting_s = None, time.perf_counter() - started
            self.tell(f"Saved {target}")
            self._prune()
            self.on_saved(target, step)
        except (OSError, RuntimeError, ValueError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            reason = str(error)
            if is_disk_full(error):
                if free >= needed:  # it filled up meanwhile
                    free = shutil.disk_usage(self.out_dir).free
                reason = f"it needs {needed:,} bytes but {free:,} were free; make room on that disk"
            self.failure = f"{target} could not be saved: {reason}"
            goes_on = "; training goes on" if self.args.on_full_disk == "continue" else ""
            self.tell(f"Warning: {self.failure}{goes_on}")

    def _prune(self) -> None:
        """Delete the step-* that neither keep_last nor keep_every keeps; the newest always stays."""
        steps = list(steps_of(self.out_dir).items())
        for step, path in steps[: -self.args.keep_last] if self.args.keep_last else []:
            if not self.args.keeps(step):
                doomed = _staging(path)  # a kill amid the deletion must not leave half a step-*
                # on Windows renaming fails while somebody reads it: the next save tries again
                with contextlib.suppress(OSError):
                    path.rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)


def _staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


class HashingFile:
    """A binary file that knows the SHA-256 and the number of bytes of what torch.save wrote to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.flush = file, file.flush
        self.sha256, self.n_bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write `data`; an OSError is kept in `error`, because torch.save reports it as "unexpected pos"."""
        self.sha256.update(data)
        self.n_bytes += memoryview(data).nbytes
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def write_state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write `state` to `path`, flushed to the disk; return its bytes and SHA-256."""
    with path.open("wb") as raw:
        file = HashingFile(raw)
        try:
            # torch.save does no more than write and flush
            torch.save(state, cast(IO[bytes], file))
        except RuntimeError as error:
            raise file.error or error from None
        raw.flush()
        os.fsync(raw.fileno())
    return {"bytes": file.n_bytes, "sha256": file.sha256.hexdigest()}


def write_checkpoint(
    out: Path, weights: dict[str, torch.Tensor], config: Config, files: dict[str, bytes]
) -> None:
    """Write a checkpoint directory of bare weights, and `files`, from which run_train.py and others start."""
    with new_folder(out, tensor_bytes(weights)) as staging:
        _fill(staging, 0, {"model": weights}, config, files)


def _fill(
    folder: Path,
    step: int,
    state: dict[str, Any],
    config: Config,
    files: dict[str, bytes],
    selection_bias: bool = False,
) -> None:
    entry = write_state(state, folder / CHECKPOINT_FILE)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    save_config(config, folder)
    write_record(folder, step, {CHECKPOINT_FILE: entry}, selection_bias)


def tensors_of(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (dotted name, tensor) of a nested state."""
    if isinstance(state, torch.Tensor):
        yield name.removeprefix("."), state
    elif isinstance(state, dict | list | tuple):
        for key, item in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors_of(item, f"{name}.{key}")


def tensor_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a nested state."""
    return sum(tensor.nbytes for _, tensor in tensors_of(state))


def non_finite(state: dict[str, Any]) -> str | None:
    """Return the name of the first weight or moment with an infinity or NaN, None if there is none."""
    parts = {key: state[key] for key in ("model", "optimizer") if key in state}
    floats = ((name, tensor) for name, tensor in tensors_of(parts) if tensor.is_floating_point())
    return next((name for name, tensor in floats if not tensor.isfinite().all()), None)


def tidy(out_dir: Path, start_step: int) -> None:
    """Remove what a killed process left half done in `out_dir`, and rename steps after `start_step`."""
    for aside in out_dir.glob(".*.old"):  # moved away for a new one, which may not have come
        target = aside.with_name(aside.name[1:].removesuffix(".old"))
        shutil.rmtree(aside, ignore_errors=True) if target.exists() else aside.rename(target)
    for staging in out_dir.glob(".*.tmp"):
        shutil.rmtree(staging, ignore_errors=True)
    for step, path in steps_of(out_dir).items():
        if step > start_step:
            superseded = free_name(path.with_name(f"superseded-{path.name}"))
            path.rename(superseded)
            note_once(f"{path} is not part of this run's history: renamed to {superseded.name}")


def delete_run(out_dir: Path) -> None:
    """Remove what an earlier run left in `out_dir`, and nothing else."""
    for old in (out_dir / FINAL, out_dir / "logs", *out_dir.glob("step-*"), *out_dir.glob("superseded-*")):
        shutil.rmtree(old, ignore_errors=True)
