"""Describe what a checkpoint directory holds and whether it is complete.

Run: uv run python tools/inspect_checkpoint.py checkpoints/final --tensors (20 s, most of it imports)

The weights are memory-mapped and never run code (`weights_only`); only --tensors reads their values.
Status 0: complete. 1: something is missing or damaged. 2: there is no checkpoint.
"""

from pathlib import Path

from litgpt_moe.cli import FlagParser, fail, run_script


def inspect(folder: Path, with_tensors: bool) -> bool:
    """Print what the checkpoint in `folder` holds and lacks; return whether something is missing."""
    from litgpt_moe.checkpoints.reader import verify_checkpoint
    from litgpt_moe.report.checkpoint import describe, describe_files, find_problems

    verify_checkpoint(folder)
    print("\n".join([str(folder), *describe_files(folder)]))
    for title, lines in describe(folder, with_tensors).items():
        print("\n".join([f"{title}:", *lines]))
    problems = [f"incomplete: {problem}" for problem in find_problems(folder)]
    print("\n".join(problems) or "complete: generate and evaluate need nothing else")
    return bool(problems)


def main(argv: list[str] | None = None) -> int:
    """Return 0 when the checkpoint is complete, 1 when not, 2 when there is none."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("dir", type=Path, help="a checkpoint directory, or an out_dir (then its final or newest)")
    add("--tensors", action="store_true", help="list every tensor with mean, std, bad values")
    args = parser.parse_args(argv)
    from litgpt_moe.checkpoints.layout import find_checkpoint

    try:
        folder = find_checkpoint(args.dir)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    try:
        return int(inspect(folder, args.tensors))
    except (ValueError, OSError) as error:
        return fail(error, 1)
    except (KeyError, TypeError, AttributeError) as error:
        # the structure of a JSON or YAML file is not the expected one
        return fail(f"{folder}: a tokenizer or settings file is damaged ({error!r})", 1)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
