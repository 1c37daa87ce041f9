"""Numbers with k, M or B and times with h or min, as a user types them, and names that are nearly right."""

import difflib
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
SHORT_NUMBER = re.compile(r"((?:0|[1-9][0-9_]*)(?:\.[0-9]+)?)([kmbt])", re.IGNORECASE)
TIME = re.compile(r"(?:([0-9.]+) ?d)? ?(?:([0-9.]+) ?h)? ?(?:([0-9.]+) ?m(?:in)?)? ?(?:([0-9.]+) ?s)?")


def whole_number(text: str) -> int:
    """Return the number in a text such as 2048, 1_000, 10k, 1.5M, 2B or 1T; ValueError if it is not whole."""
    if (match := SHORT_NUMBER.fullmatch(text.strip())) is None:
        return int(text)
    # exact, where 1.1 * 10**6 is not
    number = Decimal(match[1].replace("_", "")) * UNITS[match[2].lower()]
    if number != int(number):
        raise ValueError(f"{text} is no whole number")
    return int(number)


def short(value: float, digits: int = 3, units: str = "kMB") -> str:
    """Return a number in few digits: 3,941,504 is 3.94M. `units` are those of 1e3, 1e6, 1e9 and so on."""
    for power, unit in reversed([*enumerate(units, start=1)]):
        size = 1000**power
        # what rounds to a whole unit has it: 1M, not 1e+03k
        if abs(value) >= size * (1 - 0.5 / 10**digits):
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def seconds(text: str) -> float:
    """Return the seconds in a text such as 90, 1.5h, 45min or 1h30m; ValueError if it is no time."""
    match = TIME.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        return float(text)
    parts = [float(part or 0) for part in match.groups()]
    return sum(part * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=True))


def near(name: str, names: Iterable[str]) -> str:
    """Return "did you mean X?" for the one of `names` that is nearly `name`, "" if none is."""
    by_lower = {other.lower(): other for other in names}
    # who writes the beginning of a name means it, though another of the same length may have nearer letters
    begun = [other for other in by_lower if len(name) > 2 and other.startswith(name.lower())]
    found = begun or difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"did you mean {by_lower[found[0]]}?" if found else ""


def choose_one(name: str, names: Sequence[str]) -> str:
    """Return the way out for a value that is none of `names`: the one that is nearly it, and all of them."""
    meant, all_names = near(name, names), ", ".join(names)
    return f"{meant} Choose one of {all_names}" if meant else f"choose one of {all_names}"


def config_file(path: Path) -> Path:
    """Return a configuration file by its path, or its name in configs/; else FileNotFoundError."""
    if path.is_file():
        return path
    shipped = [*sorted(ROOT.glob("configs/*.yaml")), ROOT / "model_config.yaml", ROOT / "train_config.yaml"]
    for file in shipped:
        if str(path) in (file.stem, file.name):
            return file
    beside = [] if path.parent == Path() else [str(file) for file in path.parent.glob("*.y*ml")]
    way_out = near(str(path), [*beside, *(file.stem for file in shipped)])
    way_out = way_out or "name one that is there, or one in configs/, such as moe_30m_debug"
    raise FileNotFoundError(f"{path}: no such configuration file; {way_out}")
