"""The checks of the folder in which a run writes: its lock, what lies there, its paths and its room."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe.checkpoints.layout import FINAL, LOGS, checkpoints_of, others_of, step_name, step_of, steps_of
from litgpt_moe.checkpoints.reader import checkpoint_flaw
from litgpt_moe.checkpoints.writer import BESIDE_BYTES, foreign_files, run_folders
from litgpt_moe.cli import MAX_WINDOWS_PATH
from litgpt_moe.files import check_no_links, existing_parent, read_json, remove
from litgpt_moe.folders import staging_for
from litgpt_moe.locks import locked_folder
from litgpt_moe.processes import note_once
from litgpt_moe.training.given import resumed_place

if TYPE_CHECKING:
    from litgpt_moe.training.run import Run

# in logs/: the command of a run and what it was made with
FACTS_FILE = "run.json"


@contextlib.contextmanager
def run_lock(out_dir: Path) -> Iterator[None]:
    """Keep a second run out of `out_dir`, and say if the last one there was killed."""
    # a run that ends in any other way removes it
    was_killed = (out_dir / ".run.json").is_file()
    with locked_folder(out_dir, "run", "a run is live", "wait for it or choose another --out_dir"):
        if was_killed:
            note_once(
                f"The last run in {out_dir} was killed. If that was for lack of memory (a container's limit "
                "gives no other sign), lower train.micro_batch_size."
            )
        yield


def check_writable(out_dir: Path) -> None:
    """Raise ValueError if `out_dir` cannot be written, or cannot be created."""
    # the first that exists may be a file: no folder can be made below it
    parent = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"out_dir is {out_dir}, but {parent} cannot be written; choose another --out_dir")


def check_path_lengths(out_dir: Path) -> None:
    """Raise ValueError if Windows refuses the paths of a checkpoint's files: now, not at the first save."""
    folder = staging_for(out_dir.absolute() / step_name(10**8))
    longest = folder / "checkpoint.000000000000.tmp"
    if sys.platform != "win32" or len(str(longest)) <= MAX_WINDOWS_PATH:
        return
    try:  # long paths may be switched on
        folder.mkdir(parents=True)
        longest.touch()
    except OSError:
        need = f"a checkpoint's files need paths of {len(str(longest))} characters"
        way_out = "choose a shorter --out_dir, or switch on long paths"
        raise ValueError(
            f"out_dir is {out_dir}: {need} and Windows takes {MAX_WINDOWS_PATH}; {way_out}"
        ) from None
    finally:
        remove(folder)


def check_out_dir(run: "Run") -> None:
    """Raise ValueError if out_dir holds another run, or has no room for a checkpoint."""
    settings, out_dir = run.settings, run.settings.out_dir
    if run.initial and settings.overwrite and out_dir.resolve() in run.initial.file.resolve().parents:
        raise ValueError(
            f"initial_checkpoint_dir lies in {out_dir}, which --overwrite deletes; choose another --out_dir"
        )
    if others := others_of(out_dir):
        raise ValueError(
            f"{others[0]} is no checkpoint, but has a name under which this run saves; move it elsewhere, "
            "or choose another --out_dir"
        )
    in_runs = [path for folder in run_folders(out_dir) for path in foreign_files(folder)]
    if settings.overwrite and in_runs:
        raise ValueError(f"{in_runs[0]} is not the run's, and --overwrite would delete it; move it elsewhere")
    _refuse_another_run(run)
    check_path_lengths(out_dir)
    check_no_links(logs := out_dir / "logs")
    check_no_links(*logs.rglob("*"))
    free = free_bytes(out_dir)
    needed = run.checkpoint_bytes + BESIDE_BYTES
    if free < needed:
        raise ValueError(
            f"{out_dir}: a checkpoint needs {needed:,} bytes but {free:,} are free; make room there"
        )
    warn_of_disk(run, free)


def _refuse_another_run(run: "Run") -> None:
    """Raise ValueError if out_dir holds a run that this one neither continues nor overwrites."""
    out_dir = run.settings.out_dir
    if run.resume is not None:
        _refuse_lost_steps(run, run.resume.folder.resolve())
        return
    earlier = [path for path in (out_dir / FINAL, *steps_of(out_dir).values()) if path.exists()]
    if earlier and not run.settings.overwrite:
        is_whole = any(checkpoint_flaw(path) is None for path in checkpoints_of(out_dir))
        way_on = "continue it with --resume auto" if is_whole else "none of it can be continued"
        raise ValueError(
            f"{out_dir} already holds a run ({earlier[0].name}); {way_on}, "
            "choose another --out_dir, or delete it with --overwrite"
        )


def _refuse_lost_steps(run: "Run", start: Path) -> None:
    """Raise ValueError if the run would put later steps aside that came from the checkpoint `start` itself.

    A command that is repeated after each crash, with a checkpoint by name, would never get further. A
    command that has not run there yet may go back to an earlier step of the same folder: that is intended.
    """
    out_dir = run.settings.out_dir
    if resumed_place(run.settings.resume, out_dir) is out_dir:
        return
    if start.parent == out_dir.resolve() and not _was_resumed_so(out_dir, start):
        return
    later = [path for path in checkpoints_of(out_dir) if (step_of(path) or 0) > run.start_step]
    if any(checkpoint_flaw(path) is None for path in later):
        raise ValueError(
            f"{out_dir} holds later steps than {run.settings.resume} ({later[0].name}), with which this "
            "command would begin again; continue them with --resume auto, or choose another --out_dir"
        )


def _was_resumed_so(out_dir: Path, start: Path) -> bool:
    """Return whether the last command in `out_dir` was this one, and went on from `start`."""
    with contextlib.suppress(ValueError, OSError):
        facts = read_json(out_dir / LOGS / FACTS_FILE)
        return facts.get("command") == this_command() and facts.get("resumed") == str(start)
    return False


def this_command() -> list[str]:
    """Return the words of the command of this process, its script by name."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def free_bytes(out_dir: Path) -> int:
    """Return the room on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(existing_parent(out_dir)).free


def disk_bytes(run: "Run") -> int:
    """Return the room that the checkpoints of the run need at most at one time."""
    n_steps, keep = run.n_steps - run.start_step, run.settings.checkpoints.keep_last
    n_saves = 1 + n_steps // (run.settings.train.save_interval or n_steps or 1)
    # 2: the checkpoint that is being written, and final/
    return (run.checkpoint_bytes + BESIDE_BYTES) * min(n_saves, (keep or n_saves) + 2)


def warn_of_disk(run: "Run", free: int) -> None:
    """Warn if there is room for a checkpoint, and not for all that the run keeps."""
    out_dir = run.settings.out_dir
    if free < (whole := disk_bytes(run)):
        note_once(
            f"Warning: all checkpoints of this run need {whole:,} bytes but {free:,} are free in {out_dir}; "
            "set checkpoints.keep_last, raise train.save_interval or make room."
        )
