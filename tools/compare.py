"""Train models side by side at equal tokens, FLOPs or seconds, and say which is better and by how much.

Run: uv run python tools/compare.py configs/compare_moe.yaml --dense --budget 8M --data_dir data/books
(hours: with 3 seeds it trains 6 models, after a sweep of learning rates for each of the two)

Each run is run_train.py in a process and a folder of its own, with the same data in the same order for the
same seed. A finished run is a line of --results_file and is never made twice; after an interruption the same
command goes on. --out gets comparison.json and comparison.html. A warm-up longer than a tenth of a run is cut
to that.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe.cli import WorkFailed, run_command, run_script, say_result
from litgpt_moe.comparison.settings import CompareSettings, add_override, amount, rate, variant
from litgpt_moe.flags import FlagParser, add_flags, from_flags

if TYPE_CHECKING:
    from litgpt_moe.comparison.contestants import Contestant


def build_parser() -> FlagParser:
    """Return the parser of the command line."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("configs", type=Path, nargs="+", metavar="CONFIG", help="model configurations")
    add("--budget", type=amount, metavar="N", help="tokens, FLOPs or seconds of each model, as 8M or 1.5e15")
    add(
        "--lr",
        type=rate,
        default="auto",
        help="learning rate of all, or auto: a sweep for each (%(default)s)",
    )
    add(
        "--experts",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="make each CONFIG with N experts, same FLOPs",
    )
    add_override(parser)
    text = "also train each CONFIG with these keys replaced, under this name; repeatable"
    add("--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"), help=text)
    add("--plan", action="store_true", help="only say what would be trained, and which runs stand")
    add_flags(parser, CompareSettings)
    return parser


def run(args: argparse.Namespace) -> str | None:
    """Make the comparison, and return its figures and verdicts, or the plan of it."""
    settings: CompareSettings = from_flags(CompareSettings, args)
    if (args.budget is None) == (settings.budget_of_first is None):
        raise ValueError("give --budget N, or --budget_of_first N, and not both")
    from litgpt_moe.comparison.compare import begin
    from litgpt_moe.comparison.contestants import gather
    from litgpt_moe.comparison.facts import gather_facts
    from litgpt_moe.comparison.plan import plan_text
    from litgpt_moe.comparison.runs import RunsFile
    from litgpt_moe.comparison.train import Trainer
    from litgpt_moe.locks import locked_folder

    facts, file = gather_facts(settings.data_dir), RunsFile(settings.results_file)
    file.check()
    trainer, variants = Trainer(settings, facts, file), [variant(words) for words in args.variant]

    def models(out: Path) -> list["Contestant"]:
        place, changes = dataclasses.replace(settings, out=out), dict(args.override)
        n_pieces = facts.data["vocab_size"]
        return gather(args.configs, place, settings.dense, args.experts, changes, variants, n_pieces)

    if args.plan:
        with tempfile.TemporaryDirectory() as folder:  # a plan leaves nothing behind
            return plan_text(settings, trainer, models(Path(folder)), args.budget, args.lr)
    with locked_folder(settings.out, "compare", "a comparison is live", "wait for it, or name another --out"):
        comparison = begin(settings, trainer, models(settings.out), args.budget, args.lr)
        text = comparison.run()
    text = f"{text}\n\n{settings.out / 'comparison.html'} shows it in a browser"
    if failed := comparison.failures():
        say_result(text)
        raise WorkFailed(f"{len(failed)} failed: {'; '.join(failed)}")
    return text


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: run(args), "stopped; the same command goes on")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
