"""From a command line to a Run: everything is decided and checked before the first file is written."""

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from litgpt import args as litgpt_args

from litgpt_moe.training._temporary import ModelFacts
from litgpt_moe.training.resume import OpenCheckpoint
from litgpt_moe.training.settings import Settings
from moe_layers import MoEConfig


@dataclass(frozen=True)
class Run:
    """A checked run. Its settings are those that run and are saved: whole steps, the device's own precision."""

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
    """The checkpoint to continue from, open."""
    initial: OpenCheckpoint | None = None
    """The checkpoint whose weights to start from, open."""
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
        return self.settings.train.global_batch_size // self.world_size // self.settings.train.micro_batch_size

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: the weights and AdamW's two moments."""
        return 3 * self.facts.total_params * (2 if self.precision.endswith("16-true") else 4)


def to_litgpt(settings: Settings) -> tuple[litgpt_args.TrainArgs, litgpt_args.EvalArgs]:
    """Return new objects of LitGPT's classes for pretrain.main; changing them changes no settings."""
    # the story at a validation is ours: LitGPT's check refuses max_new_tokens in pretraining
    evaluation = replace(settings.eval, max_new_tokens=None)
    return litgpt_args.TrainArgs(**asdict(settings.train)), litgpt_args.EvalArgs(**asdict(evaluation))
