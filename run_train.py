"""Pretrain a Mixture-of-Experts model with LitGPT's own loop and tell a story with it.

Run: uv run python run_train.py     (3.5 minutes on two CPU cores: demo model, demo stories)

With CUDA it takes model_config.yaml and train_config.yaml, without it the demo settings in configs/.
Precedence: flag > environment variable > YAML > default. Any key is a flag: `--train.max_tokens 1000000`.
"""

import csv
import difflib
import errno
import functools
import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

import prepare_data
import wandb_dataset

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from moe_layers import MoEConfig

ROOT = Path(__file__).resolve().parent
DEMO_MODEL, DEMO_TRAIN = ROOT / "configs/demo_model.yaml", ROOT / "configs/demo_train.yaml"
DATA_DIR = prepare_data.PrepareSettings.data_dir
DEMO_VOCAB = 2048  # as padded_vocab_size in demo_model.yaml
FLAG_TO_KEY = {
    "micro_batch_size": "train.micro_batch_size",
    "global_batch_size": "train.global_batch_size",
    "max_tokens": "train.max_tokens",
    "max_seq_length": "train.max_seq_length",
    "train_config": "config",
    "wandb_dataset_artifact": "wandb_dataset",
}
CLASS_KEYS = ("data", "optimizer")  # each a class_path with init_args
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
    "eval.interval": 1,
    "eval.max_iters": 1,
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
    seed: int = 42
    """Seed of the weights and the order of the data."""
    optimizer: dict = field(default_factory=lambda: {"class_path": "torch.optim.AdamW"})
    """class_path and init_args of an optimizer."""
    logger_name: Literal["csv", "tensorboard", "wandb"] = "csv"
    """Logger beside logs/csv/metrics.csv, which is always written."""
    progress: bool = True
    """Show a live bar on a terminal; otherwise LitGPT's line for each log step."""
    train: litgpt_args.TrainArgs = field(default_factory=lambda: litgpt_args.TrainArgs(max_norm=1.0))
    """Training."""
    eval: litgpt_args.EvalArgs = field(default_factory=litgpt_args.EvalArgs)
    """Validation."""
    log: litgpt_args.LogArgs = field(default_factory=litgpt_args.LogArgs)
    """Names for the W&B logger."""


# --- settings: flag > environment variable > YAML > default -------------------------------------------------


