"""Describe what a checkpoint directory holds and whether it is complete.

Run: uv run python tools/inspect_checkpoint.py checkpoints/final --tensors (20 s, most of it imports)

The weights are memory-mapped and never run code (`weights_only`); only --tensors reads their values.
Status 0: complete. 1: something is missing or damaged. 2: there is no checkpoint.
"""

from pathlib import Path

from litgpt_moe.cli import STDOUT, WorkFailed, printable, run_command, run_script, say
from litgpt_moe.flags import FlagParser


def inspect(path: Path, with_tensors: bool) -> list[str]:
    """Print what the checkpoint in `path` holds and return what it lacks; WorkFailed if it is damaged."""
    from litgpt_moe.checkpoints.layout import find_checkpoint
    from litgpt_moe.checkpoints.reader import verify_checkpoint
    from litgpt_moe.report.checkpoint import describe, describe_files, find_problems

    folder = find_checkpoint(path)
    try:
        verify_checkpoint(folder)
        show(str(folder), *describe_files(folder))
        for title, lines in describe(folder, with_tensors).items():
            show(f"{title}:", *lines)
        problems = [f"incomplete: {problem}" for problem in find_problems(folder)]
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename == STDOUT:
            raise
        raise WorkFailed(str(error)) from None
    except (KeyError, TypeError, AttributeError) as error:
        # the structure of a JSON or YAML file is not the expected one
        raise WorkFailed(f"{folder}: a tokenizer or settings file is damaged ({error!r})") from None
    show(*problems or ["complete: generate and evaluate need nothing else"])
    return problems


def show(*lines: str) -> None:
    """Print lines, in which a foreign checkpoint's names may stand, each as one line."""
    say("\n".join(printable(line).replace("\n", "\\n") for line in lines))


def main(argv: list[str] | None = None) -> int:
    """Return 0 when the checkpoint is complete, 1 when not, 2 when there is none."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt_dir", type=Path, help="a checkpoint directory, or an out_dir (then its final or newest)")
    add("--tensors", action="store_true", help="list every tensor with mean, std, bad values")
    parser.accept_positional("ckpt_dir", is_required=True)
    args = parser.parse_args(argv)
    problems: list[str] = []
    return run_command(lambda: problems.extend(inspect(args.ckpt_dir, args.tensors))) or int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
