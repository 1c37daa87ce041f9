"""Keep a prepared data directory as a Weights & Biases artifact: push it, pull it, verify it.

Run: uv run python wandb_dataset.py push --data_dir data/custom_text
(5 s and the upload; with WANDB_MODE=offline nothing is sent until `wandb sync`)

The artifact holds manifest.json, the texts and token shards that it lists, and the tokenizer's files
under tokenizer/, so a pulled directory trains as it is. The way back: pull entity/project/name:alias.
push and pull leave the artifact's name in the directory, so that a run can tell what it trained on.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe.cli import RUN_TRAIN, FlagParser, command_line, first_line, variable
from litgpt_moe.files import check_inside, is_outside, sha256_file

if TYPE_CHECKING:
    import wandb

MANIFEST = "manifest.json"
LINEAGE = "artifact.json"  # beside it: the artifact that this directory is
TOKENIZER = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
DEFAULT_PROJECT = "litgpt-moe"
CONNECT_SECONDS = 30  # W&B's own 90 is long to wait for the news that there is no network
REFERENCE_FORM = "write entity/project/name:alias, or project/name:alias with WANDB_ENTITY set"


class TransferError(OSError):
    """W&B could not be reached, refused us, or sent something that must not be used."""


def load_manifest(data_dir: Path) -> dict:
    """Return the parsed manifest; whether the files agree with it is for `verify` to say."""
    path = data_dir / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest_fingerprint(manifest)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; run prepare_data.py on that folder first") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: damaged; run prepare_data.py again to rewrite it") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return manifest


def entries(manifest: dict) -> Iterator[dict]:
    """Yield the manifest's entry of each text and shard, with at least `path` and `sha256`."""
    for split in manifest["splits"].values():
        yield from split.get("text", [])
        yield from split["shards"]


def listed_files(manifest: dict) -> dict[str, str]:
    """Return POSIX path (relative to the data directory) -> SHA-256 of each text and shard listed."""
    return {check_inside(entry["path"]): entry["sha256"] for entry in entries(manifest)}


def manifest_fingerprint(manifest: dict) -> str:
    """Return the fingerprint from the hashes that the manifest records, without reading the data."""
    # Not in it: times, counts and options. Contents imply the counts, and an option that changed no shard
    # made the same data set. The tokenizer is in it because ids mean nothing without it.
    facts = {key: manifest.get(key) for key in ("format_version", "dtype")}
    facts["tokenizer"] = manifest.get("tokenizer", {}).get("sha256")
    facts["files"] = sorted(listed_files(manifest).items())
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def remember_artifact(data_dir: Path, artifact: str) -> None:
    """Write down that the data directory, as it is now, is `artifact`."""
    facts = {"artifact": artifact, "fingerprint": manifest_fingerprint(load_manifest(data_dir))}
    whole = (data_dir / LINEAGE).with_suffix(".tmp")
    whole.write_text(json.dumps(facts), encoding="utf-8")
    whole.replace(data_dir / LINEAGE)


def lineage(data_dir: Path) -> dict[str, str | None]:
    """Return a data directory's fingerprint and the artifact that it is, None if (or now that) it is none."""
    now = {"artifact": None, "fingerprint": manifest_fingerprint(load_manifest(data_dir))}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # never pushed, or a damaged note
        then = json.loads((data_dir / LINEAGE).read_text(encoding="utf-8"))
        if then["fingerprint"] == now["fingerprint"]:
            now["artifact"] = str(then["artifact"])
    return now


def verify(data_dir: Path) -> list[str]:
    """Return a sentence for each text or shard that is missing, new or not as recorded; [] is whole."""
    from tqdm import tqdm

    listed = listed_files(load_manifest(data_dir))
    problems = []
    for path in sorted([*data_dir.glob("train/*.txt"), *data_dir.glob("val/*.txt")]):
        if path.relative_to(data_dir).as_posix() not in listed:
            problems.append(f"{path}: there but not listed in {MANIFEST}")
    for name, expected in tqdm(sorted(listed.items()), "checking", unit="file", delay=1, disable=None):
        path = data_dir / name
        if not path.is_file():
            problems.append(f"{path}: listed in {MANIFEST} but not there")
        elif is_outside(path, data_dir):
            problems.append(f"{path}: a link out of its folder")
        elif sha256_file(path) != expected:
            problems.append(f"{path}: its content is not what {MANIFEST} recorded")
    return problems


