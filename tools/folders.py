"""Output folders that are whole or not there, for the tools that make them. Nothing to run here."""

import errno
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wandb_dataset import RUN_TRAIN, command_line

if TYPE_CHECKING:
    import torch

    from moe_layers import MoEConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
SPARE_BYTES = 2 << 20  # the small files beside the weights
NEXT = "Next (training reads data/custom_text, or what --dataset_dir names):"


class WorkFailed(RuntimeError):
    """The work itself failed, not its input; the text is one sentence for the user."""


def check_new_folder(out: Path, n_bytes: int) -> None:
    """Raise before any work if `out` cannot become a folder of `n_bytes` bytes.

    Raises:
        FileExistsError: there is something in it already.
        WorkFailed: the disk has no room.
    """
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name a folder that does not exist yet")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder that does not exist yet")
    free = shutil.disk_usage(existing_parent(out)).free
    if free < n_bytes + SPARE_BYTES:
        raise WorkFailed(
            f"{out} needs {n_bytes + SPARE_BYTES:,} bytes but {free:,} are free; make room there"
        )


def existing_parent(path: Path) -> Path:
    """Return `path` or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


@contextmanager
def new_folder(out: Path, n_bytes: int) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends well, and vanishes otherwise.

    Raises as `check_new_folder`, and WorkFailed if the disk fills up.
    """
    from run_train import is_disk_full, put_in_place

    out = out.absolute()  # "out/.." has no name of its own to stage beside
    check_new_folder(out, n_bytes)
    staging = out.with_name(f".{out.name}.tmp")
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        shutil.rmtree(staging, ignore_errors=True)  # a killed run's
        staging.mkdir(parents=True)
        yield staging
        put_in_place(staging, out)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if is_disk_full(error) or "No space left" in str(error):  # safetensors tells it in words alone
            raise WorkFailed(f"{out} could not be written, the disk is full; make room there") from error
        raise


def read_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the content of those files in `folder` that are there."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def write_checkpoint(
    out: Path, weights: "dict[str, torch.Tensor]", config: "MoEConfig", files: dict[str, bytes]
) -> None:
    """Write a checkpoint directory of bare weights, and `files`, from which run_train.py and others start.

    Raises as `new_folder`.
    """
    from litgpt.utils import save_config

    from moe_layers import CHECKPOINT_FILE
    from run_train import tensor_bytes, write_record, write_state

    with new_folder(out, tensor_bytes(weights)) as staging:
        entry = write_state({"model": weights}, staging / CHECKPOINT_FILE)
        for name, content in files.items():
            (staging / name).write_bytes(content)
        save_config(config, staging)
        write_record(staging, 0, {CHECKPOINT_FILE: entry})


def train_on(checkpoint: Path, like: Path | None = None) -> str:
    """Return the command that trains on from `checkpoint`, with the data and settings of the run `like`.

    `like` is a checkpoint of that run; without one, or where run_train.py did not make it, the defaults hold.
    """
    recipe = like and like / "train_config.yaml"
    given = ("--config", recipe) if recipe and recipe.is_file() else ()
    start = ("--initial_checkpoint_dir", checkpoint, "--tokenizer_dir", checkpoint)
    model = ("--model_config", checkpoint / "model_config.yaml")
    name = f"{checkpoint.absolute().name}_trained"
    names = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
    out_dir = next(out for out in map(checkpoint.with_name, names) if not out.exists())
    return command_line(*RUN_TRAIN, *given, *start, *model, "--out_dir", out_dir)


def sync_files(folder: Path) -> None:
    """Bring every file in `folder`, and their names, to the disk."""
    from run_train import sync_directory

    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_directory(folder)


def run_tool(work: Callable[[], list[str]]) -> int:
    """Print the lines that `work` returns, or why it failed; return the exit status, 130 after Ctrl-C."""
    try:
        lines = work()
    except (ValueError, OSError, WorkFailed) as error:
        text, status = explain(error)
        print("\n".join(f"error: {line}" for line in text.splitlines()), file=sys.stderr)
        return status
    except KeyboardInterrupt:
        return 130
    print("\n".join(lines))
    return 0


def explain(error: BaseException) -> tuple[str, int]:
    """Return the sentence and the exit status for an error of a tool: 1 for failed work, 2 for bad input."""
    if isinstance(error, WorkFailed | ConnectionError):
        return str(error), 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error.filename or 'the file'} could not be written, the disk is full; make room there", 1
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; check the path and its permissions", 2
    return str(error), 2
