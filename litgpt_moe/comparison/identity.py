"""What makes two runs the same run, and two speeds the same speed: the settings on which they depend."""

from typing import Any

from litgpt_moe.comparison.twin import changed_keys
from litgpt_moe.config import MoEConfig
from litgpt_moe.training.settings import Settings, dotted, plain_settings

# settings of how a run computes: its speed depends on them, and not which model comes out
OF_SPEED = ("accelerator", "devices", "num_nodes", "compile", "activation_checkpointing", "strategy")
# others that say where a run lies and what it shows
NO_MATTER = ("out_dir", "data_dir", "tokenizer_dir", "wandb", "logger_name", "log.", "progress", "eval.")
NO_MATTER += ("checkpoints.", "train.save_interval", "train.log_interval", "train.max_time", "guard.spike")
# data.init_args.seed comes back below; initial_checkpoint_dir is refused
NO_MATTER += (*OF_SPEED, "data.init_args.", "initial_checkpoint_dir")
# a run gets its tokens, and its warm-up in tokens
NO_MATTER += ("train.lr_warmup_steps", "train.epochs", "train.max_steps")
DATA_SEED = "data.init_args.seed"
# settings on which the time of a step does not depend
NO_MATTER_FOR_SPEED = ("seed", DATA_SEED, "train.max_tokens", "train.min_lr", "train.lr_warmup")
NO_MATTER_FOR_SPEED += ("schedule.", "optimizer.init_args.lr")
USUAL = dict(dotted(plain_settings(Settings())))


def nameless(config: MoEConfig) -> dict[str, Any]:
    """Return the keys that describe a model, without its name."""
    return {key: value for key, value in changed_keys(config).items() if key != "name"}


def named_seed(settings: Settings) -> int | None:
    """Return the seed of the order of the data that the settings name, None if it is that of the run."""
    named = (settings.data.get("init_args") or {}).get("seed")
    return None if named is None else int(named)


def that_matter(settings: Settings, has_experts: bool) -> dict[str, Any]:
    """Return the settings, by their dotted names, on which the trained weights depend."""
    plain = dict(dotted(plain_settings(settings)))
    left_out = NO_MATTER if has_experts else (*NO_MATTER, "moe.")
    kept = {key: value for key, value in plain.items() if not key.startswith(left_out)}
    if (named := named_seed(settings)) not in (None, settings.seed):
        kept[DATA_SEED] = named
    return kept


def for_speed(settings: Settings, has_experts: bool) -> dict[str, Any]:
    """Return the settings, by their dotted names, on which the tokens a second depend."""
    plain = dict(dotted(plain_settings(settings)))
    kept = that_matter(settings, has_experts) | {key: plain[key] for key in OF_SPEED}
    return {key: value for key, value in kept.items() if not key.startswith(NO_MATTER_FOR_SPEED)}


def same_settings(was: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether the settings of a row are these.

    One that is missing had its usual value: the version that wrote the row did not have it, or left it out.
    """
    return all(was.get(key, USUAL.get(key)) == now.get(key, USUAL.get(key)) for key in {*was, *now})


def is_same(row: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Return whether a row of the file is the run with this identity."""
    if row["model"] != identity["model"] or row["data"]["fingerprint"] != identity["data"]["fingerprint"]:
        return False
    return same_settings(row["settings"], identity["settings"])


def has_own_window(row: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Return whether a row was scored on windows as long as the sequences of its training.

    Without `window` it was scored on those of the model's block_size: an earlier version did so always.
    """
    block_size = identity["model"]["block_size"]
    return row.get("window", block_size) == (identity["settings"].get("train.max_seq_length") or block_size)
