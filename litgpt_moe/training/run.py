"""From a command line to a Run: everything is decided and checked before the first file is written."""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from litgpt import args as litgpt_args

from litgpt_moe.config import ModelFacts, MoEConfig, model_facts
from litgpt_moe.data.artifact import pull
from litgpt_moe.data.manifest import MANIFEST
from litgpt_moe.data.module import TextShards
from litgpt_moe.data.settings import DEFAULT_DATA_DIR, SPLITS
from litgpt_moe.data.tokenizer_folder import choose_tokenizer
from litgpt_moe.hardware import training_device
from litgpt_moe.processes import is_main_process, launcher_problems
from litgpt_moe.training import checks, class_path
from litgpt_moe.training.parse import load_settings
from litgpt_moe.training.resume import OpenCheckpoint, check_resume, find_initial, find_resume
from litgpt_moe.training.settings import Settings


@dataclass(frozen=True)
class Run:
    """A checked run. Its settings are as they run and are saved: whole steps, the device's own precision."""

    settings: Settings
    config: MoEConfig
    facts: ModelFacts
    data: Any  # a LitGPT data module, of whatever class the settings name
    optimizer: dict[str, Any]
    """class_path and init_args, typed and tried out."""
    precision: str
    devices: int
    """Devices on this machine."""
    resume: OpenCheckpoint | None = None
    initial: OpenCheckpoint | None = None
    start_step: int = 0
    """Steps done before this process."""
    demo_data: bool = False
    """Whether there was no text at all yet, so that the demo stories are written."""
    started: float = field(default_factory=time.monotonic)
    """When the command began, on the clock of time.monotonic; train.max_time counts from there."""

    @property
    def block_size(self) -> int:
        """Tokens in a sequence."""
        return self.settings.train.max_seq_length or self.config.block_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a step, over all devices."""
        return self.settings.train.global_batch_size * self.block_size

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return (self.settings.train.max_tokens or 0) // self.tokens_per_step

    @property
    def world_size(self) -> int:
        """Processes of the run, one a device."""
        return self.devices * self.settings.num_nodes

    @property
    def accumulation(self) -> int:
        """Micro-batches of one device in a step."""
        train = self.settings.train
        return train.global_batch_size // self.world_size // train.micro_batch_size

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: the weights and AdamW's two moments."""
        return 3 * self.facts.total_params * (2 if self.precision.endswith("16-true") else 4)


def to_litgpt(settings: Settings) -> tuple[litgpt_args.TrainArgs, litgpt_args.EvalArgs]:
    """Return new objects of LitGPT's classes for pretrain.main; changing them changes no settings."""
    # the story at a validation is ours: LitGPT's check refuses max_new_tokens in pretraining
    evaluation = replace(settings.eval, max_new_tokens=None)
    return litgpt_args.TrainArgs(**asdict(settings.train)), litgpt_args.EvalArgs(**asdict(evaluation))


def set_up(argv: list[str]) -> Run:
    """Return the checked run of a command line, whose data may still have to be prepared.

    Ask `launcher_problems()` before importing this module: Lightning trips over the variables it is about.

    Raises:
        ValueError: every problem at once, one line each, with its place and the way out.
        OSError: a file cannot be read, W&B cannot be reached, or another run is live in the folder.
    """
    parsed = load_settings(argv)
    settings = with_dataset(parsed.settings)
    config = parsed.attempt(MoEConfig.from_file, settings.model_config)
    wanted = (settings.accelerator, settings.devices, settings.num_nodes, settings.precision)
    precision, devices = parsed.attempt(training_device, *wanted) or ("", 1)
    world_size = devices * settings.num_nodes
    parsed.add(launcher_problems(world_size))
    parsed.add(checks.train_problems(settings, config and config.block_size, world_size))
    data = parsed.attempt(build_data, settings)
    settings = parsed.attempt(with_tokenizer, settings, data) or settings
    optimizer = parsed.attempt(optimizer_spec, settings)
    if is_main_process() and settings.out_dir.is_dir():
        with checks.run_lock(settings.out_dir):
            pass  # of a folder that a live run is changing nothing can be said
    resume = parsed.attempt(find_resume, settings)
    parsed.raise_all()
    initial = parsed.attempt(find_initial, settings, config)
    facts = model_facts(config, settings.train.max_seq_length)
    run = Run(settings, config, facts, data, optimizer, precision, devices, resume, initial)
    run = replace(run, settings=_as_run(run), demo_data=_wants_demo_data(settings, data))
    parsed.attempt(checks.check_tokenizer, settings, config.padded_vocab_size)
    parsed.attempt(checks.check_memory, settings, facts, precision, world_size)
    if resume:
        checked = (resume, settings, config, optimizer["class_path"], run.tokens_per_step)
        run = replace(run, start_step=parsed.attempt(check_resume, *checked) or 0)
    room = (run.checkpoint_bytes, run.n_steps - run.start_step)
    parsed.attempt(checks.check_out_dir, settings, resume, initial, *room)
    parsed.raise_all()
    return run


