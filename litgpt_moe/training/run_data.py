"""The data of a run: the data set to download, the data module, and the tokenizer that made the data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from litgpt_moe.data.forms import text_in
from litgpt_moe.data.manifest import MANIFEST
from litgpt_moe.data.module import TextShards
from litgpt_moe.data.settings import DEFAULT_DATA_DIR, SPLITS
from litgpt_moe.data.tokenizer_folder import choose_tokenizer
from litgpt_moe.training import class_path
from litgpt_moe.training.settings import Settings


def with_dataset(settings: Settings) -> Settings:
    """Return the settings with the downloaded W&B data set, and the tokenizer in the data folder, if any."""
    if settings.wandb_dataset:
        from litgpt_moe.data.artifact import pull  # not at the top: importing wandb takes a second

        folder = pull(settings.wandb_dataset, settings.wandb_artifacts_dir)
        settings = replace(settings, data_dir=folder)
        if (folder / "tokenizer/tokenizer.json").is_file():
            settings = replace(settings, tokenizer_dir=folder / "tokenizer")
    return settings


def with_tokenizer(settings: Settings, data: Any) -> Settings:
    """Return the settings with the tokenizer that was named, or else the one that made the data."""
    if not isinstance(data, TextShards):
        return replace(settings, tokenizer_dir=choose_tokenizer(None, settings.tokenizer_dir))
    data.tokenizer_dir = choose_tokenizer(data.data_dir, settings.tokenizer_dir)
    return replace(settings, tokenizer_dir=data.tokenizer_dir)


def build_data(settings: Settings) -> Any:
    """Return the data module (TextShards with the run's tokenizer and seed), or raise ValueError."""
    init_args = dict(settings.data.get("init_args") or {})
    if settings.data_dir:
        init_args |= {f"{split}_data_path": str(settings.data_dir / split) for split in SPLITS}
    data = class_path.build("data", {**settings.data, "init_args": init_args})
    if isinstance(data, TextShards):
        own = settings.tokenizer_dir
        if (named := Path(init_args.get("tokenizer_dir", own))) != own:
            raise ValueError(f"data.init_args.tokenizer_dir is {named} but tokenizer_dir is {own}; drop one")
        data.tokenizer_dir = own
        if "seed" not in init_args:
            data.seed = settings.seed
    return data


def wants_demo_data(settings: Settings, data: Any) -> bool:
    """Return whether there is no text yet, so that the demo stories are to be written."""
    # in the default folder alone: a mistyped folder must not be filled with stories
    if settings.data_dir is not None or not isinstance(data, TextShards):
        return False
    is_empty = not (DEFAULT_DATA_DIR / MANIFEST).is_file() and not text_in(Path(data.train_data_path))
    return data.data_dir == DEFAULT_DATA_DIR and is_empty
