"""Find a model's learning rate: short runs with rates in a geometric grid, and a chart of their losses.

Run: uv run python tools/find_lr.py configs/compare_moe.yaml --data_dir data/books --sweep_tokens 800000
(5 minutes on two CPU cores)

It is the sweep of tools/compare.py --lr auto, for one model. While the best rate is at an edge of the grid,
the grid grows there. Finished runs stand in --results_file and are not made again; the chart is
OUT/find_lr.svg.
"""

import argparse
from pathlib import Path

from litgpt_moe.cli import WorkFailed, run_command, run_script
from litgpt_moe.comparison.settings import FindSettings, add_override
from litgpt_moe.flags import FlagParser, add_flags, from_flags


def run(args: argparse.Namespace) -> str:
    """Make the runs, write the chart, and return the table."""
    settings: FindSettings = from_flags(FindSettings, args)
    from litgpt_moe.budget import RATE_SOURCE
    from litgpt_moe.comparison.contestants import gather
    from litgpt_moe.comparison.facts import gather_facts
    from litgpt_moe.comparison.runs import RunsFile
    from litgpt_moe.comparison.sweep import sweep_all
    from litgpt_moe.comparison.train import Trainer
    from litgpt_moe.files import write_whole
    from litgpt_moe.locks import locked_folder
    from litgpt_moe.report.comparison import sweep_chart
    from litgpt_moe.training.fit import proposed_rate

    facts, file = gather_facts(settings.data_dir), RunsFile(settings.results_file)
    file.check()
    with locked_folder(settings.out, "compare", "a comparison is live", "wait for it, or name another --out"):
        changes, n_pieces = dict(args.override), facts.data["vocab_size"]
        (model,) = gather([args.config_file], settings, False, [], changes, [], n_pieces)
        tokens = settings.sweep_tokens or facts.data["train_tokens"] / 10
        (found,) = sweep_all(Trainer(settings, facts, file), [model], settings, tokens)
        write_whole(chart := settings.out / "find_lr.svg", sweep_chart([found.as_json()]))
    if found.failed is not None:
        raise WorkFailed(f"{model.name}: {found.failed}")
    lines = [f"{model.name}, {found.tokens:,} tokens with each rate", "     rate      loss"]
    for rate in sorted(found.losses):
        lines.append(f"{rate:>9g}  {found.losses[rate]:8.4f}{'  best' * (rate == found.best)}")
    if found.is_at_edge:
        lines.append("The best is at the edge of the grid: try rates beyond it.")
    proposed = proposed_rate(model.config, model.facts)
    lines.append(f"The rule by the model's size ({RATE_SOURCE}) proposes {proposed:g}.")
    if model.named_rate:
        lines.append(f"{settings.config} names {model.named_rate:g}.")
    return "\n".join([*lines, f"The chart is {chart}."])


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("config_file", type=Path, metavar="CONFIG", help="model configuration")
    add_override(parser)
    add_flags(parser, FindSettings)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args), "stopped; the same command goes on")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
