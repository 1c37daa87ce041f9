"""The lock of a folder, which keeps a second process out of it."""

import contextlib
import errno
import glob
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from litgpt_moe.cli import note
from litgpt_moe.files import read_json, write_json


class FolderInUse(OSError):
    """Another process works in the folder; the text says which."""


@contextlib.contextmanager
def locked_folder(folder: Path, name: str, doing: str, way_out: str, wait: bool = False) -> Iterator[None]:
    """Lock `folder` during the block: a second process waits, or gets FolderInUse.

    The lock of a process that ends, however it ends, holds nobody up.
    """
    identity = folder / f".{name}.json"  # beside it: on Windows a locked file cannot be read
    made = [new for new in (folder, *folder.parents) if not new.exists()]
    lock = None
    try:
        with contextlib.suppress(OSError):  # the writer will report it
            folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder / f".{name}.lock", timeout=-1 if wait else 0)
        if lock is not None:
            remove_left_over(identity)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            me = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
            with contextlib.suppress(OSError):  # a full disk: only the message will lack it
                write_json(identity, me)
    except Timeout:
        who = "another process"
        with contextlib.suppress(OSError, ValueError, KeyError):
            who = "process {process} on {host}, since {since}".format_map(read_json(identity))
        if (claim := folder / f".{name}.claim").exists():
            way_out += f"; if its machine has crashed, delete {claim}"
        raise FolderInUse(f"{folder}: {doing} there ({who}); {way_out}") from None
    try:
        yield
    finally:
        if lock is not None:
            _remove_file(identity)
            _remove_file(Path(lock.lock_file))  # while it is held: filelock takes no file that was unlinked
            lock.release()
        with contextlib.suppress(OSError):
            for new in made:
                new.rmdir()  # fails unless it is empty


def _acquire(path: Path, timeout: float) -> BaseFileLock | None:
    """Return a lock that is held, None in a folder that cannot be written; Timeout if another holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
        return lock
    except OSError as error:
        if isinstance(error, Timeout) or error.errno == errno.ENOSPC:
            raise
        if path.is_symlink():
            raise FolderInUse(f"{path} is a link (to {path.readlink()}); delete it") from None
        if path.is_dir():
            raise FolderInUse(f"{path} is a folder; move it elsewhere, a lock has that name") from None
        if not path.exists() or error.errno == errno.EROFS:
            return None  # nothing can be written there; the writer will report it
        if error.errno in (errno.EACCES, errno.EPERM):
            text = f"{path} cannot be locked ({error.strerror}): another user's run may be live there"
            raise FolderInUse(f"{text}; if there is none, delete it") from None
        reason = error.strerror
    _remove_file(path)
    soft = SoftFileLock(path.with_suffix(".claim"))
    soft.acquire(timeout=timeout)
    note(f"{path.parent} takes no locks ({reason}): {soft.lock_file} keeps others out")
    return soft


def remove_left_over(*paths: Path) -> None:
    """Delete what a killed process has left of writing a file by `files.open_whole`.

    Call it while no other process can be writing the file.
    """
    for path in paths:
        for part in path.parent.glob(f"{glob.escape(path.stem)}.*.tmp"):
            if re.fullmatch(rf"{re.escape(path.stem)}\.[0-9]+\.tmp", part.name):
                _remove_file(part)


def _remove_file(path: Path) -> None:
    # a folder of that name is somebody else's
    with contextlib.suppress(OSError):
        path.unlink()
