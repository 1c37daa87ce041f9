"""What the given settings mean together: which of two lengths holds; is there text of one's own."""

from litgpt_moe.data.demo_stories import has_own_text
from litgpt_moe.data.settings import DEFAULT_DATA_DIR
from litgpt_moe.training.sources import Given

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