def with_dataset(settings: Settings) -> Settings:
    """Return the settings with the folder of the W&B data set, once it is here, and its own tokenizer."""
    if settings.wandb_dataset:
        folder = pull(settings.wandb_dataset, settings.wandb_artifacts_dir)
        settings = replace(settings, dataset_dir=folder)
        if (folder / "tokenizer/tokenizer.json").is_file():
            settings = replace(settings, tokenizer_dir=folder / "tokenizer")
    return settings


def with_tokenizer(settings: Settings, data: Any) -> Settings:
    """Return the settings with the tokenizer that was named, or else the one that made the data."""
    if not isinstance(data, TextShards):
        return replace(settings, tokenizer_dir=choose_tokenizer(None, settings.tokenizer_dir))
    data.tokenizer_dir = choose_tokenizer(data.data_dir, settings.tokenizer_dir)
    return replace(settings, tokenizer_dir=data.tokenizer_dir)


def _as_run(run: Run) -> Settings:
    # whole steps, a logged one at least
    max_tokens = run.n_steps * run.tokens_per_step
    log_interval = min(run.settings.train.log_interval, run.n_steps)
    train = replace(run.settings.train, max_tokens=max_tokens, log_interval=log_interval)
    return replace(run.settings, train=train, precision=run.precision, devices=run.devices)


def build_data(settings: Settings) -> Any:
    """Return the data module, ours with the run's tokenizer and seed; ValueError if it cannot be made."""
    init_args = dict(settings.data.get("init_args") or {})
    if settings.dataset_dir:
        init_args |= {f"{split}_data_path": str(settings.dataset_dir / split) for split in SPLITS}
    data = class_path.build("data", {**settings.data, "init_args": init_args})
    if isinstance(data, TextShards):
        own = settings.tokenizer_dir
        if (named := Path(init_args.get("tokenizer_dir", own))) != own:
            raise ValueError(f"data.init_args.tokenizer_dir is {named} but tokenizer_dir is {own}; drop one")
        data.tokenizer_dir = own
        if "seed" not in init_args:
            data.seed = settings.seed
    return data


def _wants_demo_data(settings: Settings, data: Any) -> bool:
    """Return whether there is no text, where nobody named a folder: a mistyped one is not to be filled."""
    if not isinstance(data, TextShards) or settings.dataset_dir is not None:
        return False
    folder = Path(data.train_data_path)
    has_text = (folder.parent / MANIFEST).is_file() or any(folder.glob("*.txt"))
    return folder.parent == DEFAULT_DATA_DIR and not has_text


def optimizer_spec(settings: Settings) -> dict[str, Any]:
    """Return the optimizer's class_path and init_args, typed; BadClass if torch refuses them."""
    # tried on one weight (a matrix, for Muon), so that a value it refuses is known before anything is written
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    kind = type(class_path.build("optimizer", settings.optimizer, [weight]))
    init_args = class_path.typed_arguments("optimizer", kind, settings.optimizer)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": init_args}