def build_parser() -> Any:
    """Return the jsonargparse parser of `Settings`: types, defaults and help, all read from the dataclass."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="run_train.py", description=__doc__, exit_on_error=False)
    parser.add_class_arguments(Settings)
    return parser


def read_flags(argv: list[str]) -> dict[str, tuple[Any, str]]:
    """Return dotted key -> (text, place) for `--key value`, `--key=value`, `--flag` and `--no_flag`."""
    switches = {f.name for f in fields(Settings) if f.type is bool}
    given: dict[str, tuple[Any, str]] = {}
    tokens = iter(argv)
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
    from moe_layers import read_mapping

    groups = (*CLASS_KEYS, *(f"{key}.init_args" for key in CLASS_KEYS), "train", "eval", "log")
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
            values[key] = parser.parse_object(Namespace({key: value}).as_dict())[key]
            if value is None and "None" not in _type_name(types[key]):  # jsonargparse lets null pass
                raise ArgumentError(None, "null")
        except ArgumentError:
            problems.append(f"{place}: {_wrong(key, value, types)}")
    if problems:
        raise ValueError("\n".join(problems))
    try:
        typed = parser.instantiate_classes(parser.parse_object(values.as_dict()))
    except (ArgumentError, ValueError) as error:  # TrainArgs checks its warm-up itself
        raise ValueError(f"{config}: {' '.join(str(error).split())}") from error
    return Settings(**{f.name: typed[f.name] for f in fields(Settings)})


def _wrong(key: str, value: Any, types: dict[str, Any]) -> str:
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1)
        return f"unknown key {key}; {f'did you mean {near[0]}?' if near else 'see --help for the keys'}"
    return f"{key} is {value!r}; it must be {_type_name(types[key]).replace('None', 'null')}"


def _type_name(action: Any) -> str:
    kind = getattr(action, "_typehint", None) or action.type
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    return name.replace("typing.", "").replace("NoneType", "None").replace("Optional", "None or ")


def choose_configs(given: dict[str, tuple[Any, str]]) -> tuple[Path, Path]:
    """Return the two YAML files of this run, and say on stderr when the demo's are taken."""
    config = Path(given["config"][0]) if "config" in given else None
    model_config = Path(given["model_config"][0]) if "model_config" in given else None
    # a checkpoint's own two, the pair at the top, the demo's pair
    if config and not model_config:
        model_config = _twin(config, "train", "model")
    elif model_config and not config:
        config = _twin(model_config, "model", "train")
    if model_config is None and not _has_cuda():
        model_config, demo = DEMO_MODEL, True
        print(
            "No CUDA and no model config named: training the small demo model on the CPU "
            "(MoE-200M all the same: --model_config model_config.yaml).",
            file=sys.stderr,
        )
    else:
        model_config, demo = model_config or ROOT / "model_config.yaml", False
    config = config or (DEMO_TRAIN if demo else ROOT / "train_config.yaml")
    print(f"Settings from {config} and {model_config}.", file=sys.stderr)
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
    problems += train_problems(settings, config.block_size if config else None, devices * settings.num_nodes)
    data, optimizer = _collect(problems, build_classes, settings) or (None, None)
    resume = _collect(problems, find_resume, settings)
    if problems:
        raise ValueError("\n".join(problems))
    initial = _collect(problems, find_initial, settings, config)
    run = Run(settings, config, data, optimizer, precision, devices, resume, initial)
    if is_own_data(data):
        problems += share_with_data(settings, data)
        # only where nobody named a folder: a mistyped one must not be filled with stories
        is_default = Path(data.train_data_path).parent == DATA_DIR
        run.demo_data = is_default and settings.dataset_dir is None and not has_text(data)
    problems += tokenizer_problems(run) + out_dir_problems(run)
    if resume:
        run.start_step = _collect(problems, resume_step, run) or 0
    if problems:
        raise ValueError("\n".join(problems))
    # what runs is what is saved: whole steps, and the device's own precision
    settings.train.max_tokens = run.n_steps * run.tokens_per_step
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
    problems += ignored_problems(settings)
    return problems or batch_problems(settings.train, block_size, world_size)


