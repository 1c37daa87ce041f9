"""The data on disk before training begins, and the training batches with their position for checkpoints."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litgpt_moe.checkpoints.reader import load_tokenizer
from litgpt_moe.data.module import TextShards
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.files import fits
from litgpt_moe.processes import note_once
from litgpt_moe.training.checks import warn_of_unused_rows
from litgpt_moe.training.run import Run
from litgpt_moe.training.steps import Ending

# padded_vocab_size in configs/demo_model.yaml
DEMO_VOCAB = 2048


class TrainLoader:
    """LitGPT's training batches: their position for checkpoints, and the place between steps to end at."""

    def __init__(
        self, loader: Any, seed: int, is_finished: Callable[[], bool], ending: Callable[[], str]
    ) -> None:
        self.loader, self.seed = loader, seed
        self.is_finished, self.ending = is_finished, ending
        # below Fabric's wrapper: a loader of ours knows its position itself
        self.inner = getattr(loader, "_dataloader", loader)
        self.has_state = hasattr(self.inner, "state_dict")
        # the position in a loader without a state of its own
        self.epoch = self.n_batches = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.is_finished():
            return
        for batch in self.loader if self.has_state else self._replayed():
            yield batch
            # litgpt 0.5.13 would take one more batch, which final/ would then lack
            if self.is_finished():
                return
            if reason := self.ending():
                raise Ending(reason)

    def _replayed(self) -> Iterator[Any]:
        """Yield the rest of an epoch drawn from its own seed, so that a resumed run can draw it again."""
        # what Fabric sets a distributed sampler's epoch to
        self.loader._num_iter_calls = self.epoch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch)
            batches = iter(self.loader)
            # samplers draw when the first batch is asked for
            first = list(itertools.islice(batches, 1))
        for batch in itertools.islice(itertools.chain(first, batches), self.n_batches, None):
            self.n_batches += 1
            yield batch
        self.epoch, self.n_batches = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position, with at least the epoch where the loader has one."""
        if self.has_state:
            return self.inner.state_dict()
        return {"epoch": self.epoch, "n_batches": self.n_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        if self.has_state:
            self.inner.load_state_dict(state)
        else:
            if not fits(state, {"epoch": 0, "n_batches": 0}):
                raise ValueError(f"train_dataloader is {state!r:.60}, which is no position in the data")
            self.epoch, self.n_batches = state["epoch"], state["n_batches"]


def prepare_data_of(run: Run) -> None:
    """Put the data on disk, up to date; raises ValueError if it is too short for the run."""
    if isinstance(run.data, TextShards):
        _prepare_text(run)
    is_new = not (run.resume or run.initial)
    if is_new and (n_rows := run.config.padded_vocab_size):
        warn_of_unused_rows(run.settings, n_rows)


def _prepare_text(run: Run) -> None:
    settings = run.settings
    folder = Path(run.data.train_data_path).parent
    needed = PrepareSettings(data_dir=folder, tokenizer_dir=settings.tokenizer_dir)
    has_tokenizer = (settings.tokenizer_dir / "tokenizer.json").is_file()
    if not has_tokenizer and (run.demo_data or run.config.padded_vocab_size == DEMO_VOCAB):
        needed = replace(needed, train_tokenizer=DEMO_VOCAB)
    if run.demo_data:
        note_once(
            f"No data in {folder}: writing the built-in demo stories there "
            "(real ones: prepare_data.py --dataset tinystories)."
        )
        prepare(replace(needed, dataset="demo"))
    elif not has_tokenizer:
        prepare(needed)
    # LitGPT asks for the loaders again; asking here reports too little text before the model is built
    run.data.connect(load_tokenizer(settings.tokenizer_dir), settings.train.micro_batch_size, run.block_size)
    run.data.prepare_data()
    run.data.train_dataloader()
    run.data.val_dataloader()
