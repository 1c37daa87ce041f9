"""Windows' rules, held on Linux: for open files, for the console, for the end of a pipe."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def files_in_use() -> set[Path]:
    """The regular files that this process has open or memory-mapped."""
    found = set()
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the handle of this very listing
            found.add(handle.readlink())
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if len(parts := line.split(maxsplit=5)) == 6:
            found.add(Path(parts[5]))
    return {path for path in found if path.is_absolute() and not path.is_dir()}


class WindowsFiles:
    """Refuses to rename, replace or delete what is open or memory-mapped in this process, as Windows does.

    Python opens files there without FILE_SHARE_DELETE; a folder cannot be renamed while a file in it is open.
    Neither does `os.rename` take the place of something that exists.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused: list[str] = []
        """What was refused, whether or not the caller told anybody."""
        rename, replace, unlink, rmdir = os.rename, os.replace, os.unlink, os.rmdir

        def renaming(source: Any, target: Any, **options: Any) -> None:
            self.check(source)
            if os.path.lexists(target):
                raise FileExistsError(
                    errno.EEXIST, "Cannot create a file when that file already exists", target
                )
            rename(source, target, **options)

        def replacing(source: Any, target: Any, **options: Any) -> None:
            self.check(source)
            self.check(target)
            replace(source, target, **options)

        def unlinking(path: Any, *, dir_fd: int | None = None) -> None:
            self.check(path, dir_fd)
            unlink(path, dir_fd=dir_fd)

        def removing_folder(path: Any, *, dir_fd: int | None = None) -> None:
            rmdir(path, dir_fd=dir_fd)

        for name, function in (("rename", renaming), ("replace", replacing), ("rmdir", removing_folder)):
            monkeypatch.setattr(os, name, function)
        for name in ("unlink", "remove"):
            monkeypatch.setattr(os, name, unlinking)

    def check(self, path: Any, dir_fd: int | None = None) -> None:
        """Raise PermissionError if the file, or one in the folder, is in use."""
        folder = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        whole = Path(os.path.normpath(folder / os.fsdecode(path)))
        if whole.suffix == ".lock":  # on Windows filelock deletes it itself, once it has let go
            return
        if in_use := sorted(used for used in files_in_use() if used == whole or whole in used.parents):
            self.refused.append(f"{whole}: {in_use[0]} is in use")
            error = "The process cannot access the file because it is being used by another process"
            raise PermissionError(errno.EACCES, error, os.fsdecode(path))


@contextlib.contextmanager
def busy_for(
    n_times: int, is_busy: Callable[[Path], bool], monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Let another program hold files, as a virus scanner does, the first `n_times` that they are renamed."""
    held: list[str] = []

    def holding(function: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, *args: Any, **options: Any) -> None:
            if is_busy(Path(source)) and len(held) < n_times:
                held.append(str(source))
                raise PermissionError(errno.EACCES, "Access is denied", source)
            function(source, *args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, holding(getattr(os, name)))
        yield held
