"""Compile native.cpp once on each machine, by the C++ compiler that is there, and load it."""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.cpp")
# no -ffast-math: with it, loading the library would make all of the process flush small numbers to zero
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno"),
    # native.cpp says itself where a product and a sum are one operation
    "-ffp-contract=off",
)
COMPILE_S = 120


class NoLibrary(RuntimeError):
    """Why there is no compiled library here; the text ends with the way out."""


def load_library() -> ctypes.CDLL:
    """Return the compiled native.cpp. Raises NoLibrary.

    It is kept in the user's cache folder under a name that stands for source, compiler, processor and torch.
    """
    if isinstance(found := _load_once(*_command()), str):
        raise NoLibrary(found)
    return found


@functools.cache
def _load_once(*command: str) -> ctypes.CDLL | str:
    """Return the library or, kept as well, why there is none: each story of a training run asks for it."""
    try:
        return _load([*command])
    except NoLibrary as error:
        return str(error)


def _load(command: list[str]) -> ctypes.CDLL:
    # the library asks for torch's OpenMP by its file name, which is another one in other versions of torch
    openmp = [library.name for library in _openmp_of_torch()]
    parts = (SOURCE.read_bytes(), command, _compiler_version(command), _processor(), openmp)
    name = f"decode-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.so"
    try:
        return _from_folder(_cache_folder(), name, command)
    except OSError:  # full, or it came to be somebody else's
        pass
    try:
        return _from_folder(Path(_own_folder().name), name, command)
    except OSError as error:
        raise NoLibrary(f"the compiled code cannot be kept or loaded ({error}); use --engine torch") from None


def _from_folder(folder: Path, name: str, command: list[str]) -> ctypes.CDLL:
    """Return the library kept in a folder; it is compiled if it is not there, or broken."""
    file = folder / name
    if file.is_file():
        with contextlib.suppress(OSError):
            return _open(file)
    _compile(command, file)
    return _open(file)


def _open(file: Path) -> ctypes.CDLL:
    """Return the library in a file, from a copy if the disk that it is on allows no code."""
    try:
        return ctypes.CDLL(str(file))
    except OSError:
        own = Path(_own_folder().name)
        if own in file.parents:
            raise
        # in a new folder each time: to write over a library that is loaded would end the process
        return ctypes.CDLL(shutil.copy(file, tempfile.mkdtemp(dir=own)))


def _command() -> list[str]:
    """Return the compiler and its flags, without the names of files. Raises NoLibrary."""
    # the flags, and who may write to the cache folder, are those of POSIX systems
    if sys.platform == "win32":
        raise NoLibrary("compiled code needs Linux or macOS (on Windows: WSL 2); use --engine torch")
    try:
        given = shlex.split(text := os.environ.get("CXX", ""))
    except ValueError as error:
        raise NoLibrary(f"CXX is {text!r:.80}, which is no command ({error}); use --engine torch") from None
    found = given or [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))][:1]
    if not found:
        raise NoLibrary("there is no C++ compiler here; install g++ for twice the speed")
    # Apple's compiler has no OpenMP: one thread there
    return [*found, *FLAGS, "-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp"]


def _compiler_version(command: list[str]) -> bytes:
    # with all words: the first may be a program like ccache, which has a version of its own
    asked = [*command, "--version"]
    try:
        return subprocess.run(asked, capture_output=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibrary(
            f"the C++ compiler {command[0]} does not start ({error}); use --engine torch"
        ) from None


def _processor() -> str:
    """Return what -march=native depends on: a home folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    kept = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return repr((platform.machine(), platform.processor(), sorted(kept)))


def _cache_folder() -> Path:
    """Return a folder that nobody else can write to: what lies there is loaded as code."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litgpt-moe"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        if is_own and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user, one of a container perhaps, has no home
        pass
    return Path(_own_folder().name)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder, which is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="litgpt-moe-")


def _openmp_of_torch() -> list[Path]:
    return sorted(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"))


def _compile(command: list[str], target: Path) -> None:
    # torch's own OpenMP comes first, so that its threads and ours are the same
    openmp = list(map(str, _openmp_of_torch()))
    with tempfile.TemporaryDirectory(prefix="compile-", dir=target.parent) as folder:
        made = Path(folder) / target.name
        inputs = [str(SOURCE), *(["-Wl,--as-needed", *openmp] if openmp else [])]
        try:
            done = subprocess.run(
                [*command, *inputs, "-o", str(made)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMPILE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NoLibrary(f"{command[0]} takes more than {COMPILE_S} s; use --engine torch") from None
        if done.returncode and "No space left" in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        if done.returncode:
            reason = next(
                (line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}"
            )
            raise NoLibrary(f"{command[0]} cannot compile {SOURCE.name} ({reason:.200}); use --engine torch")
        with made.open("rb") as written:
            os.fsync(written.fileno())  # after a power failure a library that is cut short could end Python
        made.replace(target)
