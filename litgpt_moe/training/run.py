"""From a command line to a Run: all is decided and checked before the first file is written."""

import contextlib
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from litgpt import args as litgpt_args

from litgpt_moe import budget
from litgpt_moe.checkpoints.batch_sizes import BatchSizes
from litgpt_moe.checkpoints.writer import put_back
from litgpt_moe.config import ModelFacts, MoEConfig, model_facts
from litgpt_moe.data.module import TextShards
from litgpt_moe.hardware import training_device
from litgpt_moe.processes import is_main_process, launcher_problems, note_once
from litgpt_moe.training import checks, class_path, fit, folder_checks
from litgpt_moe.training.clock import NO_TIME, UsedTime, used_time
from litgpt_moe.training.optimizer import UNFIT_OPTIMIZERS, try_step
from litgpt_moe.training.parse import Parsed, load_settings
from litgpt_moe.training.resume import (
    OpenCheckpoint,
    check_resume,
    find_initial,
    find_resume,
    place_of,
    say_if_batch_changed,
)
from litgpt_moe.training.run_data import build_data, wants_demo_data, with_dataset, with_tokenizer
from litgpt_moe.training.settings import Settings


@dataclass(frozen=True)
class Run:
    """A checked run. Its settings are saved as they run: whole steps, the precision of the device."""

    settings: Settings
    config: MoEConfig
    facts: ModelFacts
    data: Any  # a LitGPT data module, of whatever class the settings name
    optimizer: dict[str, Any]
    """class_path and init_args, typed and tried."""
    precision: str
    devices: int
    """Devices on this machine."""
    resume: OpenCheckpoint | None = None
    initial: OpenCheckpoint | None = None
    start_step: int = 0
    """Steps done before this process."""
    is_second_try: bool = False
    """Whether the GPU's memory ran out in a first try, with twice the micro-batch."""
    resumed_sizes: BatchSizes | None = None
    """Sequences in each step of a run that is resumed, this process's included."""
    used_time: UsedTime = NO_TIME
    """Of the commands before this one, up to the checkpoint that is resumed."""
    demo_data: bool = False
    """Whether the demo stories are written, because there is no text yet."""
    started: float = field(default_factory=time.monotonic)
    """time.monotonic() at the start of the command, from which train.max_time counts."""

    @property
    def block_size(self) -> int:
        """Tokens in a sequence."""
        return self.settings.train.max_seq_length or self.config.block_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a step of this process, over all devices."""
        return self.settings.train.global_batch_size * self.block_size

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences in each step of the whole run, over all devices."""
        return self.resumed_sizes or BatchSizes.constant(self.settings.train.global_batch_size)

    def tokens_at(self, step: int) -> int:
        """Return the tokens trained on after `step` steps of the whole run, over all devices."""
        return self.batch_sizes.sequences(step) * self.block_size

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.batch_sizes.steps(self.settings.train.n_tokens // self.block_size)

    @property
    def is_timed(self) -> bool:
        """Whether the learning rate follows the clock, and the run ends when its time is up."""
        return self.settings.schedule.progress == "time"

    @property
    def world_size(self) -> int:
        """Processes of the run, one per device."""
        return self.devices * self.settings.num_nodes

    @property
    def accumulation(self) -> int:
        """Gradient accumulation: micro-batches of one device in a step."""
        train = self.settings.train
        return train.global_batch_size // self.world_size // train.micro_batch_size

    @property
    def weight_bytes(self) -> int:
        """Size of the weights."""
        return self.facts.total_params * (2 if self.precision.endswith("16-true") else 4)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: the weights and AdamW's two moments."""
        return 3 * self.weight_bytes

    @property
    def data_dir(self) -> Path | None:
        """The data folder of TextShards; None with another data module."""
        return Path(self.data.train_data_path).parent if isinstance(self.data, TextShards) else None


def to_litgpt(settings: Settings) -> tuple[litgpt_args.TrainArgs, litgpt_args.EvalArgs]:
    """Return new objects of LitGPT's classes for pretrain.main; changing them changes no settings."""
    # LitGPT refuses max_new_tokens in pretraining; the story at a validation is ours
    evaluation = asdict(replace(settings.eval, max_new_tokens=None))
    return litgpt_args.TrainArgs(**asdict(settings.train)), litgpt_args.EvalArgs(**evaluation)


def set_up(argv: list[str], held: contextlib.ExitStack | None = None) -> Run:
    """Return the checked run of a command line, whose data may still have to be prepared.

    `held` gets the lock of the run's folder. It is taken before the checks, whose results hold only while no
    other run works there; without `held` it is released again.

    ValueError has one line per problem, with its place and the way out; OSError says which file cannot be
    read, that W&B cannot be reached, or that another run is live in the folder. Call `launcher_problems()`
    before this module is imported: Lightning's import fails on the variables that it checks.
    """
    parsed = load_settings(argv)
    out_dir, is_plan = parsed.settings.out_dir, parsed.settings.plan
    if not is_plan:
        parsed.attempt(folder_checks.check_writable, out_dir)
    precision, devices = _processes(parsed)
    with contextlib.ExitStack() as own:
        if not parsed.problems and not is_plan:
            if is_main_process():
                (own if held is None else held).enter_context(folder_checks.run_lock(out_dir))
            # in every process: under a launcher they look for a checkpoint at the same time
            put_back(out_dir)
        return _checked_run(parsed, precision, devices)


def _processes(parsed: Parsed) -> tuple[str, int]:
    """Return the precision and the devices on this machine; add what does not fit a launcher's variables."""
    settings = parsed.settings
    wanted = (settings.accelerator, settings.devices, settings.num_nodes, settings.precision)
    if (chosen := parsed.attempt(training_device, *wanted)) is None:
        return "", 1
    # a number of machines below 1 has a sentence of its own
    parsed.add(launcher_problems(chosen[1], max(1, settings.num_nodes)))
    return chosen


def _checked_run(parsed: Parsed, precision: str, devices: int) -> Run:
    settings = with_dataset(parsed.settings)
    data = parsed.attempt(build_data, settings)
    settings = parsed.attempt(with_tokenizer, settings, data) or settings
    resume = parsed.attempt(find_resume, settings)
    settings = parsed.attempt(fit.with_own_model, settings, resume, parsed.is_model_named) or settings
    train = parsed.attempt(fit.kept_length, settings.train, resume) or settings.train
    settings = replace(settings, train=train)
    demo_data = wants_demo_data(settings, data)
    built: Any = parsed.attempt(fit.fitting_model, settings, resume, demo_data) or (None, None)
    config, model = built
    world_size = devices * settings.num_nodes
    parsed.add(checks.train_problems(settings, config and config.block_size, world_size))
    settings = parsed.attempt(fit.with_learning_rate, settings, config, resume) or settings
    optimizer = parsed.attempt(optimizer_spec, settings)
    parsed.raise_all()
    facts = model_facts(config, settings.train.max_seq_length, model, bool(settings.train.tie_embeddings))
    initial = parsed.attempt(find_initial, settings, model)
    run = Run(settings, config, facts, data, optimizer, precision, devices, resume, initial)
    run = replace(run, demo_data=demo_data)
    if resume:
        run = parsed.attempt(_resumed, run, resume) or run
    run = _as_it_runs(run)
    parsed.attempt(checks.check_tokenizer, run)
    parsed.attempt(checks.check_memory, run)
    if run.resumed_sizes:
        parsed.attempt(check_resume, run, model)
    if not settings.plan:
        parsed.attempt(folder_checks.check_out_dir, run)
    parsed.raise_all()
    return run


def _resumed(run: Run, opened: OpenCheckpoint) -> Run:
    """Return the run at the place where it goes on; train.epochs counts the passes from its beginning."""
    run = _with_length(run)
    step, sizes = place_of(opened, run.settings, run.block_size)
    run = replace(run, start_step=step, resumed_sizes=sizes, used_time=used_time(opened, run.settings))
    say_if_batch_changed(run)
    return run


def _with_length(run: Run) -> Run:
    """Return the run with its length in tokens; where the settings leave it open, the data must be there."""
    train = fit.settled_length(run.settings.train, run.data, run.block_size, run.facts)
    return replace(run, settings=replace(run.settings, train=train))


def settle(run: Run) -> Run:
    """Return the run with what its data decide, now that they are prepared; ValueError if they are too few.

    Before, a vocabulary and a length that the settings leave open are not known.
    """
    is_open = not (run.resume or run.initial) and fit.leaves_vocabulary_open(run.settings)
    if is_open and fit.vocabulary_size(run.settings.tokenizer_dir) != run.config.vocab_size:
        config, model = fit.fitting_model(run.settings, None, has_demo_data=False)
        is_tied = bool(run.settings.train.tie_embeddings)
        facts = model_facts(config, run.settings.train.max_seq_length, model, is_tied)
        run = replace(run, config=config, facts=facts)
    if fit.is_open(run.settings.train):
        run = _as_it_runs(_with_length(run))
        if not run.settings.plan:
            folder_checks.warn_of_disk(run, folder_checks.free_bytes(run.settings.out_dir))
    # data that have been damaged since are reported where they are read
    with contextlib.suppress(ValueError, OSError):
        in_pass = fit.pass_tokens(run.data, run.block_size)
        warning = in_pass and budget.too_many_passes(run.settings.train.n_tokens, in_pass, run.data_dir)
        if warning:
            note_once(warning)
    return run


def _as_it_runs(run: Run) -> Run:
    """Return the run with its settings as they are saved, and warn of those that do not fit its length.

    max_tokens is in whole steps, and log_interval such that at least one step is logged; unless the data have
    still to decide the length.
    """
    settings = replace(run.settings, precision=run.precision, devices=run.devices)
    if fit.is_open(train := settings.train):
        return replace(run, settings=settings)
    log_interval = min(train.log_interval, run.n_steps)
    train = replace(train, max_tokens=run.tokens_at(run.n_steps), log_interval=log_interval)
    run = replace(run, settings=replace(settings, train=train))
    checks.warn_of_rates(run)
    return run


def optimizer_spec(settings: Settings) -> dict[str, Any]:
    """Return the optimizer's class_path and init_args, typed; ValueError if torch refuses them."""
    kind = class_path.find_class("optimizer", settings.optimizer)
    for refused, why in UNFIT_OPTIMIZERS.items():
        if kind is refused:
            name = settings.optimizer["class_path"]
            raise ValueError(f"optimizer.class_path is {name}, {why}; use AdamW")
    init_args = class_path.typed_arguments("optimizer", kind, settings.optimizer)
    with class_path.refused_arguments("optimizer", settings.optimizer, init_args):
        try_step(settings, kind, init_args)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": init_args}
