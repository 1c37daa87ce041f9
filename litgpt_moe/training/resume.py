"""The checkpoint that a run continues, or whose weights it starts from: found, checked, opened once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class OpenCheckpoint:
    """A checkpoint file read once, its tensors memory-mapped: their values are read when they are used."""

    file: Path
    state: dict[str, Any]
    """What the file holds. Fabric takes entries out of what it loads: give it `dict(state)`."""

    @property
    def folder(self) -> Path:
        """The checkpoint directory."""
        return self.file.parent

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict."""
        return self.state.get("model", self.state)

    @property
    def is_bare(self) -> bool:
        """Whether the file is a state dict of weights, with nothing around it."""
        return "model" not in self.state
