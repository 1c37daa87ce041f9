"""The settings of tools/compare.py and tools/find_lr.py; nothing heavy is imported, so `--help` is fast."""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from litgpt_moe.words import ROOT, UNITS

RESULTS = ROOT / "docs/results/runs.jsonl"
# FLOPs come in G and P too. No small m, which would be taken for minutes
AMOUNT_UNITS = {unit.upper(): size for unit, size in UNITS.items()} | {"": 1, "G": 10**9, "P": 10**15}


def amount(text: str) -> float:
    """Return the number of a text such as 8M, 1.5e15 or 600; for argparse."""
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([kKMbBgGtTpP]?)", text.strip())
    try:
        value = float(match[1]) * AMOUNT_UNITS[match[2].upper()] if match else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no amount; write it as 8000000, 8M, 300k or 1.5e15")
    return value


@dataclass(frozen=True)
class PlaceSettings:
    """What all runs of a comparison share, and where they lie."""

    data_dir: Path = Path("data/custom_text")
    """Prepared data directory (prepare_data.py) to train and to validate on."""
    config: Path = ROOT / "configs/compare_train.yaml"
    """Training settings, as of run_train.py (default configs/compare_train.yaml)."""
    out: Path = Path("comparison")
    """Folder for the runs, comparison.json and comparison.html."""
    results_file: Path = RESULTS
    """File of finished runs, a line each, which are not trained again (default docs/results/runs.jsonl)."""
    first_seed: int = 42
    """The first seed; the others follow it."""
    keep: bool = False
    """Keep the final checkpoint of each run (default: delete it once the run is recorded)."""
    low_priority: bool = False
    """Train at low priority, so that other programs get the processor first; speed is measured without."""
    at_once: int = 1
    """Runs at once, each with a GPU, or a share of the cores, of its own; speed is measured one by one."""

    def __post_init__(self) -> None:
        check("at_once", self.at_once, self.at_once >= 1, "1 or more")


@dataclass(frozen=True)
class FindSettings(PlaceSettings):
    """The settings of tools/find_lr.py: how a learning rate is found."""

    lr_first: float = 1e-3
    """Lowest learning rate of the sweep."""
    lr_factor: float = 2.0
    """Each further one is this many times the one before."""
    lr_count: int = 4
    """Learning rates of the sweep; it goes on by up to 4 more while the best is the first or the last."""
    sweep_tokens: int | None = None
    """Tokens to train on with each (default: a tenth of the budget, or of find_lr.py's data)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("lr_first", self.lr_first, 0 < self.lr_first < math.inf, "a number above 0")
        check("lr_factor", self.lr_factor, 1 < self.lr_factor <= 100, "a number above 1, 2 is usual")
        check("lr_count", self.lr_count, 1 <= self.lr_count <= 20, "1 to 20")
        tokens = self.sweep_tokens
        check("sweep_tokens", tokens, tokens is None or tokens >= 1, "1 or more")


@dataclass(frozen=True)
class CompareSettings(FindSettings):
    """Which models are compared, and at equal what."""

    dense: bool = False
    """Also train the dense twin of each model with experts."""
    match: Literal["tokens", "flops", "seconds"] = "tokens"
    """What is equal: tokens, FLOPs, or seconds of training on this machine, measured side by side."""
    budget_of_first: Annotated[float, amount] | None = None
    """Budget by tokens: the FLOPs, or the seconds, that the first model takes for so many tokens."""
    seeds: int = 3
    """Runs of each model, each with its own seed of weights and of the order of the data."""
    measure: bool = False
    """Measure the tokens a second with another --match too, for the seconds in the verdict."""
    measure_again: bool = False
    """Measure the tokens a second anew, although they stand in the file of runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("seeds", self.seeds, 1 <= self.seeds <= 100, "1 to 100; 3 or more give an interval")
        check("first_seed", self.first_seed, 0 <= self.first_seed < 2**31, "0 or more")


def check(name: str, value: object, is_right: bool, rule: str) -> None:
    """Raise ValueError with the flag, its value and the rule, unless the value is right."""
    if not is_right:
        raise ValueError(f"--{name} is {value}; choose {rule}")


def add_override(parser: argparse.ArgumentParser) -> None:
    """Declare --override, and --data as another name of --data_dir."""
    parser.add_argument(
        "--override",
        type=key_and_value,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="keys of model or training to replace",
    )
    # a default of its own would hide that of --data_dir
    parser.add_argument(
        "--data", dest="data_dir", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def rate(text: str) -> float | None:
    """Return the learning rate of a text, None for auto; for argparse."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no learning rate; write auto, or a number as 3e-3")
    return value


def key_and_value(text: str) -> tuple[str, str]:
    """Return the key and the value of a text such as n_expert=8; for argparse."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text} is no KEY=VALUE; write it as n_expert=8")
    return key, value


def variant(words: list[str]) -> tuple[str, dict[str, str]]:
    """Return the name of a variant and what it changes, of NAME KEY=VALUE..."""
    name, *changes = words
    if "=" in name or not changes:
        raise ValueError(f"--variant {' '.join(words)}: give a name and one or more KEY=VALUE")
    try:
        return name, dict(map(key_and_value, changes))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--variant {name}: {error}") from None
