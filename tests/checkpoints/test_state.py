"""What a resume needs: it comes back as it was saved, and what cannot be used ends in one sentence."""

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from litgpt_moe.checkpoints.layout import write_record
from litgpt_moe.checkpoints.state import (
    RunState,
    check_moments,
    check_state,
    damage_in,
    rng_state,
    set_rng_state,
    tokens_seen,
)


def run_state() -> RunState:
    guard = {"n_skipped": 1, "n_in_a_row": 0, "losses": [2.0, 1.5]}
    router = [{"load": torch.arange(4), "sums": torch.zeros(4)}]
    return RunState(12.5, guard, 4, n_rows=8, n_loads=2, router=router, rng=rng_state())


def training_state(step: int = 4) -> dict[str, Any]:
    """What a checkpoint file of ours holds; of the optimizer and the data nothing is looked into."""
    parts = {"model": {}, "optimizer": {"state": {}, "param_groups": []}, "train_dataloader": {}}
    return {**parts, "iter_num": 2 * step, "step_count": step, **run_state().state_dict()}


# --- RunState -----------------------------------------------------------------------------------------------


def test_a_run_s_state_has_the_keys_that_checkpoints_of_before_have() -> None:
    state = run_state().state_dict()
    assert set(state) == {"run", "rng"}
    counts = {"n_rows", "n_spikes", "n_loads", "n_stories"}
    assert set(state["run"]) == {
        "time_s",
        "guard",
        "told_step",
        "router",
        "batch_sizes",
        "n_threads",
        "budget",
        *counts,
    }
    assert set(state["rng"]) == {"python", "numpy", "torch", "cuda"}


def test_a_run_s_state_goes_through_a_file(tmp_path: Path) -> None:
    saved = run_state()
    torch.save(saved.state_dict(), tmp_path / "state.pth")
    loaded = RunState()
    loaded.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert (loaded.time_s, loaded.guard, loaded.told_step) == (12.5, saved.guard, 4)
    assert (loaded.n_rows, loaded.n_spikes, loaded.n_loads, loaded.n_stories) == (8, 0, 2, 0)
    assert torch.equal(loaded.router[0]["load"], torch.arange(4))
    assert loaded.rng["python"] == saved.rng["python"]


FIGURES = (
    "n_threads",
    "time_s",
    "told_step",
    "n_rows",
    "n_spikes",
    "n_loads",
    "n_stories",
    "router",
    "guard",
)
ODD = (torch.zeros(0), torch.zeros(2), [torch.zeros(0)], None, "1", True, -2, {}, float("nan"), -(10**400))


@pytest.mark.parametrize("key", FIGURES)
@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_figure_of_another_kind_is_named(key: str, odd: object) -> None:
    state = run_state().state_dict()
    state["run"][key] = odd
    with pytest.raises(ValueError, match=rf"^run\.{key} is "):
        RunState().load_state_dict(state)


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(2), True, {}, "1", 5, [8], [[0]], [[1, 8]], [[0, 0]], [[0, 8], [0, 4]], [[0, 8], [3, 2.5]]],
    ids=str,
)
def test_batch_sizes_that_make_no_sense_are_named(odd: object) -> None:
    state = run_state().state_dict()
    state["run"]["batch_sizes"] = odd
    with pytest.raises(ValueError, match=r"^run\.batch_sizes is "):
        RunState().load_state_dict(state)
    assert tokens_seen(state | {"step_count": 4}, {"train": {"global_batch_size": 4}}, 64) is None


def test_a_checkpoint_of_before_has_no_batch_sizes() -> None:
    state = run_state().state_dict()
    del state["run"]["batch_sizes"]
    RunState().load_state_dict(state)
    assert tokens_seen(state | {"step_count": 4}, {"train": {"global_batch_size": 4}}, 64) == 4 * 4 * 64


