"""Pretrain a Mixture-of-Experts model with LitGPT's own loop and tell a story with it.

Run: uv run python run_train.py     (3 minutes on two CPU cores: demo model, demo stories)

With CUDA it takes model_config.yaml and train_config.yaml, without it the demo settings in configs/.
Precedence: flag > environment variable > YAML > default. Any key is a flag: `--train.max_tokens 1000000`.
"""

import ast
import contextlib
import csv
import difflib
import errno
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import queue
import random
import re
import secrets
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal

import yaml

import prepare_data
import wandb_dataset
from litgpt_moe.cli import (
    RUN_TRAIN,
    command_line,
    first_line,
    hear_ctrl_c,
    join_switches,
    normalize_flags,
    run_script,
)
from litgpt_moe.files import FolderInUse, FolderLock, is_disk_full, put_in_place, read_json, sync_directory
from litgpt_moe.processes import is_main_process, launcher_problems, note_once

if TYPE_CHECKING:
    import torch
    from lightning.fabric import Fabric

    from moe_layers import MoEConfig

ROOT = Path(__file__).resolve().parent
DEMO_TRAIN = ROOT / "configs/demo_train.yaml"
DATA_DIR = prepare_data.PrepareSettings.data_dir
PROMPT = "Once upon a time"
DEMO_VOCAB = 2048  # as padded_vocab_size in demo_model.yaml
FLAG_TO_KEY = {
    "micro_batch_size": "train.micro_batch_size",
    "global_batch_size": "train.global_batch_size",
    "max_tokens": "train.max_tokens",
    "max_seq_length": "train.max_seq_length",
    "train_config": "config",
    "wandb_dataset_artifact": "wandb_dataset",
}
CLASS_KEYS = {  # each a class_path with init_args: where a bare name is looked for, and the usual class
    "data": ("litgpt.data", "prepare_data.TextShards"),
    "optimizer": ("torch.optim", "torch.optim.AdamW"),
}
GROUPS = ("train", "moe", "schedule", "checkpoints", "guard", "eval", "log")  # `key: value` lines under them
VARIABLES = (
    "RESUME",
    "WANDB_DATASET_ARTIFACT",
    "WANDB_ARTIFACTS_DIR",
    "DATASET_DIR",
    "MICRO_BATCH_SIZE",
    "GLOBAL_BATCH_SIZE",
    "MAX_TOKENS",
    "MAX_SEQ_LENGTH",
)
LOWEST = {  # the lowest value that makes sense; 0 switches off where it is allowed
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
    "train.max_tokens": 1,
    "train.max_seq_length": 1,
    "train.log_interval": 1,
    "train.save_interval": 1,
    "train.lr_warmup_steps": 0,
    "train.min_lr": 0,
    "train.max_norm": 0,
    "train.max_time": 1,
    "moe.aux_loss_coef": 0,
    "moe.z_loss_coef": 0,
    "moe.bias_update_rate": 0,
    "schedule.warmup_tokens": 0,
    "schedule.decay_fraction": 0,
    "checkpoints.keep_last": 1,
    "checkpoints.keep_every": 1,
    "guard.max_skipped_steps": 1,
    "guard.spike_sigma": 0,
    "eval.interval": 1,
    "eval.max_iters": 1,
    "eval.max_new_tokens": 0,
    "num_nodes": 1,
    "seed": 0,
}


