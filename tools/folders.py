"""Output folders that are whole or not there, for the tools that make them. Nothing to run here."""

import itertools
from pathlib import Path
from typing import Any

from litgpt_moe.checkpoints.layout import TOKENIZER_FILES, read_files  # noqa: F401 - moved; the users follow
from litgpt_moe.cli import RUN_TRAIN, command_line

NEXT = "Next (training reads data/custom_text, or what --dataset_dir names):"


def write_checkpoint(*args: Any) -> None:
    """Moved to litgpt_moe.checkpoints.writer; the users follow."""
    from litgpt_moe.checkpoints.writer import write_checkpoint

    write_checkpoint(*args)


def train_on(checkpoint: Path, like: Path | None = None) -> str:
    """Return the command that trains on from `checkpoint`, with the data and settings of the run `like`.

    `like` is a checkpoint of that run; without one, or where run_train.py did not make it, the defaults hold.
    """
    recipe = like and like / "train_config.yaml"
    given = ("--config", recipe) if recipe and recipe.is_file() else ()
    start = ("--initial_checkpoint_dir", checkpoint, "--tokenizer_dir", checkpoint)
    model = ("--model_config", checkpoint / "model_config.yaml")
    name = f"{checkpoint.absolute().name}_trained"
    names = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
    out_dir = next(out for out in map(checkpoint.with_name, names) if not out.exists())
    return command_line(*RUN_TRAIN, *given, *start, *model, "--out_dir", out_dir)
