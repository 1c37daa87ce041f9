"""How much a run takes and what suits it: tokens, passes through the data, learning rate, time, disk.

Plain arithmetic on numbers. Each rule names its source; planning.py counts the memory.
"""

import math
from pathlib import Path
from typing import NamedTuple

from litgpt_moe.words import short

# Muennighoff et al. 2023 (arxiv.org/abs/2305.16264): repeating the text up to about 4 times is nearly as good
# as fresh text of that length, and what later passes bring decays
GOOD_PASSES = 4
# from here on a run is told that it repeats its text too often
MANY_PASSES = 8
# Hoffmann et al. 2022 (arxiv.org/abs/2203.15556): about 20 tokens a parameter. All parameters are counted,
# not the active ones: a mixture of experts wants more tokens than a dense model of its cost
# (arxiv.org/abs/2502.05172), and a small model is to be used, not only to be cheap to train
TOKENS_A_PARAMETER = 20
# the law below is of models from some 10M active parameters on; here 3e-3 is the highest that was tried
HIGHEST_RATE = 3e-3
RATE_SOURCE = f"arxiv.org/abs/2502.05172, at most {HIGHEST_RATE:g}"
# share of a device's peak that small mixtures of experts reach; published for one GPU: 8 to 35%
TYPICAL_MFU = 0.2
# the same on a CPU, of the speed of a single large matrix product there
CPU_MFU = 0.5


class Length(NamedTuple):
    """How many tokens to train on, and the reason in words."""

    tokens: int
    why: str


def sensible_length(pass_tokens: int, n_params: int) -> Length:
    """Return the tokens that suit an amount of text (the tokens of one pass) and a model."""
    most = TOKENS_A_PARAMETER * n_params
    if GOOD_PASSES * pass_tokens <= most:
        return Length(GOOD_PASSES * pass_tokens, f"{GOOD_PASSES} passes, arxiv.org/abs/2305.16264")
    return Length(most, f"{TOKENS_A_PARAMETER} tokens a parameter, arxiv.org/abs/2203.15556")


def learning_rate(n_hidden: int, n_expert: int) -> float:
    """Return the highest learning rate of a run by the joint law for dense models and mixtures of experts.

    ln LR = 8.39 - 0.81 ln N - 0.25 ln E (Ludziejewski et al. 2025, arxiv.org/abs/2502.05172), for AdamW.
    `n_hidden` are the active parameters between embedding and head, `n_expert` the experts, 1 if dense.
    """
    rate = math.exp(8.39 - 0.81 * math.log(max(n_hidden, 1)) - 0.25 * math.log(max(n_expert, 1)))
    return float(f"{min(rate, HIGHEST_RATE):.2g}")


def passes_words(tokens: int, pass_tokens: int, place: Path) -> str:
    """Return how often a run goes through its data: "4 passes through 1,588,224 tokens (data/mine)"."""
    passes = tokens / pass_tokens
    # two digits, but 150 and not 1.5e+02
    count = f"{passes:.2g}" if passes < 99.5 else f"{passes:,.0f}"
    return f"{count} {'pass' if count == '1' else 'passes'} through {pass_tokens:,} tokens ({place})"


def too_many_passes(tokens: int, pass_tokens: int, place: Path | None) -> str | None:
    """Return the line on a run that repeats its text too often, None for a sensible number of passes."""
    if (passes := tokens / pass_tokens) <= MANY_PASSES:
        return None
    return (
        f"Warning: {tokens:,} tokens are {passes:,.1f} passes through the {pass_tokens:,} of {place}. After "
        f"about {GOOD_PASSES} the same text brings less and less (arxiv.org/abs/2305.16264), and the model "
        f"learns it by heart; --max_tokens auto is {GOOD_PASSES} passes at most."
    )


def train_seconds(tokens: float, flops_per_token: int, flops_per_s: float, mfu: float = TYPICAL_MFU) -> float:
    """Return the time that tokens take on devices with this peak, of which a run uses the share `mfu`."""
    return tokens * flops_per_token / (flops_per_s * mfu)


def time_words(seconds: float) -> str:
    """Return a time as one says it: 40 s, 12 min, 3.5 hours, 4.2 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def size_words(n_bytes: float) -> str:
    """Return bytes in MB or GB of 1e6 or 1e9."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def count_words(n: float) -> str:
    """Return a number of tokens or parameters in three digits: 390K, 1.59M, 2B."""
    return short(n, units="KMB")


class Pair(NamedTuple):
    """Two files of settings that suit an amount of text."""

    least_tokens: int
    """Tokens of text from which on it suits."""
    model: str
    config: str


# A model that is large for its text learns it by heart. Not measured. A megabyte of English text has about
# 220,000 tokens of a vocabulary of 8,192.
PAIRS = (
    Pair(0, "configs/demo_model.yaml", "configs/small_train.yaml"),
    Pair(500_000, "configs/moe_10m.yaml", "configs/small_train.yaml"),
    Pair(20_000_000, "configs/moe_30m_debug.yaml", "train_config.yaml"),
    Pair(50_000_000, "configs/moe_100m.yaml", "train_config.yaml"),
    Pair(150_000_000, "model_config.yaml", "train_config.yaml"),
)
# what two to eight cores train in an hour or two with configs/moe_10m.yaml
CPU_TOKENS = 20_000_000


def fitting_flags(n_tokens: int, has_gpu: bool) -> list[str]:
    """Return the flags of run_train.py that suit an amount of text and the machine."""
    pairs = PAIRS if has_gpu else PAIRS[:2]
    pair = next(pair for pair in reversed(pairs) if n_tokens >= pair.least_tokens)
    flags = ["--model_config", pair.model, "--config", pair.config]
    is_long = not has_gpu and GOOD_PASSES * n_tokens > CPU_TOKENS
    return [*flags, "--max_tokens", str(CPU_TOKENS)] if is_long else flags
