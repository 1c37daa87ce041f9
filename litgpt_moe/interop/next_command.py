"""The command that goes on training from a checkpoint which a tool has made."""

from pathlib import Path

from litgpt_moe.cli import train_command
from litgpt_moe.files import free_name

NEXT = "Next (training reads data/custom_text, or what --dataset_dir names):"


def training_command(checkpoint: Path, like: Path | None = None) -> str:
    """Return the command that trains from `checkpoint`, with the data and settings of the run `like`.

    `like` is a checkpoint of that run. Without it, or where run_train.py did not make it, the defaults hold.
    """
    settings = like and like / "train_config.yaml"
    given = ("--config", settings) if settings and settings.is_file() else ()
    start = ("--initial_checkpoint_dir", checkpoint, "--tokenizer_dir", checkpoint)
    model = ("--model_config", checkpoint / "model_config.yaml")
    out_dir = free_name(checkpoint.with_name(f"{checkpoint.absolute().name}_trained"), "_", start=2)
    return train_command(*given, *start, *model, "--out_dir", out_dir)
