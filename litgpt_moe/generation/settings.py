"""The settings of generate.py; `__post_init__` checks their ranges. Nothing heavy is imported here."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_PROMPT = "Once upon a time"
MAX_CHOICES = 8  # samples per request to a server; each has a KV cache of its own


def check_ranges(settings: object, rules: list[tuple[str, bool, str]]) -> None:
    """Raise a ValueError with one line for each broken rule, given as (field, whether it holds, choices)."""
    broken = [(name, getattr(settings, name), rule) for name, holds, rule in rules if not holds]
    if broken:
        raise ValueError("\n".join(f"{name} is {value}; choose {rule}" for name, value, rule in broken))


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits: below 1 is safer, above 1 wilder, 0 = greedy."""
    top_k: int = 50
    """Draw from this many most probable tokens, 0 = off."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens that have this much probability together, 1.0 = off."""
    min_p: float = 0.0
    """Drop tokens below this fraction of the highest probability, 0 = off."""
    repetition_penalty: float = 1.0
    """Make tokens that occurred already less probable; 1.2 is strong, 1.0 = off."""

    def __post_init__(self) -> None:
        is_temperature = self.temperature == 0 or 1e-3 <= self.temperature < math.inf
        rules = [
            ("temperature", is_temperature, "0 (greedy) or 0.001 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 1e-12 <= self.top_p <= 1, "above 0 and up to 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e30, "0.001 (1 = off) to 1e30"),
        ]
        check_ranges(self, rules)


@dataclass(frozen=True)
class GenerateSettings:
    """What to continue, with which checkpoint, and how much; a server's defaults for its requests."""

    prompt: str | None = None
    """Text to continue, - = standard input (default: what is piped in, else 'Once upon a time')."""
    prompt_file: Path | None = None
    """UTF-8 text file to continue."""
    ckpt_dir: Path = Path("checkpoints")
    """Checkpoint directory, or an out_dir: then its final/ or newest step-*/."""
    max_tokens: int = 200
    """New tokens at most."""
    num_samples: int = 1
    """Texts to generate from the prompt."""
    seed: int | None = None
    """Random seed, 0 or more; the same one gives the same texts (default: a fresh one, shown on stderr)."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    precision: str = "auto"
    """auto (bf16-true where CUDA has it, else 32-true), 32-true, bf16-true, 16-true."""
    engine: Literal["auto", "native", "torch"] = "auto"
    """auto, native (code compiled once by this machine's C++ compiler; CPU), torch (works everywhere)."""
    quantize: Literal["none", "int8"] = "none"
    """int8 = weights rounded to 8 bits, a row at a time, for the native engine; none."""
    serve: bool = False
    """Open a playground and OpenAI's /v1/completions instead."""
    host: str = "127.0.0.1"
    """Address that --serve listens on, 0.0.0.0 = every address of this machine."""
    port: int = 8000
    """Port that --serve listens on, 0 = any free one."""

    def __post_init__(self) -> None:
        is_few = not self.serve or self.num_samples <= MAX_CHOICES
        rules = [
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("num_samples", self.num_samples >= 1, "1 or more"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "0 or more, below 2**63"),
            ("port", 0 <= self.port < 2**16, "0 (any free one) to 65535"),
            ("num_samples", is_few, f"{MAX_CHOICES} or fewer with --serve"),
        ]
        check_ranges(self, rules)
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt_file exclude each other; drop one")
