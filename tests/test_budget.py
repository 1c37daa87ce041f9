"""The rules of a run's size, each at the numbers that its source gives or that are worked out by hand."""

import math
from pathlib import Path

import pytest
from conftest import ROOT

from litgpt_moe import budget
from litgpt_moe.config import MoEConfig, hidden_params, model_facts


def test_a_text_is_read_four_times_unless_it_is_huge_for_the_model() -> None:
    assert budget.sensible_length(1_000_000, 10_000_000)[0] == 4_000_000
    assert budget.sensible_length(50_000_000, 10_000_000)[0] == 200_000_000  # 4 passes, 20 tokens a parameter
    length = budget.sensible_length(50_000_001, 10_000_000)
    assert length.tokens == 200_000_000 and "2203.15556" in length.why


def test_more_than_eight_passes_are_told_with_their_number() -> None:
    place = Path("data/mine")
    assert budget.too_many_passes(8_000, 1_000, place) is None
    told = budget.too_many_passes(5_273_000, 1_000, place)
    assert told is not None and "5,273.0 passes through the 1,000 of" in told and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("tokens", "words"),
    [(300, "0.3 passes"), (1_000, "1 pass"), (1_010, "1 pass"), (4_000, "4 passes"), (150_000, "150 passes")],
)
def test_passes_are_counted_in_words(tokens: int, words: str) -> None:
    place = Path("data/mine")
    assert budget.passes_words(tokens, 1_000, place) == f"{words} through 1,000 tokens ({place})"


def test_the_learning_rate_is_that_of_the_joint_law() -> None:
    # 8.39 - 0.81 ln 30.3e6 - 0.25 ln 32 = -6.43
    assert budget.learning_rate(30_300_000, 32) == 1.6e-3
    dense = budget.learning_rate(100_000_000, 1)
    assert dense == pytest.approx(math.exp(8.39) / 100_000_000**0.81, rel=0.05)
    assert budget.learning_rate(1_000_000_000, 8) < budget.learning_rate(1_000_000_000, 1)
    # far below the models that it was found on, it would be 1e-2
    assert budget.learning_rate(1_000_000, 32) == budget.HIGHEST_RATE


@pytest.mark.parametrize(("name", "rate"), [("moe_10m", 3e-3), ("moe_200m", 1.6e-3), ("moe_400m", 8.4e-4)])
def test_each_size_of_model_has_its_rate(name: str, rate: float) -> None:
    config = MoEConfig.from_file(ROOT / f"configs/{name}.yaml")
    assert budget.learning_rate(hidden_params(config, model_facts(config)), config.n_expert) == rate


def test_time_is_tokens_times_flops_over_what_the_device_gives() -> None:
    assert budget.train_seconds(1e9, 300_000_000, 1e13, 0.3) == pytest.approx(1e5)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(12.3, "12 s"), (200, "3 min"), (5399, "90 min"), (9000, "2.5 hours"), (86400 * 3, "3.0 days")],
)
def test_a_time_is_said_as_people_say_it(seconds: float, words: str) -> None:
    assert budget.time_words(seconds) == words


@pytest.mark.parametrize(
    ("n_tokens", "gpu", "cpu"),
    [
        (400_000, "demo_model", "demo_model"),
        (3_000_000, "moe_10m", "moe_10m"),
        (30_000_000, "moe_30m_debug", "moe_10m"),
        (100_000_000, "moe_100m", "moe_10m"),
        (470_000_000, "model_config", "moe_10m"),
    ],
)
def test_the_proposed_files_suit_the_text_and_the_machine(n_tokens: int, gpu: str, cpu: str) -> None:
    for has_gpu, name in ((True, gpu), (False, cpu)):
        flags = budget.fitting_flags(n_tokens, has_gpu)
        model, config = flags[1], flags[3]
        assert Path(model).stem == name and all((ROOT / path).is_file() for path in (model, config))
        is_limited = not has_gpu and 4 * n_tokens > budget.CPU_TOKENS
        assert (flags[4:] == ["--max_tokens", str(budget.CPU_TOKENS)]) is is_limited
