"""What a user types: short numbers, times, names of configurations, and what is nearly one of these."""

from pathlib import Path

import pytest

from litgpt_moe.words import ROOT, choose_one, config_file, near, seconds, short, whole_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2048", 2048),
        ("-1", -1),
        ("1_000", 1000),
        ("10k", 10_000),
        ("1M", 1_000_000),
        ("1m", 1_000_000),
        ("2.5B", 2_500_000_000),
        ("1.1M", 1_100_000),  # 1.1 * 10**6 is not whole in floating point
        ("1T", 10**12),
        (" 3K ", 3000),
    ],
)
def test_a_short_number_is_exact(text: str, number: int) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize(
    ("value", "digits", "units", "text"),
    [
        (999_700, 3, "KMB", "1M"),
        (21_712, 3, "KMB", "21.7K"),
        (12_345_678, 4, "kMGTP", "12.35M"),
        (-2e15, 4, "kMGTP", "-2P"),
        (0.00125, 4, "kMGTP", "0.00125"),
    ],
)
def test_a_number_is_written_short_with_the_digits_and_units_wanted(
    value: float, digits: int, units: str, text: str
) -> None:
    assert short(value, digits, units) == text


@pytest.mark.parametrize("text", ["", "k", "1.0001k", "1.5", "010k", "1e3", "2G", "1 k", "1kk", "k1"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        whole_number(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("1.5h", 5400),
        ("45min", 2700),
        ("45m", 2700),
        ("1h30m", 5400),
        ("2d", 172800),
        ("1e3", 1000),
    ],
)
def test_a_time_has_units(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "h", "3 hours", "1M", "1:30", "1.2.3h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        seconds(text)


def test_the_nearest_name_is_proposed_and_one_that_begins_so_first() -> None:
    names = ["moe_30m_debug", "moe_400m", "demo_model"]
    assert near("moe_30m", names) == "did you mean moe_30m_debug?"
    assert near("Demo_modle", names) == "did you mean demo_model?"
    assert near("xyz", names) == ""
    assert choose_one("of", ["auto", "on", "off"]) == "did you mean off? Choose one of auto, on, off"
    assert choose_one("xyz", ["auto", "on"]) == "choose one of auto, on"


def test_a_configuration_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "configs/moe_30m_debug.yaml"
    assert config_file(Path("moe_30m_debug")) == config_file(Path("moe_30m_debug.yaml")) == shipped
    assert config_file(Path("train_config")) == ROOT / "train_config.yaml"
    # a user's own file wins
    Path("moe_30m_debug.yaml").touch()
    assert config_file(Path("moe_30m_debug.yaml")) == Path("moe_30m_debug.yaml")


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("moe_30m", "did you mean moe_30m_debug?"),
        ("mine/my_modl.yaml", "did you mean {}?".format(Path("mine/my_model.yaml"))),
        ("quite_another", "name one that is there, or one in configs/, such as moe_30m_debug"),
    ],
)
def test_a_configuration_that_is_not_there_is_told_with_the_nearest(
    name: str, way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/my_model.yaml").touch()
    with pytest.raises(FileNotFoundError) as raised:
        config_file(Path(name))
    assert str(raised.value) == f"{Path(name)}: no such configuration file; {way_out}"