@pytest.mark.parametrize("part", [{}, {"run": None}, {"rng": {}}, {"rng": {"python": 1}}, {"run": []}])
def test_a_state_without_its_parts_is_refused(part: dict) -> None:
    state = {**run_state().state_dict(), **part} if part else {}
    with pytest.raises(ValueError, match=r"^(run\.time_s|rng) is "):
        RunState().load_state_dict(state)


@pytest.mark.parametrize("part", ["python", "numpy", "torch", "cuda"])
def test_random_generators_that_cannot_be_set_are_refused_before_the_run_begins(part: str) -> None:
    before, bad = rng_state(), rng_state()
    bad["python"] = (3, (1,), None) if part == "python" else bad["python"]
    bad["numpy"] = (*bad["numpy"][:2], 625, 0, 0.0) if part == "numpy" else bad["numpy"]
    bad["torch"] = torch.zeros(3, dtype=torch.uint8) if part == "torch" else bad["torch"]
    bad["cuda"] = ["x"] if part == "cuda" else bad["cuda"]
    with pytest.raises(ValueError, match="the state of its random generators cannot be set"):
        RunState().load_state_dict({**run_state().state_dict(), "rng": bad})
    # a trial changes none of them
    assert torch.equal(rng_state()["torch"], before["torch"]) and rng_state()["python"] == before["python"]


# --- the whole file -----------------------------------------------------------------------------------------


def test_a_training_state_is_as_it_was_saved(tmp_path: Path) -> None:
    check_state(training_state(), tmp_path / "step-00000004")


def test_a_state_of_litgpt_s_own_loop_needs_no_more_than_it_writes(tmp_path: Path) -> None:
    ours = {"run", "rng"}
    check_state({k: v for k, v in training_state().items() if k not in ours}, tmp_path / "step-00000004")


def test_weights_alone_are_told_with_the_way_to_start_from_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds weights alone; start from it with --initial_checkpoint_dir"):
        check_state({"model": {}}, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step_count", -1),
        ("step_count", True),
        ("step_count", "4"),
        ("step_count", 5),  # the folder is that of step 4
        ("iter_num", None),
        ("iter_num", torch.zeros(2)),
        ("model", None),
        ("optimizer", []),
        ("train_dataloader", None),
        ("run", None),
        ("rng", {}),
    ],
)
def test_a_damaged_training_state_is_told_in_one_sentence(key: str, value: object, tmp_path: Path) -> None:
    state = training_state()
    state[key] = value
    with pytest.raises(
        ValueError, match=f"its training state is damaged: {key}.*resume from another"
    ) as caught:
        check_state(state, tmp_path / "step-00000004")
    assert "\n" not in str(caught.value) and "--initial_checkpoint_dir" in str(caught.value)


def test_the_step_is_the_one_that_the_record_says(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "lit_model.pth").touch()
    write_record(final, 8, {})
    check_state(training_state(8), final)
    with pytest.raises(ValueError, match="step_count is 4, and the checkpoint that of step 8"):
        check_state(training_state(4), final)


