"""What the given settings mean together: the length, text of one's own, the run that goes on."""

import contextlib
from pathlib import Path

from litgpt_moe.checkpoints.layout import CONFIG_FILE, checkpoints_of
from litgpt_moe.data.demo_stories import has_own_text
from litgpt_moe.data.settings import DEFAULT_DATA_DIR
from litgpt_moe.training.settings import Settings
from litgpt_moe.training.sources import Given
from litgpt_moe.yaml_files import read_mapping

LENGTHS = ("train.epochs", "train.max_tokens")


def with_one_length(given: Given) -> Given:
    """Return `given` without the length in a file where a flag or a variable gives one of the other kind."""
    files = [key for key in LENGTHS if key in given and not given[key][1].startswith(("--", "$"))]
    others = [key for key in LENGTHS if key in given and key not in files]
    return {key: value for key, value in given.items() if not (others and key in files)}


def has_own_data(given: Given) -> bool:
    """Return whether data are named, or the default folder holds other text than the demo stories."""
    is_named = any(key in ("data_dir", "wandb_dataset") or key.startswith("data.") for key in given)
    return is_named or has_own_text(DEFAULT_DATA_DIR)


def resumed_place(resume: str | bool, out_dir: Path) -> Path | None:
    """Return the folder whose newest checkpoint, or which itself, is resumed; None for a fresh start."""
    word = str(resume).lower()
    if word in ("false", "none", ""):
        return None
    return out_dir if word in ("auto", "true") else Path(str(resume))


def resumed_model(given: Given) -> str | None:
    """Return the name of the model of the run that goes on; None if none does, or it cannot be read."""
    resume, _ = given.get("resume", (Settings.resume, ""))
    out_dir, _ = given.get("out_dir", (None, ""))
    if (place := resumed_place(resume, Path(str(out_dir or Settings.out_dir)))) is None:
        return None
    # what is wrong with a checkpoint is said where it is opened
    with contextlib.suppress(ValueError, OSError):
        newest = next(iter(checkpoints_of(place)), place)
        return str(read_mapping(newest / CONFIG_FILE, is_foreign=True).get("name"))
    return None
