"""Make one HTML page of one run's logs or of several runs side by side.

Run: uv run python tools/report.py checkpoints     (1 s)

The page needs no network and no other file. It can be made, and made again, while a run is still going.
"""

from pathlib import Path

from litgpt_moe.cli import run_command, run_script
from litgpt_moe.flags import FlagParser


def report(out: Path, paths: list[Path], results: Path, overwrite: bool) -> str:
    """Write the page; return the line to print."""
    from litgpt_moe.files import check_replaceable, write_whole
    from litgpt_moe.report.page import is_page, make_page
    from litgpt_moe.report.read import find_run, read_run

    check_replaceable(out, ".html", ".htm", is_own=is_page)
    if out.exists() and not overwrite and not is_page(out):
        raise FileExistsError(f"{out} exists and is no report; add --overwrite or name another --out")
    folders = {folder.resolve(): folder for folder in map(find_run, paths)}
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders.values()]
    runs = [read_run(folder, name, results) for folder, name in zip(folders.values(), names, strict=True)]
    write_whole(out, make_page(runs))
    size, uri = out.stat().st_size / 1000, out.resolve().as_uri()
    return f"{out} ({size:,.0f} kB) shows {', '.join(names)}; open it in a browser: {uri}"


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", default=[Path("checkpoints")], help="out_dirs of runs (checkpoints)")
    add("--out", type=Path, default=Path("report.html"), help="the page (%(default)s)")
    add("--results_file", type=Path, default=Path("results.jsonl"), help="of evaluate.py (%(default)s)")
    add("--overwrite", action="store_true", help="replace an .html file that is no report, too")
    args = parser.parse_args(argv)
    return run_command(lambda: report(args.out, args.runs, args.results_file, args.overwrite))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
