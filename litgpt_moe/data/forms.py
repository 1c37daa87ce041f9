"""The forms in which text is read (.jsonl, .csv.gz, ...), and how packed files are opened.

Nothing heavy is imported here: worker processes and the checks of a run import this module.
"""

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

FORMS = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT_FORMS = (".txt", ".md")  # stories between separators; in the other forms a row is a document
OLD_FORMS = (".txt",)  # what earlier versions read
MAGIC = {".gz": (b"\x1f\x8b", "gzip"), ".zst": (b"\x28\xb5\x2f\xfd", "zstd"), ".xz": (b"\xfd7zXZ", "xz")}
PARQUET_MAGIC = b"PAR1"
NAMED_FORMS = f"{' '.join(FORMS)}, each also with {' '.join(MAGIC)} after it"
HUB_RECORD = "hub.json"  # in a data directory: which files of a hub data set it has
NO_TEXT = {  # files of programs, whose .json or .txt holds no text
    *(
        "manifest.json",
        HUB_RECORD,
        "demo.json",
        "artifact.json",
        "checkpoint.json",
        "config.json",
        "package.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "dataset_infos.json", "requirements.txt"),
}
READ_BYTES = 1 << 18  # packed bytes read at once
MAX_XZ_BYTES = 160 << 20  # of memory for unpacking; `xz -9` needs 65 MB


@dataclass(frozen=True)
class OnHub:
    """A file of a data set on the Hugging Face hub, which is read there."""

    repo: str
    revision: str
    """A commit."""
    path: str
    """In the repository."""
    size: int
    digest: str
    """Of its content: the hub's."""


@dataclass(frozen=True)
class Source:
    """A file of text: where it lies, what its name says of its form, and its name in the manifest."""

    path: Path
    form: str
    """One of FORMS."""
    packing: str
    """One of MAGIC, or '' for a file that is not packed."""
    name: str
    """Relative to the data directory, with `/` on every system."""
    is_own: bool = True
    """Whether it lies in the data directory, as its text; False: a PATH of the command."""
    on_hub: OnHub | None = None
    """Where it is read if it is not on this machine."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.on_hub.size if self.on_hub else self.path.stat().st_size


def form_of(path: Path) -> tuple[str, str] | None:
    """Return form and packing of a file by its name, None if it is in no form that is read."""
    name = path.name.lower()
    packing = next((ending for ending in MAGIC if name.endswith(ending)), "")
    name = name.removesuffix(packing)
    form = next((form for form in FORMS if name.endswith(form) and name != form), None)
    return None if form is None else (form, packing)


def stem_of(path: Path) -> str:
    """Return a file's name without what tells its form, or a folder's name."""
    found = None if path.is_dir() else form_of(path)
    return path.name[: len(path.name) - len("".join(found))] if found else path.name


def text_in(folder: Path, forms: tuple[str, ...] = FORMS) -> list[Path]:
    """Return the paths in one folder, not below it, that are named as text in one of `forms`."""
    paths = (path for path in folder.glob("[!.]*") if path.name not in NO_TEXT)
    paths = (path for path in paths if (found := form_of(path)) and found[0] in forms)
    # what earlier versions read had the ending .txt exactly
    paths = (path for path in paths if forms != OLD_FORMS or path.suffix == ".txt")
    # paths compare without regard to case on Windows, and the shards depend on the order
    return sorted(paths, key=lambda path: path.name)


class RawFile(io.RawIOBase):
    """A file opened for reading that reports each part of it."""

    def __init__(self, path: Path, on_read: Callable[[memoryview], object]) -> None:
        self._file, self._on_read = path.open("rb", buffering=0), on_read

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` and return the number of bytes, 0 at the end."""
        size = self._file.readinto(buffer) or 0
        self._on_read(memoryview(buffer)[:size])
        return size

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class XzFile(io.RawIOBase):
    """The unpacked content of .xz data; Python's LZMAFile takes as much memory as the file asks for."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._unpack = lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_XZ_BYTES)
        self._left = b""  # what follows the end of a stream: another stream, or padding

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` and return the number of bytes, 0 at the end."""
        while True:
            data = b""
            if self._unpack.eof:
                self._left = (self._unpack.unused_data or self._packed.read(READ_BYTES)).lstrip(b"\0")
                if not self._left:
                    return 0
                self._unpack = lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_XZ_BYTES)
            if self._unpack.needs_input:
                data, self._left = self._left or self._packed.read(READ_BYTES), b""
                if not data:
                    raise EOFError("it ends before the end of its data")
            if out := self._unpack.decompress(data, len(buffer)):
                buffer[: len(out)] = out
                return len(out)


@contextlib.contextmanager
def open_unpacked(source: Source, on_read: Callable[[memoryview], object]) -> Iterator[BinaryIO]:
    """Yield the unpacked content of a file; `on_read` is given each part of the packed one as it is read."""
    with contextlib.ExitStack() as stack, as_damage(source.path):
        packed = stack.enter_context(io.BufferedReader(RawFile(source.path, on_read), READ_BYTES))
        if source.packing:
            mark, name = MAGIC[source.packing]
            if (start := packed.peek(8)) and not start.startswith(mark):
                others = (other for _, (m, other) in MAGIC.items() if start.startswith(m))
                found = next((f"but is {other} data" for other in others), f"but is not {name} data")
                raise ValueError(f"{source.path}: named {source.packing} {found}; rename it")
        yield stack.enter_context(_unpacked(packed, source.packing))  # type: ignore[arg-type]


def _unpacked(packed: io.BufferedReader, packing: str) -> Any:
    if packing == ".gz":
        return gzip.GzipFile(fileobj=packed)
    if packing == ".xz":
        return io.BufferedReader(XzFile(packed), READ_BYTES)  # type: ignore[arg-type]
    if packing == ".zst":
        import pyarrow  # not at the top: it takes 40 MB, in each worker process too

        # not zstandard, whose reader takes the end of a truncated file for the end of the data
        return io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd"), READ_BYTES)
    return contextlib.nullcontext(packed)


@contextlib.contextmanager
def as_damage(path: Path) -> Iterator[None]:
    """Raise ValueError with a sentence on the file in `path` if it cannot be unpacked or decoded."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(_damage(path, error)) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(_damage(path, error)) from None  # pyarrow's


def _damage(path: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{path}: damaged, or cut short as by a download that broke off ({reason}); fetch or pack it again"
