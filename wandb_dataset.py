"""Keep a prepared data directory as a Weights & Biases artifact: push it, pull it, verify it.

Run: uv run python wandb_dataset.py push --data_dir data/custom_text
(5 s and the upload; with WANDB_MODE=offline nothing is sent until `wandb sync`)

The artifact holds manifest.json, the texts and token shards that it lists, and the tokenizer's files
under tokenizer/, so that a directory fetched by `pull entity/project/name:alias` trains as it is.
push and pull record the artifact's name in the directory, so that a training run can log which data it used.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from litgpt_moe import cli
from litgpt_moe.data.settings import DEFAULT_DATA_DIR, REFERENCE_FORM, WandbSettings
from litgpt_moe.flags import FlagParser, add_flags, from_flags


@dataclass(frozen=True)
class Folders:
    """The folders that the three commands read and write."""

    data_dir: Path = DEFAULT_DATA_DIR
    """push, verify: the prepared data directory"""
    tokenizer_dir: Path | None = None
    """push: its tokenizer (default: the one that made the data, in a folder in or beside --data_dir)"""
    wandb_artifacts_dir: Path = field(
        default_factory=lambda: Path(cli.variable("WANDB_ARTIFACTS_DIR") or "artifacts")
    )
    """pull: where the data directory goes, in a folder of its own (WANDB_ARTIFACTS_DIR)"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the three commands."""
    parser = FlagParser(("data_dir", "tokenizer_dir", "wandb_project", "wandb_entity"), description=__doc__)
    commands = ("push", "pull", "verify")
    parser.add_argument("command", nargs="?", choices=commands, default="push", help="default push")
    reference = f"what to pull (default WANDB_DATASET_ARTIFACT); {REFERENCE_FORM}"
    parser.add_argument("reference", nargs="?", help=reference)
    add_flags(parser, Folders)
    add_flags(parser, WandbSettings)
    return parser


def verify_folder(data_dir: Path) -> str:
    """Return a line that confirms the files of a data directory; WorkFailed has a line for each problem."""
    from litgpt_moe.data.manifest import MANIFEST, listed_files, manifest_fingerprint, read_manifest, verify

    if problems := verify(data_dir):
        raise cli.WorkFailed("\n".join(problems))
    manifest = read_manifest(data_dir)
    files = f"{len(listed_files(manifest))} files match {MANIFEST}"
    push = cli.command_line("uv", "run", "python", "wandb_dataset.py", "push", "--data_dir", data_dir)
    return f"{data_dir}: {files}; fingerprint {manifest_fingerprint(manifest)}\nshare it with: {push}"


def transfer(args: argparse.Namespace) -> str:
    """Push, pull or verify, and return the sentence to print."""
    folders = from_flags(Folders, args)
    if args.command != "pull" and args.reference:
        raise ValueError(f"{args.command} takes no {args.reference!r}; name the folder with --data_dir")
    if args.command == "verify":
        return verify_folder(folders.data_dir)
    from litgpt_moe.data.artifact import pull, push

    if args.command == "push":
        return push(folders.data_dir, from_flags(WandbSettings, args), folders.tokenizer_dir)
    reference = args.reference or cli.variable("WANDB_DATASET_ARTIFACT") or ""
    folder = pull(reference, folders.wandb_artifacts_dir)
    return f"{folder}: complete; train on it with: {cli.train_command(*cli.new_run_on(folder))}"


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work (no network, damage found), 2 for bad input."""
    args = build_parser().parse_intermixed_args(argv)
    return cli.run_command(lambda: transfer(args), "stopped; run it again")


if __name__ == "__main__":
    raise SystemExit(cli.run_script(main))
