"""Average the weights of several checkpoints of a run into a new one.

Run: uv run python tools/average.py checkpoints --last 4 checkpoints/average      (15 s, most of it imports)

The mean is added up in float32. Every checkpoint must be undamaged and of the same model and tokenizer.
"""

import argparse
from pathlib import Path

from litgpt_moe.cli import command_line, run_command, run_script
from litgpt_moe.flags import FlagParser


def run(args: argparse.Namespace) -> str:
    """Write the average; return lines that describe it and the next command."""
    from litgpt_moe.checkpoints.layout import check_no_place_of_run, check_utf8
    from litgpt_moe.comparison import averaging

    check_utf8(args.out.absolute())
    check_no_place_of_run(args.out)
    places = args.checkpoints
    if args.last is not None:
        if args.last < 2:
            raise ValueError(f"--last is {args.last}; choose 2 or more")
        if len(places) > 1:
            raise ValueError("--last takes the checkpoints of one run; name one out_dir before it")
        places = averaging.last_of(places[0], args.last)
    folders = averaging.average(places, args.out, args.overwrite)
    lines = [f"Wrote   {args.out}: the mean of {len(folders)} checkpoints"]
    lines += [f"        {folder}" for folder in folders]
    command = command_line("uv", "run", "python", "evaluate.py", "--ckpt_dir", args.out)
    return "\n".join([*lines, "Next:", f"  {command}"])


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, help="checkpoint directories; with --last the out_dir of a run")
    add("out", type=Path, help="checkpoint directory to make; must not exist, or be empty")
    add("--last", type=int, metavar="N", help="average the last N checkpoints of the run")
    add("--overwrite", action="store_true", help="replace an earlier average in OUT")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
