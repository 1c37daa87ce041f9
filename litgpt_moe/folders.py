"""Folders that are either complete or absent: prepared beside their place, moved, replaced and deleted."""

import contextlib
import errno
import os
import re
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from litgpt_moe.files import (
    check_no_links,
    existing_parent,
    free_name,
    is_disk_full,
    no_room,
    patient_rename,
    remove,
    sync_directory,
)

SPARE_BYTES = 2 << 20  # room for the small files beside the weights


def staging_for(target: Path, ending: str = "tmp") -> Path:
    """Return the hidden name beside `target` under which this process prepares it ("old": moves it aside)."""
    host = zlib.crc32(socket.gethostname().encode())
    return target.with_name(f".{target.name}.litgpt_moe-{host:08x}-{os.getpid()}.{ending}")


def make_staging(target: Path) -> Path:
    """Return the new empty staging folder of `target`; what a killed process left of its own is removed."""
    import psutil  # here: --help needs this module, and psutil takes 20 ms

    staging = staging_for(target)
    before, pid, after = staging.name.rpartition(str(os.getpid()))
    own_name = re.compile(f"{re.escape(before)}([0-9]+){re.escape(after)}")
    for path in target.parent.glob(".*.tmp"):
        match = own_name.fullmatch(path.name)
        if match and (match[1] == pid or not psutil.pid_exists(int(match[1]))):
            remove(path)
    staging.mkdir(parents=True)  # fails if it exists, so that nothing is written through a link
    return staging


def put_in_place(
    staging: Path, target: Path, foreign: Callable[[Path], list[Path]] = lambda folder: []
) -> None:
    """Rename the folder `staging` to `target`; an old `target` moves aside first, and is deleted at the end.

    `foreign` returns what somebody else has put into the old one: that moves into the new one.
    """
    aside = staging_for(target, "old")
    remove(aside)
    if os.path.lexists(target):
        patient_rename(target, aside)
    try:
        patient_rename(staging, target)
    except OSError:
        if os.path.lexists(aside):
            with contextlib.suppress(OSError):  # the old one is better than none
                aside.rename(target)
        raise
    move_into(target, foreign(aside))
    sync_directory(target.parent)
    delete_whole(aside, target)


def delete_whole(path: Path, target: Path) -> None:
    """Delete a folder under the name of an unfinished `target`, so that a kill leaves no half of it as such.

    What is left under that name is known to be of no use: nothing in it is looked at, or moved elsewhere.
    """
    doomed = staging_for(target)
    remove(doomed)
    # where renaming fails, as on Windows while a file is open for long, what can be deleted is
    with contextlib.suppress(OSError):
        patient_rename(path, doomed)
    for folder in (path, doomed):
        remove(folder)


def move_into(folder: Path, paths: list[Path]) -> None:
    """Move files and folders of the same disk into `folder`, where a taken name gets a number.

    ValueError if `folder` is a link: what it leads to is not ours to write.
    """
    for path in paths:
        check_no_links(folder)
        path.rename(free_name(folder / path.name))


def check_new_folder(out: Path, n_bytes: int) -> None:
    """Raise OSError if `out` cannot become a new folder of `n_bytes` bytes."""
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name a folder that does not exist yet")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder that does not exist yet")
    free = shutil.disk_usage(existing_parent(out)).free
    if free < n_bytes + SPARE_BYTES:
        needed = n_bytes + SPARE_BYTES
        raise OSError(errno.ENOSPC, f"{out} needs {needed:,} bytes but {free:,} are free; make room there")


@contextlib.contextmanager
def new_folder(out: Path, n_bytes: int) -> Iterator[Path]:
    """Yield an empty staging folder that is renamed to `out` at the end, or deleted after an error."""
    out = out.absolute()  # Path(".") has an empty name
    check_new_folder(out, n_bytes)
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        yield (staging := make_staging(out))
        put_in_place(staging, out)
    except BaseException as error:
        remove(staging_for(out))
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if is_disk_full(error):
            why = no_room(out, n_bytes + SPARE_BYTES)
            raise OSError(errno.ENOSPC, f"{out} could not be written, the disk is full: {why}") from error
        raise
