"""The settings of prepare_data.py and of a W&B upload; nothing heavy is imported, so `--help` is fast."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from litgpt_moe.cli import variable, words_of
from litgpt_moe.words import near

SPLITS = ("train", "val")
MIN_VOCAB = 320  # 3 special pieces, 256 bytes, and letters
DEFAULT_DATA_DIR = Path("data/custom_text")
# data sets of the hub by short names of ours; "tinystories" is the text file of its authors
SHORT_NAMES = {"tinystories_clean": "karpathy/tinystories-gpt4-clean"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DEFAULT_TOKENIZER_DIR = Path("data/tokenizer")
REFERENCE_FORM = "write entity/project/name:alias, or project/name:alias with WANDB_ENTITY set"
CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class PrepareFlags:
    """The flags of prepare_data.py."""

    data_dir: Path = DEFAULT_DATA_DIR
    """folder for shards and manifest.json; without PATH the text is its train/* and, if wanted, val/*
    (default data/custom_text; with PATH or OWNER/NAME data/ and the name)"""
    dataset: str = "custom"
    """custom: your own text; tinystories: download it (2.2 GB); tinystories_clean: its cleaned GPT-4 version;
    demo: write the built-in stories; OWNER/NAME: a data set of the Hugging Face hub, by its Parquet files"""
    tokenizer_dir: Path = DEFAULT_TOKENIZER_DIR
    """folder of tokenizer.json; by default the one that made the data, or TinyLlama's, downloaded here"""
    train_tokenizer: int | None = None
    """vocabulary size of a BPE tokenizer to train on the text (default: train none)"""
    subset: str | None = None
    """subset (configuration) of --dataset OWNER/NAME (default: its default, or the only one)"""
    split: str | None = None
    """split of --dataset OWNER/NAME that becomes the train split (default train, or the only one)"""
    tokenizer: str | None = None
    """another tokenizer, copied into DATA_DIR/tokenizer: a hub id (OWNER/NAME), a folder, or a file"""
    separator: str = "<|endoftext|>"
    """line between two stories ('<|endoftext|>': also inside a line); '' splits at blank lines"""
    on_bad_utf8: str = "replace"
    """replace bytes that are not UTF-8 by U+FFFD, or refuse them; both report file and line"""
    text_column: str | None = None
    """column of the text in rows (default: text, else the only one with strings); a.b: key b within a"""
    val_fraction: float = 0.01
    """share of the text for the val split if there is no text for it"""
    workers: int = 0
    """processes that tokenize, about 100 MB each (0: one per core)"""
    demo_stories: int = 9_000
    """stories to write with --dataset demo (0.7 KB each)"""
    seed: int = 42
    """seed of the demo stories"""
    overwrite: bool = False
    """replace another tokenizer in tokenizer_dir, or an edited demo.txt"""
    log_to_wandb: bool = field(
        default_factory=lambda: (variable("WANDB_LOG_DATASET") or "").lower() in ("1", "true", "yes", "on")
    )
    """upload the data directory to Weights & Biases (default WANDB_LOG_DATASET)"""


@dataclass(frozen=True)
class PrepareSettings(PrepareFlags):
    """What one preparation needs."""

    mix: tuple[str, ...] = ()
    """NAME=WEIGHT of prepared data directories to draw from, or a YAML file of them; (): no mix."""
    paths: tuple[Path, ...] = ()
    """Files and folders of text, which are only read; (): it lies in `data_dir`, or where it last was."""


@dataclass(frozen=True)
class WandbSettings:
    """Where an upload goes on Weights & Biases; a flag has precedence over its environment variable."""

    wandb_project: str | None = field(default_factory=lambda: variable("WANDB_PROJECT"))
    """W&B project (WANDB_PROJECT; default litgpt-moe)"""
    wandb_entity: str | None = field(default_factory=lambda: variable("WANDB_ENTITY"))
    """W&B user or team (WANDB_ENTITY; default: your W&B default)"""
    wandb_artifact: str | None = field(default_factory=lambda: variable("WANDB_DATA_ARTIFACT"))
    """name of the artifact (WANDB_DATA_ARTIFACT; default: the data directory's name)"""
    wandb_alias: list[str] | None = field(default_factory=lambda: words_of("WANDB_DATA_ALIASES"))
    """alias of the artifact, repeatable (default: WANDB_DATA_ALIASES=a,b)"""
    wandb_tag: list[str] | None = field(default_factory=lambda: words_of("WANDB_TAGS"))
    """tag of the W&B run, repeatable (default: WANDB_TAGS=a,b)"""
    wandb_run_name: str | None = field(default_factory=lambda: variable("WANDB_RUN_NAME"))
    """name of the W&B run (WANDB_RUN_NAME; default: made up by W&B)"""


def is_hub_name(dataset: str) -> bool:
    """Return whether --dataset names a data set of the hub by its Parquet files."""
    return dataset in SHORT_NAMES or HUB_ID.fullmatch(dataset) is not None


def check_settings(settings: PrepareSettings) -> None:
    """Raise ValueError with every problem of the settings, before anything is written."""
    s, vocab = settings, settings.train_tokenizer
    own = ("custom", "tinystories", "demo", *SHORT_NAMES)
    is_own, meant = s.dataset in own, near(s.dataset, own)
    choices = f"{', '.join(own)}, or OWNER/NAME of the hub" + (f" ({meant})" if meant else "")
    rules = (
        ("dataset", is_own or is_hub_name(s.dataset), f"one of {choices}"),
        ("subset", s.subset is None or is_hub_name(s.dataset), "it with --dataset OWNER/NAME"),
        ("split", s.split is None or is_hub_name(s.dataset), "it with --dataset OWNER/NAME"),
        ("on_bad_utf8", s.on_bad_utf8 in ("replace", "refuse"), "one of replace, refuse"),
        ("val_fraction", 1e-9 <= s.val_fraction <= 0.5, "a number from 1e-9 to 0.5"),
        ("train_tokenizer", vocab is None or vocab >= MIN_VOCAB, f"{MIN_VOCAB} pieces or more"),
        ("workers", s.workers >= 0, "0 (one per core) or more"),
        ("demo_stories", s.demo_stories >= 2, "2 or more"),
        ("separator", len(s.separator.splitlines()) <= 1, "the text of one line"),
        ("separator", not any("\ud800" <= letter <= "\udfff" for letter in s.separator), "UTF-8 text"),
    )
    s_dir = s.tokenizer_dir != DEFAULT_TOKENIZER_DIR
    others = [name for name, is_on in (("train_tokenizer", vocab), ("tokenizer_dir", s_dir)) if is_on]
    problems = [f"{name} is {getattr(settings, name)!r}; choose {rule}" for name, ok, rule in rules if not ok]
    if s.tokenizer and others:
        problems += [f"tokenizer is {s.tokenizer!r}, and {others[0]} is given too; drop one"]
    problems += [
        f"{folder}: a file; name a folder with --{name}"
        for name in ("data_dir", "tokenizer_dir")
        if (folder := getattr(settings, name)).exists() and not folder.is_dir()
    ]
    if problems:
        raise ValueError("\n".join(problems))
