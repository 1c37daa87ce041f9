# ruff: noqa
"""Stand-ins for litgpt_moe.checkpoints.{layout,writer,state} and litgpt_moe.hardware, which are being written elsewhere.

For the integrator: delete this file, and let each `from litgpt_moe.training._checkpoints_temporary import`
name those modules: layout (checkpoints_of), writer (CheckpointWriter, delete_run, tensors_of, tidy,
write_state), state (RunState, check_moments, damage_in, rng_state, set_rng_state), hardware (has_cuda, keep_freed_memory,
peak_flops, peak_memory_gb, will_compile).
"""
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn
from litgpt_moe.files import sha256_file, sync_directory
import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
import numpy as np
import torch
import errno
import functools
import hashlib
import shutil
import threading
import time
from typing import IO, Any, BinaryIO, cast
from lightning.fabric import Fabric
from litgpt.config import Config
from litgpt.utils import save_config
from litgpt_moe.files import free_name, is_disk_full, new_folder, put_in_place
from litgpt_moe.processes import note_once
import ctypes
import importlib.util
import sys
import warnings
import psutil
from lightning.fabric.utilities.throughput import get_available_flops
from moe_layers import matmul



CHECKPOINT_FILE = "lit_model.pth"
CONFIG_FILE = "model_config.yaml"
SETTINGS_FILE = "train_config.yaml"
RECORD_FILE = "checkpoint.json"  # what a whole checkpoint holds: its step, each file's size and SHA-256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
FINAL = "final"
RECORD_FORMAT = 1
MAX_RECORD_BYTES = 1 << 20
STEP_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,17})")  # as `step_name` writes it


@dataclass(frozen=True)
class CheckpointArgs:
    """Which checkpoints stay, which go to W&B, and what a full disk means."""

    keep_last: int | None = None
    """Newest step-* to keep; older ones are deleted after a save (null: all stay)."""
    keep_every: int | None = None
    """Steps; step-* that are multiples of it stay beside keep_last (null: none)."""
    on_full_disk: Literal["continue", "stop"] = "continue"
    """continue: go on training, the next save may succeed; stop: end the run with status 1."""
    to_wandb: Literal["final", "kept", "none"] = "final"
    """With logger_name wandb, artifacts of: final/; also each step-* that is kept for good; nothing."""

    def keeps(self, step: int) -> bool:
        """Return whether the step-* of `step` is never deleted."""
        return self.keep_last is None or bool(self.keep_every and step % self.keep_every == 0)


