"""The settings of benchmarks/train.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.benchmarks.machine import ROOT


@dataclass(frozen=True)
class TrainBenchmark:
    """What is trained, and how often."""

    model_config: Path = ROOT / "configs/moe_30m_debug.yaml"
    """Model configuration."""
    micro_batch_size: int = 4
    """Sequences of a micro-batch."""
    accumulation: int = 1
    """Micro-batches of a step."""
    max_seq_length: int | None = None
    """Tokens of a sequence (default: block_size)."""
    steps: int = 5
    """Timed steps of a round."""
    rounds: int = 3
    """Rounds of each."""
    precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"] | None = None
    """As in training (default: bf16-true or 16-mixed with CUDA, else 32-true)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """As in training."""
    out: Path | None = None
    """JSON file for the figures (default: none is written)."""
