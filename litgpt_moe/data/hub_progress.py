"""How far a preparation of text on the hub has come: what is done is not fetched a second time."""

import contextlib
import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from litgpt_moe.data.manifest import SHARD_FORM
from litgpt_moe.data.settings import SPLITS, PrepareSettings
from litgpt_moe.data.text import FileReader
from litgpt_moe.data.tokenizer import TokenizerFacts
from litgpt_moe.files import check_inside, check_no_links, fits, open_whole, remove

PROGRESS = ".hub_progress.npz"  # in the data directory
NOTED_BYTES = 64 << 20  # of files, from one note to the next
FILE_FORM = {"n_replaced_bytes": 0, "skipped": {}}
STATE_FORM = {
    "made_of": str,
    "files": {},
    "n_new": 0,
    "n_duplicates": dict.fromkeys(SPLITS, 0),
    "shards": {split: [SHARD_FORM] for split in SPLITS},
}


class HubProgress:
    """Notes, each time some files are done, what has come of them."""

    def __init__(
        self, settings: PrepareSettings, facts: TokenizerFacts, readers: dict[str, list[FileReader]]
    ) -> None:
        self.data_dir, self.path = settings.data_dir, settings.data_dir / PROGRESS
        self.width = facts.dtype.itemsize
        text = {split: [(r.source.name, r.source.size) for r in some] for split, some in readers.items()}
        options = (settings.text_column, settings.on_bad_utf8, settings.val_fraction)
        revisions = [r.source.on_hub and r.source.on_hub.revision for some in readers.values() for r in some]
        parts = (text, revisions[:1], options, facts.sha256, facts.dtype.name, facts.bos_id, facts.eos_id)
        self.made_of = hashlib.sha256(repr(parts).encode()).hexdigest()
        self.files: dict[str, Any] = {}
        self._n_bytes = 0

    def load(self, remember: Callable[[np.ndarray[Any, Any]], object]) -> dict[str, Any] | None:
        """Return what was noted, None if there is nothing of use; `remember` gets the stories' hashes."""
        check_no_links(self.path)
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(self.path, allow_pickle=False) as found:
                state = json.loads(found["state"].tobytes())
                if not fits(state, STATE_FORM) or state["made_of"] != self.made_of:
                    return None
                if not all(self._is_there(entry) for split in SPLITS for entry in state["shards"][split]):
                    return None
                for name in found.files:
                    if name != "state":
                        remember(found[name].astype("<u8", copy=False))
            self.files = state["files"]
            return state
        return None

    def _is_there(self, entry: dict[str, Any]) -> bool:
        path = self.data_dir / check_inside(entry["path"])
        return path.is_file() and path.stat().st_size == entry["n_tokens"] * self.width

    def is_done(self, reader: FileReader) -> bool:
        """Return whether a file was done before; its counts are then as they were."""
        entry = self.files.get(reader.source.name, {})
        if not fits(entry, FILE_FORM):
            return False
        reader.n_replaced_bytes, reader.skipped = entry["n_replaced_bytes"], Counter(entry["skipped"])
        reader.column = entry.get("column")
        return True

    def end_file(self, reader: FileReader) -> bool:
        """Take up a file that is done; return whether it is time for a note."""
        counts = {"n_replaced_bytes": reader.n_replaced_bytes, "skipped": dict(reader.skipped)}
        self.files[reader.source.name] = {**counts, "column": reader.column}
        self._n_bytes += reader.size
        return self._n_bytes >= NOTED_BYTES

    def note(self, state: dict[str, Any], hashes: list[np.ndarray[Any, Any]]) -> None:
        """Write down what has come of the files that are done."""
        self._n_bytes = 0
        text = json.dumps({"made_of": self.made_of, "files": self.files, **state})
        with open_whole(self.path) as file:
            np.savez(file, *hashes, state=np.frombuffer(text.encode("utf-8"), dtype=np.uint8))

    def end(self) -> None:
        """Delete the notes: all is done."""
        remove(self.path)
