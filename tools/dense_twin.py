"""Write the dense twin of a model with experts: the same depth, width, heads and FLOPs a token.

Run: uv run python tools/dense_twin.py configs/moe_200m.yaml     (10 s; writes configs/moe_200m_dense.yaml)

Its MLP is as wide as the nearest multiple of 8 to equal FLOPs, those that training counts, attention and head
included. What is left over is printed, and stands in the head of the file.
"""

from pathlib import Path

from litgpt_moe.cli import run_command, run_script
from litgpt_moe.flags import FlagParser


def write_twin(source: Path, out: Path | None, overwrite: bool) -> str:
    """Write the twin of the configuration in `source`, and return the lines to print."""
    from litgpt_moe.comparison.twin import dense_twin, yaml_text
    from litgpt_moe.config import MoEConfig
    from litgpt_moe.files import check_replaceable, write_whole

    out = out or source.with_name(f"{source.stem}_dense.yaml")
    matched = dense_twin(MoEConfig.from_file(source))
    text = yaml_text(matched, source)
    check_replaceable(out, ".yaml", ".yml")
    if out.exists() and not overwrite and out.read_text(encoding="utf-8") != text:
        raise FileExistsError(f"{out} exists and is another; add --overwrite, or name another file")
    write_whole(out, text)
    return f"{matched}\n{out}"


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="model configuration with experts")
    add("out", type=Path, nargs="?", metavar="OUT", help="file to write (default: CONFIG's name with _dense)")
    add("--overwrite", action="store_true", help="replace a YAML file that is not the same twin")
    args = parser.parse_args(argv)
    return run_command(lambda: write_twin(args.config, args.out, args.overwrite))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
