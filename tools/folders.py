"""Output folders that are whole or not there, for the tools that make them. Nothing to run here."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe.cli import RUN_TRAIN, command_line
from litgpt_moe.files import new_folder

if TYPE_CHECKING:
    import torch

    from moe_layers import MoEConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
NEXT = "Next (training reads data/custom_text, or what --dataset_dir names):"


def read_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the content of those files in `folder` that are there."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def write_checkpoint(
    out: Path, weights: "dict[str, torch.Tensor]", config: "MoEConfig", files: dict[str, bytes]
) -> None:
    """Write a checkpoint directory of bare weights, and `files`, from which run_train.py and others start.

    Raises as `new_folder`.
    """
    from litgpt.utils import save_config

    from moe_layers import CHECKPOINT_FILE
    from run_train import tensor_bytes, write_record, write_state

    with new_folder(out, tensor_bytes(weights)) as staging:
        entry = write_state({"model": weights}, staging / CHECKPOINT_FILE)
        for name, content in files.items():
            (staging / name).write_bytes(content)
        save_config(config, staging)
        write_record(staging, 0, {CHECKPOINT_FILE: entry})


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