# --- names --------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    """Return the name of the checkpoint directory of a step, as LitGPT's loop writes it: step-00000100."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint directory; None if its name is not one that a run gives.

    `final/` has the step that its checkpoint.json records, None without a readable one.
    """
    if path.name == FINAL:
        try:
            return read_record(path).get("step")
        except (ValueError, OSError):
            return None
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def steps_of(out_dir: Path) -> dict[int, Path]:
    """Return the step-* directories of a run by their step, whole or not, in ascending order."""
    steps = {step_of(path): path for path in out_dir.glob("step-*")}
    return {step: steps[step] for step in sorted(step for step in steps if step is not None)}


def checkpoints_of(out_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run, whole or not, the one of the last step first.

    Of step-* and `final/` with the same step, step-* comes first; a `final/` without a record comes last.
    """
    found = list(steps_of(out_dir).values())
    if (final := out_dir / FINAL).is_dir():
        found.append(final)
    steps = {path: step_of(path) for path in found}
    return sorted(
        found, key=lambda path: (-1 if steps[path] is None else steps[path], path.name), reverse=True
    )


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint directory that `path` means: itself, its `final/`, or its newest whole `step-*`.

    Raises:
        FileNotFoundError, NotADirectoryError: naming what was looked for.
        ValueError: there are checkpoints but none is whole; the text says what is wrong with the first.
    """
    if path.is_file() and path.name == CHECKPOINT_FILE:
        path = path.parent
    if path.is_file():
        raise NotADirectoryError(
            f"{path} is a file; name a checkpoint directory, which holds {CHECKPOINT_FILE}"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint directory; train one with run_train.py")
    if _has_model(path):  # the user named it: verify_checkpoint says what is wrong with it
        return path
    problems = []
    for candidate in filter(_has_model, (path / FINAL, *reversed(steps_of(path).values()))):
        try:
            recorded_files(candidate)
            return candidate
        except ValueError as problem:
            problems.append(problem)
    if problems:
        raise problems[0]
    raise FileNotFoundError(
        f"{path} holds no {CHECKPOINT_FILE} with a {CONFIG_FILE}, nor final/ or step-* that do"
    )


def _has_model(folder: Path) -> bool:
    return (folder / CHECKPOINT_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def read_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the content of those files in `folder` that exist."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


# --- checkpoint.json ----------------------------------------------------------------------------------------


def write_record(
    folder: Path, step: int, files: dict[str, dict[str, Any]], selection_bias: bool = False
) -> None:
    """Flush every file in `folder` to the disk and list them all in its checkpoint.json.

    `files` has the entries of files that are flushed already, as `writer.write_state` returns them.
    """
    files, notes = dict(files), {"selection_bias": True} if selection_bias else {}
    for path in sorted(folder.iterdir()):
        if path.name not in files:  # lit_model.pth was hashed while it was written
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    with (folder / RECORD_FILE).open("w", encoding="utf-8") as file:
        json.dump({"format": RECORD_FORMAT, "step": step, **notes, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(folder)


def read_record(folder: Path) -> dict[str, Any]:
    """Return the checked content of a folder's checkpoint.json, {} without one (as LitGPT's own checkpoints).

    Raises:
        ValueError: it is damaged.
    """
    record = folder / RECORD_FILE
    if not record.exists():
        return {}
    try:
        if record.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError("it is too large")
        content = json.loads(record.read_bytes())
        version, files, step = content["format"], content["files"], content.get("step")
        if version != RECORD_FORMAT:
            raise ValueError(f"its format is {version!r:.80}, not {RECORD_FORMAT}")
        kinds = [(type(entry["bytes"]), type(entry["sha256"])) for entry in files.values()]
        if CHECKPOINT_FILE not in files or set(kinds) != {(int, str)}:
            raise ValueError("it does not list the files")
        if step is not None and (type(step) is not int or step < 0):
            raise ValueError(f"its step is {step!r:.80}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refuse_damage(record, str(error).strip("'") or type(error).__name__)
    return content


def recorded_files(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the files that checkpoint.json lists with their entries, {} without one.

    Raises:
        ValueError: one of them is missing, has another size than recorded, or would lie elsewhere.
    """
    files = read_record(folder).get("files", {})
    for name, entry in files.items():
        path = folder / name
        if re.search(r"[/\\:\0]", name) or name in ("", ".", ".."):
            raise ValueError(
                f"{folder / RECORD_FILE} lists {name!r}, not a file of its folder; use another checkpoint"
            )
        if not path.is_file():
            refuse_damage(path, f"{RECORD_FILE} lists it and it is not there")
        if (size := path.stat().st_size) != entry["bytes"]:
            refuse_damage(path, f"it has {size:,} bytes, {RECORD_FILE} says {entry['bytes']:,}")
    return {folder / name: entry for name, entry in files.items()}


def refuse_damage(path: Path, reason: str) -> NoReturn:
    """Raise the ValueError for a damaged file of a checkpoint, in one line."""
    reason = " ".join(reason.split())[:200]
    raise ValueError(f"{path} is damaged or not a checkpoint's ({reason}); use another checkpoint")




MT19937_WORDS = 624  # of NumPy's generator
# of torch's optimizers that have a fused step: Adam, AdamW, SGD (and Muon), Adagrad
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")


@dataclass
class RunState:
    """What a resumed run goes on with. On disk: `run` for all but `rng`, and `rng`, beside LitGPT's keys."""

    time_s: float = 0.0
    """Seconds of training, over all processes that took part one after another."""
    guard: dict[str, Any] = field(default_factory=lambda: {"n_skipped": 0, "n_in_a_row": 0, "losses": []})
    """State dict of the guard: skipped steps, those in a row, the latest losses."""
    told_step: int = -1
    """Step of the latest story in logs/stories.csv, -1 before the first."""
    n_rows: int = 0
    """Rows of logs/csv/metrics.csv."""
    n_spikes: int = 0
    """Rows of logs/spikes.csv."""
    n_loads: int = 0
    """Rows of logs/expert_load.csv."""
    n_stories: int = 0
    """Rows of logs/stories.csv."""
    router: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Of each MoE layer, since the last row of the log and over all ranks: `load` (E,) int64, `sums` (4,)."""
    rng: dict[str, Any] = field(default_factory=dict)
    """Random generators, as `rng_state` returns them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the two entries of a checkpoint, `run` and `rng`."""
        run = {name: value for name, value in vars(self).items() if name != "rng"}
        return {"run": run, "rng": self.rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the entries `run` and `rng` of a checkpoint's content.

        Raises:
            ValueError: one of the values is missing or not of its kind.
        """
        run, rng = state.get("run"), state.get("rng")
        for name, is_right in _KINDS.items():
            value = run.get(name) if isinstance(run, dict) else None
            if not is_right(value):
                raise ValueError(f"run.{name} is {_short(value)}")
            setattr(self, name, value)
        if not isinstance(rng, dict) or not {"python", "numpy", "torch", "cuda"} <= rng.keys():
            raise ValueError(f"rng is {_short(rng)}")
        self.rng = rng


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _is_guard(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("losses"), list):
        return False
    counts = (value.get("n_skipped"), value.get("n_in_a_row"))
    return all(map(_is_count, counts)) and all(map(_is_finite, value["losses"]))


