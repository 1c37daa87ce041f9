"""The help of run_train.py: the common flags first, and the values that are in force."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from litgpt_moe.data.settings import DEFAULT_DATA_DIR
from litgpt_moe.flags import ALL, FlagParser, add_flags
from litgpt_moe.shell import with_home
from litgpt_moe.training.settings import Settings, dotted
from litgpt_moe.training.sources import OLD_KEYS, Given, choose_configs, read_variables

COMMON = (
    *("model_config", "config", "data_dir", "out_dir", "resume", "overwrite", "plan"),
    *("train.max_tokens", "train.max_time", "train.global_batch_size", "train.micro_batch_size"),
    *("optimizer.lr", "precision", "activation_checkpointing"),
)
# what LitGPT's classes have and a run refuses stands in no help
REFUSED = "Not supported"


def print_help(argv: list[str], description: str | None) -> None:
    """Print the help for a command line with hyphens made underscores."""
    values, where = in_force(argv)
    common = () if ALL in argv else COMMON
    text = f"{description}\nThe values in brackets are in force, by {where}." if where else description
    parser = FlagParser(common, prog="run_train.py", usage="%(prog)s [--KEY VALUE]...", description=text)
    add_flags(parser, Settings, leave_out=REFUSED, values=values)
    rate = values.get("optimizer.init_args.lr")
    shown = f"Learning rate at its peak (now {rate})" if rate else "Learning rate at its peak."
    parser.add_argument("--optimizer.lr", metavar="X", help=shown)
    parser.print_help()


def in_force(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Return the values of the settings' file and the variables, and where they come from in words.

    A file that cannot be read gives none: the run itself says what is wrong with it.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--config", "--train_config")
    parser.add_argument("--model_config")
    parser.add_argument("--data_dir", "--dataset_dir")
    with contextlib.suppress(OSError, ValueError, argparse.ArgumentError, yaml.YAMLError, AttributeError):
        named, _ = parser.parse_known_args(argv)
        given = {key: (with_home(value), key) for key, value in vars(named).items() if value}
        config, model_config = choose_configs(given, has_driver, seems_to_have_data, tell=lambda _: None)
        in_file = dotted(yaml.safe_load(config.read_text(encoding="utf-8")))
        values = {OLD_KEYS.get(name, name): value for name, value in in_file}
        values |= {"config": config, "model_config": model_config}
        variables = read_variables()
        values |= {key: value for key, (value, _) in variables.items()}
        if train := values.get("data.init_args.train_data_path"):
            values.setdefault("data_dir", Path(str(train)).parent)
        return values, " and ".join([str(config), *(place for _, place in variables.values())])
    return {}, ""


def has_driver() -> bool:
    """Return whether the driver of an NVIDIA GPU is there, which is seen without PyTorch."""
    windows = Path(os.environ.get("SYSTEMROOT", "C:/Windows"), "System32/nvcuda.dll")
    driver = windows if sys.platform == "win32" else Path("/proc/driver/nvidia/version")
    return driver.exists()


def seems_to_have_data(given: Given) -> bool:
    """Return whether data are named, or the default folder seems to hold other text than the demo stories."""
    is_prepared = (DEFAULT_DATA_DIR / "manifest.json").is_file()
    return "data_dir" in given or (is_prepared and not (DEFAULT_DATA_DIR / "train/demo.txt").is_file())
