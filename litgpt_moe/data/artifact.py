"""A data directory as a Weights & Biases artifact: push, pull, and the lineage of runs and checkpoints."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import wandb
from filelock import FileLock
from wandb.errors import Error

from litgpt_moe.checkpoints.tokenizer_files import TOKENIZER_FILES
from litgpt_moe.cli import command_line, first_line, train_command, variable
from litgpt_moe.data import manifest as manifests
from litgpt_moe.data.manifest import MANIFEST, RUN_AGAIN, manifest_fingerprint, read_manifest
from litgpt_moe.data.settings import REFERENCE_FORM, WandbSettings
from litgpt_moe.data.text import NOT_UTF8
from litgpt_moe.data.tokenizer_folder import TOKENIZER_FOLDER, find_tokenizer
from litgpt_moe.files import check_inside, patient_rename, read_json, remove, write_json
from litgpt_moe.folders import make_staging

LINEAGE = "artifact.json"  # in the data directory: name and fingerprint of the artifact that it equals
Policy = Literal["mutable", "immutable"]  # "mutable": W&B copies each file before it uploads it
CONNECT_SECONDS = 30  # W&B waits 90 by default, also where there is no network


def push(data_dir: Path, upload: WandbSettings, tokenizer_dir: Path | None = None) -> str:
    """Log a data directory as an artifact and return its name with the command that uses it."""
    tokenizer_dir = find_tokenizer(data_dir, tokenizer_dir)
    if problems := manifests.verify(data_dir):
        raise ValueError(f"{problems[0]}; run prepare_data.py again")
    for path in (data_dir.resolve(), tokenizer_dir.resolve(), Path.cwd()):
        if NOT_UTF8.search(str(path)):
            raise ValueError(f"{str(path)!a}: the name is not UTF-8, which W&B needs; rename it")
    name = upload.wandb_artifact or re.sub(r"[^\w.-]+", "-", data_dir.resolve().name)
    try:
        run = wandb.init(
            project=upload.wandb_project or "litgpt-moe",
            entity=upload.wandb_entity,
            name=upload.wandb_run_name,
            tags=upload.wandb_tag,
            job_type="push",
            # console="off": W&B would log the output of this command as that of a training run
            settings=wandb.Settings(console="off", init_timeout=CONNECT_SECONDS),
        )
        try:
            return log_artifact(run, data_dir, tokenizer_dir, name, upload.wandb_alias)
        finally:
            run.finish()
    except (Error, BrokenPipeError) as error:
        raise ConnectionError(f"could not push {data_dir} to W&B: {first_line(error)}") from error


def log_artifact(
    run: wandb.Run, data_dir: Path, tokenizer_dir: Path, name: str, aliases: list[str] | None
) -> str:
    """Log the artifact to an open run and return what `push` returns."""
    if run.disabled:
        raise ConnectionError("WANDB_MODE=disabled sends nothing; set it to online or offline")
    # offline W&B copies the files: they may change before `wandb sync` uploads them
    policy: Policy = "mutable" if run.offline else "immutable"
    logged = run.log_artifact(build_artifact(data_dir, tokenizer_dir, name, policy), aliases=aliases)
    if run.offline:
        remember_artifact(data_dir, name)
        return f"{name}: logged offline; upload with: uv run wandb sync {command_line(Path(run.dir).parent)}"
    name = logged.wait().source_qualified_name
    remember_artifact(data_dir, name)
    return f"{name}: uploaded; train on it with: {train_command('--wandb_dataset', name)}"


def build_artifact(data_dir: Path, tokenizer_dir: Path, name: str, policy: Policy) -> wandb.Artifact:
    """Return the artifact of a prepared data directory."""
    manifest = read_manifest(data_dir, check_shards=False)
    manifest["tokenizer"].pop("folder", None)  # its place on this machine
    counts = ("n_stories", "n_tokens", "n_bytes")
    metadata = {
        "fingerprint": manifest_fingerprint(manifest),
        **{key: manifest.get(key) for key in ("format_version", "tokenizer", "options", "code")},
        "splits": {name: {key: split[key] for key in counts} for name, split in manifest["splits"].items()},
    }
    artifact = wandb.Artifact(name, type="dataset", metadata=metadata)
    for split in manifest["splits"].values():
        split.pop("read", None)  # text on this machine, outside of the folder
    for entry in manifest.get("mix", ()):
        entry["folder"] = Path(entry["folder"]).name
    if isinstance(manifest.get("input"), dict):
        manifest["input"]["paths"] = []
    for entry in manifests.listed(manifest, "text"):
        entry["mtime_ns"] = 0  # equal data then makes an equal artifact
    with artifact.new_file(MANIFEST, encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1, sort_keys=True))
    for path in sorted(manifests.listed_files(manifest)):
        artifact.add_file(str(data_dir / path), name=path, policy=policy)
    for path in filter(Path.is_file, (tokenizer_dir / file for file in TOKENIZER_FILES)):
        artifact.add_file(str(path), name=f"{TOKENIZER_FOLDER}/{path.name}", policy=policy)
    return artifact


def remember_artifact(data_dir: Path, artifact: str) -> None:
    """Record in the data directory that its present content equals `artifact`."""
    fingerprint = manifest_fingerprint(read_manifest(data_dir, check_shards=False))
    write_json(data_dir / LINEAGE, {"artifact": artifact, "fingerprint": fingerprint})


def lineage(data_dir: Path) -> dict[str, str | None]:
    """Return the data directory's `fingerprint` and the `artifact` that has the same one, if any."""
    now = {"artifact": None, "fingerprint": manifest_fingerprint(read_manifest(data_dir, check_shards=False))}
    with contextlib.suppress(OSError, ValueError, KeyError):  # never pushed or pulled, or a damaged record
        recorded = read_json(data_dir / LINEAGE)
        if recorded["fingerprint"] == now["fingerprint"]:
            now["artifact"] = str(recorded["artifact"])
    return now