def ignored_problems(settings: Settings) -> list[str]:
    """Return one sentence per setting that LitGPT takes and then never reads in pretraining."""
    train, evaluation = settings.train, settings.eval
    unread = {
        "train.epochs": (train.epochs, "use train.max_tokens"),
        "train.max_steps": (train.max_steps, "use train.max_tokens"),
        "train.max_time": (train.max_time, "use train.max_tokens"),
        "eval.max_new_tokens": (evaluation.max_new_tokens, "pretraining samples no text while it validates"),
    }
    problems = [
        f"{key} is {value}, which LitGPT ignores in pretraining; {hint}"
        for key, (value, hint) in unread.items()
        if value is not None
    ]
    if evaluation.evaluate_example != "first":
        problems.append("eval.evaluate_example is for finetuning; remove it")
    is_wandb = settings.logger_name == "wandb"
    for name, value in asdict(settings.log).items():
        is_read = is_wandb and name in ("project", "run", "group")
        if value != getattr(litgpt_args.LogArgs(), name) and not is_read:
            problems.append(f"log.{name} is {value}, which logger_name {settings.logger_name} does not read")
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
        problems.append(f"train.max_seq_length is {length} but the model's block_size is {block_size}")
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

    data = dict(settings.data)
    if settings.dataset_dir:
        paths = {f"{split}_data_path": str(settings.dataset_dir / split) for split in prepare_data.SPLITS}
        data["init_args"] = {**(data.get("init_args") or {}), **paths}
    problems: list[str] = []
    module = _collect(problems, _build, "data", data, DataModule)
    # tried on one weight, so that a value it refuses is told before anything is written
    weight = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = _collect(problems, _build, "optimizer", settings.optimizer, torch.optim.Optimizer, weight)
    if problems:
        raise ValueError("\n".join(f"{settings.config} or a flag: {problem}" for problem in problems))
    kind, values = type(optimizer), settings.optimizer.get("init_args") or {}
    init_args = {name: optimizer.defaults.get(name, value) for name, value in values.items()}
    return module, {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": init_args}


def _build(key: str, spec: dict[str, Any], base: type, *args: Any) -> Any:
    """Return the object that a class_path and its init_args describe; ValueError names the wrong one."""
    from jsonargparse import ArgumentError, ArgumentParser

    path, init_args = str(spec.get("class_path")), spec.get("init_args") or {}
    package = {"optimizer": "torch.optim", "data": "litgpt.data"}[key]
    module_name, _, name = (path if "." in path else f"{package}.{path}").rpartition(".")
    try:
        kind = getattr(importlib.import_module(module_name), name)
        if not issubclass(kind, base):
            raise TypeError(f"not a {base.__name__}")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{key}.class_path is {path}, which cannot be used: {error}") from None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip={"params"} if args else set())
    types = {action.dest: action for action in parser._actions}
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
    from moe_layers import CHECKPOINT_FILE, find_checkpoint

    resume = str(settings.resume)
    if resume.lower() in ("false", "none", ""):
        return None
    if settings.overwrite:
        raise ValueError("resume and overwrite exclude each other; drop one")
    if settings.initial_checkpoint_dir:
        raise ValueError("resume and initial_checkpoint_dir exclude each other; drop one")
    out_dir = settings.out_dir if resume.lower() in ("auto", "true") else Path(resume)
    # final/ is saved with the data one batch further on (litgpt 0.5.13): only step-* resume exactly
    steps = sorted(out_dir.glob("step-*"), reverse=True)
    if out_dir is not settings.out_dir and not steps:
        return find_checkpoint(out_dir) / CHECKPOINT_FILE
    whole = [step for step in steps if (step / "model_config.yaml").is_file()]  # LitGPT writes it last
    for step in steps[: steps.index(whole[0])] if whole else steps:
        print(f"Skipping {step}: it was not written to its end.", file=sys.stderr)
    if whole:
        return whole[0] / CHECKPOINT_FILE
    if resume.lower() != "auto":  # somebody counts on a checkpoint that is not there
        raise FileNotFoundError(f"resume is {resume} but {out_dir} holds no whole step-*; use resume: auto")
    print(f"No checkpoint to resume from in {out_dir}: starting from the beginning.", file=sys.stderr)
    return None


def find_initial(settings: Settings, config: "MoEConfig") -> Path | None:
    """Return the lit_model.pth whose weights to start from, which must fit the model, or None."""
    from moe_layers import CHECKPOINT_FILE, check_weights, find_checkpoint

    if settings.initial_checkpoint_dir is None:
        return None
    checkpoint_dir = find_checkpoint(settings.initial_checkpoint_dir)
    check_weights(checkpoint_dir, config)
    return checkpoint_dir / CHECKPOINT_FILE


def resume_step(run: Run) -> int:
    """Return the optimizer steps done in the checkpoint; ValueError if this run cannot continue it."""
    from moe_layers import check_weights, read_state

    check_weights(run.resume.parent, run.config)
    train, state = run.settings.train, read_state(run.resume)
    step_count, iter_num = state.get("step_count"), state.get("iter_num")
    if not isinstance(step_count, int) or not isinstance(iter_num, int):
        raise ValueError(f"{run.resume} holds weights alone; start from it with --initial_checkpoint_dir")
    then = read_yaml(run.resume.parent / "train_config.yaml")
    for key in ("train.global_batch_size", "train.max_seq_length"):
        now = functools.reduce(getattr, key.split("."), run.settings)
        if key in then and then[key][0] != now:
            raise ValueError(
                f"{run.resume.parent}: {key} was {then[key][0]}, now {now}; resume with what it was"
            )
    if iter_num != step_count * train.gradient_accumulation_iters(run.devices, run.settings.num_nodes):
        raise ValueError(
            f"{run.resume.parent}: {step_count} steps took {iter_num} micro-batches a device, which "
            f"train.micro_batch_size {train.micro_batch_size} on {run.devices} device(s) does not give; "
            "resume with the batch sizes and devices that it was made with"
        )
    return step_count


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


def out_dir_problems(run: Run) -> list[str]:
    """Return a sentence if the place holds another run, cannot be written, or is too full."""
    out_dir = run.settings.out_dir
    if run.initial and run.settings.overwrite and out_dir.resolve() in run.initial.resolve().parents:
        return [
            f"initial_checkpoint_dir lies in {out_dir}, which --overwrite deletes; choose another --out_dir"
        ]
    earlier = [path for path in (out_dir / "final", *sorted(out_dir.glob("step-*"))) if path.exists()]
    if earlier and run.resume is None and not run.settings.overwrite:
        # final/ alone cannot be resumed exactly, only its weights taken up
        has_step = any(path.name.startswith("step-") for path in earlier)
        way_on = (
            "--resume auto" if has_step else f"--initial_checkpoint_dir {earlier[0]} and another --out_dir"
        )
        return [
            f"{out_dir} already holds a run ({earlier[0].name}); continue it with {way_on}, "
            "choose another --out_dir, or delete it with --overwrite"
        ]
    parent = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return [f"out_dir is {out_dir}, but {parent} cannot be written; choose another --out_dir"]
    needed, free = checkpoint_bytes(run), shutil.disk_usage(parent).free
    if free < needed:
        return [f"{out_dir}: a checkpoint needs {needed / 1e9:.2f} GB but {free / 1e9:.2f} GB are free"]
    whole = needed * (1 + (run.n_steps - run.start_step) // (run.settings.train.save_interval or run.n_steps))
    if free < whole:
        print(
            f"Warning: all checkpoints of this run need {whole / 1e9:.1f} GB but {free / 1e9:.1f} GB are "
            f"free in {out_dir}; raise train.save_interval or make room.",
            file=sys.stderr,
        )
    return []


def checkpoint_bytes(run: Run) -> int:
    """Return the size of one checkpoint: the weights and AdamW's two moments."""
    from moe_layers import count_parameters

    total, _ = count_parameters(run.config)
    return 3 * total * (2 if run.precision.endswith("16-true") else 4)


# --- the run ------------------------------------------------------------------------------------------------


class Monitor:
    """What Fabric calls as callback and as logger: the live bar, logs/csv/metrics.csv, the summary's figures.

    Fabric asks for methods by name, no base class, so that importing this file does not import Lightning.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.step = run.start_step
        self.first_step_at = self.last_step_at = 0.0
        self.bar: Any = None
        self.values: dict[str, str] = {}
        self.metrics = MetricsFile(run.settings.out_dir / "logs/csv/metrics.csv", run.start_step)
        self.is_live = run.settings.progress and sys.stderr.isatty() and is_main_process()

    def on_after_setup(self, fabric: "Fabric", module: Any) -> None:
        """Load the weights to start from; LitGPT's own way knows files of bare weights, not checkpoints."""
        start = self.run.initial
        if start is None:
            return
        from moe_layers import read_state

        if "model" in read_state(start):
            fabric.load(start, {"model": module}, strict=False)  # the optimizer's state stays behind
        else:
            fabric.load_raw(start, module)

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        """Advance the bar; Fabric calls it after each optimizer step."""
        self.step += 1
        self.last_step_at = time.perf_counter()
        self.first_step_at = self.first_step_at or self.last_step_at
        if self.bar is None and self.is_live:
            from tqdm import tqdm

            per_step = self.run.tokens_per_step
            total, done = self.run.n_steps * per_step, (self.step - 1) * per_step
            self.bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, dynamic_ncols=True)
        if self.bar is not None:
            self.bar.update(self.run.tokens_per_step)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row; Fabric's `log_dict` calls it with LitGPT's metrics."""
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        if rank_zero_only.rank != 0:
            return
        self.metrics.write({"step": self.step, **{key: float(value) for key, value in metrics.items()}})
        for key in ("loss", "val_loss"):
            if key in metrics:
                self.values[key] = f"{float(metrics[key]):.3f}"
        if self.bar is not None:
            self.bar.set_postfix(self.values, refresh=False)

    def print(self, *texts: Any, **_: Any) -> None:
        """Print a line of LitGPT's on stderr, less those that the bar and our summary replace."""
        line = " ".join(map(str, texts))
        # litgpt 0.5.13's summary divides by a clock reading; its step lines are the bar's business
        if line.startswith(("| ", "-----")) or (self.is_live and line.startswith("Epoch ")):
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def tokens_per_s(self) -> float | None:
        """Return tokens/s from the first to the last step of this process, validation and saving included."""
        steps = self.step - self.run.start_step - 1
        seconds = self.last_step_at - self.first_step_at
        return steps * self.run.tokens_per_step / seconds if steps > 0 and seconds > 0 else None

    def close(self) -> None:
        """Finish the bar."""
        if self.bar is not None:
            self.bar.close()


class MetricsFile:
    """One CSV over all resumes; Lightning's CSVLogger opens a new one each time and loses the last rows."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.path, self.start_step = path, start_step
        self.columns: list[str] = []

    def write(self, row: dict[str, float]) -> None:
        """Append `row`; a new column rewrites the file with a wider header."""
        new = [key for key in row if key not in self.columns]
        if new:
            rows = self._rows()
            self.columns += [key for key in [*(rows[0] if rows else []), *row] if key not in self.columns]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self.path.with_suffix(".tmp")
            with whole.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)
            whole.replace(self.path)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _rows(self) -> list[dict[str, str]]:
        """The rows to keep: all of this process, and of an earlier one those up to the step resumed from."""
        if not self.path.is_file() or (not self.columns and not self.start_step):
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if self.columns:
            return rows
        # the last row may be torn, if the machine stopped while it was written
        return [row for row in rows if row["step"] and float(row["step"]) <= self.start_step]


def ready_data(run: Run) -> None:
    """Put the data on disk, fresh; raises ValueError if it is too short for the run."""
    from litgpt import Tokenizer

    settings = run.settings
    if not is_own_data(run.data):
        return
    folder = Path(run.data.train_data_path).parent
    has_tokenizer = (settings.tokenizer_dir / "tokenizer.json").is_file()
    if run.demo_data:
        print(
            f"No data in {folder}: writing the built-in demo stories there "
            "(real ones: prepare_data.py --dataset tinystories).",
            file=sys.stderr,
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


def save_settings(settings: Settings, checkpoint_dir: Path) -> None:
    """Write the settings that ran as train_config.yaml; read back, they give the same run."""
    text = yaml.safe_dump(plain_settings(settings), sort_keys=False)
    (checkpoint_dir / "train_config.yaml").write_text(text, encoding="utf-8")


def delete_run(out_dir: Path) -> None:
    """Remove what an earlier run left in `out_dir`, and nothing else."""
    for old in (out_dir / "final", out_dir / "logs", *out_dir.glob("step-*")):
        shutil.rmtree(old, ignore_errors=True)


def is_main_process() -> bool:
    """Return whether this is the process that a person started, or the first that a launcher did."""
    # torchrun and Slurm give the rank; Fabric's own launcher the node's and the device's
    ranks = [os.environ[name] for name in ("RANK", "SLURM_PROCID") if name in os.environ][:1]
    return all(int(rank) == 0 for rank in ranks or map(os.environ.get, ("NODE_RANK", "LOCAL_RANK"), "00"))


def make_fabric(run: Run, monitor: Monitor) -> "Fabric":
    """Return the Fabric that LitGPT's loop runs on: one device, DDP on the CPU, FSDP on GPUs."""
    import lightning as L
    from lightning.fabric.strategies import FSDPStrategy
    from litgpt.model import Block
    from litgpt.utils import choose_logger

    settings = run.settings
    loggers: list[Any] = [monitor]
    if settings.logger_name != "csv":
        name = f"pretrain-{run.config.name}"
        log_args = {key: value for key, value in asdict(settings.log).items() if value is not None}
        loggers.append(
            choose_logger(
                settings.logger_name, settings.out_dir, name, log_args=log_args, resume=bool(run.resume)
            )
        )
    strategy: Any = "auto"
    if run.devices * settings.num_nodes > 1:
        # as litgpt.pretrain.setup; it knows FSDP alone, which the CPU lacks
        fsdp = FSDPStrategy(
            auto_wrap_policy={Block}, state_dict_type="full", sharding_strategy="HYBRID_SHARD"
        )
        strategy = "ddp" if settings.accelerator == "cpu" or not _has_cuda() else fsdp
    fabric = L.Fabric(
        accelerator="cuda" if settings.accelerator == "gpu" else settings.accelerator,
        devices=run.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        precision=run.precision,
        loggers=loggers,
        callbacks=[monitor],
    )
    fabric.print = lambda *texts, **kwargs: monitor.print(*texts) if fabric.is_global_zero else None
    return fabric


def train(run: Run) -> Monitor:
    """Run LitGPT's `main` and return the monitor with the run's figures."""
    import torch
    from litgpt import Tokenizer, pretrain

    settings = run.settings
    compiled, why = will_compile(settings)
    torch.compiler.set_stance("default" if compiled else "force_eager")  # litgpt 0.5.13 always calls compile
    # litgpt 0.5.13 re-parses sys.argv here and exits on our flags; drop when main takes the hyperparameters
    pretrain.save_hyperparameters = lambda _, checkpoint_dir: save_settings(settings, checkpoint_dir)
    monitor = Monitor(run)
    fabric = make_fabric(run, monitor)
    fabric.launch()
    tokenizer = Tokenizer(settings.tokenizer_dir)
    if settings.overwrite and fabric.is_global_zero:
        delete_run(settings.out_dir)
    for logger in fabric.loggers[1:]:
        logger.log_hyperparams(plain_settings(settings))
    fabric.print(describe(run, fabric, "compiled" if compiled else "eager", why))
    try:
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
            eval=settings.eval,
            optimizer=run.optimizer,
        )
    finally:
        monitor.close()
    return monitor


