"""Count a configuration's parameters and FLOPs. Run: uv run python tools/count_params.py (20 s, no memory).

With no argument it counts model_config.yaml and those in configs/. The models are built on the meta device,
so a model too large for the memory is counted as well. The status is 1 if the size in a name such as MoE-200M
is off by more than 5%.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe.cli import WorkFailed, printable, run_command, run_script, say
from litgpt_moe.flags import FlagParser, config_from_flag
from litgpt_moe.words import UNITS

if TYPE_CHECKING:
    from litgpt_moe.config import MoEConfig

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.05  # of the size in a name
BYTES_WEIGHTS = 4  # float32
BYTES_TRAINING = 16  # float32 weights, gradients and the two moments of AdamW


@dataclass(frozen=True)
class ParamCount:
    """What one configuration costs."""

    name: str
    total_params: int
    active_params: int
    """Parameters one token meets: the experts it is not sent to are left out."""
    embedding_params: int
    """Token embedding and output head."""
    flops_per_token: int
    """Forward and backward, at the full context length."""
    named_params: int | None
    """The size in the name, None where it has none."""

    @property
    def deviation(self) -> float:
        """Relative error of the name, 0.0 where it has no size."""
        return self.total_params / self.named_params - 1 if self.named_params else 0.0


def count_params(config: "MoEConfig") -> ParamCount:
    """Return the counts of the model that `config` describes, built on the meta device."""
    from litgpt_moe.config import model_facts

    facts, embedding = model_facts(config), 2 * (config.padded_vocab_size or 0) * config.n_embd
    counts = (facts.total_params, facts.active_params, embedding, facts.flops_per_token)
    return ParamCount(config.name, *counts, size_in_name(config.name))


def size_in_name(name: str) -> int | None:
    """Return the parameters that a name such as MoE-200M or moe-1.5b promises, None where it does not."""
    match = re.search(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([KMB])(?![A-Za-z0-9])", name, re.IGNORECASE)
    return round(float(match[1]) * UNITS[match[2].lower()]) if match else None


def format_table(counts: list[tuple[Path, ParamCount]]) -> str:
    """Return the counts as aligned text, one line per configuration."""
    head = f"{'name':<16} {'total':>14} {'active':>14} {'embedding':>9} {'MFLOPs/token':>12}"
    lines = [f"{head} {'name off by':>11} {'weights':>9} {'AdamW':>9}  file"]
    for path, count in counts:
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        off = f"{count.deviation:+.1%}" if count.named_params else "-"
        weights, training = (count.total_params * n / 1e9 for n in (BYTES_WEIGHTS, BYTES_TRAINING))
        lines.append(
            f"{count.name:<16} {count.total_params:>14,} {count.active_params:>14,}"
            f" {count.embedding_params / count.total_params:>9.1%} {count.flops_per_token / 1e6:>12,.1f}"
            f" {off:>11} {weights:>6.2f} GB {training:>6.2f} GB  {shown}"
        )
    lines.append("active: per token. weights: float32. AdamW: weights, gradients and moments in float32.")
    return "\n".join(lines)


def run(paths: list[Path], as_json: bool) -> None:
    """Print the counts; WorkFailed when the size in a name is off by more than 5%."""
    from litgpt_moe.config import MoEConfig

    if not paths:
        in_configs = [*sorted(ROOT.glob("configs/moe_*.yaml")), ROOT / "configs/demo_model.yaml"]
        paths = [path for path in (ROOT / "model_config.yaml", *in_configs) if path.exists()]
    counts = [(path, count_params(MoEConfig.from_file(path))) for path in paths]
    if as_json:
        say(json.dumps([{"path": str(path), **asdict(count)} for path, count in counts], indent=2))
    else:
        say(printable(format_table(counts)))
    wrong = [
        f"{path}: {count.name} has {count.total_params:,} parameters, {count.deviation:+.1%} off its name; "
        "rename it or resize it to within 5%"
        for path, count in counts
        if abs(count.deviation) > TOLERANCE
    ]
    if wrong:
        raise WorkFailed("\n".join(wrong))


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 when the size in a name is off by more than 5%, 2 for an unreadable configuration."""
    parser = FlagParser(description=__doc__)
    helped = "model configurations (default: ours)"
    parser.add_argument("configs", nargs="*", type=config_from_flag, help=helped)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args.configs, args.json))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