def _is_router(value: Any) -> bool:
    def is_layer(layer: Any) -> bool:
        tensors = [layer.get("load"), layer.get("sums")] if isinstance(layer, dict) else [None]
        return all(isinstance(tensor, torch.Tensor) for tensor in tensors)

    return isinstance(value, list) and all(map(is_layer, value))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "time_s": lambda value: _is_finite(value) and value >= 0,
    "guard": _is_guard,
    "told_step": lambda value: _is_count(value) or (type(value) is int and value == -1),
    **dict.fromkeys(("n_rows", "n_spikes", "n_loads", "n_stories"), _is_count),
    "router": _is_router,
}


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 60 else text[:57] + "..."


def check_state(state: dict[str, Any], folder: Path) -> None:
    """Check that training can go on from `state`, the content of a checkpoint file in `folder`.

    Sizes are left to torch and `check_moments`: load the state inside `damage_in`.

    Raises:
        ValueError: it is not as it was saved, or holds weights alone.
    """
    if "step_count" not in state:
        raise ValueError(f"{folder} holds weights alone; start from it with --initial_checkpoint_dir")
    with damage_in(folder):
        for name in ("step_count", "iter_num"):
            if not _is_count(state.get(name)):
                raise ValueError(f"{name} is {_short(state.get(name))}")
        for step in (step_of(folder), read_record(folder).get("step")):
            if step is not None and step != state["step_count"]:
                raise ValueError(
                    f"step_count is {state['step_count']}, and the checkpoint that of step {step}"
                )
        for name in ("model", "optimizer", "train_dataloader"):
            if not isinstance(state.get(name), dict):
                raise ValueError(f"{name} is {_short(state.get(name))}")
        # a checkpoint of LitGPT's own loop has neither
        if "run" in state or "rng" in state or (folder / RECORD_FILE).exists():
            RunState().load_state_dict(state)


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Check that what an optimizer has loaded is as large as its weights.

    torch's `load_state_dict` does not look, and the fused AdamW of torch 2.10 writes beyond smaller moments.

    Raises:
        ValueError: naming the moment.
    """
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            shape = weight.shape if name in MOMENTS else torch.Size() if name == "step" else None
            if shape is not None and isinstance(value, torch.Tensor) and value.shape != shape:
                shapes = f"{tuple(value.shape)}, its weight is of {tuple(weight.shape)}"
                raise ValueError(f"optimizer.state has a {name} of {shapes}")


@contextlib.contextmanager
def damage_in(folder: Path) -> Iterator[None]:
    """Turn what torch and others raise for a training state that does not fit into one ValueError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{folder}: its training state is damaged: {lines[0][:200]}; resume from another step-*, "
            f"or start from its weights with --initial_checkpoint_dir {folder}"
        ) from error


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator that a layer or a data module may draw from."""
    name, keys, *others = np.random.get_state()
    numpy_state = (name, torch.from_numpy(keys.astype(np.int64)), *others)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Set every generator to a state of `rng_state`; CUDA's only where there are as many devices.

    Raises:
        ValueError: a generator does not take its state.
    """
    try:
        random.setstate(state["python"])
        name, keys, position, *others = state["numpy"]
        if not 0 <= position <= MT19937_WORDS:  # NumPy does not check it and would read past its memory
            raise ValueError(f"position {position}")
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, *others))
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    # each generator has errors of its own for a state that it does not take
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"the state of its random generators cannot be set ({reason})") from error