def fingerprint(data_dir: Path) -> str:
    """Return the SHA-256 over a data directory's contents, equal on every machine and at every time.

    Every file is read; one that is not as recorded is an error, because then no fingerprint is true.
    """
    if problems := verify(data_dir):
        raise ValueError(f"{problems[0]}; run prepare_data.py again")
    return manifest_fingerprint(load_manifest(data_dir))


def resolve_artifact(reference: str, entity: str | None) -> str:
    """Return "entity/project/name:alias"; `entity` fills in where the reference has none."""
    parts = reference.split("/")
    if len(parts) == 2 and entity:
        parts = [entity, *parts]
    words = [*parts[:-1], *parts[-1].split(":")]
    if len(parts) != 3 or len(words) != 4 or not all(re.fullmatch(r"(?!\.+$)[^\\#?%\s]+", w) for w in words):
        raise ValueError(f"{reference!r} is not a W&B data set; {REFERENCE_FORM}")
    return "/".join(parts)


def find_tokenizer(data_dir: Path, tokenizer_dir: Path | None) -> Path:
    """Return the folder of the tokenizer that made the shards: the one named, else one inside or beside."""
    wanted = load_manifest(data_dir).get("tokenizer", {}).get("sha256")
    beside = sorted(path.parent for path in data_dir.parent.glob("*/tokenizer.json"))
    near = [data_dir / TOKENIZER, data_dir.parent / TOKENIZER, *beside]
    # what lies near and may not be read is another's; what is named has to be read
    passed_over = () if tokenizer_dir else PermissionError
    for folder in [tokenizer_dir] if tokenizer_dir else near:
        path = folder / "tokenizer.json"
        with contextlib.suppress(passed_over):
            if path.is_file() and sha256_file(path) == wanted:
                return folder
    if tokenizer_dir:
        what = "not the one" if path.is_file() else "not found, so not the one"
        raise ValueError(f"{path}: {what} that made {data_dir}; name that one's folder with --tokenizer_dir")
    raise ValueError(
        f"{data_dir}: the tokenizer that made it is not in {near[0]}, nor in a folder beside {data_dir}; "
        "name its folder with --tokenizer_dir"
    )


def without_times(node: object) -> object:
    """Return parsed JSON with every `mtime_ns` zero, so that equal data makes an equal artifact."""
    if isinstance(node, dict):
        return {key: 0 if key == "mtime_ns" else without_times(value) for key, value in node.items()}
    return [without_times(value) for value in node] if isinstance(node, list) else node


def build_artifact(data_dir: Path, tokenizer_dir: Path, name: str, policy: str) -> "wandb.Artifact":
    """Return the artifact of a data directory that `verify` found whole."""
    import wandb

    manifest = load_manifest(data_dir)
    counts = ("n_stories", "n_tokens", "n_bytes")
    metadata = {
        "fingerprint": manifest_fingerprint(manifest),
        **{key: manifest.get(key) for key in ("format_version", "tokenizer", "options", "code")},
        "splits": {s: {key: split.get(key) for key in counts} for s, split in manifest["splits"].items()},
    }
    artifact = wandb.Artifact(name, type="dataset", metadata=metadata)
    with artifact.new_file(MANIFEST, encoding="utf-8") as file:
        file.write(json.dumps(without_times(manifest), indent=1, sort_keys=True))
    for path in sorted(listed_files(manifest)):
        artifact.add_file(str(data_dir / path), name=path, policy=policy)
    for path in filter(Path.is_file, (tokenizer_dir / file for file in TOKENIZER_FILES)):
        artifact.add_file(str(path), name=f"{TOKENIZER}/{path.name}", policy=policy)
    return artifact


def push(
    data_dir: Path,
    project: str | None = None,
    entity: str | None = None,
    artifact: str | None = None,
    aliases: list[str] | None = None,
    tags: list[str] | None = None,
    run_name: str | None = None,
    tokenizer_dir: Path | None = None,
) -> str:
    """Log a data directory as an artifact and return the sentence that says where it is and what is next."""
    tokenizer_dir = find_tokenizer(data_dir, tokenizer_dir)
    fingerprint(data_dir)  # hashes all, so that damaged data is never pushed
    name = artifact or re.sub(r"[^\w.-]+", "-", data_dir.resolve().name)
    import wandb

    options = {"project": project or DEFAULT_PROJECT, "entity": entity, "name": run_name, "tags": tags}
    try:
        # console="off": otherwise W&B would take this command's own output for a training log
        settings = wandb.Settings(console="off", init_timeout=CONNECT_SECONDS)
        run = wandb.init(job_type="push", settings=settings, **options)
        try:
            return log_artifact(run, data_dir, tokenizer_dir, name, aliases)
        finally:
            run.finish()
    except wandb.errors.Error as error:
        raise TransferError(f"could not push {data_dir} to W&B: {first_line(error)}") from error


