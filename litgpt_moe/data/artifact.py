"""A data directory as a Weights & Biases artifact: push, pull, and what a run or checkpoint came from."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import wandb
from filelock import FileLock

from litgpt_moe.cli import RUN_TRAIN, command_line, first_line
from litgpt_moe.data.manifest import (
    MANIFEST,
    entries,
    fingerprint,
    listed_files,
    load_manifest,
    manifest_fingerprint,
    verify,
)
from litgpt_moe.data.tokenizer import TOKENIZER, TOKENIZER_FILES, find_tokenizer
from litgpt_moe.files import check_inside

LINEAGE = "artifact.json"  # beside it: the artifact that this directory is
DEFAULT_PROJECT = "litgpt-moe"
CONNECT_SECONDS = 30  # W&B's own 90 is long to wait for the news that there is no network
REFERENCE_FORM = "write entity/project/name:alias, or project/name:alias with WANDB_ENTITY set"


class TransferError(OSError):
    """W&B could not be reached, refused us, or sent something that must not be used."""


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
    run: wandb.Run, data_dir: Path, tokenizer_dir: Path, name: str, aliases: list[str] | None
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


def build_artifact(data_dir: Path, tokenizer_dir: Path, name: str, policy: str) -> wandb.Artifact:
    """Return the artifact of a data directory that `verify` found whole."""
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


def without_times(node: object) -> object:
    """Return parsed JSON with every `mtime_ns` zero, so that equal data makes an equal artifact."""
    if isinstance(node, dict):
        return {key: 0 if key == "mtime_ns" else without_times(value) for key, value in node.items()}
    return [without_times(value) for value in node] if isinstance(node, list) else node


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


def use_dataset(run: wandb.Run, data_dir: Path, tokenizer_dir: Path) -> None:
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


def log_checkpoint(run: wandb.Run, folder: Path, name: str, metadata: dict) -> None:
    """Log a checkpoint directory as an artifact of `run`, which so comes from what the run used."""
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


def resolve_artifact(reference: str, entity: str | None) -> str:
    """Return "entity/project/name:alias"; `entity` fills in where the reference has none."""
    parts = reference.split("/")
    if len(parts) == 2 and entity:
        parts = [entity, *parts]
    words = [*parts[:-1], *parts[-1].split(":")]
    if len(parts) != 3 or len(words) != 4 or not all(re.fullmatch(r"(?!\.+$)[^\\#?%\s]+", w) for w in words):
        raise ValueError(f"{reference!r} is not a W&B data set; {REFERENCE_FORM}")
    return "/".join(parts)


def pull(reference: str, artifacts_dir: Path) -> Path:
    """Return the data directory of `entity/project/name:alias` (WANDB_ENTITY fills in), downloaded once."""
    reference = resolve_artifact(reference, os.environ.get("WANDB_ENTITY"))
    try:
        return fetch(reference, artifacts_dir)
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise TransferError(f"could not pull {reference}: {first_line(error)}") from error


def fetch(reference: str, artifacts_dir: Path) -> Path:
    """Return the folder of an artifact, downloaded and checked unless its digest is there already."""
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


def download(source: wandb.Artifact, part: Path, target: Path) -> None:
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
