"""Files that are either complete or absent, links among them, and their digests."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

MAX_JSON_BYTES = 256 << 20  # the largest tokenizers have 40 MB
# seconds between attempts to rename: a virus scanner or OneDrive opens new files for a moment
PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error means that the disk is full."""
    # torch's zip writer and safetensors set no errno
    words = ("PytorchStreamWriter failed writing", "No space left")
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(word in str(error) for word in words)


def no_room(folder: Path, needed: int) -> str:
    """Return why `needed` bytes could not be written in `folder`, and the way out."""
    folder = existing_parent(folder)
    free = shutil.disk_usage(folder).free
    if hasattr(os, "statvfs") and (system := os.statvfs(folder)).f_files and not system.f_favail:
        return f"no inode is free on that disk, though {free:,} bytes are; delete files there"
    if free >= needed:
        return f"it needs {needed:,} bytes and the disk, or your quota there, was full; make room"
    return f"it needs {needed:,} bytes but {free:,} were free; make room on that disk"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    if not path.is_file():  # to read a pipe would wait for ever
        raise FileNotFoundError(errno.ENOENT, "no ordinary file there", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that is flushed and renamed to `path` at the end, or deleted after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, made = path.with_suffix(f".{secrets.randbelow(10**12)}.tmp"), None
    try:
        with part.open("xb") as file:  # x: never one that exists, never through a link
            made = part
            yield file
            file.flush()
            os.fsync(file.fileno())
        patient_rename(part, path, is_replacing=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # ENOSPC from a write names no file
    finally:
        if made:
            made.unlink(missing_ok=True)


def patient_rename(source: Path, target: Path, is_replacing: bool = False) -> None:
    """Rename a file or folder; on Windows, which refuses that while something in it is open, try for 6 s."""
    rename = source.replace if is_replacing else source.rename
    for pause_s in PAUSES_S if sys.platform == "win32" else ():
        try:
            rename(target)
            return
        except PermissionError:
            time.sleep(pause_s)
    rename(target)


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, by `open_whole`."""
    with open_whole(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, by `open_whole`."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file, {} without a file; ValueError if it is damaged."""
    if path.is_file() and (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path}: {size:,} bytes, over {max_bytes:,}; replace the file")
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); replace the file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; replace the file")
    return content


def fits(value: Any, form: Any) -> bool:
    """Return whether parsed data matches `form`, a small schema:

    - a dict: a dict with these keys, each value matching its form; other keys are allowed
    - a list of one form: a list whose items all match it
    - a type: a value of exactly that type
    - a number: a number of that type (an int may stand for a float), at least this large and below 2**63.
    """
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(value.get(key), part) for key, part in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    if isinstance(form, type):
        return type(value) is form
    return type(value) in (int, type(form)) and form <= value < 2**63


def check_inside(name: str) -> str:
    """Return a relative path; ValueError if it leaves its folder on Linux or on Windows."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or posix.is_absolute() or windows.anchor or ".." in (*posix.parts, *windows.parts):
        raise ValueError(f"the entry {name!r} would lie outside its folder; refusing it")
    return name


def is_network_share(name: str) -> bool:
    r"""Return whether Windows reaches a path over the network: //host/share, \\host\share, or \??\UNC\host.

    Even path.exists() makes Windows log in there, which sends this user's name and a hash of the password.
    Check a path from somebody else's file with this before you use it.
    """
    path = PureWindowsPath(name).as_posix()
    is_drive = re.match(r"(//[?.]|/\?\?)/[A-Za-z]:", path) and ".." not in path.split("/")
    return path.startswith(("//", "/??/")) and not is_drive


def path_of_any_system(name: str) -> Path | None:
    """Return the path that a checkpoint's settings name, None if it is a network share.

    One written on Windows may have backslashes.
    """
    if is_network_share(name):
        return None
    path = Path(name)
    return path if "\\" not in name or path.exists() else Path(PureWindowsPath(name).as_posix())


def is_outside(path: Path, folder: Path) -> bool:
    """Return whether `path`, with links resolved, lies outside `folder`."""
    return folder.resolve() not in path.resolve().parents


def existing_parent(path: Path) -> Path:
    """Return the first of `path` and its parents that is an existing folder."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def sync_directory(folder: Path) -> None:
    """Flush the entries of `folder` to the disk; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_files(folder: Path) -> None:
    """Flush every file in `folder` and its entries to the disk."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_directory(folder)


def is_link(path: Path) -> bool:
    """Return whether a path is a symbolic link, or a junction of Windows."""
    return path.is_symlink() or path.is_junction()


def remove(path: Path) -> None:
    """Delete a folder, a file or a link if it exists and that is possible; a link is not followed."""
    if path.is_dir() and not is_link(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def open_no_link(path: str, flags: int) -> int:
    """Open a file, but not through a link: the `opener` of an `open` that appends."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def check_no_links(*paths: Path) -> None:
    """Raise ValueError if one of these paths, which are to be written, leads elsewhere."""
    for path in paths:
        if is_link(path):
            raise ValueError(
                f"{path} is a link (to {path.readlink()}), which is not written through; delete it"
            )
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is neither a file nor a folder; name another, or delete it")


def check_replaceable(path: Path, *endings: str, is_own: Callable[[Path], bool] = lambda path: False) -> None:
    """Raise OSError if writing a result to `path` would replace something of another kind.

    Of its kind are a file for which `is_own` holds and one whose name has one of the `endings`, as .json.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file")
    if os.path.lexists(path) and not path.is_file():
        raise FileExistsError(f"{path} is no ordinary file; name another")
    if path.exists() and path.suffix.lower() not in endings and not is_own(path):
        raise FileExistsError(f"{path} exists and is no earlier result; name another file")


def free_name(path: Path, separator: str = ".", start: int = 1) -> Path:
    """Return `path` if it does not exist, else the first numbered name (`path.1`) that does not."""
    numbered = (path.with_name(f"{path.name}{separator}{n}") for n in itertools.count(start))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))