def test_a_checkpoint_with_a_record_is_ours_and_must_say_where_the_run_was(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final/lit_model.pth").touch()
    write_record(tmp_path / "final", 4, {})
    state = {key: value for key, value in training_state().items() if key not in ("run", "rng")}
    with pytest.raises(ValueError, match=r"run\.time_s is None"):
        check_state(state, tmp_path / "final")


@pytest.mark.parametrize(
    "odd", [{"state": {}}, {"state": {}, "param_groups": []}, {"state": 1, "param_groups": 2}]
)
def test_moments_of_another_model_are_left_to_torch_and_told_in_one_sentence(
    odd: dict, tmp_path: Path
) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="its training state is damaged: ") as caught, damage_in(tmp_path):
        optimizer.load_state_dict(copy.deepcopy(odd))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_moments_of_another_size_are_refused_before_a_fused_step_writes_beyond_them(name: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(1000)
    optimizer.step()
    check_moments(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0][name] = torch.zeros(3)
    optimizer.load_state_dict(state)  # torch takes it
    with pytest.raises(
        ValueError, match=rf"optimizer\.state has a {name} of \(3,\), its weight is of \(1000,\)"
    ):
        check_moments(optimizer)


@pytest.mark.parametrize("odd", [None, [0.0], "exp_avg"])
def test_a_moment_that_is_missing_or_no_tensor_is_refused(odd: object) -> None:
    weights = [torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones(4)
    optimizer.step()
    check_moments(optimizer)
    if odd is None:
        del optimizer.state[weights[1]]["exp_avg"]
    else:
        optimizer.state[weights[1]]["exp_avg"] = odd
    with pytest.raises(ValueError, match=r"optimizer\.state has (a )?exp_avg (for some weights|that is a )"):
        check_moments(optimizer)


OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
}
# a base class, and two that a run refuses: for sparse gradients, and with a closure
REFUSED = ("Optimizer", "SparseAdam", "LBFGS")


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(REFUSED)))
def test_every_optimizer_of_torch_goes_on_bit_for_bit(name: str) -> None:
    shapes = [(4, 6), (6, 3)] if name == "Muon" else [(4, 6), (6,), (2, 3, 4), (5,)]

    def fresh() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        draw = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
        return weights, OPTIMIZERS[name]([{"params": weights[:3]}, {"params": weights[3:]}])

    def train(
        weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int
    ) -> None:
        for step in range(first, last):
            draw = torch.Generator().manual_seed(step)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=draw)
            optimizer.step()

    weights, optimizer = fresh()
    train(weights, optimizer, 0, 3)
    state, kept = copy.deepcopy(optimizer.state_dict()), [weight.detach().clone() for weight in weights]
    train(weights, optimizer, 3, 6)
    resumed, its_optimizer = fresh()
    for weight, value in zip(resumed, kept, strict=True):
        weight.data.copy_(value)
    its_optimizer.load_state_dict(state)
    check_moments(its_optimizer)
    train(resumed, its_optimizer, 3, 6)
    assert all(map(torch.equal, weights, resumed))
    assert not any(map(torch.equal, weights, kept))


def test_an_optimizer_s_own_parts_of_other_sizes_are_left_alone() -> None:
    optimizer = torch.optim.SGD([weight := torch.nn.Parameter(torch.zeros(8))])
    optimizer.state[weight] = {"absmax1": torch.zeros(2)}  # as bitsandbytes keeps beside its 8-bit moments
    check_moments(optimizer)


def test_an_error_of_another_kind_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), damage_in(tmp_path):
        raise ZeroDivisionError


# --- random generators --------------------------------------------------------------------------------------


def test_the_state_of_every_random_generator_is_put_back() -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(1).item()]

    draw()
    state = rng_state()
    first = draw()
    draw()
    set_rng_state(state)
    assert draw() == first


@pytest.mark.parametrize(
    ("key", "odd"),
    [
        *itertools.product(["python", "numpy", "torch"], [None, 1, (), torch.zeros(3)]),
        *itertools.product(["cuda"], [None, 1]),  # of a tuple or tensor only as many as there are devices
    ],
    ids=str,
)
def test_a_generator_s_state_that_it_does_not_take_is_told_in_one_sentence(key: str, odd: object) -> None:
    before = rng_state()
    try:
        with pytest.raises(ValueError, match="its random generators cannot be set") as caught:
            set_rng_state({**before, key: odd})
        assert "\n" not in str(caught.value)
    finally:
        set_rng_state(before)


def test_a_position_beyond_numpy_s_words_is_refused() -> None:
    state = rng_state()
    name, keys, _, *others = state["numpy"]
    with pytest.raises(ValueError, match="position 1000000"):
        set_rng_state({**state, "numpy": (name, keys, 10**6, *others)})
