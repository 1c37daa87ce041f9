"""Our TrainArgs, EvalArgs and LogArgs have LitGPT's names, types and defaults, but for a list."""

import inspect
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any

import pytest
from litgpt import args as litgpt_args
from litgpt import pretrain

from litgpt_moe.training import settings
from litgpt_moe.training.run import to_litgpt
from litgpt_moe.training.settings import Settings

# (class, field) -> (what differs, LitGPT's, ours, why)
DIFFERENCES: dict[tuple[str, str], tuple[str, Any, Any, str]] = {
    ("TrainArgs", "max_norm"): (
        "default",
        None,
        1.0,
        "LitGPT's null fails in its own check of a pretraining",
    ),
    ("TrainArgs", "max_tokens"): (
        "default",
        None,
        "auto",
        "LitGPT's null fails in pretraining; the type has auto too",
    ),
    ("LogArgs", "metadata"): (
        "type",
        dict | None,
        dict[str, Any] | None,
        "of a dict jsonargparse asks no more",
    ),
}


def differences(name: str) -> dict[tuple[str, str], tuple[str, Any, Any]]:
    theirs = {f.name: f for f in fields(getattr(litgpt_args, name))}
    ours = {f.name: f for f in fields(getattr(settings, name))}
    assert list(ours) == list(theirs), f"{name} of LitGPT has other fields now: give ours the same, in order"
    found = {}
    for key, their in theirs.items():
        for what in ("type", "default"):
            if (one := getattr(their, what)) != (other := getattr(ours[key], what)):
                found[name, key] = (what, one, other)
    return found


@pytest.mark.parametrize("name", ["TrainArgs", "EvalArgs", "LogArgs"])
def test_names_types_and_defaults_are_litgpt_s_but_for_listed_differences(name: str) -> None:
    listed = {key: entry[:3] for key, entry in DIFFERENCES.items() if key[0] == name}
    assert differences(name) == listed, f"LitGPT's {name} has changed: take the change over, or list it"


def test_litgpt_gets_objects_of_its_own_classes_that_change_no_settings() -> None:
    ours = Settings(
        train=replace(Settings().train, max_tokens=1000), eval=replace(Settings().eval, max_iters=7)
    )
    train, evaluation = to_litgpt(ours)
    assert isinstance(train, litgpt_args.TrainArgs) and isinstance(evaluation, litgpt_args.EvalArgs)
    assert asdict(train) == asdict(ours.train) and asdict(evaluation) == asdict(ours.eval)
    train.save_interval = 1
    assert ours.train.save_interval == 1000 and to_litgpt(ours)[0].save_interval == 1000


def test_the_length_of_a_story_is_not_for_litgpt_which_refuses_it() -> None:
    ours = Settings(eval=replace(Settings().eval, max_new_tokens=60))
    assert to_litgpt(ours)[1].max_new_tokens is None
    with pytest.raises(ValueError, match="max_new_tokens"):
        pretrain.validate_args(*to_litgpt(ours)[:1], litgpt_args.EvalArgs(max_new_tokens=60), None, False)


def test_pretraining_takes_the_two_groups_and_nothing_for_loggers() -> None:
    taken = inspect.signature(pretrain.main).parameters
    assert {"train", "eval"} <= taken.keys() and "log" not in taken


def test_settings_cannot_be_changed_once_they_are_made() -> None:
    ours = Settings()
    for target in (
        ours,
        ours.train,
        ours.moe,
        ours.schedule,
        ours.checkpoints,
        ours.guard,
        ours.eval,
        ours.log,
    ):
        name = fields(target)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(target, name, None)
