"""Batches of token ids: order, ranks, epochs, reading ahead."""

import os
import random
import re
from itertools import islice

import numpy as np
import pytest
import torch

from litgpt_moe.data.batches import TokenBatches, TokenStream
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings


class Counting:
    """A token stream whose ids are their own positions."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = self.vocab_size = n_tokens

    def __len__(self) -> int:
        return self.n_tokens

    def read_into(self, ids: np.ndarray, start: int) -> None:
        ids[:] = np.arange(start, start + len(ids))


def test_the_stream_reads_across_shards(settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litgpt_moe.data.shards.SHARD_BYTES", 3000)
    monkeypatch.setattr("litgpt_moe.data.text.BLOCK_BYTES", 1000)
    manifest = prepare(settings)
    shards = manifest["splits"]["train"]["shards"]
    whole = np.concatenate([np.fromfile(settings.data_dir / s["path"], dtype="<u2") for s in shards])
    stream = TokenStream(settings.data_dir, "train")
    assert len(shards) > 3 and len(stream) == len(whole)
    rng = random.Random(0)
    for _ in range(200):
        start = rng.randrange(len(whole))
        stop = rng.randint(start, min(len(whole), start + rng.choice((5, 5000))))
        ids = stream.read(start, stop)
        assert ids.dtype == np.int64 and ids.tolist() == whole[start:stop].tolist()
    with pytest.raises(IndexError):
        stream.read(0, len(whole) + 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_cut_short_while_it_is_read_is_named(
    settings: PrepareSettings, num_workers: int
) -> None:
    prepare(settings)
    batches = TokenBatches(TokenStream(settings.data_dir, "train"), 2, 16, 0, num_workers=num_workers)
    reading = iter(batches)
    next(reading)
    (shard,) = (settings.data_dir / "train/train").glob("*.bin")
    os.truncate(shard, 100)
    with pytest.raises(OSError, match=rf"^{re.escape(str(shard))}: cut short while .* run prepare_data.py"):
        list(islice(reading, 9))


def test_a_shard_that_is_deleted_while_it_is_read_can_be_read_on(settings: PrepareSettings) -> None:
    prepare(settings)
    stream = TokenStream(settings.data_dir, "train")
    whole = stream.read(0, len(stream)).tolist()
    for shard in (settings.data_dir / "train/train").glob("*.bin"):
        try:
            shard.unlink()
        except PermissionError:
            pytest.skip("Windows deletes no file that is open, so the case cannot come about there")
    assert stream.read(0, len(stream)).tolist() == whole


def test_an_epoch_predicts_every_token_once_in_a_new_order() -> None:
    batches = TokenBatches(Counting(10 * 12 + 1), batch_size=3, block_size=10, seed=42)
    epochs = [np.concatenate([batch.numpy() for batch in islice(batches, 4)]) for _ in range(2)]
    assert len(batches) == 4
    for rows in epochs:
        assert rows.shape == (12, 11) and sorted(rows[:, 1:].ravel().tolist()) == list(range(1, 121))
        assert (np.diff(rows) == 1).all()
    assert epochs[0].tolist() != epochs[1].tolist()
    again = TokenBatches(Counting(121), batch_size=3, block_size=10, seed=42)
    assert np.concatenate([batch.numpy() for batch in islice(again, 4)]).tolist() == epochs[0].tolist()


def test_a_batch_reaches_into_the_next_epoch_in_training_and_ends_short_in_validation() -> None:
    train = TokenBatches(Counting(112), batch_size=4, block_size=10, seed=0)
    val = TokenBatches(Counting(112), batch_size=4, block_size=10, seed=None)
    flow = [start for batch in islice(train, 6) for start in batch[:, 0].tolist()]
    assert sorted(flow[:11]) == sorted(flow[11:22]) == list(range(0, 110, 10))
    assert [len(batch) for batch in val] == [4, 4, 3] and len(val) == 3
    assert [row[0].item() for batch in val for row in batch] == list(range(0, 110, 10))


def test_ranks_share_out_the_same_steps_as_one_rank_over_epoch_ends() -> None:
    one = TokenBatches(Counting(231), batch_size=4, block_size=10, seed=0)
    ranks = [TokenBatches(Counting(231), 2, 10, 0, rank, 2) for rank in range(2)]
    for whole, *parts in islice(zip(one, *ranks, strict=True), 20):
        assert whole.tolist() == [row for part in parts for row in part.tolist()]
    assert one.state_dict() == ranks[0].state_dict() == ranks[1].state_dict()
    assert one.state_dict()["epoch"] == 3


def test_worker_processes_give_the_batches_that_one_process_gives_from_any_position(
    settings: PrepareSettings,
) -> None:
    prepare(settings)

    def batches(num_workers: int) -> TokenBatches:
        stream = TokenStream(settings.data_dir, "train")
        return TokenBatches(stream, batch_size=3, block_size=32, seed=1, num_workers=num_workers)

    alone, read_ahead = batches(0), batches(2)
    before = torch.random.get_rng_state()
    for n_batches in (5, len(alone), 3):  # each goes on where the last left off, the second over an epoch end
        pairs = zip(islice(alone, n_batches), islice(read_ahead, n_batches), strict=True)
        assert all(one.equal(other) for one, other in pairs)
        assert alone.state_dict() == read_ahead.state_dict()
    assert alone.state_dict()["epoch"] == 1
    assert before.equal(torch.random.get_rng_state())


def test_changed_data_on_resume_starts_the_next_epoch() -> None:
    old, new = (TokenBatches(Counting(n), 2, 10, 0) for n in (101, 201))
    next(iter(old))
    new.load_state_dict(old.state_dict())
    assert new.state_dict() == {"epoch": 1, "n_used": 0, "n_sequences": 20}