def use_dataset(run: wandb.Run, data_dir: Path, tokenizer_dir: Path) -> None:
    """Record on W&B that `run` reads the artifact that equals the data directory; no-op without one."""
    reference = lineage(data_dir)["artifact"]
    if reference is None or run.disabled:
        return
    if "/" in reference and not run.offline:
        run.use_artifact(reference)
        return
    artifact = build_artifact(data_dir, tokenizer_dir, artifact_name(reference), "immutable")
    if run.offline:
        # wandb 0.31 refuses use_artifact offline, but `wandb sync` supports it; W&B stores equal data once
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:  # the data was pushed offline: the name that `wandb sync` gave it is not known here
        run.use_artifact(artifact)


def log_checkpoint(run: wandb.Run, folder: Path, name: str, metadata: dict[str, Any]) -> None:
    """Log a checkpoint directory as an artifact of `run`; W&B then shows which data it was trained on."""
    artifact = wandb.Artifact(f"{name}-{run.id}", type="model", metadata=metadata)
    for path in sorted(folder.iterdir()):  # not add_dir, which prints a line for each file
        # immutable: W&B does not copy the weights, and refuses a file that changed before its upload
        artifact.add_file(str(path), policy="immutable")
    logged = run.log_artifact(artifact, aliases=["latest", folder.name])
    if not run.offline:
        logged.wait()  # raises an error if the server refused it


def artifact_name(reference: str) -> str:
    """Return `name` of entity/project/name:alias."""
    return reference.rsplit("/", 1)[-1].partition(":")[0]


def resolve_artifact(reference: str, entity: str | None) -> str:
    """Return "entity/project/name:alias"; a reference without an entity gets `entity`."""
    parts = reference.split("/")
    if len(parts) == 2 and entity:
        parts = [entity, *parts]
    words = [*parts[:-1], *parts[-1].split(":")]
    if len(parts) != 3 or len(words) != 4 or not all(re.fullmatch(r"(?!\.+$)[^\\#?%\s]+", w) for w in words):
        raise ValueError(f"{reference!r} is not a W&B data set; {REFERENCE_FORM}")
    return "/".join(parts)


def pull(reference: str, artifacts_dir: Path) -> Path:
    """Return the data directory of `entity/project/name:alias`, downloaded unless it is there already."""
    reference = resolve_artifact(reference, variable("WANDB_ENTITY"))
    try:
        return fetch(reference, artifacts_dir)
    except (Error, ValueError, OSError) as error:
        # `download` has deleted the folder, so preparing it again is no way out
        reason = first_line(error).removesuffix(f"; {RUN_AGAIN}")
        raise ConnectionError(f"could not pull {reference}: {reason}") from error


def fetch(reference: str, artifacts_dir: Path) -> Path:
    """Return the folder of an artifact; it is named after the digest, so new content gets a new folder."""
    source = wandb.Api().artifact(reference)
    for path, entry in source.manifest.entries.items():
        check_inside(path)
        if entry.ref:  # wandb would copy any file of this machine that a reference names
            raise ValueError(f"the entry {path!r} is a link to {entry.ref}; refusing it")
    digest = re.sub(r"[^0-9A-Za-z]", "", source.digest)[:32]
    target = artifacts_dir / f"{artifact_name(reference)}-{digest}"
    if not target.is_dir():
        artifacts_dir.mkdir(parents=True, exist_ok=True)
        lock = artifacts_dir / f".{target.name}.litgpt_moe.lock"
        with FileLock(lock):  # only the first process of a run downloads
            if not target.is_dir():
                download(source, target)
    return target


def download(source: wandb.Artifact, target: Path) -> None:
    """Fetch an artifact into a staging folder, check it, and rename that to `target`."""
    part = make_staging(target)  # W&B caches the files that a killed process downloaded
    try:
        source.download(root=str(part))
        if links := [path for path in part.rglob("*") if path.is_symlink()]:
            raise ValueError(f"the entry {links[0].name!r} is a link; refusing it")
        if problems := manifests.verify(part):
            raise ValueError(f"{problems[0].removeprefix(str(part))[1:]}; the download is not used")
        find_tokenizer(part, part / TOKENIZER_FOLDER)
        manifests.record_times(part)
        remember_artifact(part, source.source_qualified_name)
        patient_rename(part, target)
    finally:
        remove(part)
