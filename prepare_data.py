"""Turn text into token shards that training reads directly.

Run: uv run python prepare_data.py --dataset demo --train_tokenizer 2048      (3 s on two cores)
     uv run python prepare_data.py stories.jsonl.gz --train_tokenizer 4096

PATH: files and folders of text, UTF-8, which are only read; of a folder with train/ and val/ those two.
Without PATH the text lies in DATA_DIR/train/ and DATA_DIR/val/. Forms: .txt .md .jsonl .json .csv .tsv
.parquet, each also .gz .zst .xz. A .txt or .md file may hold many stories, split by <|endoftext|> (or a line
--separator); in the others a row is a story. Every story becomes BOS + ids + EOS in a flat array of ids;
manifest.json says what made it, and shards that no longer match are made again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from litgpt_moe import cli
from litgpt_moe.data.settings import (
    DEFAULT_DATA_DIR,
    PrepareFlags,
    PrepareSettings,
    WandbSettings,
    is_hub_name,
)
from litgpt_moe.flags import FlagParser, add_flags, from_flags


def build_parser() -> FlagParser:
    """Return the parser of the command line."""
    common = ("mix", "data_dir", "dataset", "train_tokenizer", "tokenizer", "text_column", "overwrite")
    parser = FlagParser(common, description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="text, see above")
    mix_help = "prepared data directories to draw from, by weight (or a YAML file of such lines)"
    parser.add_argument("--mix", nargs="+", default=[], metavar="NAME=WEIGHT", help=mix_help)
    for kind in (PrepareFlags, WandbSettings):
        add_flags(parser, kind)
    parser.set_defaults(data_dir=None)
    return parser


def settings_of(args: argparse.Namespace) -> PrepareSettings:
    """Return the settings; a data directory that no flag names is called after the first PATH."""
    from litgpt_moe.data.inputs import check_free, default_data_dir

    if args.data_dir is None and args.paths:
        args.data_dir = default_data_dir(args.paths[0])
        if args.data_dir.resolve() != args.paths[0].resolve():
            check_free(args.data_dir, args.paths)
    elif args.data_dir is None and args.mix:
        args.data_dir = DEFAULT_DATA_DIR.parent / "mix"
    elif args.data_dir is None and is_hub_name(args.dataset):
        args.data_dir = DEFAULT_DATA_DIR.parent / args.dataset.rpartition("/")[2]
        check_free(args.data_dir, [])
    args.paths, args.mix = tuple(args.paths), tuple(args.mix)
    return from_flags(PrepareSettings, args)


def summary(manifest: dict[str, Any], settings: PrepareSettings, seconds: float | None) -> str:
    """Return the counts, the places and the next command; `seconds` is None if nothing had to be made."""
    from litgpt_moe.budget import fitting_flags
    from litgpt_moe.data.demo_stories import has_own_text
    from litgpt_moe.data.manifest import MANIFEST
    from litgpt_moe.data.summary import sees_gpu, what_was_read
    from litgpt_moe.data.tokenizer_folder import choose_tokenizer

    line = "{split:5}  {n_stories:,} stories, {n_tokens:,} tokens, {n_bytes:,} bytes of text "
    line += "({n_duplicates:,} duplicates dropped, {n_replaced_bytes:,} bytes replaced), shards: {n_shards:,}"
    splits, vocab_size = manifest["splits"], manifest["tokenizer"]["vocab_size"]
    lines = [line.format(split=name, n_shards=len(part["shards"]), **part) for name, part in splits.items()]
    tokenizer_dir = choose_tokenizer(settings.data_dir, settings.tokenizer_dir)
    where = f"{settings.data_dir / MANIFEST}, tokenizer {tokenizer_dir}"
    lines.append(f"where  {where} ({vocab_size:,} pieces)")
    if seconds is not None:
        n_tokens = sum(split["n_tokens"] for split in splits.values())
        lines.append(f"time   {seconds:.1f} s, {n_tokens / seconds:,.0f} tokens/s from the start to the end")
    is_default = settings.data_dir == PrepareSettings.data_dir
    flags = [] if is_default else cli.new_run_on(settings.data_dir)
    if flags or has_own_text(settings.data_dir):  # the demo's pair is the default for its stories
        flags += fitting_flags(splits["train"]["n_tokens"], sees_gpu())
    return "\n".join([*what_was_read(manifest), *lines, f"next   {cli.train_command(*flags)}"])


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work (full disk, no hub), 2 for bad settings or text."""
    args = build_parser().parse_intermixed_args(argv)
    from litgpt_moe.data.manifest import MANIFEST
    from litgpt_moe.data.prepare import prepare
    from litgpt_moe.data.tokenizer_folder import choose_tokenizer
    from litgpt_moe.locks import FolderInUse

    def prepared(settings: PrepareSettings) -> str:
        start, start_ns = time.perf_counter(), time.time_ns()
        try:
            manifest = prepare(settings)
            is_new = (settings.data_dir / MANIFEST).stat().st_mtime_ns >= start_ns
        except (FileNotFoundError, NotADirectoryError, FolderInUse, ConnectionError):
            raise
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
            raise cli.WorkFailed(
                f"{reason}; finished shards are kept, run again once this is fixed"
            ) from error
        return summary(manifest, settings, time.perf_counter() - start if is_new else None)

    def work() -> str | None:
        settings = settings_of(args)
        cli.say(cli.printable(prepared(settings)))
        if not settings.log_to_wandb:
            return None
        from litgpt_moe.data.artifact import push

        tokenizer_dir = choose_tokenizer(settings.data_dir, settings.tokenizer_dir)
        return push(settings.data_dir, from_flags(WandbSettings, args), tokenizer_dir)

    return cli.run_command(work, "stopped; finished shards are kept, run again to go on")


def __getattr__(name: str) -> Any:
    """Return TextShards, which YAML files name `prepare_data.TextShards`; its import takes seconds."""
    if name == "TextShards":
        from litgpt_moe.data.module import TextShards

        return TextShards
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    raise SystemExit(cli.run_script(main))
