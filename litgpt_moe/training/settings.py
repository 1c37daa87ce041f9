"""The settings of a run: the keys of train_config.yaml, the flags of run_train.py, their defaults and help.

Nothing heavy is imported here, so that `run_train.py --help` answers at once. TrainArgs, EvalArgs and LogArgs
have LitGPT's names, types and defaults: `import litgpt.args` would load torch. A contract test compares them.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml

from litgpt_moe.checkpoints.layout import CheckpointArgs
from litgpt_moe.data.settings import DEFAULT_TOKENIZER_DIR


@dataclass(frozen=True)
class TrainArgs:
    """Training. LitGPT's own keys."""

    save_interval: int | None = 1000
    """Steps between checkpoints (null: only the last)."""
    log_interval: int = 1
    """Steps between the rows of the log."""
    global_batch_size: int = 64
    """Sequences in a step, over all devices."""
    micro_batch_size: int = 4
    """Sequences at a time on a device; lower it if memory runs out."""
    lr_warmup_steps: int | None = 100
    """Steps of linear warm-up of the learning rate."""
    lr_warmup_fraction: float | None = None
    """Share of an epoch to warm up in, in place of lr_warmup_steps."""
    epochs: int | None = None
    """Passes through the training text, in place of train.max_tokens."""
    max_tokens: int | Literal["auto"] | None = "auto"
    """Tokens to train on, such as 10M; auto: 4 passes through the text, or fewer."""
    max_steps: int | None = None
    """Not supported in pretraining: use train.max_tokens or train.epochs."""
    max_time: float | None = None
    """Seconds, or 3h, in which the command trains, saves and ends (see schedule.progress)."""
    max_seq_length: int | None = None
    """Tokens in a sequence (null: the model's block_size)."""
    tie_embeddings: bool | None = None
    """Whether the embedding and the head share one weight matrix."""
    max_norm: float | None = 1.0
    """Norm that the gradient is clipped to (.inf: off)."""
    min_lr: float = 6e-5
    """Learning rate at the end of the decay."""

    @property
    def n_tokens(self) -> int:
        """Tokens to train on; 0 as long as the data have not decided it."""
        return self.max_tokens if isinstance(self.max_tokens, int) and not self.epochs else 0


@dataclass(frozen=True)
class EvalArgs:
    """Validation. LitGPT's own keys."""

    interval: int = 600
    """Steps between validations."""
    max_new_tokens: int | None = None
    """Tokens of the story written to logs/stories.csv at each validation (null: no story)."""
    max_iters: int = 100
    """Micro-batches in a validation, at most."""
    initial_validation: bool = False
    """Validate before the first step too."""
    final_validation: bool = True
    """Validate after the last step too."""
    evaluate_example: str | int = "first"
    """Not supported in pretraining."""


@dataclass(frozen=True)
class LogArgs:
    """Names for the W&B logger. LitGPT's own keys; those of LitLogger are not supported."""

    project: str | None = None
    """W&B project."""
    run: str | None = None
    """W&B run name (null: a generated one)."""
    group: str | None = None
    """W&B group."""
    teamspace: str | None = None
    """Not supported: of LitLogger."""
    metadata: dict[str, Any] | None = None
    """Not supported: of LitLogger."""
    log_model: bool = False
    """Not supported: see checkpoints.to_wandb."""
    save_logs: bool = True
    """Not supported: of LitLogger."""
    checkpoint_name: str | None = None
    """Not supported: of LitLogger."""


@dataclass(frozen=True)
class BalanceArgs:
    """What keeps the tokens spread over the experts. The logged loss stays pure cross-entropy."""

    aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss of Switch Transformer (0.01 there; 0: off)."""
    z_loss_coef: float = 0.0
    """Weight of the router's z-loss of ST-MoE (0.001 there; 0: off)."""
    bias_update_rate: float = 0.0
    """Step of DeepSeek-V3's selection bias, which stock LitGPT cannot read (0.001 there; 0: off)."""


@dataclass(frozen=True)
class ScheduleArgs:
    """The learning rate over the run, from optimizer.init_args.lr down to train.min_lr."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: half a period; wsd: warmup-stable-decay, down only at the end; constant: never down."""
    progress: Literal["tokens", "time"] = "tokens"
    """What the rate follows: the tokens, or also the time: down when train.max_time of the run is up."""
    warmup_tokens: int | None = None
    """Tokens of linear warm-up, in place of train.lr_warmup_steps (null: that key counts)."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd goes down (0.2: arxiv.org/abs/2405.18392)."""


