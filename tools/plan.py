"""Show which model fits which graphics card. Run: uv run python tools/plan.py --gpu "RTX 3060" (a minute)

For each shipped configuration: its parameters, and the peak memory of a training step by micro-batch size,
without and with activation checkpointing. The step is counted tensor by tensor, which needs no GPU.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe.cli import printable, run_command, run_script, say
from litgpt_moe.flags import FlagParser, config_from_flag

if TYPE_CHECKING:
    from litgpt_moe.config import ModelFacts
    from litgpt_moe.planning import StepMemory

ROOT = Path(__file__).resolve().parents[1]
MODELS = [ROOT / f"configs/{name}.yaml" for name in ("demo_model", "moe_30m_debug", "moe_200m", "moe_400m")]
SIZES = (1, 2, 4, 8, 16, 32)
SHOWN = 4  # the micro-batch size whose parts are listed
CARDS = ["6 GB", "8 GB", "12 GB", "24 GB"]
PRECISIONS = ["bf16-true", "bf16-mixed", "16-mixed", "32-true"]
MARGIN = "What fits leaves 1 GiB of the card, and 5% of the step, for CUDA, the desktop and fragmentation."


@dataclass(frozen=True)
class Plan:
    """What one configuration takes to train on one CUDA device."""

    name: str
    facts: "ModelFacts"
    steps: dict[bool, dict[int, "StepMemory"]]
    """Without and with activation checkpointing: micro-batch size -> memory of a step."""

    def peaks(self) -> list[list[str]]:
        """Return the two rows of the first table."""
        facts = self.facts
        counts = [f"{facts.total_params / 1e6:.1f}M", f"{facts.active_params / 1e6:.1f}M"]
        first = [self.name, *counts, f"{facts.flops_per_token / 1e6:,.0f}"]
        rows = [[f"{step.peak / 1e9:.2f}" for step in steps.values()] for steps in self.steps.values()]
        return [[*first, "no", *rows[0]], ["", "", "", "", "yes", *rows[1]]]

    def fit(self, memory: int) -> str:
        """Return the largest micro-batch that fits, without and with activation checkpointing."""
        from litgpt_moe.hardware import fits

        best = [
            max((size for size, step in steps.items() if fits(step.peak, memory)), default=0)
            for steps in self.steps.values()
        ]
        return "no" if not any(best) else f"{best[0] or 'no'} ({best[1]})"


def plan(path: Path, precision: str, optimizer: str) -> Plan:
    """Return the plan of the configuration in a file."""
    from litgpt_moe.config import MoEConfig, model_facts
    from litgpt_moe.planning import StepPlanner
    from litgpt_moe.training.optimizer import make_optimizer
    from litgpt_moe.training.settings import Settings

    config, model = MoEConfig.model_from_file(path)
    spec = {"class_path": optimizer, "init_args": {}}
    make = None if "8bit" in optimizer else lambda gpt: make_optimizer(Settings(), gpt, spec)
    steps = {}
    for is_recomputed in (False, True):
        planner = StepPlanner(config, precision, make, kernel="triton", is_recomputed=is_recomputed)
        steps[is_recomputed] = {size: planner.memory(size) for size in SIZES}
    return Plan(config.name, model_facts(config, model=model), steps)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def text(plans: list[Plan], cards: dict[str, int]) -> str:
    """Return both tables, and the parts of a step."""
    head = ["Model", "Parameters", "Active", "MFLOPs a token", "Checkpointing", *map(str, SIZES)]
    peaks = table(head, [row for plan in plans for row in plan.peaks()])
    parts = [f"- {plan.name}: {plan.steps[False][SHOWN]}" for plan in plans]
    rows = [[card, *(plan.fit(size) for plan in plans)] for card, size in cards.items()]
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


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 2 for a card, precision, optimizer or configuration that cannot be read."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("--gpu", action="append", help="name of a card, such as 'RTX 3060'; may be repeated")
    add("--memory", action="append", help="or its memory, such as 12GB (default: 6, 8, 12 and 24 GB)")
    add("--model_config", action="append", type=config_from_flag, help="a model (default: ours); repeatable")
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the run (%(default)s)")
    add("--optimizer", default="torch.optim.AdamW", help="class, such as bitsandbytes.optim.AdamW8bit")
    args = parser.parse_args(argv)

    def run() -> None:
        from litgpt_moe.hardware import card_bytes

        cards = {card: card_bytes(card) for card in [*(args.gpu or []), *(args.memory or [])] or CARDS}
        plans = [plan(path, args.precision, args.optimizer) for path in args.model_config or MODELS]
        say(printable(text(plans, cards)))

    return run_command(run)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
