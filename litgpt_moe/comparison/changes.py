"""What --override and --variant may replace: keys of the model, and settings that are not a run's own."""

from typing import Any

import yaml

from litgpt_moe.config import MoEConfig
from litgpt_moe.training.sources import FLAG_TO_KEY

DATA = "give --data_dir: all models of a comparison learn from the same data"
PACE = "a run of a comparison has its own"
# keys that a comparison sets for each run, or that would spoil it, and what to do instead
INSTEAD = {
    "optimizer.init_args.lr": "give --lr 3e-3, or --lr auto to find a rate for each model",
    "seed": "give --first_seed and --seeds",
    "train.max_tokens": "give --budget",
    "train.epochs": "give --budget",
    "train.max_steps": "give --budget",
    "train.max_time": "give --match seconds and --budget",
    "initial_checkpoint_dir": "each run of a comparison starts from weights of its own seed",
    **dict.fromkeys(("data_dir", "wandb_dataset", "tokenizer_dir"), DATA),
    **{f"data.init_args.{name}": DATA for name in ("train_data_path", "val_data_path", "tokenizer_dir")},
    "out_dir": "give --out",
    "config": "give --config",
    "model_config": "name the file as CONFIG",
    **dict.fromkeys(("resume", "overwrite", "plan"), "the same command of compare.py goes on by itself"),
    **dict.fromkeys(("train.log_interval", "train.save_interval", "checkpoints.keep_last"), PACE),
    **{f"eval.{name}": PACE for name in ("interval", "max_iters", "initial_validation", "final_validation")},
}


def check_changes(where: str, changes: dict[str, str]) -> None:
    """Raise ValueError if a comparison would not do what a change says; `where` is the flag that names it."""
    for key, value in changes.items():
        plain = key.replace("-", "_")
        if (way_out := INSTEAD.get(FLAG_TO_KEY.get(plain, plain))) is not None:
            raise ValueError(f"{where}: {key}={value} would not be taken; {way_out}")


def model_keys(changes: dict[str, str]) -> dict[str, Any]:
    """Return the changes that are keys of the model, their values as in YAML."""
    return {k: yaml.safe_load(v) for k, v in changes.items() if k in MoEConfig.__dataclass_fields__}


def training_flags(changes: dict[str, str]) -> tuple[str, ...]:
    """Return the changes that are settings of run_train.py, as its flags."""
    others = {key: value for key, value in changes.items() if key not in MoEConfig.__dataclass_fields__}
    return tuple(word for key, value in others.items() for word in (f"--{key}", value))