def log_artifact(
    run: "wandb.Run", data_dir: Path, tokenizer_dir: Path, name: str, aliases: list[str] | None
) -> str:
    """Log the artifact to an open run and return what `push` returns."""
    if run.disabled:
        raise TransferError("WANDB_MODE=disabled sends nothing; set it to online or offline")
    # offline, the files are copied: they may change before `wandb sync` reads them
    policy = "mutable" if run.offline else "immutable"
    logged = run.log_artifact(build_artifact(data_dir, tokenizer_dir, name, policy), aliases=aliases)
    if run.offline:
        remember_artifact(data_dir, name)
        return f"{name}: recorded; send it with: uv run wandb sync {command_line(Path(run.dir).parent)}"
    logged.wait()
    remember_artifact(data_dir, logged.source_qualified_name)
    name = logged.source_qualified_name
    return f"{name}: uploaded; train on it with: {command_line(*RUN_TRAIN, '--wandb_dataset', name)}"


def use_dataset(run: "wandb.Run", data_dir: Path, tokenizer_dir: Path) -> None:
    """Record that `run` reads the artifact that the data directory is; one that is none is not sent."""
    reference = lineage(data_dir)["artifact"]
    if reference is None or run.disabled:
        return
    if "/" in reference and not run.offline:
        run.use_artifact(reference)
        return
    artifact = build_artifact(data_dir, tokenizer_dir, artifact_name(reference), "immutable")
    if run.offline:
        # wandb 0.31 refuses use_artifact offline, though its sync knows how; the server keeps equal data once
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:  # pushed offline: the name that `wandb sync` gave it is not known here
        run.use_artifact(artifact)


def log_checkpoint(run: "wandb.Run", folder: Path, name: str, metadata: dict) -> None:
    """Log a checkpoint directory as an artifact of `run`, which so comes from what the run used."""
    import wandb

    artifact = wandb.Artifact(f"{name}-{run.id}", type="model", metadata=metadata)
    for path in sorted(folder.iterdir()):  # add_dir would print about each
        # immutable: no second copy of all weights; W&B refuses what changed before it was sent
        artifact.add_file(str(path), policy="immutable")
    logged = run.log_artifact(artifact, aliases=["latest", folder.name])
    if not run.offline:
        logged.wait()  # what the server refused is an error here


def artifact_name(reference: str) -> str:
    """Return `name` of entity/project/name:alias."""
    return reference.rsplit("/", 1)[-1].partition(":")[0]


def fetch(reference: str, artifacts_dir: Path) -> Path:
    """Return the folder of an artifact, downloaded and checked unless its digest is there already."""
    import wandb
    from filelock import FileLock

    source = wandb.Api().artifact(reference)
    for path, entry in source.manifest.entries.items():
        check_inside(path)
        if entry.ref:  # a reference could copy any file of this machine into the folder
            raise ValueError(f"the entry {path!r} is a link to {entry.ref}; refusing it")
    digest = re.sub(r"[^0-9A-Za-z]", "", source.digest)[:32]
    target = artifacts_dir / f"{artifact_name(reference)}-{digest}"
    if not target.is_dir():
        artifacts_dir.mkdir(parents=True, exist_ok=True)
        # beside the target, so that the rename is atomic and half a download is never taken for a whole one
        part = artifacts_dir / f".part-{target.name}"
        with FileLock(f"{part}.lock"):  # several processes of a run ask for the same; the first one fetches
            if not target.is_dir():
                download(source, part, target)
    return target


def download(source: "wandb.Artifact", part: Path, target: Path) -> None:
    """Fetch an artifact into `part`, check it, and rename it to `target`."""
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed; W&B's cache has what it fetched
    try:
        source.download(root=str(part))
        check_download(part)
        remember_artifact(part, source.source_qualified_name)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_download(folder: Path) -> None:
    """Check every hash of a fresh download, then record its files' own times in its manifest."""
    if links := [path for path in folder.rglob("*") if path.is_symlink()]:
        raise ValueError(f"the entry {links[0].name!r} is a link; refusing it")
    if problems := verify(folder):
        raise ValueError(f"{problems[0].removeprefix(str(folder))[1:]}; the download is not used")
    find_tokenizer(folder, folder / TOKENIZER)
    manifest = load_manifest(folder)
    for entry in entries(manifest):
        if "mtime_ns" in entry:  # so that the check for stale shards need not hash the texts again
            entry["mtime_ns"] = (folder / entry["path"]).stat().st_mtime_ns
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")


