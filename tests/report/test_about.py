"""The words of a report on model, machine, data and code, from facts as a run records them."""

from typing import Any

import pytest

from litgpt_moe.report.about import about
from litgpt_moe.words import short

MACHINE = {
    "system": "Linux 6.1",
    "cpu": "Ryzen",
    "cores": 8,
    "memory": 32 * 10**9,
    "devices": 1,
    "machines": 1,
}
GPU = {"gpu": "NVIDIA GeForce RTX 3060", "gpu_memory": 12 * 2**30}
DATA = {"folder": "data/mine", "vocab_size": 2048, "train": {"n_tokens": 2000, "n_stories": 7}}


def words(label: str, **facts: Any) -> str | None:
    """Return the words of one label after 5,000 tokens of training."""
    return about(facts, {}, 5000, []).get(label)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({"device": "cpu"}, "Ryzen (8 cores, 32 GB), Linux 6.1"),
        ({"device": "cuda", **GPU}, "NVIDIA GeForce RTX 3060 (12 GB), Ryzen (8 cores, 32 GB), Linux 6.1"),
        (
            {"device": "cuda", **GPU, "devices": 4, "machines": 2},
            "2 machines: 4 x NVIDIA GeForce RTX 3060 (12 GB), Ryzen (8 cores, 32 GB), Linux 6.1",
        ),
        ({"device": "mps"}, "mps, Ryzen (8 cores, 32 GB), Linux 6.1"),
        ({"device": "cpu", "cores": "many"}, None),
    ],
)
def test_the_machine_is_named_with_its_gpus(machine: dict[str, Any], expected: str | None) -> None:
    assert words("Machine", machine={**MACHINE, **machine}) == expected


def test_the_passes_are_tokens_trained_on_over_those_of_the_data() -> None:
    data = {**DATA, "val": {"n_tokens": 0, "n_stories": 0}}
    assert words("Passes", data=data) == "2.5 through the training data"
    assert words("Data", data=data) == (
        "data/mine: 2k tokens in 7 stories, 0 tokens to validate, a tokenizer of 2,048 pieces"
    )
    assert words("Passes", data={"class_path": "litgpt.data.LitData"}) is None
    assert words("Data", data={"class_path": "litgpt.data.LitData"}) == "litgpt.data.LitData"


def test_a_dense_model_has_no_experts_to_count() -> None:
    model = {"name": "Dense", "n_layer": 2, "n_embd": 16, "n_expert": 0, "n_expert_per_token": 0}
    model |= {"total_params": 1_999_600, "active_params": 1_999_600}
    assert words("Model", model=model) == "Dense: 2 layers of width 16, no experts"
    assert words("Parameters", model=model) == "2M, all active for each token"


def test_a_run_of_an_earlier_version_has_the_name_in_its_settings() -> None:
    assert about({}, {"model.name": "MoE-4M"}, None, []) == {"Model": "MoE-4M"}


def test_the_commit_is_short_and_says_if_it_was_changed() -> None:
    commit = {"id": "0123456789abcdef", "is_changed": True}
    assert words("Commit", commit=commit) == "0123456789ab, with changes that are not committed"
    assert words("Commit", commit={**commit, "is_changed": False}) == "0123456789ab"


def test_counts_have_three_digits() -> None:
    counts = {0: "0", 999: "999", 1000: "1k", 999_949: "1M", 3_941_504: "3.94M", 2_000_000_000: "2B"}
    assert {count: short(count) for count in counts} == counts