@dataclass(frozen=True)
class RecipeArgs:
    """Finer points of the optimizer and of the first weights, all of them off by default."""

    embedding_lr: float = 1.0
    """Learning rate of the embedding, times optimizer.init_args.lr."""
    head_lr: float = 1.0
    """Learning rate of the output head, times optimizer.init_args.lr."""
    other_lr: float = 1.0
    """Learning rate of norms, biases and routers, times optimizer.init_args.lr."""
    decay_to_zero: bool = False
    """Lower the weight decay in a straight line to 0 at the last step."""
    cautious_decay: bool = False
    """Decay a weight only where the step itself makes it smaller (arxiv.org/abs/2510.12402)."""
    zero_head: bool = False
    """Start from an output head of zeros."""


@dataclass(frozen=True)
class GuardArgs:
    """What happens at a loss that is not finite, or suddenly far too high."""

    max_skipped_steps: int = 10
    """Steps in a row without a finite loss and gradient, each skipped, after which the run ends."""
    spike_sigma: float = 6.0
    """Standard deviations above the last 128 losses from which a step is in logs/spikes.csv (0: off)."""


@dataclass(frozen=True)
class Settings:
    """What one run needs; the keys of train_config.yaml."""

    config: Path | None = None
    """The settings: a YAML file, or its name in configs/."""
    model_config: Path | None = None
    """The model: a YAML file of LitGPT Config keys, or its name in configs/."""
    out_dir: Path = Path("checkpoints")
    """Folder for step-*/, final/ and logs/."""
    overwrite: bool = False
    """Delete an earlier run in out_dir."""
    plan: bool = False
    """Say what the run would take, and train nothing."""
    resume: str | bool = False
    """auto: from the newest checkpoint, or a fresh start; true: or an error; or a path."""
    initial_checkpoint_dir: Path | None = None
    """Checkpoint whose weights to start from; not together with resume."""
    data: dict[str, Any] = field(default_factory=lambda: {"class_path": "prepare_data.TextShards"})
    """class_path and init_args of a LitGPT data module."""
    data_dir: Path | None = None
    """Prepared data, in place of those in data.init_args."""
    tokenizer_dir: Path = DEFAULT_TOKENIZER_DIR
    """Folder of tokenizer.json, copied into every checkpoint; not named: the one that made the data."""
    wandb_dataset: str | None = None
    """W&B artifact to train on: entity/project/name:alias, or project/name:alias with WANDB_ENTITY."""
    wandb_artifacts_dir: Path = Path("artifacts")
    """Directory for downloaded artifacts."""
    precision: str | None = None
    """bf16-true, bf16-mixed, 16-mixed, 32-true, or auto: the best here."""
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto"
    """Kind of device; auto is CUDA, or else the CPU. mps (Apple) must be asked for."""
    devices: int | str = "auto"
    """Devices on this machine; auto (or -1) is every GPU, or one CPU process."""
    num_nodes: int = 1
    """Machines."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles on CUDA where Triton is installed, and runs eager elsewhere."""
    activation_checkpointing: bool = False
    """Less memory, for one more forward pass."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Of several GPUs: the whole model on each (ddp), or shards (fsdp); auto is ddp where that fits."""
    float32_matmul_precision: Literal["highest", "high"] = "high"
    """Of float32 products on CUDA: high is TF32, as `litgpt pretrain` has it; highest is float32 itself."""
    seed: int = 42
    """Seed of the weights and the order of the data."""
    optimizer: dict[str, Any] = field(default_factory=lambda: {"class_path": "torch.optim.AdamW"})
    """class_path and init_args of an optimizer. lr may be auto, a rule by the model's size.
    torch.optim.Muon leaves all but hidden matrices to AdamW."""
    weight_decay_on: Literal["matrices", "all"] = "matrices"
    """matrices: no decay on norms, biases, embeddings and routers; all: on every weight."""
    logger_name: Literal["csv", "tensorboard", "wandb"] = "csv"
    """Logger beside logs/csv/metrics.csv, which is always written."""
    progress: bool = True
    """Show a live bar on a terminal; otherwise a line for each log step."""
    train: TrainArgs = field(default_factory=TrainArgs)
    moe: BalanceArgs = field(default_factory=BalanceArgs)
    schedule: ScheduleArgs = field(default_factory=ScheduleArgs)
    recipe: RecipeArgs = field(default_factory=RecipeArgs)
    checkpoints: CheckpointArgs = field(default_factory=CheckpointArgs)
    guard: GuardArgs = field(default_factory=GuardArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    log: LogArgs = field(default_factory=LogArgs)


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain values for YAML and loggers, without those that name files or a run."""
    left_out = ("config", "model_config", "resume", "overwrite", "plan")
    plain = {name: value for name, value in asdict(settings).items() if name not in left_out}
    # with slashes on Windows too, so that a checkpoint can go on elsewhere
    return {name: value.as_posix() if isinstance(value, PurePath) else value for name, value in plain.items()}


def dotted(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by their dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def saved_text(settings: Settings) -> str:
    """Return the train_config.yaml that a checkpoint keeps."""
    return yaml.safe_dump(plain_settings(settings), sort_keys=False)
