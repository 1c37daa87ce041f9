"""What differs between a checkpoint and the settings that go on from it: refused, or told in a line."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from litgpt_moe.checkpoints.layout import CONFIG_FILE
from litgpt_moe.config import MoEConfig
from litgpt_moe.data.tokenizer import read_tokenizer_facts
from litgpt_moe.processes import note_once
from litgpt_moe.training.settings import Settings, dotted, plain_settings

# keys of a model's configuration that do not change what it computes (padded_vocab_size does)
SAME_FUNCTION = ("name", "hf_config", "padding_multiple")
# settings whose change on a resume is told
TOLD = (
    *("optimizer.", "schedule.", "moe.", "guard.", "data.", "data_dir", "wandb_dataset", "precision"),
    *("devices", "num_nodes", "accelerator", "seed", "train.global_batch_size"),
    *("train.micro_batch_size", "train.max_tokens", "train.lr_warmup", "train.min_lr", "train.max_norm"),
    # a validation loss of other batches is another figure; a smaller number to keep deletes checkpoints
    *("recipe.", "eval.interval", "eval.max_iters", "checkpoints.keep_", "float32_matmul_precision"),
)


def changed_keys(before: MoEConfig, now: MoEConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys that make two models compute something else, with both values."""
    for key in (item.name for item in fields(MoEConfig) if item.name not in SAME_FUNCTION):
        if (was := getattr(before, key)) != (value := getattr(now, key)):
            yield key, was, value


def changed_meaning(folder: Path, settings: Settings, config: MoEConfig) -> Iterator[str]:
    """Yield what makes the weights of a checkpoint compute something else now: model keys, the tokenizer."""
    # an object has the defaults, with which the model was trained, of keys that an old file lacks
    before = MoEConfig.untried_from_file(folder / CONFIG_FILE, is_foreign=True)
    for key, was, value in changed_keys(before, config):
        yield f"{CONFIG_FILE}: {key} was {was}, now {value}"
    # litgpt 0.5.13 computes the norm of models with these words in their name in another way
    if any((word in before.name) != (word in config.name) for word in ("Gemma", "OLMo")):
        yield f"{CONFIG_FILE}: name was {before.name}, now {config.name}"
    if not (folder / "tokenizer.json").is_file():
        return  # LitGPT's converters may write none
    named = settings.tokenizer_dir
    if not (named / "tokenizer.json").is_file():
        yield f"tokenizer_dir is {named}, but {named} holds no tokenizer.json"
    elif _tokenizer_key(folder) != _tokenizer_key(named):
        yield f"its tokenizer is not the one in {named} (tokenizer_dir)"


def _tokenizer_key(folder: Path) -> tuple[str, int, int]:
    facts = read_tokenizer_facts(folder)
    return facts.sha256, facts.bos_id, facts.eos_id


def changed_run(before: dict[str, Any], settings: Settings, optimizer: str, block_size: int) -> Iterator[str]:
    """Yield the settings with which the training state does not fit any more."""
    for key, value in (
        ("train.max_seq_length", settings.train.max_seq_length),
        ("train.tie_embeddings", settings.train.tie_embeddings),
        ("optimizer.class_path", optimizer),
        ("weight_decay_on", settings.weight_decay_on),
    ):
        # a class has several paths: torch.optim.AdamW is also torch.optim.adamw.AdamW
        otherwise = block_size if key == "train.max_seq_length" else None
        names = [str(text or otherwise).rpartition(".")[2] for text in (before.get(key, value), value)]
        if names[0] != names[1]:
            yield f"{key} was {before[key]}, now {value}"
    # weights with learning rates of their own are in groups of their own
    had, has = (
        any(some.get(f"recipe.{name}_lr", 1.0) != 1.0 for name in ("embedding", "head", "other"))
        for some in (before, dict(dotted(plain_settings(settings))))
    )
    if had != has:
        yield f"recipe.*_lr was {'set' if had else 'not set'}, now it is {'set' if has else 'not set'}"
    # with these on, an optimizer of torch expects moments that it does not keep otherwise
    init_args = settings.optimizer.get("init_args") or {}
    for name in ("amsgrad", "centered", *(["momentum"] if "RMSprop" in optimizer else [])):
        key, value = f"optimizer.init_args.{name}", init_args.get(name)
        if bool(before.get(key)) != bool(value):
            yield f"{key} was {before.get(key)}, now {value}"


def say_what_changed(folder: Path, before: dict[str, Any], settings: Settings) -> None:
    """Say in a line which settings are others than those that the checkpoint in `folder` was made with."""
    now, default = (dict(dotted(plain_settings(some))) for some in (settings, Settings()))
    before = dict(dotted(before))
    # an argument of the optimizer that the settings do not name any more has the default of its class
    changes = [
        f"{key} {was!s:.200} -> {now.get(key, 'not set')!s:.200}"
        for key in {**now, **before}
        if _slashes(was := before.get(key, default.get(key))) != _slashes(now.get(key))
        and key.startswith(TOLD)
    ]
    if changes:
        note_once(f"Changed since {folder}: {'; '.join(changes)}.")


def _slashes(value: Any) -> Any:
    """Return a path with slashes; on Windows earlier versions saved paths with backslashes."""
    return value.replace("\\", "/") if isinstance(value, str) else value
