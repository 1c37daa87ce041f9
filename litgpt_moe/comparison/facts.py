"""What is recorded beside each run: the data, the machine, the commit and the command."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_moe.cli import command_line
from litgpt_moe.data.manifest import manifest_fingerprint, read_manifest
from litgpt_moe.data.prepare import stale_reasons
from litgpt_moe.data.tokenizer_folder import find_tokenizer
from litgpt_moe.hardware import machine
from litgpt_moe.words import ROOT

# of a machine, what its speed depends on
SPEED_FACTS = ("device", "cpu", "cores", "threads", "torch")


@dataclass(frozen=True)
class Facts:
    """Where, on what and by which code the runs of one command are made."""

    data: dict[str, Any]
    machine: dict[str, Any]
    commit: dict[str, Any]
    command: str

    @property
    def fingerprint(self) -> str:
        """The digest of the data and of their tokenizer."""
        return self.data["fingerprint"]

    def check_data(self, data_dir: Path) -> None:
        """Raise ValueError if the data are others than when the command began."""
        if manifest_fingerprint(read_manifest(data_dir)) != self.fingerprint:
            raise ValueError(
                f"{data_dir} has changed since this began; the same command compares on what it is now"
            )

    def is_this_machine(self, other: dict[str, Any]) -> bool:
        """Return whether speeds that were measured on a machine hold on this one."""
        return all(other.get(key) == self.machine[key] for key in SPEED_FACTS)


def gather_facts(data_dir: Path) -> Facts:
    """Return the facts; ValueError or OSError if the data are not prepared, or their text has changed."""
    manifest = read_manifest(data_dir)
    if reasons := stale_reasons(data_dir, find_tokenizer(data_dir, None)):
        raise ValueError(f"{data_dir}: {reasons[0]}; run prepare_data.py on that folder again")
    val = manifest["splits"]["val"]
    data = {
        "fingerprint": manifest_fingerprint(manifest),
        "train_tokens": manifest["splits"]["train"]["n_tokens"],
        "val_tokens": val["n_tokens"],
        "val_bytes": val["n_bytes"],
        "vocab_size": manifest["tokenizer"]["vocab_size"],
    }
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return Facts(data, machine(), commit(), command_line("uv", "run", "python", name, *sys.argv[1:]))


def commit() -> dict[str, Any]:
    """Return the commit of this checkout, and whether the code is as committed; {} without git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if (head := git("rev-parse", "HEAD")) is None:
        return {}
    # the rows of finished runs change with each run
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs/results")
    return {"commit": head, "is_clean": changed == ""}
