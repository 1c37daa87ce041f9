"""Parquet files: the text column, a few rows at a time; and the reader for each form of file."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from tqdm import tqdm

from litgpt_moe.data.forms import PARQUET_MAGIC, TEXT_FORMS, Source, open_unpacked
from litgpt_moe.data.hub_file import open_on_hub
from litgpt_moe.data.rows import JsonLinesReader, JsonReader, Row, RowReader, TableReader
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.text import FileReader, Reading, TextReader

MAX_COUNTED_BYTES = 64 << 20  # of files that are read once more, to count the text in them
ROWS_AT_ONCE = 32
BUFFER_BYTES = 1 << 20  # of a column; without a buffer the column of a whole row group is held
MAX_GROWTH, MIN_GROWN = 100, 1 << 30  # times and bytes to which a packed Parquet file may grow on the disk


class ParquetReader(RowReader):
    """Yields the text column of a Parquet file."""

    def rows(self, progress: "tqdm[Any]") -> Iterator[Row]:
        """Yield the rows; ValueError with file and row for one that is broken."""
        import pyarrow.parquet  # not at the top: it takes 40 MB, in each worker process too

        n_rows = 0
        try:
            with self._open(progress) as file:
                table = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
                column = self._column_of(table.schema_arrow)
                size, n_done = self.size, 0
                # a thread a column would read ahead
                for batch in table.iter_batches(ROWS_AT_ONCE, columns=[column], use_threads=False):
                    for row in batch.to_pylist():
                        n_rows += 1
                        yield f"row {n_rows}", row
                    done = size * n_rows // max(1, table.metadata.num_rows)
                    progress.update(done - n_done)
                    n_done = done
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise self.broken(f"row {n_rows + 1} or one soon after it", error) from None
        except OSError as error:
            if error.errno is not None or isinstance(error, ConnectionError):
                raise
            raise self.broken(f"row {n_rows + 1} or one soon after it", error) from None

    def _column_of(self, schema: Any) -> str:
        """Return the column to read; its values are judged as those of other rows are."""
        from pyarrow import types  # not at the top: it takes 40 MB, in each worker process too

        def is_string(kind: Any) -> bool:
            kind = kind.value_type if types.is_dictionary(kind) else kind
            return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

        def sample(kind: Any) -> Any:
            if types.is_struct(kind):
                return {kind.field(i).name: sample(kind.field(i).type) for i in range(kind.num_fields)}
            return "a" if is_string(kind) else 0

        return super().choose_column([{field.name: sample(field.type) for field in schema}])

    def choose_column(self, rows: list[Any]) -> str:
        """Return the only column that was read."""
        if not rows:
            return self.reading.text_column or "text"
        asked, (found,) = self.reading.text_column, rows[0]
        return found if asked is None else asked

    @contextlib.contextmanager
    def _open(self, progress: "tqdm[Any]") -> Iterator[IO[bytes]]:
        """Yield the file opened for reading at any place, unpacked on the disk if it is packed."""
        with contextlib.ExitStack() as stack:
            if self.source.on_hub:
                file: IO[bytes] = stack.enter_context(open_on_hub(self.source.on_hub))
            elif self.source.packing:
                file = stack.enter_context(tempfile.TemporaryFile(dir=self.reading.scratch))
                packed = stack.enter_context(open_unpacked(self.source, self.sha256.update))
                limit = max(MIN_GROWN, MAX_GROWTH * self.size)
                while chunk := packed.read(BUFFER_BYTES):
                    file.write(chunk)
                    if file.tell() > limit:
                        raise ValueError(f"{self.path}: unpacks to more than {limit:,} bytes; check the file")
                file.seek(0)
            else:
                file = stack.enter_context(self.path.open("rb"))
                self.sha256 = hashlib.file_digest(file, "sha256")
                file.seek(0)
            if file.read(len(PARQUET_MAGIC)) != PARQUET_MAGIC:
                raise ValueError(f"{self.path}: named .parquet but is not Parquet data; rename it")
            file.seek(0)
            yield file


READERS: dict[str, type[FileReader]] = {
    **dict.fromkeys(TEXT_FORMS, TextReader),
    ".jsonl": JsonLinesReader,
    ".json": JsonReader,
    ".csv": TableReader,
    ".tsv": TableReader,
    ".parquet": ParquetReader,
}


def reader_of(source: Source, reading: Reading) -> FileReader:
    """Return the reader for the form of a file."""
    return READERS[source.form](source, reading)


def text_bytes(sources: list[Source], settings: PrepareSettings) -> int:
    """Return the size of the text in some files: where they are small, here and not all plain text, that of
    its stories, which is the same in every form; else the size of the files.
    """
    total = sum(source.size for source in sources)
    is_plain = all(source.form in TEXT_FORMS and not source.packing for source in sources)
    if total > MAX_COUNTED_BYTES or is_plain or any(source.on_hub for source in sources):
        return total
    reading = Reading.of(settings, is_quiet=True)
    lists = (reader_of(source, reading).story_lists(tqdm(disable=True)) for source in sources)
    return sum(len(story.encode("utf-8")) for some in lists for stories in some for story in stories)