def pull(reference: str, artifacts_dir: Path) -> Path:
    """Return the data directory of `entity/project/name:alias` (WANDB_ENTITY fills in), downloaded once."""
    reference = resolve_artifact(reference, os.environ.get("WANDB_ENTITY"))
    import wandb

    try:
        return fetch(reference, artifacts_dir)
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise TransferError(f"could not pull {reference}: {first_line(error)}") from error


def add_wandb_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of an upload; the default of each is its variable, read now."""
    add = parser.add_argument
    add(
        "--wandb_project",
        metavar="NAME",
        default=variable("WANDB_PROJECT"),
        help=f"default {DEFAULT_PROJECT}",
    )
    add("--wandb_entity", metavar="NAME", default=variable("WANDB_ENTITY"), help="default: your W&B default")
    name = variable("WANDB_DATA_ARTIFACT")
    add("--wandb_artifact", metavar="NAME", default=name, help="default: the data directory's name")
    add("--wandb_alias", metavar="NAME", action="append", help="repeatable; WANDB_DATA_ALIASES=a,b")
    add("--wandb_tag", metavar="NAME", action="append", help="tag of the run, repeatable; WANDB_TAGS=a,b")
    add(
        "--wandb_run_name", metavar="NAME", default=variable("WANDB_RUN_NAME"), help="default: made up by W&B"
    )


def push_from_flags(args: argparse.Namespace, data_dir: Path, tokenizer_dir: Path | None) -> str:
    """Return what `push` returns, called with the flags of `add_wandb_flags`."""

    def words(name: str) -> list[str] | None:
        return [word.strip() for word in os.environ.get(name, "").split(",") if word.strip()] or None

    aliases = args.wandb_alias or words("WANDB_DATA_ALIASES")
    tags = args.wandb_tag or words("WANDB_TAGS")
    where = (args.wandb_project, args.wandb_entity, args.wandb_artifact)
    return push(data_dir, *where, aliases, tags, args.wandb_run_name, tokenizer_dir)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the three commands."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("command", nargs="?", choices=("push", "pull", "verify"), default="push", help="default push")
    add("reference", nargs="?", help=f"what to pull (default WANDB_DATASET_ARTIFACT); {REFERENCE_FORM}")
    data_dir = Path("data/custom_text")
    add("--data_dir", metavar="DIR", type=Path, default=data_dir, help="push, verify: default %(default)s")
    tokenizer = "push: default the one that made the data, in a folder in or beside --data_dir"
    add("--tokenizer_dir", metavar="DIR", type=Path, help=tokenizer)
    artifacts_dir = Path(variable("WANDB_ARTIFACTS_DIR") or "artifacts")
    add("--wandb_artifacts_dir", metavar="DIR", type=Path, default=artifacts_dir, help="default %(default)s")
    add_wandb_flags(parser)
    return parser


def run_command(args: argparse.Namespace) -> str:
    """Return the result of the command as the sentence to print."""
    if args.command == "pull":
        folder = pull(args.reference or variable("WANDB_DATASET_ARTIFACT") or "", args.wandb_artifacts_dir)
        return f"{folder}: whole; train on it with: {command_line(*RUN_TRAIN, '--dataset_dir', folder)}"
    if args.reference:
        raise ValueError(f"{args.command} takes no {args.reference!r}; name the folder with --data_dir")
    if args.command == "push":
        return push_from_flags(args, args.data_dir, args.tokenizer_dir)
    if problems := verify(args.data_dir):
        raise TransferError("\nerror: ".join(problems))
    manifest = load_manifest(args.data_dir)
    n_files = len(listed_files(manifest))
    whole = f"{args.data_dir}: {n_files} files match {MANIFEST}; fingerprint {manifest_fingerprint(manifest)}"
    push = command_line("uv", "run", "python", "wandb_dataset.py", "push", "--data_dir", args.data_dir)
    return f"{whole}\nshare it with: {push}"


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work (no network, damage found), 2 for bad input."""
    args = build_parser().parse_intermixed_args(argv)
    try:
        print(run_command(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, TransferError) else 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
