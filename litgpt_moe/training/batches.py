"""Preparing the data before training begins, and the training batches with a position to resume from."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litgpt_moe.checkpoints.reader import load_tokenizer
from litgpt_moe.config import DEFAULT_VOCABULARY
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.files import fits
from litgpt_moe.processes import launcher, note_once
from litgpt_moe.training.checks import warn_of_unused_rows
from litgpt_moe.training.fit import DEMO_VOCABULARY, is_open, leaves_vocabulary_open
from litgpt_moe.training.run import Run


class TrainLoader:
    """LitGPT's training batches, with their position for checkpoints, and a place between two of them.

    `between_batches` is called there, before the next batch is taken. It may raise to leave the loop.
    A batch of all devices has `batch_size` sequences.
    `with_first`, if given, is called with the first batch before that is trained on.
    """

    def __init__(
        self,
        loader: Any,
        seed: int,
        is_finished: Callable[[], bool],
        between_batches: Callable[[], None],
        batch_size: int = 1,
        with_first: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.loader, self.seed, self.batch_size = loader, seed, batch_size
        self.is_finished, self.between_batches = is_finished, between_batches
        self.with_first = with_first
        # without Fabric's wrapper; our own loader knows its position
        self.inner = getattr(loader, "_dataloader", loader)
        self.has_state = hasattr(self.inner, "state_dict")
        # the position in a loader that has no state_dict
        self.epoch = self.n_batches = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.is_finished():
            return
        for batch in self.loader if self.has_state else self._replayed():
            if self.with_first is not None:
                with_first, self.with_first = self.with_first, None
                with_first(batch)
            yield batch
            # litgpt 0.5.13 takes one more batch, which a run that goes on from final/ would then miss
            if self.is_finished():
                return
            self.between_batches()

    def _replayed(self) -> Iterator[Any]:
        """Yield the batches left in the epoch, shuffled by its own seed so that a resume can repeat it."""
        # what Fabric sets a distributed sampler's epoch to
        self.loader._num_iter_calls = self.epoch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch)
            batches = iter(self.loader)
            # samplers draw their random numbers at the first batch
            first = list(itertools.islice(batches, 1))
        for batch in itertools.islice(itertools.chain(first, batches), self.n_batches, None):
            self.n_batches += 1
            yield batch
        self.epoch, self.n_batches = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the loader's own state dict, or else the epoch and its batches so far."""
        if self.has_state:
            return self.inner.state_dict()
        return {"epoch": self.epoch, "n_batches": self.n_batches, "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        if self.has_state:
            return self.inner.load_state_dict(state)
        if not fits(state, {"epoch": 0, "n_batches": 0}):
            raise ValueError(f"train_dataloader is {state!r:.60}, which is no position in the data")
        # earlier versions did not record it
        size = state.get("batch_size", self.batch_size)
        if not fits(size, 1):
            raise ValueError(f"train_dataloader.batch_size is {size!r:.60}, which is no batch size")
        self.epoch = state["epoch"]
        self.n_batches, n_again = divmod(state["n_batches"] * size, self.batch_size)
        if n_again:
            note_once(
                f"The data go on where a batch of {self.batch_size} begins: the {n_again} sequences before "
                "the place where they stopped come again."
            )


class ValLoader:
    """LitGPT's validation batches; between two of them `between_batches` is called with both numbers.

    They are the number of batches done, and of all, which is infinite for a loader without a length.
    """

    def __init__(self, loader: Any, between_batches: Callable[[int, float], None]) -> None:
        self.loader, self.between_batches = loader, between_batches

    @property
    def n_batches(self) -> float:
        """Its batches, infinite where it has no length."""
        with contextlib.suppress(TypeError):
            return len(self.loader)
        return math.inf

    def __iter__(self) -> Iterator[Any]:
        n_batches = self.n_batches
        for n_done, batch in enumerate(self.loader):
            if n_done:
                self.between_batches(n_done, n_batches)
            yield batch


def prepare_data_of(run: Run) -> None:
    """Prepare the data on disk; ValueError if there is too little for the run."""
    if run.data_dir is not None:
        before = _facts_of(run.data_dir)
        _prepare_text(run, run.data_dir)
        is_fitted = is_open(run.settings.train) or leaves_vocabulary_open(run.settings)
        if is_fitted and run.world_size > 1 and launcher() and _facts_of(run.data_dir) != before:
            # the other processes have been started already, and have read what was there before
            raise ValueError(f"{run.data_dir}: prepared just now, which decides the run; start it once more")
    if not (run.resume or run.initial):
        warn_of_unused_rows(run)


def _facts_of(data_dir: Path) -> tuple[int, int] | None:
    """Return the training tokens and the pieces of the tokenizer; None for data that are not prepared."""
    with contextlib.suppress(ValueError, OSError):
        manifest = read_manifest(data_dir, check_shards=False)
        return manifest["splits"]["train"]["n_tokens"], manifest["tokenizer"]["vocab_size"]
    return None


def _prepare_text(run: Run, folder: Path) -> None:
    settings = run.settings
    needed = PrepareSettings(data_dir=folder, tokenizer_dir=settings.tokenizer_dir)
    has_tokenizer = (settings.tokenizer_dir / "tokenizer.json").is_file()
    # without one, prepare_data.py would download TinyLlama's
    size = DEMO_VOCABULARY if run.demo_data else run.config.vocab_size
    is_own = size != DEFAULT_VOCABULARY and leaves_vocabulary_open(settings)
    if not has_tokenizer and (is_own or size == DEMO_VOCABULARY):
        needed = replace(needed, train_tokenizer=size)
    if run.demo_data:
        note_once(
            f"No data in {folder}: writing the built-in demo stories there "
            "(real ones: prepare_data.py --dataset tinystories)."
        )
        prepare(replace(needed, dataset="demo"))
    elif not has_tokenizer:
        prepare(needed)
    # LitGPT builds its own loaders later; here they report too little text before the model is built
    run.data.connect(load_tokenizer(settings.tokenizer_dir), settings.train.micro_batch_size, run.block_size)
    run.data.prepare_data()
    run.data.train_dataloader()
    run.data.val_dataloader()
