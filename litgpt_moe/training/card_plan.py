"""Which model fits which graphics card, how long it trains there, and on how much text: for tools/plan.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from litgpt_moe import budget
from litgpt_moe.checkpoints.writer import BESIDE_BYTES
from litgpt_moe.config import ModelFacts, MoEConfig, has_open_vocabulary, model_facts
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.hardware import card_bytes, card_flops, fits, has_cuda, peak_flops
from litgpt_moe.planning import StepMemory, StepPlanner
from litgpt_moe.training.fit import proposed_rate
from litgpt_moe.training.optimizer import make_optimizer
from litgpt_moe.training.settings import Settings

SIZES = (1, 2, 4, 8, 16, 32)
SHOWN = 4  # the micro-batch size whose parts are listed
MARGIN = "What fits leaves 1 GiB of the card, and 5% of the step, for CUDA, the desktop and fragmentation."
GIVEN = ("given by --mfu",)
BYTES_OF_WEIGHTS = {"bf16-true": 2}  # of a weight; 4 in the other precisions


@dataclass(frozen=True)
class Text:
    """The text to train on: prepared data."""

    data_dir: Path
    n_tokens: int
    n_pieces: int

    @classmethod
    def of(cls, data_dir: Path) -> "Text":
        """Return the training text of a prepared data directory; ValueError or OSError if there is none."""
        manifest = read_manifest(data_dir, check_shards=False)
        return cls(data_dir, manifest["splits"]["train"]["n_tokens"], manifest["tokenizer"]["vocab_size"])


@dataclass(frozen=True)
class Plan:
    """What one configuration takes to train on one CUDA device."""

    name: str
    facts: ModelFacts
    learning_rate: float
    checkpoint_bytes: int
    steps: dict[bool, dict[int, StepMemory]]
    """Without and with activation checkpointing: micro-batch size -> memory of a step."""

    def peaks(self) -> list[list[str]]:
        """Return the two rows of the table of peaks."""
        facts = self.facts
        counts = [f"{facts.total_params / 1e6:.1f}M", f"{facts.active_params / 1e6:.1f}M"]
        first = [self.name, *counts, f"{facts.flops_per_token / 1e6:,.0f}"]
        rows = [[f"{step.peak / 1e9:.2f}" for step in steps.values()] for steps in self.steps.values()]
        return [[*first, "no", *rows[0]], ["", "", "", "", "yes", *rows[1]]]

    def fit(self, memory: int) -> str:
        """Return the largest micro-batch that fits, without and with activation checkpointing."""
        best = [
            max((size for size, step in steps.items() if fits(step.peak, memory)), default=0)
            for steps in self.steps.values()
        ]
        return "no" if not any(best) else f"{best[0] or 'no'} ({best[1]})"

    def length(self, device: "Speed | None", hours: float | None, text: Text | None) -> list[str]:
        """Return the row on a device: tokens, passes through the text, time, learning rate, a checkpoint."""
        n_params, cost = self.facts.total_params, self.facts.flops_per_token
        tokens = budget.TOKENS_A_PARAMETER * n_params
        if hours and device:
            tokens = int(hours * 3600 * device.flops_per_s * device.mfu / cost)
        elif text:
            tokens = budget.sensible_length(text.n_tokens, n_params).tokens
        spent = f"{tokens * cost / 1e15:,.0f} PFLOP"
        if device:
            spent = budget.time_words(budget.train_seconds(tokens, cost, device.flops_per_s, device.mfu))
        passes = [f"{tokens / text.n_tokens:.2g}"] if text else []
        figures = [f"{self.learning_rate:g}", budget.size_words(self.checkpoint_bytes)]
        return [self.name, budget.count_words(tokens), *passes, spent, *figures]


class Speed(NamedTuple):
    """How fast a device trains."""

    name: str
    flops_per_s: float
    """Its peak."""
    mfu: float
    """The share of it that training uses."""
    why: str = "typical, not measured here"
    """Where that share is from."""


def speed_of(card: str, mfu: float | None) -> Speed | None:
    """Return the speed of a card, None for one given by its memory; `mfu` as measured, None for typical."""
    flops = card_flops(card)
    return None if flops is None else Speed(card, flops, mfu or budget.TYPICAL_MFU, *GIVEN[: bool(mfu)])


def speed_here(precision: str, mfu: float | None) -> Speed:
    """Return the speed of this machine: of its GPU, or of its CPU, which is measured."""
    device = torch.device("cuda" if has_cuda() else "cpu")
    typical = budget.TYPICAL_MFU if device.type == "cuda" else budget.CPU_MFU
    name = torch.cuda.get_device_name() if device.type == "cuda" else "this machine's CPU"
    flops = peak_flops(device, precision if device.type == "cuda" else "32-true")
    return Speed(name, flops, mfu or typical, *GIVEN[: bool(mfu)])


def make_plan(path: Path, precision: str, optimizer: str, text: Text | None = None) -> Plan:
    """Return the plan of the configuration in a file, with the vocabulary of the text if it is open."""
    sizes = {"vocab_size": text.n_pieces} if text and has_open_vocabulary(path) else {}
    config, model = MoEConfig.model_from_file(path, False, **sizes)
    facts = model_facts(config, model=model)
    spec = {"class_path": optimizer, "init_args": {}}
    make = None if "8bit" in optimizer else lambda gpt: make_optimizer(Settings(), gpt, spec)
    steps = {}
    for is_recomputed in (False, True):
        planner = StepPlanner(config, precision, make, kernel="triton", is_recomputed=is_recomputed)
        steps[is_recomputed] = {size: planner.memory(size) for size in SIZES}
    # the weights and two moments
    checkpoint = 3 * facts.total_params * BYTES_OF_WEIGHTS.get(precision, 4) + BESIDE_BYTES
    return Plan(config.name, facts, proposed_rate(config, facts), checkpoint, steps)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def memory_text(plans: list[Plan], cards: list[str]) -> str:
    """Return the tables of peaks and of what fits, and the parts of a step."""
    head = ["Model", "Parameters", "Active", "MFLOPs a token", "Checkpointing", *map(str, SIZES)]
    peaks = table(head, [row for plan in plans for row in plan.peaks()])
    parts = [f"- {plan.name}: {plan.steps[False][SHOWN]}" for plan in plans]
    rows = [[card, *(plan.fit(card_bytes(card)) for plan in plans)] for card in cards]
    lines = [
        "Peak of a step in GB, by micro-batch size, without and with --activation_checkpointing:",
        f"\n{peaks}\n",
        f"Its parts at a micro-batch of {SHOWN}, without:\n",
        *parts,
        "\nThe largest micro-batch that fits; in brackets, with --activation_checkpointing:",
        f"\n{table(['Card', *(plan.name for plan in plans)], rows)}\n",
        MARGIN,
    ]
    return "\n".join(lines)


def length_text(plans: list[Plan], speeds: list[Speed], hours: float | None, text: Text | None) -> str:
    """Return a table for each device, of how long the models train and on how much text."""
    rule = f"{budget.TOKENS_A_PARAMETER} tokens a parameter (arxiv.org/abs/2203.15556)"
    if text:
        passes = f"{budget.GOOD_PASSES} passes through the text (arxiv.org/abs/2305.16264)"
        rule = f"{passes}, or fewer from {rule} on"
    if hours:
        rule = f"what {hours:g} hours are enough for"
    head = ["Model", "Tokens", *(["Passes"] if text else []), "Time", "Learning rate", "A checkpoint"]
    tables = []
    for speed in speeds or [None]:
        peak = f"{speed.flops_per_s / 1e12:.3g} TFLOP/s" if speed else ""
        where = f"{speed.name}, at {speed.mfu:.0%} of {peak} ({speed.why})" if speed else ""
        tables.append(where and f"{where}:")
        tables.append(table(head, [plan.length(speed, hours, text) for plan in plans]))
    lines = [
        f"Tokens: {rule}.",
        f"Learning rate: for AdamW, {budget.RATE_SOURCE}.",
    ]
    return "\n\n".join(["\n".join(lines), *filter(None, tables)])
