"""Names of checkpoints and their files, checkpoint.json, and which checkpoints are kept.

Nothing heavy is imported here, since the settings of a run hold `CheckpointArgs`.
"""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from litgpt_moe.checkpoints.read_errors import ReadFailed, patient
from litgpt_moe.files import fits, is_link, sha256_file, sync_files, write_json
from litgpt_moe.folders import check_new_folder
from litgpt_moe.words import near

CHECKPOINT_FILE = "lit_model.pth"
CONFIG_FILE = "model_config.yaml"
SETTINGS_FILE = "train_config.yaml"
RECORD_FILE = "checkpoint.json"  # the step, and size and SHA-256 of each file
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
FINAL = "final"
LOGS = "logs"
RECORD_FORMAT = 1
# schemas of a file's entry and of what it may hold in "weights", for `files.fits`
ENTRY_FORM = {"bytes": int, "sha256": str}
WEIGHTS_FORM = {"head": 1, "tail": 1, "sha256": str}
MAX_RECORD_BYTES = 1 << 20
# Only these names are the project's: as `step_name` writes it, what a resume from an earlier step renames,
# and what a killed process leaves of them (`folders.staging_for`; the mark came with version 0.2)
STEP_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,17})")
SUPERSEDED = re.compile(rf"superseded-{STEP_NAME.pattern}(\.[0-9]+)?")
LEFT_OVER = re.compile(
    rf"\.(?P<target>{FINAL}|{STEP_NAME.pattern})(?P<mark>\.litgpt_moe-[0-9a-f]{{8}}-[0-9]+)?"
    r"\.(?P<ending>tmp|old)"
)


@dataclass(frozen=True)
class CheckpointArgs:
    """Which checkpoints are kept, which go to W&B, and what happens when the disk is full."""

    keep_last: int | None = None
    """Newest step-* to keep; older ones are deleted after a save (null: all stay)."""
    keep_every: int | None = None
    """In steps: each step-* that is a multiple of it is kept as well (null: none)."""
    on_full_disk: Literal["continue", "stop"] = "continue"
    """continue: go on training, the next save may succeed; stop: end the run with status 1."""
    to_wandb: Literal["final", "kept", "none"] = "final"
    """What goes to W&B (logger_name wandb): final (final/), kept (also each step-* kept for good), none."""

    def keeps(self, step: int) -> bool:
        """Return whether the checkpoint of `step` is kept for good."""
        return self.keep_last is None or bool(self.keep_every and step % self.keep_every == 0)


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint directory, as LitGPT's loop gives it: step-00000100."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint directory: from its name, or from the record of `final/`; else None."""
    if path.name == FINAL:
        try:
            return read_record(path).get("step")
        except ReadFailed:
            raise
        except (ValueError, OSError):
            return None
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds anything of a checkpoint, whole or damaged, or nothing at all.

    Others may have exported a model to a name like step-00000100: that folder is theirs.
    """
    if not folder.is_dir():
        return False
    own = (CHECKPOINT_FILE, CONFIG_FILE, SETTINGS_FILE, RECORD_FILE)
    return any((folder / name).exists() for name in own) or not any(folder.iterdir())


def others_of(out_dir: Path) -> list[Path]:
    """Return what has a checkpoint's name in `out_dir` and is none."""
    named = [path for path in out_dir.glob("*") if path.name == FINAL or STEP_NAME.fullmatch(path.name)]
    return sorted(path for path in named if not is_checkpoint(path))


def steps_of(out_dir: Path) -> dict[int, Path]:
    """Return the step-* directories of a run by step in ascending order, damaged ones too."""
    steps = {step_of(path): path for path in out_dir.glob("step-*") if is_checkpoint(path)}
    return {step: steps[step] for step in sorted(step for step in steps if step is not None)}


