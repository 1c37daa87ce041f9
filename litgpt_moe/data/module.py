"""TextShards: the LitGPT data module that reads our token shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from litgpt.data import TextFiles
from torch import distributed
from torch.utils.data import ChainDataset, DataLoader

from litgpt_moe.data.batches import TokenBatches, TokenStream
from litgpt_moe.data.prepare import refresh
from litgpt_moe.data.settings import DEFAULT_DATA_DIR, DEFAULT_TOKENIZER_DIR
from litgpt_moe.processes import is_first_on_machine, note_once

UNUSED = 1e-3  # share of the training tokens; a larger one is reported


class ShardLoader(DataLoader[torch.Tensor]):
    """A DataLoader over `TokenBatches`, whose position LitGPT saves in checkpoints and restores."""

    def __init__(self, batches: TokenBatches) -> None:
        # an iterable data set, though empty: Fabric gives any other a distributed sampler
        super().__init__(ChainDataset([]), batch_size=None)
        self.batches = batches
        # LitGPT calls these two when it saves and when it resumes
        self.state_dict, self.load_state_dict = batches.state_dict, batches.load_state_dict

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        # DataLoader's own iterator would draw from the global random state and take 50 us a batch
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass
class TextShards(TextFiles):
    """LitGPT's TextFiles on our shards: stories with BOS and EOS, exact resume, no litdata."""

    train_data_path: Path = DEFAULT_DATA_DIR / "train"
    """Folder of the training text; its parent is the data directory with manifest.json."""
    val_data_path: Path | None = None
    """Folder of the validation text; it must be the folder val beside train_data_path."""
    seed: int = 42
    """Seed of the order of the training sequences."""
    num_workers: int = 0
    """Processes that read ahead. 0 is fastest on a local disk: transfers between processes cost more."""
    tokenizer_dir: Path = DEFAULT_TOKENIZER_DIR
    """Folder of the tokenizer that the shards must have been made with."""

    def __post_init__(self) -> None:
        train, val = Path(self.train_data_path), self.val_data_path
        if train.name != "train" or (val is not None and Path(val) != train.parent / "val"):
            given = f"train_data_path is {train}, val_data_path {val}"
            raise ValueError(f"data: {given}; choose FOLDER/train and FOLDER/val")
        if self.num_workers < 0:
            raise ValueError(f"data: num_workers is {self.num_workers}; choose 0 or more")
        self.train_data_path, self.data_dir = train, train.parent
        self.is_checked = self.is_reported = False  # the contents of the shards; the tokens that are not used
        super().__post_init__()

    def prepare_data(self) -> None:
        """Rebuild stale shards; LitGPT calls this in every process, and run_train.py before that."""
        # hashing all shards takes long: one process of each machine does it, once in a run
        is_to_hash = not self.is_checked and is_first_on_machine()
        refresh(self.data_dir, Path(self.tokenizer_dir), is_to_hash, wait=_is_distributed())
        self.is_checked = True

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training split: endless, shuffled by `seed`, shared among the ranks."""
        return self._loader("train", self.seed)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the validation split: all of it in order on every rank."""
        return self._loader("val", None)

    def _loader(self, split: str, seed: int | None) -> ShardLoader:
        """Return a split's loader; ValueError if its text is too short for one batch (val: one sequence)."""
        is_shared = seed is not None and _is_distributed()
        ranks = (distributed.get_rank(), distributed.get_world_size()) if is_shared else (0, 1)
        stream, block_size = TokenStream(self.data_dir, split), self.max_seq_length - 1
        batches = TokenBatches(stream, self.batch_size, block_size, seed, *ranks, self.num_workers)
        n_wanted = 1 if seed is None else batches.batch_size * batches.world_size
        if batches.n_sequences < n_wanted:
            # with a micro-batch of one sequence
            fewest = 1 if seed is None else batches.world_size
            way_out = f"put more text into {self.data_dir / split}"
            if seed is None:
                way_out += ", or without any there prepare with a larger --val_fraction"
            if batches.n_sequences >= fewest:
                way_out = (
                    f"choose a micro_batch_size of {batches.n_sequences // fewest} or less, or {way_out}"
                )
            elif longest := (len(stream) - 1) // fewest:
                way_out = f"choose a max_seq_length of {longest} or less, or {way_out}"
            raise ValueError(
                f"{self.data_dir}: the {split} split has {len(stream):,} tokens, {batches.n_sequences} "
                f"sequences of {block_size}, but {n_wanted} are needed; {way_out}"
            )
        n_left = len(stream) - 1 - batches.n_sequences * block_size
        if seed is not None and not self.is_reported and n_left > UNUSED * len(stream):
            self.is_reported = True
            left = f"the last {n_left:,} of {len(stream):,} training tokens"
            note_once(f"{self.data_dir}: {left} fill no sequence of {block_size} and are not used")
        return ShardLoader(batches)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


# the name in YAML files and checkpoints, under which prepare_data.py exports the class
TextShards.__module__ = "prepare_data"
