"""Token shards -> batches of token ids, in an order that a resumed run continues exactly."""

import bisect
import contextlib
import io
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from litgpt_moe.cli import note
from litgpt_moe.data.loader_workers import outlive_stop_signals
from litgpt_moe.data.manifest import RUN_AGAIN, read_manifest
from litgpt_moe.files import fits

POSITION_FORM = {"epoch": 0, "n_used": 0, "n_sequences": 1}  # of `TokenBatches.state_dict`


def allow_open_files(n_files: int) -> None:
    """Raise the limit of open files (1,024 on most Linux systems) if `n_files` more could exceed it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not at the top: Windows lacks the module, and the limit

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < n_files + 256:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(n_files + 256, hard), hard))


class TokenStream:
    """The token ids of a split as one long array over its shards."""

    def __init__(self, data_dir: Path, split: str) -> None:
        manifest = read_manifest(data_dir)
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        shards = manifest["splits"][split]["shards"]
        allow_open_files(2 * len(shards))
        # Not mapped: to touch what another program has cut off a mapped file ends the process with SIGBUS. A
        # file that is open stays readable when a new preparation deletes it.
        opened = contextlib.ExitStack()
        paths = [data_dir / shard["path"] for shard in shards]
        self._files = [opened.enter_context(path.open("rb", buffering=0)) for path in paths]
        weakref.finalize(self, opened.close)
        self._ends = np.cumsum([shard["n_tokens"] for shard in shards]).tolist()
        self.vocab_size = manifest["tokenizer"]["vocab_size"]
        self.place, self._args = data_dir / split / split, (data_dir, split)

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return TokenStream, self._args  # a worker process receives the names and opens the files itself

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Return the ids from `start` up to `stop`, exclusive, as int64."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        ids = np.empty(stop - start, dtype=np.int64)
        self.read_into(ids, start)
        return ids

    def read_into(self, ids: np.ndarray[Any, Any], start: int) -> None:
        """Fill `ids` with the tokens that begin at `start`."""
        index, filled = bisect.bisect_right(self._ends, start), 0
        while filled < len(ids):
            first = self._ends[index - 1] if index else 0
            n_tokens = min(len(ids) - filled, self._ends[index] - start - filled)
            part = np.empty(n_tokens, self._dtype)
            offset = (start + filled - first) * part.itemsize
            if read_at(self._files[index], part.view(np.uint8).data, offset) < part.nbytes:
                self._raise_cut(index)
            ids[filled : filled + n_tokens] = part
            filled += n_tokens
            index += 1

    def check_sizes(self) -> None:
        """Raise OSError if a shard was cut short since it was opened."""
        starts = [0, *self._ends]
        for index, file in enumerate(self._files):
            if os.fstat(file.fileno()).st_size < (self._ends[index] - starts[index]) * self._dtype.itemsize:
                self._raise_cut(index)

    def _raise_cut(self, index: int) -> None:
        raise OSError(f"{self._files[index].name}: cut short while it was read; {RUN_AGAIN}")


def read_at(file: io.FileIO, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from a place in a file and return the number of bytes."""
    if hasattr(os, "preadv"):  # processes that were forked share the place of an open file
        return os.preadv(file.fileno(), [buffer], offset)
    file.seek(offset)  # Windows forks none
    return file.readinto(buffer) or 0


@dataclass
class TokenBatches(Dataset[torch.Tensor]):
    """Batches of T + 1 token ids: sequence i is tokens i*T to i*T + T, so each token is predicted once.

    With a seed (training): endless epochs, each in a new order, in which a batch may reach into the next
    epoch. A step has the same sequences whatever the number of ranks. Iteration continues where the last one
    stopped, or from the position given to `load_state_dict`.
    Without a seed (validation): one pass in order, the same on every rank, because LitGPT logs rank 0's loss.
    """

    stream: TokenStream
    batch_size: int
    block_size: int
    seed: int | None
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0

    def __post_init__(self) -> None:
        self.n_sequences = max(0, len(self.stream) - 1) // self.block_size
        self.n_taken = 0  # sequences taken so far, by all ranks together and over all epochs

    def __len__(self) -> int:
        if self.seed is None:
            return math.ceil(self.n_sequences / self.batch_size)
        return self.n_sequences // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.seed is None:
            for start in range(0, self.n_sequences, self.batch_size):
                yield self._checked(self[range(start, min(start + self.batch_size, self.n_sequences))])
            return
        plan = self._plan(self.seed, self.n_taken)
        for batch in self._read_ahead(plan) if self.num_workers else map(self.__getitem__, plan):
            # before the yield, so that a checkpoint saved after this batch does not repeat it
            self.n_taken += self.batch_size * self.world_size
            yield self._checked(batch)

    def _read_ahead(self, plan: Iterator[list[int]]) -> Iterator[torch.Tensor]:
        # a DataLoader draws a seed; with its own generator the global random state stays as it is
        own = torch.Generator().manual_seed(0)
        loader = DataLoader(self, None, sampler=plan, num_workers=self.num_workers, generator=own)
        outlive_stop_signals(loader)
        try:
            yield from loader
        except (OSError, RuntimeError):  # a worker's, with its traceback for a text
            self.stream.check_sizes()
            raise

    def _checked(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the batch; OSError if a token is not in the vocabulary, for which the model has no row."""
        if (highest := int(batch.max())) >= self.stream.vocab_size:
            place, size = self.stream.place, self.stream.vocab_size
            raise OSError(f"{place}: damaged: token {highest} of a vocabulary of {size}; {RUN_AGAIN}")
        # a copy from pinned memory to the GPU need not wait for what the GPU is doing
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def _plan(self, seed: int, start: int) -> Iterator[list[int]]:
        """Yield this rank's sequences for each batch, from sequence `start` on, counted over all epochs."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            first = start + self.rank * self.batch_size
            sequences = []
            for position in range(first, first + self.batch_size):
                if position // self.n_sequences != epoch:
                    epoch = position // self.n_sequences
                    order = np.random.default_rng([seed, epoch]).permutation(self.n_sequences)
                sequences.append(int(order[position % self.n_sequences]))
            yield sequences
            start += self.batch_size * self.world_size

    def __getitem__(self, index: list[int] | range) -> torch.Tensor:
        """Return the batch of the sequences in `index`; torch's DataLoader calls this in its workers."""
        ids = np.empty((len(index), self.block_size + 1), dtype=np.int64)
        for row, sequence in zip(ids, index, strict=True):
            self.stream.read_into(row, sequence * self.block_size)
        return torch.from_numpy(ids)

    def state_dict(self) -> dict[str, int]:
        """Return the position; it stays valid for another batch size or number of ranks."""
        epoch, n_used = divmod(self.n_taken, self.n_sequences)
        return {"epoch": epoch, "n_used": n_used, "n_sequences": self.n_sequences}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position; with other data or block size, from the start of the next epoch."""
        if not fits(state, POSITION_FORM) or state["n_used"] >= state["n_sequences"]:
            raise ValueError(f"train_dataloader is {state!r:.60}, which is no position in the data")
        epoch, n_used = state["epoch"], state["n_used"]
        if state["n_sequences"] != self.n_sequences:
            note(f"the data had {state['n_sequences']:,} sequences, now {self.n_sequences:,}: next epoch")
            epoch, n_used = epoch + 1, 0
        self.n_taken = epoch * self.n_sequences + n_used
