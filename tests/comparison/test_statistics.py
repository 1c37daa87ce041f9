"""Spreads, intervals and crossings against values worked out by hand."""

import math

import pytest

from litgpt_moe.comparison.statistics import crossing, paired_difference, spread, t_95


def test_a_spread_has_the_sample_deviation() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    assert spread([1.5]).sd is None


def test_an_interval_is_that_of_the_paired_differences() -> None:
    # differences -0.1, -0.2, -0.3: mean -0.2, deviation 0.1; t with 2 degrees of freedom is 4.303
    found = paired_difference([1.0, 2.0, 3.0], [1.1, 2.2, 3.3])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert found.mean == pytest.approx(-0.2)
    assert (found.low, found.high) == pytest.approx((-0.2 - half, -0.2 + half))
    assert not found.is_clear


def test_equal_differences_are_clear_and_one_pair_is_not() -> None:
    assert paired_difference([1.0, 2.0], [1.5, 2.5]).is_clear
    assert not paired_difference([1.0], [1.5]).is_clear


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.706), (20, 2.086), (21, 2.080), (30, 2.042), (120, 1.980)]
)
def test_t_is_that_of_the_tables(degrees: int, value: float) -> None:
    assert t_95(degrees) == pytest.approx(value, abs=8e-4)


def test_a_crossing_lies_on_a_line_over_the_logarithm_of_the_tokens() -> None:
    curve = [(100.0, 5.0), (400.0, 3.0), (1600.0, 2.0)]
    assert crossing(curve, 4.0) == pytest.approx(200.0)
    assert crossing(curve, 3.0) == pytest.approx(400.0)
    assert crossing(curve, 5.0) == 100.0
    assert crossing(curve, 6.0) is None and crossing(curve, 1.0) is None