SMALL_FILES_BYTES = 1 << 20  # beside the tensors: the small files and the zip's own lists
# tokenizer.model: LitGPT reads such a tokenizer too. Not litgpt.utils.copy_config_files: it also copies
# model_config.yaml and config.json, and a tokenizer folder may hold those of another model
COPIED_FILES = (*TOKENIZER_FILES, "tokenizer.model")


class CheckpointWriter:
    """Writes checkpoint directories in the background: beside their place, flushed, then renamed into it.

    A directory named step-* or final is whole at every moment. What a killed process leaves has a name with a
    leading dot, and `tidy` removes it. Training waits only for the copy to host memory.
    """

    def __init__(
        self, out_dir: Path, args: CheckpointArgs, settings_text: str, tell: Callable[[str], None]
    ) -> None:
        self.out_dir, self.args, self.tell = out_dir, args, tell
        self.settings_text = settings_text
        """Content of each checkpoint's train_config.yaml."""
        self.on_saved: Callable[[Path, int], None] = lambda folder, step: None
        """Called with each new checkpoint and its step, in the background thread."""
        self.failure: str | None = None
        """Why the latest save failed; None if it did not."""
        self.lasting_s = 0.0
        """Seconds that the latest save took, writing included; 0.0 before the first."""
        self.selection_bias = False
        """Whether the weights have a selection bias, so that stock LitGPT refuses them."""
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
            self._fill(staging, step, config, tokenizer_dir)
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

    def _fill(self, staging: Path, step: int, config: Config, tokenizer_dir: Path) -> None:
        if name := non_finite(self._host):
            raise ValueError(f"{name} holds values that are no numbers")
        files = {CHECKPOINT_FILE: write_state(self._host, staging / CHECKPOINT_FILE)}
        save_config(config, staging)
        (staging / SETTINGS_FILE).write_text(self.settings_text, encoding="utf-8")
        for file, content in read_files(tokenizer_dir, COPIED_FILES).items():
            (staging / file).write_bytes(content)
        write_record(staging, step, files, selection_bias=self.selection_bias)

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
    """A binary file that knows the SHA-256 and the number of bytes of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self.n_bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write `data`; an OSError is kept in `error`, because torch.save reports it as "unexpected pos"."""
        self._sha256.update(data)
        self.n_bytes += memoryview(data).nbytes
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Flush the file below."""
        self._file.flush()

    def hexdigest(self) -> str:
        """Return the SHA-256 so far, in hexadecimal."""
        return self._sha256.hexdigest()


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
    return {"bytes": file.n_bytes, "sha256": file.hexdigest()}


def write_checkpoint(
    out: Path, weights: dict[str, torch.Tensor], config: Config, files: dict[str, bytes]
) -> None:
    """Write a checkpoint directory of bare weights, and `files`, from which run_train.py and others start.

    Raises as `new_folder`.
    """
    with new_folder(out, tensor_bytes(weights)) as staging:
        entry = write_state({"model": weights}, staging / CHECKPOINT_FILE)
        for name, content in files.items():
            (staging / name).write_bytes(content)
        save_config(config, staging)
        write_record(staging, 0, {CHECKPOINT_FILE: entry})


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




DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
# no fp16: LitGPT's fused AdamW and its clipping do not work with the loss scaling that fp16 needs
TRAINING_PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")


# --- device and precision -----------------------------------------------------------------------------------


def has_cuda() -> bool:
    """Return whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def _has_bf16() -> bool:
    return has_cuda() and torch.cuda.is_bf16_supported(including_emulation=False)


def default_precision(device_type: str) -> str:
    """Return bf16-true for a GPU that computes in it, 32-true elsewhere."""
    return "bf16-true" if device_type == "cuda" and _has_bf16() else "32-true"