def checkpoints_of(out_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run, damaged ones too, the latest step first.

    At the same step, step-* precedes `final/`; a `final/` without a record comes last.
    """
    found = [(step, path.name) for step, path in steps_of(out_dir).items()]
    if is_checkpoint(final := out_dir / FINAL):
        step = step_of(final)
        found.append((-1 if step is None else step, FINAL))
    return [out_dir / name for _, name in sorted(found, reverse=True)]


def moved_aside(out_dir: Path) -> dict[Path, Path]:
    """Return what was moved aside for a replacement that never came, by the places where it was."""
    found = [(LEFT_OVER.fullmatch(path.name), path) for path in sorted(out_dir.glob(".*.old"))]
    places = {out_dir / match["target"]: path for match, path in found if match and not is_link(path)}
    return {place: path for place, path in places.items() if not os.path.lexists(place)}


def check_utf8(path: Path) -> None:
    """Raise ValueError if the libraries that read and write weights and tokenizers cannot open `path`."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        only = "torch, safetensors and tokenizers open UTF-8 names only"
        raise ValueError(f"{str(path)!a}: the name is not UTF-8; {only}, so rename it") from None


def check_new_place(out: Path) -> None:
    """Raise ValueError or OSError if a tool must not make the folder `out`."""
    check_utf8(out := out.absolute())
    check_no_place_of_run(out)
    check_new_folder(out, 0)


def check_no_place_of_run(folder: Path) -> None:
    """Raise ValueError if `folder` has, in a run's out_dir, a name under which the run writes."""
    folder = folder.resolve()
    run, name = folder.parent, folder.name
    is_name = name in (FINAL, LOGS) or STEP_NAME.fullmatch(name) or SUPERSEDED.fullmatch(name)
    marks = (run / ".run.json", run / LOGS / "run.json", run / LOGS / "csv")
    if is_name and (any(mark.exists() for mark in marks) or checkpoints_of(run)):
        raise ValueError(f"{folder}: the run in {run} keeps this name for itself; choose another")


def find_checkpoint(path: Path) -> Path:
    """Return `path` itself if it is a checkpoint, or its `final/`, or its newest undamaged `step-*`.

    If all of them are damaged, ValueError says what is wrong with the first.
    """
    check_utf8(path)
    if path.is_file() and path.name == CHECKPOINT_FILE:
        path = path.parent
    if path.is_file():
        wanted = f"a checkpoint directory, which holds {CHECKPOINT_FILE}"
        raise NotADirectoryError(f"{path} is a file; name {wanted}")
    if not path.is_dir():
        beside, newest = [], []
        with contextlib.suppress(OSError):
            beside = [other.name for other in path.parent.iterdir() if other.is_dir()]
            newest = [other.name for other in checkpoints_of(path.parent)[:3]]
        there = f"{path.parent} has {', '.join(newest)}" if newest else "train one with run_train.py"
        way_out = near(path.name, beside) or there
        if aside := moved_aside(path.parent).get(path):
            way_out = f"a kill left it as {aside}: rename that"
        raise FileNotFoundError(f"{path}: no such checkpoint directory; {way_out}")
    if _has_model(path):  # verify_checkpoint will report its damage
        return path
    problems = []
    for candidate in filter(_has_model, (path / FINAL, *reversed(steps_of(path).values()))):
        try:
            recorded_files(candidate)
            return candidate
        except ValueError as problem:
            problems.append(problem)
    if problems:
        raise problems[0]
    wanted = f"{CHECKPOINT_FILE} with a {CONFIG_FILE}, nor final/ or step-* that do"
    killed = [f"; but there is {old}: rename it to {place.name}" for place, old in moved_aside(path).items()]
    raise FileNotFoundError(f"{path} holds no {wanted}{''.join(killed[:1])}")


def _has_model(folder: Path) -> bool:
    return (folder / CHECKPOINT_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def read_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the content of the files of these names that exist in `folder`."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def write_record(folder: Path, step: int, files: dict[str, dict[str, Any]], **notes: Any) -> None:
    """Write checkpoint.json, which lists every file in `folder`; `files` holds the known entries."""
    files = dict(files)
    for path in sorted(folder.iterdir()):
        if path.name not in files:  # lit_model.pth is hashed while it is written
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(folder / RECORD_FILE, {"format": RECORD_FORMAT, "step": step, **notes, "files": files})
    sync_files(folder)


@patient
def read_record(folder: Path) -> dict[str, Any]:
    """Return the checked content of checkpoint.json; {} without one, as in LitGPT's own checkpoints."""
    record = folder / RECORD_FILE
    if not record.exists():
        return {}
    try:
        if not record.is_file():  # to read a pipe would wait for ever
            raise ValueError("it is no file")
        if record.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError("it is too large")
        content = json.loads(record.read_bytes())
        version, files, step = content["format"], content["files"], content.get("step")
        if version != RECORD_FORMAT:
            raise ValueError(f"its format is {version!r:.80}, not {RECORD_FORMAT}")
        if CHECKPOINT_FILE not in files or not all(map(_is_entry, files.values())):
            raise ValueError("it does not list the files")
        if step is not None and (type(step) is not int or step < 0):
            raise ValueError(f"its step is {step!r:.80}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refuse_damage(record, str(error).strip("'") or type(error).__name__)
    return content


def _is_entry(entry: Any) -> bool:
    return fits(entry, ENTRY_FORM) and ("weights" not in entry or fits(entry["weights"], WEIGHTS_FORM))


def recorded_files(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the files that checkpoint.json lists and their entries, after a check of their sizes."""
    files = read_record(folder).get("files", {})
    for name, entry in files.items():
        path = folder / name
        if re.search(r"[/\\:\0]", name) or name in ("", ".", ".."):
            text = f"{folder / RECORD_FILE} lists {name!r}, not a file of its folder"
            raise ValueError(f"{text}; use another checkpoint")
        if not path.is_file():
            refuse_damage(path, f"{RECORD_FILE} lists it and it is not there")
        if (size := path.stat().st_size) != entry["bytes"]:
            refuse_damage(path, f"it has {size:,} bytes, {RECORD_FILE} says {entry['bytes']:,}")
    return {folder / name: entry for name, entry in files.items()}


def is_saved(folder: Path, step: int) -> bool:
    """Return whether `folder` is a checkpoint of this step with all its files."""
    try:
        return read_record(folder).get("step") == step and bool(recorded_files(folder))
    except (ValueError, OSError):
        return False


def refuse_damage(path: Path, reason: str) -> NoReturn:
    """Raise the ValueError for a damaged file of a checkpoint."""
    reason = " ".join(reason.split())[:200]
    raise ValueError(f"{path} is damaged or not a checkpoint's ({reason}); use another checkpoint")
