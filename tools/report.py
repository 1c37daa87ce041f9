"""Make one HTML page of one run's logs or of several runs side by side.

Run: uv run python tools/report.py checkpoints     (1 s)

The page needs no network and no other file. A run that is still going can be shown at any time: make the page
again to see more.
"""

import argparse
from collections.abc import Collection
from pathlib import Path

from litgpt_moe.cli import FlagParser, run_command, run_script


def name_runs(paths: Collection[Path]) -> list[str]:
    """Return a name for each run: its folder's, or the whole path where two are alike."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def report(args: argparse.Namespace) -> str:
    """Write the page, and return the line that says what was made.

    Raises:
        ValueError: one sentence on what is wrong with a log.
        OSError: a log or a place to write is missing, or holds something that this tool did not make.
    """
    from litgpt_moe.files import write_whole
    from litgpt_moe.report.page import is_page, make_page, page_data
    from litgpt_moe.report.read import find_run, read_run

    out: Path = args.out
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; name a file with --out, like report.html")
    if out.is_file() and not args.overwrite and not is_page(out):
        raise FileExistsError(f"{out} exists and is no report; add --overwrite or name another --out")
    folders = {folder.resolve(): folder for folder in map(find_run, args.runs)}.values()
    runs = [read_run(folder, name) for folder, name in zip(folders, name_runs(folders), strict=True)]
    write_whole(out, make_page(page_data(runs)))
    size, names = out.stat().st_size / 1000, ", ".join(run.name for run in runs)
    return f"{out} ({size:,.0f} kB) shows {names}; open it in a browser: {out.resolve().as_uri()}"


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", default=[Path("checkpoints")], help="out_dirs of runs (checkpoints)")
    add("--out", type=Path, default=Path("report.html"), help="the page (%(default)s)")
    add("--overwrite", action="store_true", help="replace a file that is no report, too")
    args = parser.parse_args(argv)
    return run_command(lambda: report(args))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