def pick_device(device: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Return what the --device and --precision of generate.py and evaluate.py mean.

    Raises:
        ValueError: this machine has no such device, or there is no such precision.
    """
    if precision not in ("auto", *DTYPES):
        raise ValueError(f"--precision {precision} is unknown; choose auto, {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if has_cuda() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        if chosen.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError, ImportError) as error:  # without CUDA torch raises AssertionError
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # and thirty names of devices
            reason = "torch knows no such device"
        raise ValueError(f"--device {device} cannot be used here ({reason}); choose cpu or auto") from None
    return chosen, DTYPES[default_precision(chosen.type) if precision == "auto" else precision]


def training_device(
    accelerator: str, devices: int | str, num_nodes: int, precision: str | None
) -> tuple[str, int]:
    """Return the precision and the number of devices on this machine that a run's settings mean.

    Raises:
        ValueError: this machine has no such devices, or they lack the precision.
    """
    cuda = has_cuda() and accelerator in ("auto", "cuda", "gpu")
    if accelerator in ("cuda", "gpu") and not cuda:
        raise ValueError(
            f"accelerator is {accelerator} but this torch sees no CUDA device; use accelerator: cpu"
        )
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("accelerator is mps but this machine has none; use accelerator: cpu")
    n_devices = _count_devices(devices, torch.cuda.device_count() if cuda else None)
    precision = precision or default_precision("cuda" if cuda else "cpu")
    if precision not in TRAINING_PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(TRAINING_PRECISIONS)}")
    if precision.startswith("bf16") and cuda and not _has_bf16():
        raise ValueError(f"precision is {precision}, which this GPU lacks; use 32-true")
    if cuda and sys.platform == "win32" and n_devices * num_nodes > 1:
        raise ValueError("several GPUs need NCCL, which Windows lacks; use devices: 1, or Linux (WSL 2)")
    return precision, n_devices


def _count_devices(devices: int | str, n_present: int | None) -> int:
    """Return how many devices `devices` means where `n_present` are there (None: processes on the CPU)."""
    count = (n_present or 1) if devices in ("auto", "-1", -1) else devices
    if not str(count).isdecimal() or int(count) < 1:
        raise ValueError(f"devices is {devices!r}; choose auto or a number of 1 or more")
    if n_present is not None and int(count) > n_present:
        raise ValueError(f"devices is {count} but this machine has {n_present} CUDA device(s)")
    return int(count)


def will_compile(compile: str, accelerator: str) -> tuple[bool, str]:
    """Return whether a run compiles the model, given its `compile` setting (auto, on or off), and why."""
    if compile != "auto":
        return compile == "on", f"compile: {compile}"
    if accelerator == "cpu" or not has_cuda():
        return False, "no CUDA; compiling takes minutes on a CPU"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed (on Windows: triton-windows)"
    return True, "CUDA and Triton"


# --- speed --------------------------------------------------------------------------------------------------


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of dense matrix products on `device`: its maker's figure, else measured here."""
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        if device.type == "cuda" and (known := get_available_flops(device, dtype)):
            return float(known)
    size, best = (4096 if device.type == "cuda" else 1024), math.inf
    one = torch.ones(size, size, dtype=dtype, device=device)
    for _ in range(5 if device.type == "cuda" else 20):  # a CPU may be busy with other work for a while
        started = time.perf_counter()
        matmul(one, one)[0, 0].item()  # waits for the product
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


# --- memory -------------------------------------------------------------------------------------------------


def memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or less where a cgroup limits it."""
    return min([psutil.virtual_memory().total, *cgroup_limits()])


def cgroup_limits(root: Path = Path("/")) -> list[int]:
    """Return the memory limits in bytes that a container or a service sets for this process (Linux)."""
    limits = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)  # "0::/a/b" in version 2, "9:memory:/a/b" in 1
            if controllers and "memory" not in controllers.split(","):
                continue
            top, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
            group = Path(path.strip("/"))
            # the limit of each parent group holds too; a container sees its own group as the root, whatever
            # the path says
            for part in (group, *group.parents):
                file = root / "sys/fs/cgroup" / top / part / name
                with contextlib.suppress(OSError, ValueError):  # "max": none
                    limits.append(int(file.read_text(encoding="utf-8")))
    return limits


def peak_memory_gb() -> float:
    """Return the peak memory in 1e9 bytes: the GPU's where there is one, else this process's."""
    if has_cuda():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    # a module of Unix alone
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, up to this process's peak, for the next step or chunk of logits.

    By default glibc returns blocks of more than 32 MB, and the top of its heap, to the system. Fetching them
    again takes 80,000 page faults in a step of MoE-30M (2,048 tokens, chunks of logits of 64 MB, Xeon): a
    tenth of its time. 100 steps of 4,096 tokens with ten checkpoints take 2.96 GB at their peak with this and
    2.72 without. evaluate.py scores the same model 1.7 times as fast as when chunks of 128 MB are returned
    (EPYC), in 1.9 GB instead of 1.4.
    """
    mallopt(mmap_max=0, trim_threshold=-1)


def mallopt(**values: int) -> None:
    """Set parameters of glibc's malloc (its manual: "Malloc Tunable Parameters"); a no-op without glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        numbers = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}  # in malloc.h
        for name, value in values.items():
            libc.mallopt(numbers[name], value)