def _litgpt_args() -> Any:
    """LitGPT's argument dataclasses, from args.py alone: its package loads torch, seconds before --help."""
    folder = importlib.util.find_spec("litgpt").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("litgpt_args", Path(folder) / "args.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


litgpt_args = _litgpt_args()


@dataclass
class BalanceArgs:
    """What keeps the tokens spread over the experts. The logged loss stays pure cross-entropy."""

    aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss of Switch Transformer (0.01 there; 0: off)."""
    z_loss_coef: float = 0.0
    """Weight of the router's z-loss of ST-MoE (0.001 there; 0: off)."""
    bias_update_rate: float = 0.0
    """Step of DeepSeek-V3's selection bias, which stock LitGPT cannot read (0.001 there; 0: off)."""


@dataclass
class ScheduleArgs:
    """The learning rate over the run, from optimizer.init_args.lr down to train.min_lr."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: half a period; wsd: constant, then down at the end; constant: never down."""
    warmup_tokens: int | None = None
    """Tokens of linear warm-up, in place of train.lr_warmup_steps (null: as those say)."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd goes down (0.2: arxiv.org/abs/2405.18392)."""


@dataclass
class CheckpointArgs:
    """Which checkpoints stay, which go to W&B, and what a full disk means."""

    keep_last: int | None = None
    """Newest step-* to keep; older ones are deleted after a save (null: all stay)."""
    keep_every: int | None = None
    """Steps; step-* that are multiples of it stay beside keep_last (null: none)."""
    on_full_disk: Literal["continue", "stop"] = "continue"
    """continue: go on training, the next save may succeed; stop: end the run with status 1."""
    to_wandb: Literal["final", "kept", "none"] = "final"
    """With logger_name wandb, artifacts of: final/; also each step-* that is kept for good; nothing."""


@dataclass
class GuardArgs:
    """What a loss that is no number, or suddenly far too high, leads to."""

    max_skipped_steps: int = 10
    """Steps in a row without a finite loss and gradient, each skipped, after which the run ends."""
    spike_sigma: float = 6.0
    """Standard deviations above the last 128 losses from which a step is in logs/spikes.csv (0: off)."""


@dataclass
class Settings:
    """What one run needs; the keys of train_config.yaml."""

    config: Path | None = None
    """YAML with these settings (default: train_config.yaml with CUDA, configs/demo_train.yaml without)."""
    model_config: Path | None = None
    """YAML with LitGPT Config keys (default: model_config.yaml with CUDA, else configs/demo_model.yaml)."""
    out_dir: Path = Path("checkpoints")
    """Directory for step-*/, final/ and logs/."""
    overwrite: bool = False
    """Delete an earlier run in out_dir instead of refusing to touch it."""
    resume: str | bool = False
    """auto: the newest step-* in out_dir, or a fresh start; true: the newest, or an error; or a path."""
    initial_checkpoint_dir: Path | None = None
    """Checkpoint whose weights to start from; not together with resume."""
    data: dict = field(default_factory=lambda: {"class_path": "prepare_data.TextShards"})
    """class_path and init_args of a LitGPT data module."""
    dataset_dir: Path | None = None
    """Data directory (with train/ and val/) that replaces the one in data.init_args."""
    tokenizer_dir: Path = Path("data/tokenizer")
    """Directory with tokenizer.json, copied into every checkpoint (dataset_dir/tokenizer goes before it)."""
    wandb_dataset: str | None = None
    """W&B artifact to train on: entity/project/name:alias, or project/name:alias with WANDB_ENTITY."""
    wandb_artifacts_dir: Path = Path("artifacts")
    """Directory for downloaded artifacts."""
    precision: str | None = None
    """bf16-true, bf16-mixed or 32-true (default: bf16-true where CUDA has it, else 32-true)."""
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto"
    """Kind of device."""
    devices: int | str = "auto"
    """Devices on this machine; auto is every GPU, or one CPU process."""
    num_nodes: int = 1
    """Machines."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles on CUDA where Triton is installed, and runs eager elsewhere."""
    float32_matmul_precision: Literal["highest", "high"] = "high"
    """Of float32 products on CUDA: high is TF32, as `litgpt pretrain` has it; highest is float32 itself."""
    seed: int = 42
    """Seed of the weights and the order of the data."""
    optimizer: dict = field(default_factory=lambda: {"class_path": "torch.optim.AdamW"})
    """class_path and init_args of an optimizer. torch.optim.Muon leaves all but hidden matrices to AdamW."""
    weight_decay_on: Literal["matrices", "all"] = "matrices"
    """matrices: no decay on norms, biases, embeddings and routers; all: on every weight."""
    logger_name: Literal["csv", "tensorboard", "wandb"] = "csv"
    """Logger beside logs/csv/metrics.csv, which is always written."""
    progress: bool = True
    """Show a live bar on a terminal; otherwise LitGPT's line for each log step."""
    train: litgpt_args.TrainArgs = field(default_factory=lambda: litgpt_args.TrainArgs(max_norm=1.0))
    """Training. max_time counts from the start of the command; the run then saves and ends in time."""
    moe: BalanceArgs = field(default_factory=BalanceArgs)
    """Balance of the experts."""
    schedule: ScheduleArgs = field(default_factory=ScheduleArgs)
    """Learning rate."""
    checkpoints: CheckpointArgs = field(default_factory=CheckpointArgs)
    """Checkpoints."""
    guard: GuardArgs = field(default_factory=GuardArgs)
    """Numerical guard."""
    eval: litgpt_args.EvalArgs = field(default_factory=litgpt_args.EvalArgs)
    """Validation. max_new_tokens: length of the story written to logs/stories.csv each time (null: none)."""
    log: litgpt_args.LogArgs = field(default_factory=litgpt_args.LogArgs)
    """Names for the W&B logger."""

    places: ClassVar[dict[str, str]] = {}  # dotted key -> the file, variable or flag that set it


# --- settings: flag > environment variable > YAML > default -------------------------------------------------


def build_parser() -> Any:
    """Return the jsonargparse parser of `Settings`: types, defaults and help, all read from the dataclass."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="run_train.py", description=__doc__, exit_on_error=False)
    # until Python 3.13 `inspect` parses this whole file again for each class, half of the time of --help
    parse, ast.parse = ast.parse, functools.cache(ast.parse)
    try:
        parser.add_class_arguments(Settings)
    finally:
        ast.parse = parse
    return parser


def read_flags(argv: list[str]) -> dict[str, tuple[Any, str]]:
    """Return dotted key -> (text, place) for `--key value`, `--key=value`, `--flag` and `--no_flag`."""
    switches = {f.name for f in fields(Settings) if f.type is bool}
    tokens = iter(join_switches(argv, {f"--{name}" for name in switches}))
    given: dict[str, tuple[Any, str]] = {}
    for token in tokens:
        if not re.fullmatch(r"--\w+(\.\w+)*(=.*)?", token, re.DOTALL):
            raise ValueError(f"{token!r} is not a flag; write --key value (see --help)")
        name, equals, value = token[2:].partition("=")
        key = FLAG_TO_KEY.get(name, name)
        if not equals and name.removeprefix("no_") in switches:
            key, value = name.removeprefix("no_"), str(not name.startswith("no_"))
        elif not equals:
            value = next(tokens, None)
            if value is None:
                raise ValueError(f"--{name} needs a value (see --help)")
        group, _, rest = key.partition(".")
        if group in CLASS_KEYS and rest:
            # --optimizer.lr means --optimizer.init_args.lr, as on LitGPT's command line
            key = (
                f"{group}.{rest}"
                if rest == "class_path"
                else f"{group}.init_args.{rest.removeprefix('init_args.')}"
            )
            value = _scalar(name, value)
        given[f"{key}.class_path" if key in CLASS_KEYS else key] = (value, f"--{name}")
    return given


def _scalar(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--{name}: {text!r} is not readable as a YAML value; quote it") from None


def read_variables() -> dict[str, tuple[Any, str]]:
    """Return dotted key -> (text, place) for the environment variables that are set and not empty."""
    present = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    return {FLAG_TO_KEY.get(n.lower(), n.lower()): (value, f"${n}") for n, value in present.items()}


def read_yaml(path: Path) -> dict[str, tuple[Any, str]]:
    """Return dotted key -> (value, place) for a train_config.yaml."""
    from litgpt_moe.yaml_files import read_mapping

    groups = (*CLASS_KEYS, *(f"{key}.init_args" for key in CLASS_KEYS), *GROUPS)
    flat: dict[str, tuple[Any, str]] = {}

    def flatten(prefix: str, mapping: dict[Any, Any]) -> None:
        for name, value in mapping.items():
            key = f"{prefix}{name}"
            if key in groups[2:] and not isinstance(value, dict):
                raise ValueError(
                    f"{path}: {key} is {value!r}; write `key: value` lines under it, or remove it"
                )
            if key in groups and isinstance(value, dict):
                flatten(f"{key}.", value)
            else:
                flat[f"{key}.class_path" if key in CLASS_KEYS else key] = (value, str(path))

    flatten("", read_mapping(path))
    return flat


def load_settings(argv: list[str]) -> Settings:
    """Return the typed settings.

    Raises:
        ValueError: one line per problem, naming the place, the key, the value and the way out.
        OSError: a configuration file cannot be read.
    """
    from jsonargparse import ArgumentError, Namespace

    given = {**read_variables(), **read_flags(argv)}
    config, model_config = choose_configs(given)
    given = {**read_yaml(config), **given}
    given["config"], given["model_config"] = (str(config), "--config"), (str(model_config), "--model_config")
    parser = build_parser()
    types = {action.dest: action for action in parser._actions}
    values, problems = Namespace(), []
    for key, (value, place) in given.items():
        if key.split(".")[0] in CLASS_KEYS:  # typed in build_classes, where torch and litgpt are loaded
            values[key] = value
            continue
        try:
            if key not in types:  # jsonargparse lets an unknown key of {} pass
                raise ArgumentError(None, "unknown")
            # a group as a whole needs its defaults; a key without them is typed in a fortieth of the time
            one = Namespace({key: value}).as_dict()
            values[key] = parser.parse_object(one, defaults=key in GROUPS)[key]
            wanted = _wanted(types[key])  # jsonargparse lets null pass, and takes "" for this folder
            if (value is None and "null" not in wanted) or (value == "" and "a path" in wanted):
                raise ArgumentError(None, wanted)
        except ArgumentError:
            problems.append(f"{place}: {_wrong(key, value, types)}")
    if problems:
        raise ValueError("\n".join(problems))
    try:
        typed = parser.instantiate_classes(parser.parse_object(values.as_dict()))
    except (ArgumentError, ValueError) as error:  # TrainArgs checks its warm-up itself
        keys = [key for key in given if key.rpartition(".")[2] in str(error)]
        places = dict.fromkeys(given[key][1] for key in keys) or [config]
        raise ValueError(f"{', '.join(map(str, places))}: {' '.join(str(error).split())}") from error
    settings = Settings(**{f.name: typed[f.name] for f in fields(Settings)})
    settings.places = {key: place for key, (_, place) in given.items()}
    return settings


def with_places(problems: list[str], settings: Settings) -> list[str]:
    """Return the problems, those that begin with a key after the file, variable or flag that set it."""
    keys = [re.match(r"[\w.]+(?= is )", problem) for problem in problems]
    places = [settings.places.get(key[0]) if key else None for key in keys]
    return [f"{place}: {text}" if place else text for place, text in zip(places, problems, strict=True)]


def _wrong(key: str, value: Any, types: dict[str, Any]) -> str:
    from moe_layers import MoEConfig

    if key not in types and key in MoEConfig.__dataclass_fields__:
        return f"unknown key {key}; it describes the model: set it in the file of --model_config"
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1)
        if key.rpartition(".")[2] in ("lr", "learning_rate"):  # train.min_lr is near, and never meant
            near = ["lr" if "lr" in types else "optimizer.init_args.lr"]
        return f"unknown key {key}; {f'did you mean {near[0]}?' if near else 'see --help for the keys'}"
    if key in GROUPS:
        return f"{key} is {value!r}; give one of its keys, as in --{key}.KEY VALUE"
    return f"{key} is {value!r}; it must be {_wanted(types[key])}"


def _wanted(action: Any) -> str:
    from litgpt_moe.yaml_files import type_words

    return type_words(getattr(action, "_typehint", None) or action.type)


def choose_configs(given: dict[str, tuple[Any, str]]) -> tuple[Path, Path]:
    """Return the two YAML files of this run, and say on stderr when the demo's are taken."""
    config = Path(given["config"][0]) if "config" in given else None
    model_config = Path(given["model_config"][0]) if "model_config" in given else None
    for path in filter(None, (config, model_config)):
        if not path.is_file():  # read_mapping says so too, some seconds later: it comes with torch
            raise FileNotFoundError(
                f"{path}: no such configuration file; name one that is there, as those in configs/ are"
            )
    # a checkpoint's own two, the pair at the top, the demo's pair
    if config and not model_config:
        model_config = _twin(config, "train", "model")
    elif model_config and not config:
        config = _twin(model_config, "model", "train")
    if model_config is None and not _has_cuda():
        model_config, demo = prepare_data.DEMO_MODEL, True
        note_once(
            "No CUDA and no model config named: training the small demo model on the CPU "
            "(MoE-200M all the same: --model_config model_config.yaml)."
        )
    else:
        model_config, demo = model_config or ROOT / "model_config.yaml", False
    config = config or (DEMO_TRAIN if demo else ROOT / "train_config.yaml")
    here = Path.cwd()  # what lies in it is told as a user would type it
    config, model_config = (
        p.relative_to(here) if p.is_relative_to(here) else p for p in (config, model_config)
    )
    note_once(f"Settings from {config} and {model_config}.")
    return config, model_config


def _twin(path: Path, word: str, other: str) -> Path | None:
    twin = path.with_name(path.name.replace(word, other))
    return twin if twin != path and twin.is_file() else None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# --- checks: everything that can be known before the first file is written ----------------------------------


@dataclass
class Run:
    """A checked run: what `train` hands to LitGPT."""

    settings: Settings
    config: "MoEConfig"
    data: Any  # a LitGPT data module, of whatever class the settings name
    optimizer: dict[str, Any]
    precision: str
    devices: int
    resume: Path | None = None
    """The lit_model.pth to continue from."""
    initial: Path | None = None
    """The lit_model.pth whose weights to start from."""
    start_step: int = 0
    demo_data: bool = False
    """Whether there is no text at all yet, so that the demo stories are to be written."""
    started: float = field(default_factory=time.monotonic)
    """When the command began, on the clock of time.monotonic; train.max_time counts from there."""

    @property
    def tokens_per_step(self) -> int:
        return self.settings.train.global_batch_size * self.block_size

    @property
    def n_steps(self) -> int:
        return self.settings.train.max_tokens // self.tokens_per_step

    @property
    def block_size(self) -> int:
        return self.settings.train.max_seq_length or self.config.block_size

    @property
    def is_demo_vocabulary(self) -> bool:
        return self.config.padded_vocab_size == DEMO_VOCAB


def check_run(settings: Settings) -> Run:
    """Return the run that the settings describe.

    Raises:
        ValueError: every problem at once, one line each.
    """
    from moe_layers import MoEConfig

    problems: list[str] = []
    config = _collect(problems, MoEConfig.from_file, settings.model_config)
    precision, devices = _collect(problems, choose_device, settings) or (None, 1)
    problems += launcher_problems(devices * settings.num_nodes)
    problems += train_problems(settings, config.block_size if config else None, devices * settings.num_nodes)
    data, optimizer = _collect(problems, build_classes, settings) or (None, None)
    if is_main_process() and (live := run_lock(settings.out_dir).problem()):
        raise ValueError(live)  # what lies there is changing
    resume = _collect(problems, find_resume, settings)
    if problems:
        raise ValueError("\n".join(with_places(problems, settings)))
    initial = _collect(problems, find_initial, settings, config)
    run = Run(settings, config, data, optimizer, precision, devices, resume, initial)
    if is_own_data(data):
        problems += share_with_data(settings, data)
        # only where nobody named a folder: a mistyped one must not be filled with stories
        is_default = Path(data.train_data_path).parent == DATA_DIR
        run.demo_data = is_default and settings.dataset_dir is None and not has_text(data)
    problems += tokenizer_problems(run) + memory_problems(run) + out_dir_problems(run)
    if resume:
        run.start_step = _collect(problems, resume_step, run) or 0
    if problems:
        raise ValueError("\n".join(with_places(problems, settings)))
    # what runs is what is saved: whole steps, and the device's own precision
    settings.train.max_tokens = run.n_steps * run.tokens_per_step
    settings.train.log_interval = min(
        settings.train.log_interval, run.n_steps
    )  # a short run logs its loss too
    settings.precision, settings.devices = precision, devices
    return run


def _collect(problems: list[str], function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, or None with its message added to `problems`."""
    try:
        return function(*args)
    except (ValueError, OSError) as error:
        problems.extend(str(error).splitlines())
        return None


def choose_device(settings: Settings) -> tuple[str, int]:
    """Return the precision and the number of devices on this machine."""
    import torch

    kind = settings.accelerator
    cuda = torch.cuda.is_available() and kind in ("auto", "cuda", "gpu")
    if kind in ("cuda", "gpu") and not cuda:
        raise ValueError(f"accelerator is {kind} but this torch sees no CUDA device; use accelerator: cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("accelerator is mps but this machine has none; use accelerator: cpu")
    present = torch.cuda.device_count() if cuda else None
    devices = settings.devices
    devices = (present or 1) if devices in ("auto", "-1", -1) else devices
    if not str(devices).isdecimal() or int(devices) < 1:
        raise ValueError(f"devices is {settings.devices!r}; choose auto or a number of 1 or more")
    if present is not None and int(devices) > present:
        raise ValueError(f"devices is {devices} but this machine has {present} CUDA device(s)")
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = settings.precision or ("bf16-true" if has_bf16 else "32-true")
    # no fp16: LitGPT's fused AdamW and its clipping do not work with the loss scaling that fp16 needs
    choices = ("32-true", "bf16-true", "bf16-mixed")
    if precision not in choices:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(choices)}")
    if precision.startswith("bf16") and cuda and not has_bf16:
        raise ValueError(f"precision is {precision}, which this GPU lacks; use 32-true")
    if cuda and sys.platform == "win32" and int(devices) * settings.num_nodes > 1:
        raise ValueError("several GPUs need NCCL, which Windows lacks; use devices: 1, or Linux (WSL 2)")
    if cuda and int(devices) * settings.num_nodes > 1 and str(settings.optimizer).find("Muon") >= 0:
        raise ValueError("torch.optim.Muon needs whole matrices, which FSDP splits; use devices: 1 or AdamW")
    return precision, int(devices)


def train_problems(settings: Settings, block_size: int | None, world_size: int) -> list[str]:
    """Return one sentence per training setting that is out of range, ignored by LitGPT, or does not fit."""
    problems = []
    for key, lowest in LOWEST.items():
        value = functools.reduce(getattr, key.split("."), settings)
        highest = 2**32 - 1 if key == "seed" else 10**15
        if value is not None and not lowest <= value <= highest and value != float("inf"):
            above = f", up to {highest}" if value > highest else ""
            problems.append(f"{key} is {value}; choose {lowest} or more{above}")
    if not settings.train.max_norm:
        problems.append(
            "train.max_norm is null or 0; LitGPT needs a number above 0 (1.0 is usual, .inf is off)"
        )
    if settings.schedule.decay_fraction > 1:
        problems.append(f"schedule.decay_fraction is {settings.schedule.decay_fraction}; choose 0 to 1")
    if settings.schedule.warmup_tokens is not None and settings.train.lr_warmup_fraction:
        problems.append("schedule.warmup_tokens and train.lr_warmup_fraction exclude each other; drop one")
    problems += ignored_problems(settings)
    steps = settings.train.lr_warmup_steps or 0
    n_tokens = settings.train.global_batch_size * (settings.train.max_seq_length or block_size or 1)
    problems = problems or batch_problems(settings.train, block_size, world_size)
    if not problems and steps * n_tokens > (settings.train.max_tokens or 0):
        note_once(
            f"Warning: train.lr_warmup_steps is {steps} but the run has "
            f"{(settings.train.max_tokens or 0) // n_tokens} steps: the learning rate never gets to its top."
        )
    return problems


def ignored_problems(settings: Settings) -> list[str]:
    """Return one sentence per setting that LitGPT takes and then never reads in pretraining."""
    train = settings.train
    unread = {
        "train.epochs": (train.epochs, "use train.max_tokens"),
        "train.max_steps": (train.max_steps, "use train.max_tokens"),
    }
    problems = [
        f"{key} is {value}, which LitGPT ignores in pretraining; {hint}"
        for key, (value, hint) in unread.items()
        if value is not None
    ]
    if settings.eval.evaluate_example != "first":
        problems.append("eval.evaluate_example is for finetuning; remove it")
    is_wandb = settings.logger_name == "wandb"
    for name, value in asdict(settings.log).items():
        is_read = is_wandb and name in ("project", "run", "group")
        if value != getattr(litgpt_args.LogArgs(), name) and not is_read:
            problems.append(f"log.{name} is {value}, which logger_name {settings.logger_name} does not read")
    if settings.checkpoints.to_wandb != CheckpointArgs.to_wandb and not is_wandb:
        problems.append(f"checkpoints.to_wandb needs logger_name wandb; it is {settings.logger_name}")
    return problems


def batch_problems(train: Any, block_size: int | None, world_size: int) -> list[str]:
    """Return one sentence per size that does not divide or fit another."""
    problems = []
    unit, length = train.micro_batch_size * world_size, train.max_seq_length or block_size
    if train.global_batch_size % unit:
        problems.append(
            f"train.global_batch_size is {train.global_batch_size}, not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} times {world_size} device(s); choose a multiple of {unit}"
        )
    if block_size is None:  # the model config has problems of its own
        return problems
    if not 1 <= length <= block_size:
        problems.append(
            f"train.max_seq_length is {length} but the model's block_size is {block_size}; "
            f"choose 1 to {block_size}"
        )
    elif train.max_tokens is None or train.max_tokens < train.global_batch_size * length:
        problems.append(
            f"train.max_tokens is {train.max_tokens}, less than one step of {train.global_batch_size} x "
            f"{length} = {train.global_batch_size * length} tokens; raise it or lower train.global_batch_size"
        )
    return problems


def build_classes(settings: Settings) -> tuple[Any, dict[str, Any]]:
    """Return the data module, built, and the optimizer's class_path and init_args, typed and tried out."""
    import torch
    from litgpt.data import DataModule

    for key, base in (("data", DataModule), ("optimizer", torch.optim.Optimizer)):
        with contextlib.suppress(ValueError):  # `_build` tells it
            drop_arguments(settings, key, base)
    problems: list[str] = []
    data = dict(settings.data)
    if settings.dataset_dir:
        paths = {f"{split}_data_path": str(settings.dataset_dir / split) for split in prepare_data.SPLITS}
        data["init_args"] = {**(data.get("init_args") or {}), **paths}
    module = _collect(problems, _build, "data", data, DataModule)
    # tried on one weight (a matrix, for Muon), so that a value it refuses is told before anything is written
    weight = [torch.nn.Parameter(torch.zeros(2, 2))]
    optimizer = _collect(problems, _build, "optimizer", settings.optimizer, torch.optim.Optimizer, weight)
    if problems:
        raise ValueError("\n".join(f"{_place(settings, problem)}: {problem}" for problem in problems))
    kind, values = type(optimizer), settings.optimizer.get("init_args") or {}
    init_args = {name: optimizer.defaults.get(name, value) for name, value in values.items()}
    return module, {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": init_args}


def _place(settings: Settings, problem: str) -> str:
    """Return what set the class, or the arguments of it, that a problem of `_build` is about."""
    key, _, rest = problem.partition(": ")
    group = key.partition(".")[0]
    prefix, class_path = f"{group}.init_args.", f"{group}.class_path"
    given = {name.removeprefix(prefix): p for name, p in settings.places.items() if name.startswith(prefix)}
    named = [given[word] for word in re.findall(r"\w+", rest) if word in given][:1]
    if named or "init_args" not in problem:
        return ", ".join(named) or settings.places.get(class_path, str(settings.config))
    return ", ".join(sorted(set(given.values()))) or str(settings.config)


def drop_arguments(settings: Settings, key: str, base: type) -> None:
    """Leave out the YAML's init_args that a class chosen by a flag does not know, and say so.

    They were written for the YAML's class. What both know (lr, weight_decay) stays, and so do flags.
    """
    spec, config = getattr(settings, key), str(settings.config)
    types = _arguments(key, spec, base)[2]
    if settings.places.get(f"{key}.class_path", config) == config:
        return
    init_args = spec.get("init_args") or {}
    written = [name for name in init_args if settings.places.get(f"{key}.init_args.{name}") == config]
    if foreign := [name for name in written if name not in types]:
        names = ", ".join(foreign)
        note_once(f"{spec['class_path']} has no {names}: left out what {config} says under {key}.init_args.")
        kept = {name: value for name, value in init_args.items() if name not in foreign}
        setattr(settings, key, {**spec, "init_args": kept})


def _arguments(key: str, spec: dict[str, Any], base: type) -> tuple[type, Any, dict[str, Any]]:
    """Return the class that a class_path names, a parser of its arguments, and these by name."""
    from jsonargparse import ArgumentParser

    package, usual = CLASS_KEYS[key]
    path = spec.get("class_path")
    if not isinstance(path, str) or not path:
        raise ValueError(f"{key}.class_path is {path!r}; name a class, such as {usual}")
    module_name, _, name = (path if "." in path else f"{package}.{path}").rpartition(".")
    try:
        if module_name.partition(".")[0] in sys.stdlib_module_names:  # importing some of them does things
            raise TypeError(f"Python's own modules hold no {base.__name__}")
        kind = getattr(importlib.import_module(module_name), name)
        if not issubclass(kind, base):
            raise TypeError(f"not a {base.__name__}")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{key}.class_path is {path}, which cannot be used: {error}; name another, such as {usual}"
        ) from None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip={"params"} if key == "optimizer" else set())
    return kind, parser, {action.dest: action for action in parser._actions}


def _build(key: str, spec: dict[str, Any], base: type, *args: Any) -> Any:
    """Return the object that a class_path and its init_args describe; ValueError names the wrong one."""
    from jsonargparse import ArgumentError

    kind, parser, types = _arguments(key, spec, base)
    path, init_args = spec.get("class_path"), spec.get("init_args") or {}
    typed = {}
    for name, value in init_args.items():
        try:
            typed[name] = parser.parse_object({name: value}, defaults=False)[name]
        except ArgumentError:
            raise ValueError(f"{key}.init_args: {_wrong(name, value, types)}") from None
    try:
        return kind(*args, **typed)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{key}: {path} does not take these init_args: {error}") from None


def find_resume(settings: Settings) -> Path | None:
    """Return the lit_model.pth to continue from, or None for a fresh start."""
    from moe_layers import CHECKPOINT_FILE, find_checkpoint, verify_checkpoint

    resume = str(settings.resume)
    if resume.lower() in ("false", "none", ""):
        return None
    if settings.overwrite:
        raise ValueError("resume and overwrite exclude each other; drop one")
    if settings.initial_checkpoint_dir:
        raise ValueError("resume and initial_checkpoint_dir exclude each other; drop one")
    out_dir = settings.out_dir if resume.lower() in ("auto", "true") else Path(resume)
    newest_first = checkpoints_of(out_dir)
    if out_dir is not settings.out_dir and not newest_first:
        verify_checkpoint(checkpoint_dir := find_checkpoint(out_dir))
        return checkpoint_dir / CHECKPOINT_FILE
    for checkpoint_dir in newest_first:
        if (flaw := checkpoint_flaw(checkpoint_dir)) is None:
            return checkpoint_dir / CHECKPOINT_FILE
        note_once(f"Skipping {checkpoint_dir}: {flaw}")
    if resume.lower() != "auto":  # somebody counts on a checkpoint that is not there
        raise FileNotFoundError(
            f"resume is {resume} but {out_dir} holds no whole step-* or final; use resume: auto"
        )
    note_once(f"No checkpoint to resume from in {out_dir}: starting from the beginning.")
    return None


def checkpoints_of(out_dir: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, whole or not, the one of the last step first."""
    steps = {path: int(path.name[5:]) for path in out_dir.glob("step-*") if path.name[5:].isdecimal()}
    if (final := out_dir / "final").is_dir():
        steps[final] = final_step(final)
    return sorted(steps, key=lambda path: (steps[path], path.name), reverse=True)


def final_step(final: Path) -> int:
    """Return the step that its checkpoint.json records, -1 without one, or if it is damaged."""
    from moe_layers import MAX_RECORD_BYTES, RECORD_FILE

    record = final / RECORD_FILE
    try:
        content = json.loads(record.read_bytes()) if record.stat().st_size <= MAX_RECORD_BYTES else {}
        return step if type(step := content["step"]) is int else -1
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return -1


def checkpoint_flaw(checkpoint_dir: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from, None if it is whole; its name is left to the caller."""
    from moe_layers import CHECKPOINT_FILE, read_state, verify_checkpoint

    if not (checkpoint_dir / "model_config.yaml").is_file():  # LitGPT, which has no digests, writes it last
        return "it was not written to its end"
    try:
        verify_checkpoint(checkpoint_dir)
        check_state(read_state(checkpoint_dir / CHECKPOINT_FILE), checkpoint_dir)
    except (ValueError, OSError) as error:
        reason = str(error).removeprefix(str(checkpoint_dir)).lstrip(f": {os.sep}")
        return re.split("; (?:use|resume from) another", reason)[0]
    return None


def find_initial(settings: Settings, config: "MoEConfig") -> Path | None:
    """Return the lit_model.pth whose weights to start from, which must fit the model, or None."""
    from moe_layers import CHECKPOINT_FILE, check_weights, find_checkpoint, verify_checkpoint

    if settings.initial_checkpoint_dir is None:
        return None
    verify_checkpoint(checkpoint_dir := find_checkpoint(settings.initial_checkpoint_dir))
    check_weights(checkpoint_dir, config)
    return checkpoint_dir / CHECKPOINT_FILE


def resume_step(run: Run) -> int:
    """Return the optimizer steps done in the checkpoint; ValueError if this run cannot continue it."""
    from moe_layers import check_weights, has_selection_bias, read_state

    checkpoint_dir = run.resume.parent
    check_weights(checkpoint_dir, run.config)
    state = read_state(run.resume)
    check_state(state, checkpoint_dir, run)
    step = state["step_count"]
    if run.settings.moe.bias_update_rate and not has_selection_bias(state["model"]):
        raise ValueError(
            f"{checkpoint_dir} was trained without a selection bias; drop moe.bias_update_rate, or start "
            "from its weights with --initial_checkpoint_dir"
        )
    then = {key: value for key, (value, _) in read_yaml(checkpoint_dir / "train_config.yaml").items()}
    train = run.settings.train
    for key, value in (
        ("train.global_batch_size", train.global_batch_size),
        ("train.max_seq_length", train.max_seq_length),
        ("optimizer.class_path", run.optimizer["class_path"]),
        ("weight_decay_on", run.settings.weight_decay_on),
    ):
        # a class has several paths: torch.optim.AdamW is torch.optim.adamw.AdamW too
        names = [str(text).rpartition(".")[2] for text in (then.get(key, value), value)]
        if names[0] != names[1]:
            raise ValueError(f"{checkpoint_dir}: {key} was {then[key]}, now {value}; resume with what it was")
    if step > run.n_steps:
        raise ValueError(f"{checkpoint_dir} is past the {run.n_steps} steps of train.max_tokens; raise that")
    if step == run.n_steps:
        note_once(f"{checkpoint_dir} is at the last step of train.max_tokens; to train on, raise that.")
    total = then.get("train.max_tokens")  # of a checkpoint of LitGPT's own, anything
    n_steps = total // run.tokens_per_step if isinstance(total, int) else run.n_steps
    if n_steps != run.n_steps and run.settings.schedule.name != "constant":
        note_once(
            f"Warning: {checkpoint_dir} is of a run of {n_steps:,} steps, now train.max_tokens makes it "
            f"{run.n_steps:,}; the learning rates so far followed the old total, the rest follows the new."
        )
    return step


# --- the training state of a checkpoint: checked whole before any of it is used -----------------------------


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_loss_list(value: Any) -> bool:
    return type(value) is list and len(value) <= Guard.WINDOW and all(map(_is_finite, value))


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


FIGURES: dict[str, Callable[[Any], bool]] = {  # what `Monitor.save` adds is under run and rng
    "step_count": _is_count,
    "iter_num": _is_count,
    "run.time_s": lambda value: _is_finite(value) and value >= 0,
    "run.told_step": lambda value: type(value) is int and (value == -1 or _is_count(value)),
    "run.n_rows": _is_count,
    "run.n_spikes": _is_count,
    "run.n_loads": _is_count,
    "run.n_stories": _is_count,
    "run.guard.n_skipped": _is_count,
    "run.guard.n_in_a_row": _is_count,
    "run.guard.losses": _is_loss_list,
}


def check_state(state: dict[str, Any], checkpoint_dir: Path, run: Run | None = None) -> None:
    """Check that training can go on from `state`; with a run, that this run can.

    Raises:
        ValueError: it is not as it was saved, or holds weights alone.
    """
    if "step_count" not in state:
        raise ValueError(f"{checkpoint_dir} holds weights alone; start from it with --initial_checkpoint_dir")
    is_ours = "run" in state or "rng" in state or (checkpoint_dir / "checkpoint.json").exists()
    parts = [figure_problems(state, checkpoint_dir, is_ours), loader_problems(state, run)]
    if is_ours:  # a checkpoint of LitGPT's own loop has neither
        parts += [rng_problems(state), router_problems(state)]
    parts.append(optimizer_problems(state, run))
    if (problem := next(itertools.chain(*parts), None)) is not None:
        raise ValueError(
            f"{checkpoint_dir}: its training state is damaged: {problem}; resume from another step-*, "
            f"or start from its weights with --initial_checkpoint_dir {checkpoint_dir}"
        )


def _part(state: Any, key: str) -> Any:
    """Return what is at a dotted key of nested dicts, None if nothing is."""
    for name in key.split("."):
        # no kind of dict whose methods a file could hide behind values of its own
        state = state.get(name) if type(state) is dict else None
    return state


def _wrong_part(state: Any, key: str) -> str:
    text = " ".join(repr(_part(state, key)).split())
    return f"{key} is {text if len(text) < 60 else text[:57] + '...'}"


def figure_problems(state: dict[str, Any], checkpoint_dir: Path, is_ours: bool) -> Iterator[str]:
    """Yield what is wrong with the counts and figures of a training state."""
    for key, is_right in FIGURES.items():
        if (is_ours or not key.startswith("run.")) and not is_right(_part(state, key)):
            yield _wrong_part(state, key)
    named = re.fullmatch(r"step-(\d+)", checkpoint_dir.name)
    recorded = read_json(checkpoint_dir / "checkpoint.json").get("step")
    for step in (int(named[1]) if named else None, recorded):
        if step is not None and step != state["step_count"]:
            yield f"step_count is {state['step_count']}, and the checkpoint that of step {step!r:.20}"
    n_skipped = _part(state, "run.guard.n_skipped") or 0
    if n_skipped > state["step_count"] or (_part(state, "run.guard.n_in_a_row") or 0) > n_skipped:
        yield _wrong_part(state, "run.guard")


def loader_problems(state: dict[str, Any], run: Run | None) -> Iterator[str]:
    """Yield what is wrong with the position in the data; other data modules may keep what they like."""
    is_own = run is not None and is_own_data(run.data)
    for name in ("epoch", "n_used", "n_sequences", "n_batches"):
        value = _part(state, f"train_dataloader.{name}")
        if not _is_count(value) and (value is not None or (is_own and name != "n_batches")):
            yield _wrong_part(state, f"train_dataloader.{name}")
    n_sequences = _part(state, "train_dataloader.n_sequences")
    if n_sequences is not None and not (_part(state, "train_dataloader.n_used") or 0) < n_sequences:
        yield _wrong_part(state, "train_dataloader")


def rng_problems(state: dict[str, Any]) -> Iterator[str]:
    """Yield which state of a random generator cannot be set, found by setting it in one of no use."""
    import numpy as np
    import torch

    def cuda(states: list[torch.Tensor]) -> None:
        if type(states) is not list or any(s.dtype != torch.uint8 or s.ndim != 1 for s in states):
            raise ValueError

    for name, set_state in (
        ("python", lambda value: random.Random().setstate(python_state(value))),
        ("numpy", lambda value: np.random.RandomState().set_state(numpy_state(value))),
        ("torch", lambda value: torch.Generator().set_state(value)),
        ("cuda", cuda),
    ):
        try:
            set_state(_part(state, f"rng.{name}"))
        except Exception:  # each generator has errors of its own for what it does not take
            yield _wrong_part(state, f"rng.{name}")


def router_problems(state: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the tokens and losses that each MoE layer counted since the last row."""
    import torch

    counts, weights = _part(state, "run.router"), state.get("model")
    gates = dict.items(weights) if isinstance(weights, dict) else ()
    shapes = [gate.shape[:1] for name, gate in gates if str(name).endswith(".mlp.gate.weight")]
    if type(counts) is not list or len(counts) != len(shapes):
        yield _wrong_part(state, "run.router")
        return
    for layer, (count, shape) in enumerate(zip(counts, shapes, strict=True)):
        load, sums = _part(count, "load"), _part(count, "sums")
        if (
            not (isinstance(load, torch.Tensor) and isinstance(sums, torch.Tensor))
            or (load.dtype, load.shape) != (torch.int64, shape)
            or (sums.dtype, sums.shape) != (torch.float32, (4,))
            or bool((load < 0).any())
            or not sums.isfinite().all()
        ):
            yield f"run.router.{layer} is not what a layer counts"


def meta_model(config: "MoEConfig") -> Any:
    """Return the model without its values: names and shapes alone."""
    import torch
    from litgpt import GPT

    with torch.device("meta"):
        return GPT(config)


MOMENTS = {  # what torch's optimizers keep of a weight
    "Muon": {"momentum_buffer"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Adam": {"step", "exp_avg", "exp_avg_sq"},
}


def optimizer_problems(state: dict[str, Any], run: Run | None) -> Iterator[str]:
    """Yield what is wrong with the optimizer's state; with a run, whether it is one of that optimizer."""
    kept, groups = _part(state, "optimizer.state"), _part(state, "optimizer.param_groups")
    if type(kept) is not dict:
        yield _wrong_part(state, "optimizer.state")
    elif type(groups) is not list or any(type(_part(group, "params")) is not list for group in groups):
        yield _wrong_part(state, "optimizer.param_groups")
    elif run is not None:
        model = meta_model(run.config)
        if run.settings.train.tie_embeddings:  # one weight less
            model.transformer.wte.weight = model.lm_head.weight
        optimizer = make_optimizer(run.settings, model, run.optimizer)
        names = [name for group in groups for name in group["params"]]
        sizes = [len(group["params"]) for group in groups]
        wanted = [len(group["params"]) for group in optimizer.param_groups]
        if any(type(name) not in (int, str) for name in names) or len(set(names)) < len(names):
            yield "optimizer.param_groups name a weight twice, or none"
        elif odd := [name for name, tensor in tensors_of(groups) if tensor.numel() != 1]:
            yield f"optimizer.param_groups.{odd[0]} is no setting"  # a tensor is neither true nor false
        elif sizes != wanted:
            yield f"optimizer.param_groups have {sizes} weights, not {wanted}"
        elif not set(kept) <= set(names) or len(kept) not in (0, len(names)):
            yield f"optimizer.state is of {len(kept)} weights, not {len(names)}"
        else:
            n_steps = state["step_count"] - (_part(state, "run.guard.n_skipped") or 0)
            yield from moment_problems(kept, names, optimizer, n_steps)
        if name := non_finite(state):
            yield f"{name} holds values that are no numbers"


def moment_problems(kept: dict[Any, Any], names: list[Any], optimizer: Any, n_steps: int) -> Iterator[str]:
    """Yield which weight's moments are not what `optimizer` has after `n_steps`. `names` are in its order."""
    import torch

    parts = getattr(optimizer, "parts", [optimizer])
    groups = [(type(part).__name__, group) for part in parts for group in part.param_groups]
    weights = [(kind, group, weight) for kind, group in groups for weight in group["params"]]
    keeps_none = not kept and {kind for kind, _ in groups} == {"SGD"}  # which has no moments without momentum
    if bool(kept) != bool(n_steps) and not keeps_none:
        yield f"optimizer.state is of {len(kept)} weights after {n_steps} steps"
    for name, (kind, group, weight) in zip(names, weights if kept else [], strict=False):
        moments = kept[name]
        wanted = MOMENTS.get(kind) and MOMENTS[kind] | ({"max_exp_avg_sq"} if group.get("amsgrad") else set())
        if type(moments) is not dict or (wanted and set(moments) != wanted):
            yield f"optimizer.state.{name!r:.60} is not what {kind} keeps"
            continue
        for key, value in moments.items() if wanted else ():
            is_tensor = isinstance(value, torch.Tensor) and value.is_floating_point()
            if key == "step":
                is_right = is_tensor and value.numel() == 1 and value.item() == n_steps
            else:
                is_right = is_tensor and value.shape == weight.shape
            if not is_right or (key.endswith("_sq") and bool((value < 0).any())):
                yield f"optimizer.state.{name!r:.60}.{key} is not what {kind} has after {n_steps} steps"


def is_own_data(data: Any) -> bool:
    return isinstance(data, prepare_data.TextShards)


def share_with_data(settings: Settings, data: Any) -> list[str]:
    """Give our data module the run's tokenizer and seed; return a sentence if it names another tokenizer."""
    named = settings.data.get("init_args", {})
    if "seed" not in named:
        data.seed = settings.seed
    given = Path(named.get("tokenizer_dir", settings.tokenizer_dir))
    data.tokenizer_dir = settings.tokenizer_dir
    if given == settings.tokenizer_dir:
        return []
    return [
        f"data.init_args.tokenizer_dir is {given} but tokenizer_dir is {settings.tokenizer_dir}; drop one"
    ]


def has_text(data: Any) -> bool:
    """Return whether the data directory holds shards or raw text to make them from."""
    folder = Path(data.train_data_path)
    return (folder.parent / prepare_data.MANIFEST).is_file() or any(folder.glob("*.txt"))


def tokenizer_problems(run: Run) -> list[str]:
    """Return a sentence if the tokenizer in place is unusable or has more pieces than the model has rows."""
    folder, rows = run.settings.tokenizer_dir, run.config.padded_vocab_size
    if folder.exists() and not folder.is_dir():
        return [f"tokenizer_dir is {folder}, a file; name the folder that has tokenizer.json"]
    if not (folder / "tokenizer.json").is_file():
        return []  # prepare_data makes or fetches one, or says why it cannot
    try:
        size = prepare_data.read_tokenizer(folder).vocab_size
    except (ValueError, OSError) as error:
        return [str(error)]
    if size <= rows:
        return []
    return [
        f"{folder}: the tokenizer has {size} pieces but padded_vocab_size in {run.settings.model_config} "
        f"is {rows}; "
        "choose a larger model (--model_config configs/moe_30m_debug.yaml) or another --tokenizer_dir"
    ]


def warn_of_unused_rows(run: Run) -> None:
    """Tell of a new model with more than twice as many rows as the tokenizer has pieces."""
    folder, rows = run.settings.tokenizer_dir, run.config.padded_vocab_size
    is_new = run.resume is None and run.initial is None
    if not is_new or not (folder / "tokenizer.json").is_file():
        return
    size = prepare_data.read_tokenizer(folder).vocab_size
    if 2 * size < rows:
        note_once(
            f"Warning: {folder}: the tokenizer has {size} pieces but padded_vocab_size in "
            f"{run.settings.model_config} is {rows}: the other rows take memory and time in each step and "
            f"are never used; set that and vocab_size to {size}."
        )


def memory_problems(run: Run) -> list[str]:
    """Return a sentence if the weights and their gradients alone are more than the machine's memory."""
    import psutil
    import torch

    from moe_layers import count_parameters

    total, _ = count_parameters(run.config)
    needed = 2 * total * (2 if run.precision.endswith("16-true") else 4)
    has = min([psutil.virtual_memory().total, *cgroup_limits()])
    if torch.cuda.is_available() and run.settings.accelerator in ("auto", "cuda", "gpu"):
        has = torch.cuda.mem_get_info()[1] * run.devices * run.settings.num_nodes
    if needed <= has:
        return []
    return [
        f"{run.settings.model_config}: {total:,} parameters and their gradients need {needed / 1e9:.4g} GB "
        f"of memory but there are {has / 1e9:.4g}; choose a smaller model"
    ]


def cgroup_limits(root: Path = Path("/")) -> list[int]:
    """Return the limits of memory in bytes that a container or a service gives this process (Linux)."""
    limits = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)  # "0::/a/b" in version 2, "9:memory:/a/b" in 1
            if controllers and "memory" not in controllers.split(","):
                continue
            top, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
            group = Path(path.strip("/"))
            # each group above holds too; a container sees its own as the top, whatever the path says
            for part in (group, *group.parents):
                file = root / "sys/fs/cgroup" / top / part / name
                with contextlib.suppress(OSError, ValueError):  # "max": none
                    limits.append(int(file.read_text(encoding="utf-8")))
    return limits


def out_dir_problems(run: Run) -> list[str]:
    """Return a sentence if the place holds another run, cannot be written, or is too full."""
    out_dir = run.settings.out_dir
    if run.initial and run.settings.overwrite and out_dir.resolve() in run.initial.resolve().parents:
        return [
            f"initial_checkpoint_dir lies in {out_dir}, which --overwrite deletes; choose another --out_dir"
        ]
    earlier = [path for path in (out_dir / "final", *sorted(out_dir.glob("step-*"))) if path.exists()]
    if earlier and run.resume is None and not run.settings.overwrite:
        return [_way_on(out_dir, earlier)]
    parent = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return [f"out_dir is {out_dir}, but {parent} cannot be written; choose another --out_dir"]
    needed, free = checkpoint_bytes(run), shutil.disk_usage(parent).free
    if free < needed:
        return [f"{out_dir}: a checkpoint needs {needed:,} bytes but {free:,} are free; make room there"]
    n_saves = 1 + (run.n_steps - run.start_step) // (run.settings.train.save_interval or run.n_steps)
    whole = needed * min(n_saves, (run.settings.checkpoints.keep_last or n_saves) + 2)
    if free < whole:
        note_once(
            f"Warning: all checkpoints of this run need {whole:,} bytes but {free:,} are free in {out_dir}; "
            "set checkpoints.keep_last, raise train.save_interval or make room."
        )
    return []


def _way_on(out_dir: Path, earlier: list[Path]) -> str:
    """Return the sentence on a place that holds a run already."""
    if any(checkpoint_flaw(path) is None for path in checkpoints_of(out_dir)):
        way = "continue it with --resume auto"
    else:
        way = "none of it can be continued"
    return (
        f"{out_dir} already holds a run ({earlier[0].name}); {way}, "
        "choose another --out_dir, or delete it with --overwrite"
    )


def checkpoint_bytes(run: Run) -> int:
    """Return the size of one checkpoint: the weights and AdamW's two moments."""
    from moe_layers import count_parameters

    total, _ = count_parameters(run.config)
    return 3 * total * (2 if run.precision.endswith("16-true") else 4)


# --- checkpoints: whole, or not there -----------------------------------------------------------------------


class Ending(Exception):
    """Raised between two steps, when everything is saved, to leave LitGPT's loop."""


class RunFailed(RuntimeError):
    """The run cannot go on; the text says why and what to do."""


class CheckpointWriter:
    """Writes checkpoint directories in the background: beside, synced, then renamed into place.

    A directory named step-* or final is whole at every moment. What a kill leaves has a name with a leading
    dot, and `tidy` removes it. Training waits for the copy to host memory alone.
    """

    def __init__(self, settings: Settings, tell: Callable[[str], None]) -> None:
        self.out_dir, self.args, self.tell = settings.out_dir, settings.checkpoints, tell
        # as text and now: a request to stop changes train.save_interval later
        self.settings_text = yaml.safe_dump(plain_settings(settings), sort_keys=False)
        self.on_saved: Callable[[Path, int], None] = lambda folder, step: None  # told of each, in the thread
        self.failure: str | None = None  # why the latest save failed
        self.lasting_s = 0.0  # how long the latest save took, writing included
        self.selection_bias = False  # whether stock LitGPT would refuse the weights
        self._host: dict[str, Any] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None

    def save(
        self, fabric: "Fabric", state: dict[str, Any], tokenizer_dir: Path, checkpoint_file: Path
    ) -> None:
        """Copy the state to host memory and begin to write it."""
        self.wait()  # for the buffers of the save before
        target = checkpoint_file.parent
        # through Fabric's strategy, which gives the whole state to `hold` on rank 0
        fabric.save(self._staging(target) / checkpoint_file.name, state)
        if fabric.global_rank == 0:
            config = state["model"].config
            write = functools.partial(self._write, target, state["step_count"], config, tokenizer_dir)
            self._thread = threading.Thread(target=write, name="checkpoint")
            self._thread.start()

    def hold(self, checkpoint: dict[str, Any]) -> None:
        """Copy `checkpoint`'s tensors to host memory, on CUDA into pinned buffers that all saves share."""
        import torch

        copies: dict[Any, torch.Tensor] = {}

        def copy(value: Any, name: str) -> Any:
            if isinstance(value, dict):
                return {key: copy(item, f"{name}.{key}") for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copy(item, f"{name}.{i}") for i, item in enumerate(value))
            if not isinstance(value, torch.Tensor):
                return value
            # tied weights are one tensor under two names, and stay so
            key = (value.data_ptr(), value.shape, value.dtype) if value.numel() else name
            if key not in copies:
                copies[key] = self._buffer(name, value).copy_(value.detach(), non_blocking=True)
            return copies[key]

        self._host = copy(checkpoint, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _buffer(self, name: str, like: "torch.Tensor") -> "torch.Tensor":
        import torch

        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
            self._buffers[name] = buffer
        return buffer

    def wait(self) -> None:
        """Return when the save in progress, if any, has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, target: Path, step: int, config: "MoEConfig", tokenizer_dir: Path) -> None:
        """Write the directory and rename it into place, or tell why not and leave nothing behind."""
        started, staging = time.perf_counter(), self._staging(target)
        needed, free = tensor_bytes(self._host) + 2**20, 0  # the small files and the zip's own lists
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)  # somebody may have moved it away
            free = shutil.disk_usage(self.out_dir).free
            if free < needed:
                raise OSError(errno.ENOSPC, "known before a byte is written")
            staging.mkdir(parents=True, exist_ok=True)
            self._fill(staging, step, config, tokenizer_dir)
            put_in_place(staging, target)
            self.failure, self.lasting_s = None, time.perf_counter() - started
            self.tell(f"Saved {target}")
            self._prune()
            self.on_saved(target, step)
        except (OSError, RuntimeError, ValueError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            if is_disk_full(error):
                if free >= needed:  # it filled up meanwhile
                    free = shutil.disk_usage(self.out_dir).free
                error = f"it needs {needed:,} bytes but {free:,} were free; make room on that disk"
            self.failure = f"{target} could not be saved: {error}"
            goes_on = "; training goes on" if self.args.on_full_disk == "continue" else ""
            self.tell(f"Warning: {self.failure}{goes_on}")

    def _fill(self, staging: Path, step: int, config: "MoEConfig", tokenizer_dir: Path) -> None:
        from litgpt.utils import copy_config_files, save_config

        if name := non_finite(self._host):
            raise ValueError(f"{name} holds values that are no numbers")
        files = {"lit_model.pth": write_state(self._host, staging / "lit_model.pth")}
        save_config(config, staging)
        (staging / "train_config.yaml").write_text(self.settings_text, encoding="utf-8")
        copy_config_files(tokenizer_dir, staging)
        write_record(staging, step, files, selection_bias=self.selection_bias)

    def _prune(self) -> None:
        """Delete the step-* that neither keep_last nor keep_every keeps; the newest always stays."""
        args, steps = self.args, sorted(self.out_dir.glob("step-*"))
        for path in steps[: -args.keep_last] if args.keep_last else []:
            number = path.name.removeprefix("step-")
            if number.isdecimal() and not is_kept(args, int(number)):
                doomed = self._staging(path)  # a kill amid the deletion must not leave half a step-*
                with contextlib.suppress(
                    OSError
                ):  # Windows, while somebody reads it: the next save tries again
                    path.rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)

    @staticmethod
    def _staging(target: Path) -> Path:
        return target.with_name(f".{target.name}.tmp")


def is_kept(args: CheckpointArgs, step: int) -> bool:
    """Return whether the step-* of `step` stays for good."""
    return args.keep_last is None or bool(args.keep_every and step % args.keep_every == 0)


class HashingFile:
    """A binary file that knows the SHA-256 and the number of bytes of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self.n_bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        self.n_bytes += memoryview(data).nbytes
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error  # torch.save tells of it as "unexpected pos"
            raise

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def write_state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write `state` to `path` and to the disk itself; return its bytes and SHA-256."""
    import torch

    with path.open("wb") as raw:
        file = HashingFile(raw)
        try:
            torch.save(state, file)
        except RuntimeError:
            raise file.error or sys.exception() from None
        raw.flush()
        os.fsync(raw.fileno())
    return {"bytes": file.n_bytes, "sha256": file.hexdigest()}


def write_record(
    folder: Path, step: int, files: dict[str, dict[str, Any]], selection_bias: bool = False
) -> None:
    """Bring every file in `folder` to the disk and list them all in its checkpoint.json.

    `files` has the entries of those that are on the disk already, as `write_state` returns them.
    """
    files, notes = dict(files), {"selection_bias": True} if selection_bias else {}
    for path in sorted(folder.iterdir()):
        if path.name not in files:  # lit_model.pth was hashed while it was written
            with path.open("rb+") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    with (folder / "checkpoint.json").open("w", encoding="utf-8") as file:
        json.dump({"format": 1, "step": step, **notes, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(folder)


def tensors_of(state: Any, name: str = "") -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield (dotted name, tensor) of a nested state."""
    import torch

    if isinstance(state, torch.Tensor):
        yield name.removeprefix("."), state
    elif isinstance(state, dict | list | tuple):
        for key, item in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors_of(item, f"{name}.{key}")


def tensor_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a nested state."""
    return sum(tensor.nbytes for _, tensor in tensors_of(state))


def non_finite(state: dict[str, Any]) -> str | None:
    """Return the name of the first weight or moment that is not a number, None if all are."""
    parts = {key: state[key] for key in ("model", "optimizer") if key in state}
    floats = ((name, tensor) for name, tensor in tensors_of(parts) if tensor.is_floating_point())
    return next((name for name, tensor in floats if not tensor.isfinite().all()), None)


def tidy(out_dir: Path, start_step: int) -> None:
    """Remove what a kill left half done in `out_dir`, and move steps after `start_step` out of the way."""
    for aside in out_dir.glob(".*.old"):  # moved away for a new one that may not have come
        target = aside.with_name(aside.name[1:].removesuffix(".old"))
        shutil.rmtree(aside, ignore_errors=True) if target.exists() else aside.rename(target)
    for staging in out_dir.glob(".*.tmp"):
        shutil.rmtree(staging, ignore_errors=True)
    for path in sorted(out_dir.glob("step-*")):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and int(number) > start_step:
            superseded = next(
                name
                for n in itertools.count()
                if not (name := path.with_name(f"superseded-{path.name}{f'.{n}' if n else ''}")).exists()
            )
            path.rename(superseded)
            note_once(f"{path} is not part of this run's history: renamed to {superseded.name}")


def run_lock(out_dir: Path) -> FolderLock:
    """Return what keeps a second run out of `out_dir`."""
    return FolderLock(out_dir, "run", "a run is live", "wait for it or choose another --out_dir")


# --- the end of a run before its time -----------------------------------------------------------------------


class StopSignals:
    """While active: the first signal asks for an end after this step, a second one leaves at once."""

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")  # Ctrl-C, Slurm and systemd, Slurm, Ctrl-Break

    def __init__(self) -> None:
        self.reason = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for name in self.NAMES:
            if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.reason:
            os._exit(128 + number)  # checkpoints are renamed when whole: there is nothing to break
        self.reason = signal.Signals(number).name
        text = f"\n{self.reason}: finishing this step and saving; once more leaves at once.\n"
        os.write(2, text.encode())  # print may be in use when the signal comes


class Guard:
    """Tells a step that must be skipped, or is worth a look, from its loss and the norm of its gradient."""

    WINDOW, FEWEST = 128, 32  # losses to compare with; OLMo-core's SkipStepOptimizer has 128 and 6 sigma

    def __init__(self, args: GuardArgs) -> None:
        self.args = args
        self.n_skipped = self.n_in_a_row = 0
        self.losses: list[float] = []

    def is_bad(self, loss: float, norm: float) -> bool:
        """Return whether the step must be skipped, and count it."""
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self.n_in_a_row = self.n_in_a_row + 1 if bad else 0
        self.n_skipped += bad
        return bad

    def spike(self, loss: float) -> tuple[float, float] | None:
        """Return (mean, standard deviation) of the losses before, if `loss` is far above them."""
        before, found = self.losses, None
        if self.args.spike_sigma and len(before) >= self.FEWEST:
            mean, sigma = statistics.fmean(before), statistics.pstdev(before)
            found = (mean, sigma) if loss > mean + self.args.spike_sigma * max(sigma, 1e-6) else None
        self.losses = [*before, loss][-self.WINDOW :]
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"n_skipped": self.n_skipped, "n_in_a_row": self.n_in_a_row, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_skipped, self.n_in_a_row = state["n_skipped"], state["n_in_a_row"]
        self.losses = state["losses"]


def learning_rate(settings: Settings, step: int, n_steps: int, warmup_steps: int, lr: float) -> float:
    """Return the learning rate of optimizer step 1 <= `step` <= `n_steps`; the last of a decay has min_lr.

    Counted in steps, not (as litgpt 0.5.13) in micro-batches, so that devices and micro_batch_size do not
    change it.
    """
    low, args = settings.train.min_lr, settings.schedule
    if step <= warmup_steps:
        return lr * step / warmup_steps
    if args.name == "constant":
        return lr
    if args.name == "cosine":
        done = (step - warmup_steps) / max(1, n_steps - warmup_steps)
        return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * done))
    n_decay = min(round(args.decay_fraction * n_steps), n_steps - warmup_steps)
    done = max(0.0, (step - (n_steps - n_decay)) / n_decay) if n_decay else 0.0
    return low + (lr - low) * (1 - math.sqrt(done))  # Haegele et al., arxiv.org/abs/2405.18392, eq. 2


# --- the optimizer ------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """Return the name that a parameter has in the model itself, without those of FSDP's wrappers."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def sort_parameters(model: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the hidden matrices, the output head, and all else: embedding, routers, norms and biases."""

    # the shapes, of which FSDP leaves flat pieces
    n_dims = {name: weight.ndim for name, weight in meta_model(model.config).named_parameters()}
    matrices, head, rest = [], [], []
    for name, weight in model.named_parameters():
        name = plain_name(name)
        if (
            weight is model.transformer.wte.weight
            or n_dims.get(name, 1) < 2
            or name.endswith("mlp.gate.weight")
        ):
            rest.append(weight)
        else:
            (head if name.startswith("lm_head") else matrices).append(weight)
    return matrices, head, rest


@functools.cache
def muon_with_adamw() -> type:
    """Return the optimizer for torch.optim.Muon: that for the hidden matrices, AdamW for all else."""
    import torch
    from torch.optim import AdamW, Muon

    class MuonWithAdamW(torch.optim.Optimizer):
        """Muon (kellerjordan.github.io/posts/muon) on each matrix by itself, so on each expert by itself.

        One learning rate serves both, for Muon's updates are scaled to the RMS of AdamW's
        (arxiv.org/abs/2502.16982, section 2.2) unless init_args name another adjust_lr_fn.
        """

        def __init__(self, matrices: list[Any], others: list[dict[str, Any]], **init_args: Any) -> None:
            init_args.setdefault("adjust_lr_fn", "match_rms_adamw")
            shared = {key: init_args[key] for key in ("lr", "weight_decay") if key in init_args}
            self.parts = [Muon(matrices, **init_args), AdamW(others, **shared, betas=(0.9, 0.95), fused=True)]
            super().__init__(
                [group for part in self.parts for group in part.param_groups], self.parts[0].defaults
            )
            self._share()

        def _share(self) -> None:
            """Let the parts work on this optimizer's groups and state, which are what is saved and loaded."""
            n_muon = len(self.parts[0].param_groups)
            for part, groups in zip(
                self.parts, (self.param_groups[:n_muon], self.param_groups[n_muon:]), strict=True
            ):
                part.param_groups, part.state = groups, self.state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self._share()

        def step(self, closure: Any = None) -> None:
            for part in self.parts:
                part.step()

    return MuonWithAdamW


def make_optimizer(settings: Settings, model: Any, spec: dict[str, Any]) -> "torch.optim.Optimizer":
    """Return the optimizer that `spec` describes, with weight decay where the settings want it."""
    module_name, _, name = spec["class_path"].rpartition(".")
    kind, init_args = getattr(importlib.import_module(module_name), name), dict(spec["init_args"])
    matrices, head, rest = sort_parameters(model)
    plain = {"params": rest}
    if settings.weight_decay_on == "matrices" and "weight_decay" in inspect.signature(kind).parameters:
        plain["weight_decay"] = 0.0
    if name == "Muon":
        return muon_with_adamw()(matrices, [{"params": head}, plain], **init_args)
    # one kernel over all weights: on two CPU cores a seventh of the time of one call per weight
    if "fused" in inspect.signature(kind).parameters and not {"fused", "foreach"} & set(init_args):
        init_args["fused"] = True
    return kind([{"params": matrices + head}, plain], **init_args)


# --- the run ------------------------------------------------------------------------------------------------


class TrainLoader:
    """LitGPT's training batches: their position for checkpoints, and the place between steps to end at."""

    def __init__(self, loader: Any, monitor: "Monitor") -> None:
        self.loader, self.monitor, self.seed = loader, monitor, monitor.run.settings.seed
        self.inner = getattr(loader, "_dataloader", loader)
        self.has_state = hasattr(self.inner, "state_dict")
        self.epoch = self.n_batches = 0  # where the loader has no state of its own

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.monitor.is_finished:
            return
        for batch in self.loader if self.has_state else self._replayed():
            yield batch
            if self.monitor.is_finished:  # litgpt 0.5.13 would take one more batch, which final/ then lacks
                return
            if self.monitor.ending:
                raise Ending(self.monitor.ending)

    def _replayed(self) -> Iterator[Any]:
        """Yield an epoch drawn from its own seed, so that a resumed run can draw it again."""
        import torch

        self.loader._num_iter_calls = self.epoch  # what Fabric sets a distributed sampler's epoch to
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch)
            batches = iter(self.loader)
            first = list(itertools.islice(batches, 1))  # samplers draw when they are asked
        for batch in itertools.islice(itertools.chain(first, batches), self.n_batches, None):
            self.n_batches += 1
            yield batch
        self.epoch, self.n_batches = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        if self.has_state:
            return self.inner.state_dict()
        return {"epoch": self.epoch, "n_batches": self.n_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.has_state:
            self.inner.load_state_dict(state)
        else:
            self.epoch, self.n_batches = state["epoch"], state["n_batches"]


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator that a layer or a data module may draw from."""
    import numpy as np
    import torch

    name, keys, *rest = np.random.get_state()
    numpy_state = (name, torch.from_numpy(keys.astype(np.int64)), *rest)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def python_state(state: Any) -> Any:
    """Return the state as `random.setstate` takes it, which does not look at the last part."""
    _, _, gauss = state
    if gauss is not None and not _is_finite(gauss):
        raise ValueError(gauss)
    return state


def numpy_state(state: Any) -> tuple[Any, ...]:
    """Return the state as `numpy.random.set_state` takes it, which does not look at the position."""
    import numpy as np

    name, keys, position, *rest = state
    if type(position) is not int or not 0 <= position <= 624:
        raise ValueError(position)
    return (name, keys.numpy().astype(np.uint32), position, *rest)


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators where `rng_state` found them."""
    import numpy as np
    import torch

    random.setstate(python_state(state["python"]))
    np.random.set_state(numpy_state(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class Monitor:
    """Watches each step: skips a bad one, ends the run on request, writes the log, shows the live bar.

    Fabric asks its callbacks and loggers for methods by name, so that importing this file does not import
    Lightning. `TrainingFabric` hands on what LitGPT's loop calls.
    """

    def __init__(self, run: Run, stops: StopSignals) -> None:
        self.run, self.stops, self.settings = run, stops, run.settings
        self.step = run.start_step
        self.ending = ""  # why the run ends after this step
        self.told_step = -1  # of the latest story
        self.has_validated = False  # fit begins with a validation on trial, in a resumed process once more
        self.guard = Guard(run.settings.guard)
        self.writer = CheckpointWriter(run.settings, self.print)
        logs = run.settings.out_dir / "logs"
        self.metrics, self.spikes = LogFile(logs / "csv/metrics.csv"), LogFile(logs / "spikes.csv")
        self.loads, self.stories = LogFile(logs / "expert_load.csv"), LogFile(logs / "stories.csv")
        self.logs = {  # by the names of their lengths in a checkpoint
            "n_rows": self.metrics,
            "n_spikes": self.spikes,
            "n_loads": self.loads,
            "n_stories": self.stories,
        }
        self.loader: TrainLoader | None = None
        self.fabric: Fabric | None = None
        self.model: Any = None  # LitGPT's GPT, inside whatever compiles and shards it
        self.head: Any = None  # its lm_head, if the loss does the head's product
        self.tokenizer: Any = None
        self.bar: Any = None
        self.wandb = WandbLog(run, self.print) if run.settings.logger_name == "wandb" else None
        if self.wandb:
            self.writer.on_saved = self.wandb.log_checkpoint
        self.values: dict[str, str] = {}
        self.is_live = run.settings.progress and sys.stderr.isatty() and is_main_process()
        self.loss_sum: Any = 0.0  # on the device, of this step's micro-batches
        self.loss = self.norm = self.lr = math.nan
        self.before_s = 0.0  # training of the processes that this one resumes
        self.began = time.perf_counter()
        self.first_step_at = self.last_step_at = 0.0
        self.paused_s = 0.0  # validation since the last row
        self.row_step, self.row_s = run.start_step, 0.0
        self.longest_step_s = 0.0

    # --- called by TrainingFabric ---

    def before_step(self, fabric: "Fabric", optimizer: Any, norm: "torch.Tensor") -> None:
        """Decide on the step from one transfer to the host, with the same outcome on all ranks."""
        import torch

        from moe_layers import discard_step_load

        failed = fabric.world_size + 1  # more than the wishes to stop of all ranks
        wish = failed if self._failed_save() else int(self._wants_to_stop())
        # float32: a loss in bf16 would be rounded to three digits
        loss = torch.as_tensor(self.loss_sum, dtype=torch.float32, device=fabric.device)
        figures = torch.stack([loss, norm.detach().float(), loss.new_tensor(wish)])
        if fabric.world_size > 1:
            # contiguous: gloo reduces the memory of a strided view, not its elements
            loss, wish = fabric.all_reduce(figures[[0, 2]], reduce_op="sum").unbind()
            figures = torch.stack([loss / fabric.world_size, figures[1], wish])
        self.loss, self.norm, wish = figures.tolist()
        self.loss_sum = 0.0
        if wish:
            self._end(failed=wish >= failed)
        if self.guard.is_bad(self.loss, self.norm):
            discard_step_load(self.model)
            self._skip(optimizer)
        elif (found := self.guard.spike(self.loss)) is not None:
            self._flag(*found)
        lr = optimizer.defaults["lr"]
        self.lr = learning_rate(self.settings, self.step + 1, self.run.n_steps, self.warmup_steps, float(lr))
        for group in optimizer.param_groups:
            group["lr"] = self.lr

    @functools.cached_property
    def warmup_steps(self) -> int:
        """The optimizer steps of linear warm-up."""
        train, schedule = self.settings.train, self.settings.schedule
        if schedule.warmup_tokens is not None:
            steps = math.ceil(schedule.warmup_tokens / self.run.tokens_per_step)
        elif train.lr_warmup_fraction:  # of an epoch
            steps = math.ceil(train.lr_warmup_fraction * len(self.loader) / self.accumulation)
        else:
            steps = train.lr_warmup_steps or 0
        return min(steps, self.run.n_steps)

    def _wants_to_stop(self) -> bool:
        limit = self.settings.train.max_time
        if limit is not None and not self.stops.reason:
            # a step as long as the longest so far, and a save, must still fit
            save_s = self.writer.lasting_s or checkpoint_bytes(self.run) / 200e6
            if time.monotonic() - self.run.started + 1.5 * self.longest_step_s + save_s >= limit:
                self.stops.reason = f"train.max_time of {limit:g} s"
        return bool(self.stops.reason)

    def _failed_save(self) -> bool:
        failure = self.writer.failure
        return failure is not None and (
            "no numbers" in failure or self.settings.checkpoints.on_full_disk == "stop"
        )

    def _end(self, failed: bool) -> None:
        if failed:
            reason = self.writer.failure or "another process could not save"
            raise RunFailed(f"{reason}; continue with --resume auto")
        self.ending = self.stops.reason or "the request of another process"
        self.settings.train.save_interval = 1  # read by LitGPT after each step

    def _skip(self, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)  # an optimizer passes over weights without a gradient
        n, most = self.guard.n_in_a_row, self.settings.guard.max_skipped_steps
        what = f"the loss is {self.loss:g}, its gradient's norm {self.norm:g}"
        self.print(f"step {self.step + 1}: {what}: step skipped ({n} in a row)")
        if n >= most:
            self.writer.wait()
            good = sorted(self.settings.out_dir.glob("step-*"))
            way_on = f"continue from {good[-1]} with --resume auto" if good else "there is no checkpoint yet"
            raise RunFailed(f"{what} in {n} steps in a row; lower optimizer.init_args.lr; {way_on}")

    def _flag(self, mean: float, sigma: float) -> None:
        """Write where the batch of a loss spike lies, so that it can be looked at."""
        first = self.step * self.settings.train.global_batch_size
        row = {"step": self.step + 1, "loss": self.loss, "mean": mean, "sigma": sigma, "grad_norm": self.norm}
        self.spikes.write({**row, "first_sequence": first})
        self.print(
            f"step {self.step + 1}: the loss {self.loss:.3f} is far above {mean:.3f} +- {sigma:.3f} before; "
            f"its stories: uv run python tools/show_batch.py "
            + command_line(self.settings.out_dir, "--step", self.step + 1)
        )

    def complete(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the row for LitGPT's `metrics`: figures over all ranks, and ours beside them."""
        now = time.perf_counter()
        row = {"step": self.step, "total_tokens": self.step * self.run.tokens_per_step}
        row["time_s"] = self.before_s + now - self.began
        if "loss" not in metrics:
            return row | {key: float(value) for key, value in metrics.items()}
        tokens = (self.step - self.row_step) * self.run.tokens_per_step
        seconds = row["time_s"] - self.row_s - self.paused_s
        rate = tokens / seconds if seconds > 0 else math.nan
        self.row_step, self.row_s, self.paused_s = self.step, row["time_s"], 0.0
        return row | {
            "iter": metrics["iter"],
            "epoch": self.epoch,
            "loss": self.loss,
            "learning_rate": self.lr,
            "grad_norm": self.norm,
            "skipped_steps": self.guard.n_skipped,
            "tokens_per_s": rate,
            "mfu": rate * self.flops_per_token / self.peak_flops,
            "flops": row["total_tokens"] * self.flops_per_token,
            "iter_time": metrics["iter_time"],
            "remaining_time": metrics["remaining_time"],
            "peak_memory_gb": peak_memory_gb(),
            **self._router_statistics(),
        }

    def _router_statistics(self) -> dict[str, float]:
        from moe_layers import moe_layers, router_statistics

        counts, read = router_statistics(self.model, self.sum_over_ranks)
        counts = counts.cpu()
        for layer, row in zip(moe_layers(self.model), counts.tolist(), strict=True):
            load = {f"e{expert}": int(n) for expert, n in enumerate(row[:-4])}
            self.loads.write({"step": self.step, "layer": layer, **load})
        return read(counts)

    def sum_over_ranks(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Return the sum over all processes."""
        return tensor if self.fabric.world_size == 1 else self.fabric.all_reduce(tensor, reduce_op="sum")

    @functools.cached_property
    def flops_per_token(self) -> float:
        """FLOPs of the model for one token, forward and backward; see `model_flops_per_token`."""
        return model_flops_per_token(self.run.config, self.run.block_size)

    @functools.cached_property
    def peak_flops(self) -> float:
        """FLOP/s of all devices of the run at their best."""
        return peak_flops(self.fabric.device, self.run.precision) * self.fabric.world_size

    @property
    def accumulation(self) -> int:
        """Micro-batches of one device in an optimizer step."""
        return self.settings.train.gradient_accumulation_iters(self.run.devices, self.settings.num_nodes)

    @property
    def epoch(self) -> int:
        return self.loader.state_dict().get("epoch", 0) if self.loader else 0

    def resume(self, state: dict[str, Any], rest: dict[str, Any]) -> None:
        """Go on where the checkpoint that LitGPT has just loaded into `state` was made."""
        state["iter_num"] = state["step_count"] * self.accumulation  # other devices take other micro-batches
        if "run" not in rest:  # LitGPT's own loop wrote it
            return
        set_rng_state(rest["rng"])
        mine = rest["run"]
        if self.fabric.is_global_zero:  # what a row sums over all ranks
            for balance, counts in zip(self._balances(), mine["router"], strict=True):
                balance.load.copy_(counts["load"])
                balance.sums.copy_(counts["sums"])
        self.before_s = self.row_s = mine["time_s"]
        self.guard.load_state_dict(mine["guard"])
        self.told_step = mine["told_step"]
        for name, log in self.logs.items():
            log.keep(mine[name])

    def save(
        self, fabric: "Fabric", state: dict[str, Any], tokenizer_dir: Path, checkpoint_file: Path
    ) -> None:
        """Save `state` and what `resume` needs; in place of litgpt.pretrain.save_checkpoint."""
        for log in self.logs.values():
            log.sync()
        mine = {
            "time_s": self.before_s + time.perf_counter() - self.began,
            "guard": self.guard.state_dict(),
            "told_step": self.told_step,
            **{name: log.n_rows for name, log in self.logs.items()},
            "router": [
                {"load": self.sum_over_ranks(b.load.clone()), "sums": self.sum_over_ranks(b.sums.clone())}
                for b in self._balances()
            ],
        }
        self.writer.save(fabric, {**state, "run": mine, "rng": rng_state()}, tokenizer_dir, checkpoint_file)

    def _balances(self) -> list[Any]:
        from moe_layers import moe_layers

        return [layer.balance for layer in moe_layers(self.model).values()]

    @property
    def is_finished(self) -> bool:
        return self.step >= self.run.n_steps

    # --- called by Fabric ---

    def on_after_setup(self, fabric: "Fabric", module: Any) -> None:
        """Balance the experts, and load the weights to start from."""
        from moe_layers import (
            defer_head,
            has_selection_bias,
            read_state,
            read_weights,
            set_balance,
            use_fast_linear,
            use_selection_bias,
        )

        self.fabric, self.model = fabric, module.module
        use_fast_linear(self.model)
        set_balance(self.model, **asdict(self.settings.moe), scale=1 / self.accumulation)
        # FSDP's weights are whole inside the model's forward alone; float16 wants the loss scaled before
        if not is_sharded(fabric) and not self.run.precision.startswith("16"):
            self.head = defer_head(self.model)
        source = self.run.initial or self.run.resume
        if has_bias := source is not None and has_selection_bias(read_weights(source)):
            use_selection_bias(self.model)  # trained with one, they choose with it for ever
        self.writer.selection_bias = has_bias or self.settings.moe.bias_update_rate > 0
        if self.run.initial is None:
            return
        # LitGPT's own way knows files of bare weights, not checkpoints
        if "model" in read_state(source):
            fabric.load(source, {"model": module}, strict=False)  # the optimizer's state stays behind
        else:
            fabric.load_raw(source, module, strict=False, weights_only=True)  # check_weights was strict

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        """Move the selection bias and advance the bar; Fabric calls it after each optimizer step."""
        from moe_layers import update_selection_bias

        update_selection_bias(self.model, self.sum_over_ranks)
        self.step += 1
        now = time.perf_counter()
        self.longest_step_s = max(self.longest_step_s, now - (self.last_step_at or self.began))
        self.last_step_at = now
        self.first_step_at = self.first_step_at or now
        if self.bar is None and self.is_live:
            from tqdm import tqdm

            per_step = self.run.tokens_per_step
            total, done = self.run.n_steps * per_step, (self.step - 1) * per_step
            self.bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, dynamic_ncols=True)
        if self.bar is not None:
            self.bar.update(self.run.tokens_per_step)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row; Fabric's `log_dict` calls it, on rank 0 alone."""
        if not is_main_process():
            return
        self.metrics.write(metrics)
        for key in ("loss", "val_loss"):
            if key in metrics:
                self.values[key] = f"{float(metrics[key]):.3f}"
        if self.bar is not None:
            self.bar.set_postfix(self.values, refresh=False)
        elif "loss" in metrics:
            self.print(self._line(metrics))

    def _line(self, row: dict[str, Any]) -> str:
        left = timedelta(seconds=int(row["remaining_time"]))
        val = f", val {self.values['val_loss']}" if "val_loss" in self.values else ""
        parts = (
            f"step {self.step:,}/{self.run.n_steps:,}",
            f"epoch {row['epoch'] + 1}",
            f"loss {row['loss']:.3f}{val}",
            f"lr {row['learning_rate']:.2e}",
            f"norm {row['grad_norm']:.2f}",
            f"{row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.1%}",
            *_worst_layer(row),
            f"{left} left",
        )
        return " | ".join(parts)

    # --- what a person sees ---

    def print(self, *texts: Any, **_: Any) -> None:
        """Print a line on stderr, less those of LitGPT's that the bar, our lines and our summary replace."""
        line = " ".join(map(str, texts))
        # litgpt 0.5.13's summary divides by a clock reading; its epoch begins at 1 again after a resume
        if line.startswith(("| ", "-----", "Epoch ")) or not is_main_process():
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def validate(self, validate: Callable[..., "torch.Tensor"], *args: Any, **options: Any) -> "torch.Tensor":
        """Return LitGPT's validation loss; tell a story, and warn of a loss that is not finite."""
        started = time.perf_counter()
        val_loss = validate(*args, **options)
        if self.settings.eval.max_new_tokens and self.has_validated:
            self.tell_story()
        self.has_validated = True
        self.paused_s += time.perf_counter() - started
        if not val_loss.isfinite():
            self.print(f"Warning: the validation loss is {val_loss.item():g} at step {self.step}.")
        return val_loss.clamp(max=700.0)  # fit takes its exponential, which overflows at 709 and raises

    def tell_story(self) -> None:
        """Write what the model makes of PROMPT to logs/stories.csv; training's random numbers stay."""
        import torch

        if not is_main_process() or is_sharded(self.fabric):  # which has no whole model
            return
        if self.told_step == self.step:  # by the validation of this step, before the final one
            return
        self.told_step = self.step
        cuda = [self.fabric.device] if self.fabric.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            torch.manual_seed(1)
            if self.head is not None:
                self.head.is_deferred = False
            text = write_story(self.model, self.tokenizer, self.settings.eval.max_new_tokens)
            if self.head is not None:
                self.head.is_deferred = True
        self.model.train()
        tokens = self.step * self.run.tokens_per_step
        self.stories.write({"step": self.step, "tokens": tokens, "prompt": PROMPT, "text": text})

    def tokens_per_s(self) -> float | None:
        """Return tokens/s from the first to the last step of this process, validation and saving included."""
        steps = self.step - self.run.start_step - 1
        seconds = self.last_step_at - self.first_step_at
        return steps * self.run.tokens_per_step / seconds if steps > 0 and seconds > 0 else None

    def close(self) -> None:
        """Finish the bar, the save in progress, and W&B."""
        self.writer.wait()
        if self.bar is not None:
            self.bar.close()
        if self.wandb:
            self.wandb.close()


def _worst_layer(row: dict[str, Any]) -> list[str]:
    """Return what the line says of the layer whose fullest expert is furthest above the mean."""
    prefix = "moe/load_imbalance/layer_"
    loads = [(value, key.removeprefix(prefix)) for key, value in row.items() if key.startswith(prefix)]
    if not loads:
        return []
    value, layer = max(loads)
    dead = int(row[f"moe/dead_experts/layer_{layer}"])
    return [f"load x{value:.2f} in layer {int(layer)}" + (f", {dead} dead" if dead else "")]


class WandbLog:
    """The run on W&B. What fails there is told, and training goes on.

    A thread of its own sends data and checkpoints: without a network, W&B tries each again for minutes.
    """

    PATIENCE_S = (
        150  # at the end, for data and checkpoints, then for the rest; `wandb sync` sends what is left
    )

    def __init__(self, run: Run, tell: Callable[[str], None]) -> None:
        self.run, self.tell = run, tell
        self.logger: Any = None  # Lightning's; None before `begin`, in other processes, and once W&B is lost
        self.figures: dict[str, float] = {}
        self.lineage: dict[str, str | None] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="wandb", daemon=True)

    def begin(self) -> None:
        """Begin the run on W&B, offline where it cannot be reached; RunFailed where nobody has logged in."""
        from wandb import errors

        try:
            self._open()
        except (errors.UsageError, errors.AuthenticationError) as error:
            reason = first_line(error)
            raise RunFailed(f"W&B: {reason}; WANDB_MODE=offline trains without a login") from error
        except errors.Error as error:
            self._open(mode="offline")
            self.tell(f"Warning: no W&B ({first_line(error)}): recording offline, for wandb sync")
        self._worker.start()
        if is_own_data(self.run.data):
            data_dir = Path(self.run.data.train_data_path).parent
            self.lineage = wandb_dataset.lineage(data_dir)
            self.logger.experiment.config.update({"dataset": self.lineage}, allow_val_change=True)
            self._send(wandb_dataset.use_dataset, data_dir, self.run.settings.tokenizer_dir)

    def _open(self, **options: Any) -> None:
        import wandb
        from litgpt.utils import choose_logger

        settings, name = self.run.settings, f"pretrain-{self.run.config.name}"
        log_args = {key: value for key, value in asdict(settings.log).items() if value is not None}
        options["settings"] = wandb.Settings(
            init_timeout=wandb_dataset.CONNECT_SECONDS, finish_timeout=self.PATIENCE_S
        )
        options |= {"id": wandb_run_id(self.run), "resume": "allow", "log_args": log_args}
        options["save_dir"] = os.environ.get("WANDB_DIR") or "."  # which Lightning's logger passes over
        logger = choose_logger("wandb", settings.out_dir, name, **options)
        _ = logger.experiment  # connects
        self.logger = logger

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self._guarded(lambda: self.logger.log_hyperparams(params))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.figures |= {key: float(metrics[key]) for key in ("loss", "val_loss") if key in metrics}
        self._guarded(lambda: self.logger.log_metrics(metrics, step))

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            if self.logger is not None:
                call()
        except Exception as error:  # of any kind: none is worth the training
            self.logger = None
            reason = first_line(error)
            self.tell(
                f"Warning: W&B is lost ({reason}); training goes on, {self.run.settings.out_dir}/logs has all"
            )

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Send a checkpoint that is in its place, if the settings want it."""
        args = self.run.settings.checkpoints
        if args.to_wandb == "none" or (
            folder.name != "final" and not (args.to_wandb == "kept" and is_kept(args, step))
        ):
            return
        tokens = step * self.run.tokens_per_step
        metadata = {"step": step, "tokens": tokens, **self.figures, "dataset": self.lineage}
        self._send(wandb_dataset.log_checkpoint, folder, self.run.config.name, metadata)

    def _send(self, function: Callable[..., None], subject: Path, *args: Any) -> None:
        def job() -> None:
            try:
                if self.logger is not None:
                    function(self.logger.experiment, subject, *args)
            except Exception as error:  # as above
                reason = first_line(error)
                self.tell(f"Warning: {subject} is not recorded on W&B: {reason}; training goes on")

        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def close(self) -> None:
        """Wait, within bounds, until W&B has everything."""
        if self.logger is not None:
            self._jobs.put(None)
            self._worker.join(self.PATIENCE_S)
            self._guarded(self.logger.experiment.finish)


class LogFile:
    """One CSV over all resumes; Lightning's CSVLogger opens a new one each time and loses the last rows.

    In all processes but the first nothing is written, so that whoever has a row need not ask.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.n_rows = 0
        self._late: list[
            dict[str, Any]
        ] = []  # rows that a locked file (Windows, a spreadsheet) has to wait for

    def keep(self, n_rows: int) -> None:
        """Keep the first rows, which were there when the checkpoint was made; the others come again."""
        if not self.path.is_file() or not is_main_process():
            return
        # the last row may be torn or worse, if the machine stopped while it was written
        with self.path.open(encoding="utf-8", errors="replace", newline="") as file:
            reader = csv.DictReader(line.replace("\0", "") for line in file)
            columns = [name for name in reader.fieldnames or [] if name]
            rows = list(itertools.islice(reader, n_rows))
        self._rewrite(columns, rows)
        self.n_rows = len(rows)

    def write(self, row: dict[str, Any]) -> None:
        """Append `row`; a new column rewrites the file with a wider header."""
        if not is_main_process():
            return
        self._late.append(row)
        self.n_rows += 1
        with contextlib.suppress(PermissionError):
            for late in list(self._late):
                if any(key not in self.columns for key in late):
                    self._widen(late)
                with self.path.open("a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(late)
                self._late.remove(late)

    def _widen(self, row: dict[str, Any]) -> None:
        rows: list[dict[str, str]] = []
        if self.columns:
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        self._rewrite(list(dict.fromkeys([*self.columns, *row])), rows)

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".tmp")
        with whole.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        whole.replace(self.path)
        self.columns = columns

    def sync(self) -> None:
        """Bring the rows to the disk, before a checkpoint counts on them."""
        if self.path.is_file() and self.columns:
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())


def ready_data(run: Run) -> None:
    """Put the data on disk, fresh; raises ValueError if it is too short for the run."""
    from litgpt import Tokenizer

    settings = run.settings
    if not is_own_data(run.data):
        return
    folder = Path(run.data.train_data_path).parent
    has_tokenizer = (settings.tokenizer_dir / "tokenizer.json").is_file()
    if run.demo_data:
        note_once(
            f"No data in {folder}: writing the built-in demo stories there "
            "(real ones: prepare_data.py --dataset tinystories)."
        )
    if run.demo_data or not has_tokenizer:
        trains_own = not has_tokenizer and (run.demo_data or run.is_demo_vocabulary)
        prepare_data.prepare(
            prepare_data.PrepareSettings(
                data_dir=folder,
                dataset="demo" if run.demo_data else "custom",
                tokenizer_dir=settings.tokenizer_dir,
                train_tokenizer=DEMO_VOCAB if trains_own else None,
            )
        )
    # LitGPT asks for the loaders again; asking here tells of too little text before the model is built
    run.data.connect(Tokenizer(settings.tokenizer_dir), settings.train.micro_batch_size, run.block_size)
    run.data.prepare_data()
    run.data.train_dataloader()
    run.data.val_dataloader()


def will_compile(settings: Settings) -> tuple[bool, str]:
    """Return whether the model is compiled, and why."""
    import torch

    if settings.compile != "auto":
        return settings.compile == "on", f"compile: {settings.compile}"
    if settings.accelerator == "cpu" or not torch.cuda.is_available():
        return False, "no CUDA; compiling takes minutes on a CPU"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed (on Windows: triton-windows)"
    return True, "CUDA and Triton"


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings as YAML and loggers take them."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return str(value) if isinstance(value, Path) else value

    # which run this was, not what it trained: its own flags when somebody starts from this file
    left_out = ("config", "model_config", "resume", "overwrite")
    return {name: value for name, value in plain(settings).items() if name not in left_out}


def delete_run(out_dir: Path) -> None:
    """Remove what an earlier run left in `out_dir`, and nothing else."""
    for old in (out_dir / "final", out_dir / "logs", *out_dir.glob("step-*"), *out_dir.glob("superseded-*")):
        shutil.rmtree(old, ignore_errors=True)


def own_moments(optimizer: Any) -> None:
    """Copy the moments that an optimizer took from a mapped file, which deleting does not free till then."""
    import torch

    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Fabric's wrapper
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                moments[name] = value.clone()


@functools.cache
def training_fabric() -> type:
    """Return the Fabric whose calls in LitGPT's loop reach the monitor."""
    import lightning as L

    class TrainingFabric(L.Fabric):
        """Fabric with the seams that litgpt 0.5.13's loop offers: it calls these between its own lines."""

        monitor: Monitor

        def setup_dataloaders(self, *loaders: Any, **options: Any) -> list[Any]:
            train, *others = super().setup_dataloaders(*loaders, **options)
            self.monitor.loader = TrainLoader(train, self.monitor)
            return [self.monitor.loader, *others]

        def backward(self, tensor: "torch.Tensor", *args: Any, **options: Any) -> None:
            self.monitor.loss_sum = self.monitor.loss_sum + tensor.detach().float()  # over accumulation
            super().backward(tensor, *args, **options)

        def clip_gradients(self, module: Any, optimizer: Any, **options: Any) -> "torch.Tensor":
            norm = super().clip_gradients(module, optimizer, **options, error_if_nonfinite=False)
            self.monitor.before_step(self, optimizer, norm)
            return norm

        def load(self, path: Any, state: Any = None, strict: bool = True, **_: Any) -> dict[str, Any]:
            groups = state["optimizer"].param_groups if "iter_num" in (state or {}) else []
            own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
            rest = super().load(path, state, strict=strict, weights_only=True)
            if own:  # the run's own settings hold: a changed weight_decay would be taken and never used
                for group, settings in zip(state["optimizer"].param_groups, own, strict=True):
                    group.update(settings)
                own_moments(state["optimizer"])
                self.monitor.resume(state, rest)
            return rest

        def log_dict(self, metrics: dict[str, Any], step: int | None = None) -> None:
            super().log_dict(self.monitor.complete(metrics), step)

        def print(self, *texts: Any, **_: Any) -> None:
            self.monitor.print(*texts)

    return TrainingFabric


def checkpoint_io(writer: CheckpointWriter) -> Any:
    """Return Lightning's plugin through which a strategy hands over the whole state on rank 0."""
    import torch
    from lightning.fabric.plugins import TorchCheckpointIO

    class BackgroundIO(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            writer.hold(checkpoint)

        def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    return BackgroundIO()


def sharded_strategy(writer: CheckpointWriter) -> Any:
    """Return FSDP as litgpt.pretrain.setup has it, with the first weights and the checkpoints of one process.

    Fabric's own writes the file while training waits, and takes up the optimizer's state in the order of the
    model's parameters, which is not that of the optimizer's groups.
    """
    import torch
    from lightning.fabric.strategies import FSDPStrategy
    from litgpt.model import Block
    from litgpt.utils import reset_parameters

    class ShardedStrategy(FSDPStrategy):
        def setup_module(self, module: Any) -> Any:
            # whole, as on one device: Fabric's own fills layers in another order, and parts tied weights
            is_tied = module.transformer.wte.weight is module.lm_head.weight
            module.to_empty(device=self.root_device)
            reset_parameters(module)
            if is_tied:
                module.transformer.wte.weight = module.lm_head.weight
            return super().setup_module(module)

        def save_checkpoint(self, path: Any, state: dict[str, Any], *_: Any, **__: Any) -> None:
            with whole_tensors(state["model"], rank0_only=True):
                moments = gather_moments(state["optimizer"], state["model"])
                whole = {
                    key: value.state_dict() if hasattr(value, "state_dict") else value
                    for key, value in state.items()
                    if key != "optimizer"
                }
            if self.is_global_zero:
                writer.hold({**whole, "optimizer": moments})

        def load_checkpoint(
            self, path: Any, state: Any = None, strict: bool = True, *_: Any, **__: Any
        ) -> dict[str, Any]:
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if not isinstance(state, dict):  # Fabric.load_raw: a file of bare weights
                saved, state = {"model": saved}, {"model": state}
            return scatter_state(saved, state, strict)

    return ShardedStrategy(auto_wrap_policy={Block}, state_dict_type="full", sharding_strategy="HYBRID_SHARD")


def scatter_state(saved: dict[str, Any], state: dict[str, Any], strict: bool) -> dict[str, Any]:
    """Bring what one process saved into `state`, whose model FSDP has sharded; return what is left over."""
    with whole_tensors(state["model"], rank0_only=False):
        state["model"].load_state_dict(saved.pop("model"), strict=strict)
        if "optimizer" in state:
            scatter_moments(state["optimizer"], state["model"], saved.pop("optimizer"))
    for key in state.keys() & saved.keys():
        value = saved.pop(key)
        if hasattr(state[key], "load_state_dict"):
            state[key].load_state_dict(value)
        else:
            state[key] = value
    return saved


def is_sharded(fabric: "Fabric") -> bool:
    """Return whether each process holds a part of the weights alone (FSDP)."""
    from lightning.fabric.strategies import FSDPStrategy

    return isinstance(fabric.strategy, FSDPStrategy)


def whole_tensors(module: Any, rank0_only: bool) -> contextlib.AbstractContextManager[Any]:
    """Let FSDP's state dicts hold whole tensors, in host memory, gathered from all processes."""
    from torch.distributed import fsdp

    return fsdp.FullyShardedDataParallel.state_dict_type(
        module,
        fsdp.StateDictType.FULL_STATE_DICT,
        fsdp.FullStateDictConfig(offload_to_cpu=True, rank0_only=rank0_only),
        fsdp.FullOptimStateDictConfig(offload_to_cpu=True, rank0_only=rank0_only),
    )


def _names(optimizer: Any, module: Any) -> list[str]:
    """Return the names of the optimizer's parameters by the numbers that its state dict gives them."""
    names = {id(weight): plain_name(name) for name, weight in module.named_parameters()}
    return [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]


def gather_moments(optimizer: Any, module: Any) -> dict[str, Any]:
    """Return on rank 0, of an optimizer sharded by FSDP, the state dict that one process would have."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    moments = FullyShardedDataParallel.optim_state_dict(module, optimizer).get("state", {})
    return {
        "state": {n: moments[name] for n, name in enumerate(_names(optimizer, module)) if name in moments},
        "param_groups": optimizer.state_dict()["param_groups"],
    }


def scatter_moments(optimizer: Any, module: Any, saved: dict[str, Any]) -> None:
    """Give each process its part of what `gather_moments` or one process saved."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    names = _names(optimizer, module)
    groups = [{**group, "params": [names[n] for n in group["params"]]} for group in saved["param_groups"]]
    named = {"state": {names[n]: moments for n, moments in saved["state"].items()}, "param_groups": groups}
    optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(module, optimizer, named))


def make_fabric(run: Run, monitor: Monitor) -> "Fabric":
    """Return the Fabric that LitGPT's loop runs on: one device, DDP on the CPU, FSDP on GPUs."""
    from litgpt.utils import choose_logger

    settings = run.settings
    loggers: list[Any] = [monitor]
    if settings.logger_name == "tensorboard":
        loggers.append(choose_logger("tensorboard", settings.out_dir, f"pretrain-{run.config.name}"))
    elif monitor.wandb:
        loggers.append(monitor.wandb)
    strategy, plugins = "auto", [checkpoint_io(monitor.writer)]
    if run.devices * settings.num_nodes > 1:  # litgpt.pretrain.setup knows FSDP alone, which the CPU lacks
        strategy = "ddp"
        if settings.accelerator != "cpu" and _has_cuda():
            strategy, plugins = sharded_strategy(monitor.writer), []
    fabric = training_fabric()(
        accelerator="cuda" if settings.accelerator == "gpu" else settings.accelerator,
        devices=run.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        plugins=plugins,
        precision=run.precision,
        loggers=loggers,
        callbacks=[monitor],
    )
    fabric.monitor = monitor
    return fabric


def wandb_run_id(run: Run) -> str:
    """Return the id of this run on W&B, the same over all its resumes."""
    path = run.settings.out_dir / ".wandb_run_id"
    if run.resume and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(4)  # eight characters, as W&B's own
    if is_main_process():
        path.write_text(run_id, encoding="utf-8")
    return run_id


@contextlib.contextmanager
def litgpt_seams(monitor: Monitor, compiled: bool) -> Iterator[None]:
    """Put our functions in the place of those that litgpt.pretrain (0.5.13) calls and has no argument for."""
    import torch
    from litgpt import GPT, pretrain

    from moe_layers import linear_cross_entropy

    compile = torch.compile
    cross_entropy = pretrain.chunked_cross_entropy
    loss_dtype = torch.bfloat16 if monitor.run.precision == "bf16-mixed" else None  # as autocast has it

    def optimizer(spec: dict[str, Any], *_: Any, **__: Any) -> "torch.optim.Optimizer":
        return make_optimizer(monitor.settings, monitor.model, spec)

    def loss(output: "torch.Tensor", targets: "torch.Tensor", **options: Any) -> "torch.Tensor":
        if monitor.head is None or options.get("chunk_size") == 0:  # 0: of the model whose FLOPs are counted
            return cross_entropy(output, targets, **options)
        return linear_cross_entropy(output, monitor.head.weight, targets, loss_dtype)

    def compile_others(model: Any = None, **options: Any) -> Any:
        return model if isinstance(model, GPT) else compile(model, **options)

    # save_checkpoint writes the weights in place and re-parses sys.argv, which exits on our flags;
    # instantiate_torch_optimizer knows one group of weights, and decides on `fused` itself;
    # chunked_cross_entropy needs all logits at once
    replacements: dict[tuple[Any, str], Any] = {
        (pretrain, "save_checkpoint"): monitor.save,
        (pretrain, "validate"): functools.partial(monitor.validate, pretrain.validate),
        (pretrain, "instantiate_torch_optimizer"): optimizer,
        (pretrain, "chunked_cross_entropy"): loss,
    }
    if not compiled:  # main calls it all the same, which takes a second to load Inductor, and for nothing
        replacements[torch, "compile"] = compile_others
    originals = {(owner, name): getattr(owner, name) for owner, name in replacements}
    try:
        for (owner, name), replacement in replacements.items():
            setattr(owner, name, replacement)
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


def train(run: Run, stops: StopSignals) -> Monitor:
    """Run LitGPT's `main` and return the monitor with the run's figures; `monitor.ending` if it was stopped.

    Raises:
        RunFailed: the loss is no longer a number, or a checkpoint could not be saved.
    """
    import torch
    from litgpt import Tokenizer, pretrain

    from moe_layers import keep_freed_memory

    settings = run.settings
    compiled, why = will_compile(settings)
    # the model is left to litgpt_seams: this is for what an optimizer compiles, at import or in its step
    torch.compiler.set_stance("default" if compiled else "force_eager")
    monitor = Monitor(run, stops)
    fabric = make_fabric(run, monitor)
    if fabric.device.type == "cuda":  # elsewhere it may mean other roundings, and no speed
        torch.set_float32_matmul_precision(settings.float32_matmul_precision)
    elif fabric.device.type == "cpu":
        keep_freed_memory()
    fabric.launch()
    tokenizer = monitor.tokenizer = Tokenizer(settings.tokenizer_dir)
    open_logs(run, monitor, fabric)
    fabric.print(describe(run, fabric, "compiled" if compiled else "eager", why))
    try:
        with litgpt_seams(monitor, compiled), contextlib.suppress(Ending):
            pretrain.main(
                fabric=fabric,
                devices=run.devices,
                num_nodes=settings.num_nodes,
                seed=settings.seed,
                initial_checkpoint_dir=None,  # Monitor.on_after_setup loads it
                resume=run.resume or False,
                config=run.config,
                data=run.data,
                out_dir=settings.out_dir,
                tokenizer_dir=settings.tokenizer_dir,
                tokenizer=tokenizer,
                train=settings.train,
                eval=replace(settings.eval, max_new_tokens=None),  # ours; LitGPT refuses it here
                optimizer=run.optimizer,
            )
    finally:
        monitor.close()
    if monitor.writer.failure is not None:
        raise RunFailed(f"{monitor.writer.failure}; then continue with --resume auto")
    return monitor


def open_logs(run: Run, monitor: Monitor, fabric: "Fabric") -> None:
    """Clear the place, and tell the loggers the settings."""
    if fabric.is_global_zero:
        if monitor.wandb:
            monitor.wandb.begin()
        clear_out_dir(run, monitor)
    for logger in fabric.loggers[1:]:
        logger.log_hyperparams(plain_settings(run.settings))


def clear_out_dir(run: Run, monitor: Monitor) -> None:
    """Remove an earlier run, if told to, and what a kill left half done."""
    if run.settings.overwrite:
        delete_run(run.settings.out_dir)
    tidy(run.settings.out_dir, run.start_step)
    if run.resume is None:
        for log in monitor.logs.values():
            log.keep(0)
    write_run_facts(run)


def write_run_facts(run: Run) -> None:
    """Write logs/run.json: the command, the settings and the versions, for reports."""
    names = ("torch", "litgpt", "lightning", "numpy")
    facts = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "settings": plain_settings(run.settings),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in names}},
    }
    path = run.settings.out_dir / "logs/run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1), encoding="utf-8")


def describe(run: Run, fabric: "Fabric", mode: str, why: str) -> str:
    """Return the lines that say what runs, and on what."""
    import torch

    from moe_layers import count_parameters, experts_path

    total, active = count_parameters(run.config)
    dtype = torch.bfloat16 if run.precision.startswith("bf16") else torch.float32
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() == "high"
    resumed = f", resuming after step {run.start_step} ({run.resume.parent})" if run.resume else ""
    return (
        f"Model   {run.config.name}: {total:,} parameters, {active:,} active per token\n"
        f"Device  {fabric.device}, {run.precision}{' (TF32)' if tf32 else ''}, {mode} ({why})\n"
        f"Experts {experts_path(run.config, fabric.device, dtype)}\n"
        f"Run     {run.n_steps:,} steps of {run.tokens_per_step:,} tokens, seed {run.settings.seed}{resumed}"
    )


def model_flops_per_token(config: "MoEConfig", block_size: int) -> float:
    """Return 6 N + 12 L H Q T, N the active parameters without the token embedding.

    PaLM, appendix B (arxiv.org/abs/2204.02311): attention counted without its causal half, as MFU is quoted.
    """
    from moe_layers import count_parameters

    _, active = count_parameters(config)
    embedding = config.padded_vocab_size * config.n_embd
    return 6 * (active - embedding) + 12 * config.n_layer * config.n_head * config.head_size * block_size


def peak_flops(device: "torch.device", precision: str) -> float:
    """Return the FLOP/s of dense matrix products on `device`: its maker's figure, else measured here."""
    import torch
    from lightning.fabric.utilities.throughput import get_available_flops

    from moe_layers import matmul

    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        if device.type == "cuda" and (known := get_available_flops(device, dtype)):
            return float(known)
    size, best = (4096 if device.type == "cuda" else 1024), math.inf
    one = torch.ones(size, size, dtype=dtype, device=device)
    for _ in range(5 if device.type == "cuda" else 20):  # a CPU may be busy with other work for a while
        started = time.perf_counter()
        matmul(one, one)[0, 0].item()  # waits for the product
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_memory_gb() -> float:
    """Return the peak memory in 1e9 bytes, of the GPU where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def write_story(model: Any, tokenizer: Any, max_new_tokens: int) -> str:
    """Return the story that the model makes of PROMPT; it is left in eval mode and without a cache."""
    from litgpt.generate.base import generate

    weight = model.lm_head.weight
    prompt_ids = tokenizer.encode(PROMPT, device=weight.device)
    length = min(model.max_seq_length, prompt_ids.numel() + max_new_tokens)
    if prompt_ids.numel() >= length:
        return PROMPT  # a toy model whose context the prompt fills
    model.eval()
    model.set_kv_cache(batch_size=1, max_seq_length=length, device=weight.device, dtype=weight.dtype)
    try:
        ids = generate(model, prompt_ids, length, temperature=0.7, top_p=0.9, eos_id=tokenizer.eos_id)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        return "(none: the model's logits are not finite)"
    finally:
        model.clear_kv_cache()
    return tokenizer.decode(ids).strip()


def tell_story(checkpoint_dir: Path) -> str:
    """Return a story that the saved checkpoint tells."""
    import torch
    from litgpt import Tokenizer

    from moe_layers import load_model

    torch.manual_seed(1)
    return write_story(load_model(checkpoint_dir), Tokenizer(checkpoint_dir), 300)


def summarize(run: Run, monitor: Monitor) -> None:
    """Print the run's figures, a story and what to do next, on stdout."""
    final, rate = run.settings.out_dir / "final", monitor.tokens_per_s()
    tokens = (monitor.step - run.start_step) * run.tokens_per_step
    # of the last step, which may lie between two rows of the log
    losses = [] if math.isnan(monitor.loss) else [f"{monitor.loss:.3f} in training"]
    if val_loss := monitor.values.get("val_loss"):
        losses.append(f"{val_loss} in validation")
    print(
        f"\nTrained    {tokens:,} tokens in {monitor.step - run.start_step} steps"
        + (f", {rate:,.0f} tokens/s with validation and saving" if rate else "")
        + (f"\nLoss       {', '.join(losses)}" if losses else "")
        + (f"\nSkipped    {n} steps without a finite gradient" if (n := monitor.guard.n_skipped) else "")
        + f"\nMemory     {peak_memory_gb():.2f} GB{' on the GPU' if _has_cuda() else ''} at its peak"
        + f"\nCheckpoint {final}\nLog        {monitor.metrics.path}"
    )
    if is_own_data(run.data):
        print(f"\nA story from it:\n\n{tell_story(final)}\n")
    folder = Path(run.data.train_data_path).parent if is_own_data(run.data) else DATA_DIR
    data_flag = () if folder == DATA_DIR else ("--data_dir", folder)
    typed = command_line
    print(
        "Next:\n"
        f'  uv run python generate.py {typed("--ckpt_dir", final)} --prompt "One day, a little dog"\n'
        f"  uv run python evaluate.py {typed('--ckpt_dir', final, *data_flag)}\n"
        f"  uv run python tools/report.py {typed(run.settings.out_dir)}"
    )
    if run.demo_data:
        print(
            "These were the built-in demo stories. For real ones:\n"
            "  uv run python prepare_data.py --dataset tinystories --data_dir data/tinystories "
            "--tokenizer_dir data/tinyllama"
        )


def explain(error: Exception, out_dir: Path) -> str | None:
    """Return what to tell of a failure in training, None for one that only a bug can cause."""
    if isinstance(error, RunFailed | FolderInUse):
        return str(error)
    if "by peer" in str(error):  # gloo's "Connection closed by peer", or "reset"
        return "another process of this run has ended, see its message; then continue with --resume auto"
    if is_disk_full(error):
        return f"{out_dir}: the disk is full; make room and continue with --resume auto"
    return f"{error}; put it right and continue with --resume auto" if isinstance(error, OSError) else None


def resume_command(argv: list[str]) -> str:
    """Return the command that goes on with the run that `argv` began."""
    switches = {f"--{f.name}" for f in fields(Settings) if f.type is bool}
    kept, flags = [], iter(join_switches(argv, switches))
    for flag in flags:
        name, equals, _ = flag.partition("=")
        if name in ("--resume", "--initial_checkpoint_dir"):
            _ = equals or next(flags, None)
        elif name not in ("--overwrite", "--no_overwrite"):
            kept.append(flag)
    return command_line(*RUN_TRAIN, *kept, "--resume", "auto")


def set_up(argv: list[str]) -> Run:
    """Return the checked run with its data on disk. ValueError and OSError tell what is wrong."""
    hear_ctrl_c()
    if problems := launcher_problems():  # before Lightning, whose import trips over them
        raise ValueError("\n".join(problems))
    settings = load_settings(argv)
    if settings.wandb_dataset:
        settings.dataset_dir = wandb_dataset.pull(settings.wandb_dataset, settings.wandb_artifacts_dir)
    if settings.dataset_dir and (settings.dataset_dir / "tokenizer/tokenizer.json").is_file():
        settings.tokenizer_dir = settings.dataset_dir / "tokenizer"  # an artifact brings its own
    run = check_run(settings)
    if is_main_process():  # the others wait for it when the process group forms
        ready_data(run)
        warn_of_unused_rows(run)
    return run


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 2 after a message on bad settings, 1 after failed work, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # a story may hold what a Windows code page lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    started = time.monotonic()
    argv = normalize_flags(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        build_parser().print_help()
        return 0
    if sys.platform == "linux":
        # Before the first `import torch`, which reads it once: MoE row counts differ from step to step, and
        # without segments that grow the caching allocator keeps a block for each until memory is in pieces.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        run = set_up(argv)
    except KeyboardInterrupt:
        return _fail("stopped before training began; the same command goes on", 130)
    except (ValueError, OSError) as error:
        is_work = isinstance(error, wandb_dataset.TransferError | ConnectionError) or is_disk_full(error)
        return _fail(error, 1 if is_work else 2)
    run.started, out_dir = started, run.settings.out_dir
    try:
        with run_lock(out_dir) if is_main_process() else contextlib.nullcontext():
            with StopSignals() as stops:
                monitor = train(run, stops)
            if is_main_process() and monitor.ending:
                print(f"Stopped after step {monitor.step:,} of {run.n_steps:,} ({monitor.ending}). To go on:")
                print(f"  {resume_command(argv)}")
            elif is_main_process():
                summarize(run, monitor)
    except KeyboardInterrupt:
        return _fail(f"stopped; the model is in {out_dir / 'final'}", 130)
    except BrokenPipeError:  # whoever read the summary has gone; the model is saved
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, RuntimeError) as error:
        if (reason := explain(error, out_dir)) is None:
            raise
        return _fail(reason, 1)
    return 0


def _fail(error: Any, status: int) -> int:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(run_script(main))