def describe(run: Run, fabric: "Fabric", mode: str, why: str) -> str:
    """Return the lines that say what runs, and on what."""
    import torch

    from moe_layers import count_parameters, experts_path

    total, active = count_parameters(run.config)
    dtype = torch.bfloat16 if run.precision.startswith("bf16") else torch.float32
    resumed = f", resuming after step {run.start_step} ({run.resume.parent})" if run.resume else ""
    return (
        f"Model   {run.config.name}: {total:,} parameters, {active:,} active per token\n"
        f"Device  {fabric.device}, {run.precision}, {mode} ({why})\n"
        f"Experts {experts_path(run.config, fabric.device, dtype)}\n"
        f"Run     {run.n_steps:,} steps of {run.tokens_per_step:,} tokens, seed {run.settings.seed}{resumed}"
    )


def peak_memory() -> str:
    """Return the peak memory of this process, of the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
    if sys.platform == "win32":
        import psutil

        return f"{psutil.Process().memory_info().peak_wset / 1e9:.2f} GB"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def tell_story(checkpoint_dir: Path, prompt: str = "Once upon a time") -> str:
    """Return a story that the saved checkpoint tells."""
    import torch
    from litgpt import Tokenizer
    from litgpt.generate.base import generate

    from moe_layers import load_model

    model, tokenizer = load_model(checkpoint_dir), Tokenizer(checkpoint_dir)
    prompt_ids = tokenizer.encode(prompt)
    length = min(model.max_seq_length, prompt_ids.numel() + 300)
    if prompt_ids.numel() >= length:
        return prompt  # a toy model whose context the prompt fills
    torch.manual_seed(1)
    model.max_seq_length = length
    model.set_kv_cache(batch_size=1, device="cpu", dtype=next(model.parameters()).dtype)
    ids = generate(model, prompt_ids, length, temperature=0.7, top_p=0.9, eos_id=tokenizer.eos_id)
    return tokenizer.decode(ids).strip()


def summarize(run: Run, monitor: Monitor) -> None:
    """Print the run's figures, a story and what to do next, on stdout."""
    final, rate = run.settings.out_dir / "final", monitor.tokens_per_s()
    tokens = (monitor.step - run.start_step) * run.tokens_per_step
    print(
        f"\nTrained    {tokens:,} tokens in {monitor.step - run.start_step} steps"
        + (f", {rate:,.0f} tokens/s with validation and saving" if rate else "")
        + (f"\nLoss       {monitor.values['loss']} in training" if "loss" in monitor.values else "")
        + (f", {monitor.values['val_loss']} in validation" if "val_loss" in monitor.values else "")
        + f"\nMemory     {peak_memory()} at its peak\nCheckpoint {final}\nLog        {monitor.metrics.path}"
    )
    if is_own_data(run.data):
        print(f"\nA story from it:\n\n{tell_story(final)}\n")
    folder = Path(run.data.train_data_path).parent if is_own_data(run.data) else DATA_DIR
    data_flag = "" if folder == DATA_DIR else f" --data_dir {folder}"
    print(
        "Next:\n"
        f'  uv run python generate.py --ckpt_dir {final} --prompt "One day, a little dog"\n'
        f"  uv run python evaluate.py --ckpt_dir {final}{data_flag}"
    )
    if run.demo_data:
        print(
            "These were the built-in demo stories. For real ones:\n"
            "  uv run python prepare_data.py --dataset tinystories --data_dir data/tinystories "
            "--tokenizer_dir data/tinyllama"
        )


