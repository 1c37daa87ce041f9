"""Sampling, by distributions worked out by hand."""

import pytest
import torch

from litgpt_moe.generation.sampling import candidates, sample
from litgpt_moe.generation.settings import Sampling


def distribution(probs: list[float], seen: list[bool] | None = None, **options: float) -> list[float]:
    """Return the probabilities that `sample` draws from when the model's are `probs`."""
    settings = Sampling(**{"temperature": 1.0, "top_k": 0, **options})
    occurred = None if seen is None else torch.tensor(seen)
    weights, ids = candidates(torch.tensor(probs).log(), settings, occurred)
    whole = torch.zeros(len(probs))
    whole[torch.arange(len(probs)) if ids is None else ids] = weights / weights.sum()
    return whole.tolist()


def test_without_options_the_models_distribution_is_drawn_from() -> None:
    assert distribution([0.2, 0.5, 0.3]) == pytest.approx([0.2, 0.5, 0.3])


def test_temperature_two_takes_square_roots() -> None:
    assert distribution([16 / 21, 1 / 21, 4 / 21], temperature=2.0) == pytest.approx([4 / 7, 1 / 7, 2 / 7])


def test_top_k_keeps_the_k_likeliest() -> None:
    assert distribution([0.2, 0.5, 0.3], top_k=2) == pytest.approx([0, 0.625, 0.375])


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    assert distribution([0.2, 0.5, 0.3], top_k=9) == pytest.approx([0.2, 0.5, 0.3])


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    assert distribution([0.2, 0.5, 0.3], top_p=0.7) == pytest.approx([0, 0.625, 0.375])


def test_a_tiny_top_p_still_keeps_the_likeliest() -> None:
    assert distribution([0.2, 0.5, 0.3], top_p=1e-9) == pytest.approx([0, 1, 0])


def test_top_p_keeps_thousands_of_tokens_where_it_takes_them() -> None:
    probs = distribution([1 / 4096] * 4096, top_p=0.5)
    assert sum(p > 0 for p in probs) == 2048


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert distribution([0.2, 0.5, 0.3], min_p=0.5) == pytest.approx([0, 0.625, 0.375])


def test_temperature_comes_before_top_p() -> None:
    # squared: 4/38, 25/38, 9/38; 25/38 = 0.66 reaches 0.6, where 0.5 would not have
    assert distribution([0.2, 0.5, 0.3], temperature=0.5, top_p=0.6) == pytest.approx([0, 1, 0])


def test_top_k_comes_before_top_p() -> None:
    # of the two kept, 0.4 and 0.3, the first has 4/7 = 0.57
    assert distribution([0.3, 0.4, 0.2, 0.1], top_k=2, top_p=0.5) == pytest.approx([0, 1, 0, 0])


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    settings = Sampling(temperature=1.0, top_k=0, repetition_penalty=2.0)
    logits, seen = torch.tensor([2.0, -1.0, 1.0, -3.0]), torch.tensor([True, True, False, False])
    probs, _ = candidates(logits, settings, seen)
    assert torch.allclose(probs, torch.tensor([1.0, -2.0, 1.0, -3.0]).softmax(0))


def test_repetition_penalty_holds_for_greedy_too() -> None:
    settings = Sampling(temperature=0.0, repetition_penalty=2.0)
    assert sample(torch.tensor([[1.5, 1.0]]), settings, [None], torch.tensor([[True, False]])) == [1]


def test_sample_draws_each_token_as_often_as_its_probability_says() -> None:
    draw, settings = torch.Generator().manual_seed(0), Sampling(temperature=1.0, top_k=2)
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    ids = [sample(logits[None], settings, [draw])[0] for _ in range(3000)]
    # two thirds, with a standard deviation of 0.0086
    assert ids.count(1) / 3000 == pytest.approx(2 / 3, abs=0.035)
    assert ids.count(0) == 0


OPTIONS = [
    {},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"top_k": 0},
    {"top_p": 0.7},
    {"top_k": 0, "top_p": 0.7},
    {"top_k": 5000, "top_p": 0.7},
    {"top_k": 0, "top_p": 0.9999, "min_p": 0.001, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_row_gets_the_same_token_beside_others_as_alone(options: dict[str, float]) -> None:
    settings, draws = Sampling(**options), torch.Generator().manual_seed(1)
    # of the flat rows the first 1,024 tokens have less than 0.7 of the probability, of the others more
    logits = torch.randn(6, 3000, generator=draws) * torch.tensor([[0.1], [9.0]] * 3)
    seen = torch.rand(6, 3000, generator=draws) < 0.1

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in range(6)]

    for _ in range(3):
        together = sample(logits, settings, generators(), seen)
        own = zip(logits, generators(), seen, strict=True)
        alone = [sample(row[None], settings, [draw], marks[None])[0] for row, draw, marks in own]
        assert together == alone
        logits = logits.roll(1, dims=1)


def test_a_seed_draws_what_torch_multinomial_draws() -> None:
    # so that a seed tells the story that it told when sample called it
    settings, mine = Sampling(), torch.Generator().manual_seed(3)
    theirs = torch.Generator().manual_seed(3)
    for logits in torch.randn(200, 1000, generator=torch.Generator().manual_seed(4)):
        probs, ids = candidates(logits, settings)
        assert ids is not None
        expected = ids[torch.multinomial(probs, 1, generator=theirs)]
        assert sample(logits[None], settings, [mine]) == expected.tolist()
