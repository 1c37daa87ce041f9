"""Where the settings of a run come from: which two files, which variables, and the short names of keys.

Nothing heavy is imported here, so that `run_train.py --help` can show the values in force.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litgpt_moe.data.settings import DEFAULT_DATA_DIR
from litgpt_moe.processes import note_once
from litgpt_moe.words import ROOT, config_file

Given = dict[str, tuple[Any, str]]  # dotted key -> (value or text, the file, variable or flag that gave it)

FLAG_TO_KEY = {
    "micro_batch_size": "train.micro_batch_size",
    "global_batch_size": "train.global_batch_size",
    "max_tokens": "train.max_tokens",
    "max_seq_length": "train.max_seq_length",
    "train_config": "config",
    "wandb_dataset_artifact": "wandb_dataset",
    "dataset_dir": "data_dir",
}
# keys of YAML files by their names in earlier versions
OLD_KEYS = {"dataset_dir": "data_dir"}
# environment variables, each named as its flag in upper case
VARIABLES = [name.upper() for name in FLAG_TO_KEY if name != "train_config"]
VARIABLES += ["RESUME", "WANDB_ARTIFACTS_DIR"]
# file names that belong together when they lie in one folder: a checkpoint's, and the demo's
PAIRS = (("train_config.yaml", "model_config.yaml"), ("demo_train.yaml", "demo_model.yaml"))


def read_variables() -> Given:
    """Return the values of the environment variables that are set and not empty."""
    present = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    return {FLAG_TO_KEY.get(n.lower(), n.lower()): (value, f"${n}") for n, value in present.items()}


def choose_configs(
    given: Given,
    has_cuda: Callable[[], bool],
    has_own_data: Callable[[Given], bool],
    tell: Callable[[str], None] = note_once,
    resumed: str | None = None,
) -> tuple[Path, Path]:
    """Return the YAML files of the settings and of the model, and tell which, and why.

    If only one is named, the other is its partner in PAIRS, if that lies in the same folder, or the default:
    train_config.yaml, and model_config.yaml. Without CUDA, or where there is no text yet to train on but the
    demo stories, the default is the demo's. For a resumed run, whose model is named `resumed`, it is the
    demo's if that name is.
    """
    named = {key: config_file(Path(given[key][0])) for key in ("config", "model_config") if key in given}
    config, model_config = named.get("config"), named.get("model_config")
    why_config = why_model = ""
    if config and not model_config and (model_config := _partner(config)):
        why_model = " (beside it; another: --model_config PATH)"
    elif model_config and not config and (config := _partner(model_config)):
        why_config = " (beside the model's; another: --config PATH)"
    if model_config is None:
        model_config = _default_model(given, config is not None, has_cuda, has_own_data, tell, resumed)
        config = config or _partner(model_config)
        why_model = " (the default; another: --model_config PATH)" if named else ""
    if config is None:
        config = ROOT / PAIRS[0][0]
        why_config = " (the default; another: --config PATH)" if named else ""
    here = Path.cwd()
    # files below this folder are named by their relative path, as a user types it
    config, model_config = (
        path.relative_to(here) if path.is_relative_to(here) else path for path in (config, model_config)
    )
    tell(f"Settings from {config}{why_config} and {model_config}{why_model}.")
    return config, model_config


def _default_model(
    given: Given,
    is_config_named: bool,
    has_cuda: Callable[[], bool],
    has_own_data: Callable[[Given], bool],
    tell: Callable[[str], None],
    resumed: str | None,
) -> Path:
    """Return the default file of the model, for `choose_configs`."""
    usual, demo = ROOT / PAIRS[0][1], ROOT / "configs" / PAIRS[1][1]
    if resumed is not None:
        name = re.search(r"^name: *(\S+)", demo.read_text(encoding="utf-8"), re.MULTILINE)
        return demo if name and name[1] == resumed else usual
    reason = "" if has_cuda() else "No CUDA and no model config named"
    if not reason and not is_config_named and not has_own_data(given):
        reason = f"No text of yours in {DEFAULT_DATA_DIR} and no model config named"
    if reason:
        tell(
            f"{reason}: training the small demo model{'' if has_cuda() else ' on the CPU'} "
            "(MoE-200M all the same: --model_config model_config.yaml)."
        )
    return demo if reason else usual


def _partner(path: Path) -> Path | None:
    names = [name for pair in PAIRS if path.name in pair for name in pair if name != path.name]
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
