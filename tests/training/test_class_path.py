"""Classes from class_path and init_args: found, typed, or refused in a sentence about a setting."""

import importlib.util
from pathlib import Path

import pytest
import torch
from litgpt.data import TextFiles

from litgpt_moe.training.class_path import BadClass, build, find_class, typed_arguments

WEIGHT = torch.nn.Parameter(torch.zeros(2, 2))


def adamw(**init_args: object) -> dict:
    return {"class_path": "torch.optim.AdamW", "init_args": init_args}


def test_values_are_typed_as_the_class_annotates_them() -> None:
    # plain YAML reads 1e-3 as text, and a pair as a list
    optimizer = build("optimizer", adamw(lr="1e-3", betas=[0.9, 0.95]), [WEIGHT])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (1e-3, (0.9, 0.95))
    data = build(
        "data", {"class_path": "prepare_data.TextShards", "init_args": {"train_data_path": "somewhere/train"}}
    )
    assert isinstance(data, TextFiles) and data.train_data_path == Path("somewhere/train")


@pytest.mark.parametrize("path", ["AdamW", "torch.optim.AdamW", "torch.optim.adamw.AdamW"])
def test_a_class_has_a_bare_name_and_whole_paths(path: str) -> None:
    assert find_class("optimizer", {"class_path": path}) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("spec", "sentence", "keys"),
    [
        ({}, "class_path is None; name a class, such as torch.optim.AdamW", ["class_path"]),
        ({"class_path": "AdamX"}, "class_path is AdamX, which cannot be used", ["class_path"]),
        ({"class_path": "torch.nn.Linear"}, "not a Optimizer; name another", ["class_path"]),
        ({"class_path": "antigravity.fly"}, "Python's own modules hold no Optimizer", ["class_path"]),
        (adamw(lr="fast"), "init_args: lr is 'fast'; it must be a number", ["init_args.lr"]),
        (adamw(lrr=1), "init_args: unknown key lrr; did you mean lr?", ["init_args.lrr"]),
        (adamw(learning_rate=1), "unknown key learning_rate; did you mean lr?", ["init_args.learning_rate"]),
        (adamw(weight_decay=-1), "does not take these init_args: Invalid", ["init_args.weight_decay"]),
        (adamw(lr=-1, eps=1e-8), "does not take these init_args", ["init_args.lr", "init_args.eps"]),
    ],
)
def test_what_cannot_be_built_is_told_with_the_settings_that_it_is_about(
    spec: dict, sentence: str, keys: list[str]
) -> None:
    with pytest.raises(BadClass) as raised:
        build("optimizer", spec, [WEIGHT])
    assert sentence in str(raised.value)
    assert raised.value.keys == [f"optimizer.{key}" for key in keys]


def test_an_argument_of_another_class_is_refused() -> None:
    muon = {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.02, "betas": [0.9, 0.95]}}
    with pytest.raises(BadClass) as raised:
        build("optimizer", muon, [WEIGHT])
    assert str(raised.value).endswith("unknown key betas: torch.optim.Muon has none; leave it out")
    del muon["init_args"]["betas"]
    assert build("optimizer", muon, [WEIGHT]).defaults["lr"] == 0.02
    assert typed_arguments("optimizer", torch.optim.Muon, muon) == {"lr": 0.02}


@pytest.mark.skipif(importlib.util.find_spec("litdata") is not None, reason="litdata is installed")
@pytest.mark.parametrize("name", ["TinyStories", "litgpt.data.TextFiles", "LitData", "OpenWebText"])
def test_a_data_module_of_litgpt_names_the_extra_that_it_needs(name: str) -> None:
    with pytest.raises(BadClass, match="needs the package litdata; install it with: uv sync --extra litdata"):
        find_class("data", {"class_path": name})


def test_a_data_module_for_finetuning_is_refused() -> None:
    with pytest.raises(BadClass, match=r"data.class_path is litgpt.data.Alpaca, which is for finetuning"):
        find_class("data", {"class_path": "litgpt.data.Alpaca"})
