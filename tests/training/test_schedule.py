"""The learning rate of each step, worked out by hand, and its warm-up."""

import math
from typing import Literal

import pytest
from helpers.runs import edit_yaml, rows, run

from litgpt_moe.training.schedule import learning_rate, warmup_steps
from litgpt_moe.training.settings import ScheduleArgs, TrainArgs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 10 steps, 2 of warm-up, from 1.0 to 0.2; cosine: 0.2 + 0.4 (1 + cos(pi (step - 2) / 8))
        ("cosine", {1: 0.5, 2: 1.0, 4: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 6: 0.6, 10: 0.2}),
        # the last 4 steps go down: 0.2 + 0.8 (1 - sqrt(done))
        ("wsd", {1: 0.5, 2: 1.0, 6: 1.0, 7: 0.2 + 0.8 * 0.5, 10: 0.2}),
        ("constant", {1: 0.5, 2: 1.0, 10: 1.0}),
    ],
)
def test_the_learning_rate_of_each_schedule_is_the_one_worked_out_by_hand(
    name: Literal["cosine", "wsd", "constant"], expected: dict[int, float]
) -> None:
    args = ScheduleArgs(name=name, decay_fraction=0.4)
    found = {step: learning_rate(args, step, 10, 2, peak=1.0, lowest=0.2) for step in expected}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "train", "expected"),
    [
        (ScheduleArgs(), TrainArgs(lr_warmup_steps=3), 3),
        (ScheduleArgs(), TrainArgs(lr_warmup_steps=None), 0),
        (ScheduleArgs(), TrainArgs(lr_warmup_steps=50), 20),  # not more than there are
        (ScheduleArgs(warmup_tokens=1), TrainArgs(lr_warmup_steps=3), 1),
        (ScheduleArgs(warmup_tokens=513), TrainArgs(), 3),  # of 256 tokens each, rounded up
        (ScheduleArgs(), TrainArgs(lr_warmup_steps=None, lr_warmup_fraction=0.1), 3),  # of 25 in an epoch
    ],
)
def test_warm_up_is_given_in_steps_in_tokens_or_as_part_of_an_epoch(
    schedule: ScheduleArgs, train: TrainArgs, expected: int
) -> None:
    found = warmup_steps(schedule, train, n_steps=20, tokens_per_step=256, steps_per_epoch=25)
    assert found == expected


@pytest.mark.usefixtures("eager", "workspace")
def test_warm_up_counts_in_tokens_or_steps() -> None:
    edit_yaml("train_config.yaml", "train.lr_warmup_steps", 4)
    assert run("--out_dir", "steps") == 0
    assert run("--out_dir", "tokens", "--schedule.warmup_tokens", 4 * 256, "--micro_batch_size", 1) == 0
    rates = [[row["learning_rate"] for row in rows(name) if row["loss"]] for name in ("steps", "tokens")]
    assert rates[0] == rates[1] and [float(rate) for rate in rates[0][:4]] == [0.0025, 0.005, 0.0075, 0.01]
