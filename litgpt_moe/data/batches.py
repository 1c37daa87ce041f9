"""Token shards -> batches of token ids, in an order that a checkpoint can go on from."""

import bisect
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from litgpt_moe.cli import note
from litgpt_moe.data.manifest import RUN_AGAIN, read_manifest


def allow_open_files(n_files: int) -> None:
    """Raise the limit of open files (1,024 on most Linux) where mapped shards would exceed it."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < n_files + 256:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(n_files + 256, hard), hard))


class TokenStream:
    """The token ids of a split as one long array; its shards stay on disk and are read where needed."""

    def __init__(self, data_dir: Path, split: str) -> None:
        manifest = read_manifest(data_dir)
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        shards = manifest["splits"][split]["shards"]
        allow_open_files(2 * len(shards))
        # a plain array over the mapped file: slicing a memmap itself is several times slower
        self._shards = [np.asarray(np.memmap(data_dir / s["path"], dtype, mode="r")) for s in shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()
        self.vocab_size = manifest["tokenizer"]["vocab_size"]
        self.place, self._args = data_dir / split / split, (data_dir, split)

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return TokenStream, self._args  # a worker process maps the files itself

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids from `start` up to `stop` as int64."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        ids = np.empty(stop - start, dtype=np.int64)
        self.read_into(ids, start)
        return ids

    def read_into(self, ids: np.ndarray, start: int) -> None:
        """Fill `ids` with the tokens from `start` on."""
        index, filled = bisect.bisect_right(self._ends, start), 0
        while filled < len(ids):
            shard = self._shards[index]
            offset = start + filled - (self._ends[index] - len(shard))
            part = shard[offset : offset + len(ids) - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
            index += 1


@dataclass
class TokenBatches:
    """Batches of T + 1 token ids: sequence i is tokens i*T to i*T + T, so each token is predicted once.

    With a seed (training): an endless flow of all sequences, in a new order each epoch, dealt out to the
    ranks so that the same sequences make up a step whatever the number of ranks; a batch may reach into the
    next epoch. Iterating goes on where the last iteration or `load_state_dict` left off.
    Without (validation): in order and to the end, the same on every rank, since LitGPT logs rank 0's loss.
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
        self.epoch = self.n_used = 0  # sequences of this epoch that all ranks together have had

    def __len__(self) -> int:
        if self.seed is None:
            return math.ceil(self.n_sequences / self.batch_size)
        return self.n_sequences // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._in_order() if self.seed is None else self._endless()

    def _in_order(self) -> Iterator[torch.Tensor]:
        for start in range(0, self.n_sequences, self.batch_size):
            yield self._checked(self._load(range(start, min(start + self.batch_size, self.n_sequences))))

    def _endless(self) -> Iterator[torch.Tensor]:
        plan = self._plan(self.epoch * self.n_sequences + self.n_used)
        for batch in _read_ahead(self, plan) if self.num_workers else map(self._load, plan):
            # before the batch is out: a checkpoint made after it does not repeat it
            used = self.n_used + self.batch_size * self.world_size
            self.epoch, self.n_used = self.epoch + used // self.n_sequences, used % self.n_sequences
            yield self._checked(batch)

    def _checked(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the batch; OSError if it holds a token that no tokenizer made (an index error, later on)."""
        if (highest := int(batch.max())) >= self.stream.vocab_size:
            place, size = self.stream.place, self.stream.vocab_size
            raise OSError(f"{place}: damaged: token {highest} of a vocabulary of {size}; {RUN_AGAIN}")
        return batch

    def _plan(self, start: int) -> Iterator[list[int]]:
        """Yield this rank's sequences for each batch, from the `start`-th of the endless flow on."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            sequences = []
            for place in range(
                start + self.rank * self.batch_size, start + (self.rank + 1) * self.batch_size
            ):
                if place // self.n_sequences != epoch:
                    epoch = place // self.n_sequences
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.n_sequences)
                sequences.append(int(order[place % self.n_sequences]))
            yield sequences
            start += self.batch_size * self.world_size

    def _load(self, sequences: list[int] | range) -> torch.Tensor:
        ids = np.empty((len(sequences), self.block_size + 1), dtype=np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            self.stream.read_into(row, sequence * self.block_size)
        return torch.from_numpy(ids)

    __getitem__ = _load  # what a worker process asks a data set for

    def state_dict(self) -> dict[str, int]:
        """Return the position; it holds for another batch size or number of ranks too."""
        return {"epoch": self.epoch, "n_used": self.n_used, "n_sequences": self.n_sequences}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position; with other data or another block size, at the start of the next epoch."""
        self.epoch, self.n_used = state["epoch"], state["n_used"]
        if state["n_sequences"] != self.n_sequences:
            note(f"the data had {state['n_sequences']:,} sequences, now {self.n_sequences:,}: new epoch")
            self.epoch, self.n_used = self.epoch + 1, 0


def _read_ahead(batches: TokenBatches, plan: Iterator[list[int]]) -> Iterator[torch.Tensor]:
    """Yield the batches of `plan`, read by worker processes."""
    # a generator of its own: the default one is the run's, whose state must not depend on num_workers
    generator = torch.Generator().manual_seed(0)
    return iter(
        DataLoader(
            batches, batch_size=None, sampler=plan, num_workers=batches.num_workers, generator=generator
        )
    )
