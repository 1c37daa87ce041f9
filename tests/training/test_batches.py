"""The training batches: their order over resumes, and the place between two steps where a run ends."""

import pytest
from torch.utils.data import DataLoader

from litgpt_moe.training.batches import TrainLoader
from litgpt_moe.training.steps import Ending


def loader(batch_size: int = 2) -> TrainLoader:
    plain = DataLoader(list(range(10)), batch_size=batch_size, shuffle=True)
    return TrainLoader(plain, 3, lambda: False, lambda: None, batch_size)


def batches(train: TrainLoader, n: int) -> list[list[int]]:
    found: list[list[int]] = []
    while len(found) < n:
        for batch in train:
            found.append(batch.tolist())
            if len(found) == n:
                break
    return found


def test_a_plain_loader_of_another_data_module_resumes_in_its_shuffled_order() -> None:
    whole = batches(loader(), 13)
    assert sorted(sum(whole[:5], [])) == list(range(10)) and whole[:5] != whole[5:10]  # noqa: RUF017
    first, second = loader(), loader()
    assert batches(first, 8) == whole[:8]
    second.load_state_dict(first.state_dict())
    assert batches(second, 5) == whole[8:]


def test_a_plain_loader_goes_on_where_it_stopped_with_another_batch_size_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = sum(batches(loader(), 5), [])  # noqa: RUF017
    first, second, third = loader(), loader(1), loader(5)
    batches(first, 3)
    second.load_state_dict(first.state_dict())
    assert batches(second, 4) == [[sequence] for sequence in whole[6:]]
    assert "go on" not in capsys.readouterr().err
    third.load_state_dict(first.state_dict())
    assert batches(third, 1) == [whole[5:]]
    assert "the 1 sequences before the place where they stopped come again" in capsys.readouterr().err
    # an earlier version did not record the size
    old = {key: value for key, value in first.state_dict().items() if key != "batch_size"}
    first.load_state_dict(old)
    assert batches(first, 1) == [whole[6:8]]
    with pytest.raises(ValueError, match="batch_size is 0, which is no batch size"):
        first.load_state_dict(old | {"batch_size": 0})


def test_a_loader_with_a_position_of_its_own_keeps_it_itself() -> None:
    class Counting:
        def __init__(self) -> None:
            self.n_used = 0

        def __iter__(self):
            while True:
                self.n_used += 1
                yield self.n_used

        def state_dict(self) -> dict[str, int]:
            return {"n_used": self.n_used}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.n_used = state["n_used"]

    train = TrainLoader(Counting(), seed=3, is_finished=lambda: False, between_batches=lambda: None)
    train.load_state_dict({"n_used": 7})
    assert next(iter(train)) == 8
    assert train.state_dict() == {"n_used": 8}


def test_no_batch_is_taken_after_the_last_step() -> None:
    taken: list[object] = []
    train = TrainLoader(DataLoader(list(range(10))), 3, lambda: len(taken) == 4, lambda: None)
    for batch in train:
        taken.append(batch)
    assert len(taken) == 4 and train.state_dict() == {"epoch": 0, "n_batches": 4, "batch_size": 1}
    assert list(train) == []


def test_a_run_that_is_asked_to_end_does_so_before_the_next_batch() -> None:
    taken: list[object] = []

    def end() -> None:
        raise Ending("SIGTERM")

    train = TrainLoader(DataLoader(list(range(10))), 3, lambda: False, end)
    with pytest.raises(Ending, match="SIGTERM"):
        for batch in train:
            taken.append(batch)
    assert len(taken) == 1 and train.state_dict() == {"epoch": 0, "n_batches": 1, "batch_size": 1}