def is_disk_full(error: BaseException) -> bool:
    """Return whether saving failed for want of room: torch's zip writer tells it as a RuntimeError."""
    return getattr(error, "errno", None) == errno.ENOSPC or "PytorchStreamWriter failed writing" in str(error)


def explain(error: Exception, out_dir: Path) -> str | None:
    """Return what to tell of a failure in training, None for one that only a bug can cause."""
    if is_disk_full(error):
        return f"{out_dir}: the disk is full; make room and continue with --resume auto"
    if "non-finite" in str(error):  # litgpt 0.5.13 clips with error_if_nonfinite
        return (
            "the loss or its gradient is no longer a number; lower optimizer.init_args.lr, "
            "and continue from an earlier checkpoint with --resume PATH"
        )
    return f"{error}; put it right and continue with --resume auto" if isinstance(error, OSError) else None


def set_up(argv: list[str]) -> Run:
    """Return the checked run with its data on disk. ValueError and OSError tell what is wrong."""
    settings = load_settings(argv)
    if settings.wandb_dataset:
        settings.dataset_dir = wandb_dataset.pull(settings.wandb_dataset, settings.wandb_artifacts_dir)
    if settings.dataset_dir and (settings.dataset_dir / "tokenizer/tokenizer.json").is_file():
        settings.tokenizer_dir = settings.dataset_dir / "tokenizer"  # an artifact brings its own
    run = check_run(settings)
    if is_main_process():  # the others wait for it when the process group forms
        ready_data(run)
    return run


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 2 after a message on bad settings, 1 after failed work, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # a story may hold what a Windows code page lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    argv = wandb_dataset.normalize_flags(sys.argv[1:] if argv is None else argv)
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
    out_dir = run.settings.out_dir
    try:
        monitor = train(run)
        if is_main_process():
            summarize(run, monitor)
    except KeyboardInterrupt:
        return _fail(f"stopped; continue from the last checkpoint in {out_dir} with --resume auto", 130)
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
    raise SystemExit(main())
