"""logs/run.json: the command, model, machine, data and versions of a run, from which reports are made."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import litgpt_moe
from litgpt_moe.checkpoints.layout import LOGS
from litgpt_moe.data.manifest import manifest_fingerprint, read_manifest
from litgpt_moe.files import write_json
from litgpt_moe.hardware import cpu_name, memory_bytes
from litgpt_moe.locks import remove_left_over
from litgpt_moe.threads import usable_cores
from litgpt_moe.training.folder_checks import FACTS_FILE, this_command
from litgpt_moe.training.run import Run
from litgpt_moe.training.settings import plain_settings

CHECKOUT = Path(litgpt_moe.__file__).parents[1]


def write_run_facts(run: Run, device: torch.device) -> None:
    """Write the facts of a run that begins or goes on."""
    versions = {"python": sys.version.split()[0], "litgpt_moe": litgpt_moe.__version__}
    versions |= {name: version(name) for name in ("torch", "litgpt", "lightning", "numpy")}
    facts = {
        "command": this_command(),
        "resumed": str(run.resume.folder.resolve()) if run.resume else None,
        "model": _model(run),
        "machine": _machine(run, device),
        "data": _data(run),
        "commit": commit(CHECKOUT),
        "settings": plain_settings(run.settings),
        "versions": versions,
    }
    path = run.settings.out_dir / LOGS / FACTS_FILE
    remove_left_over(path)
    write_json(path, facts)


def _model(run: Run) -> dict[str, Any]:
    names = ("name", "n_layer", "n_embd", "n_expert", "n_expert_per_token", "padded_vocab_size")
    sizes = {"total_params": run.facts.total_params, "active_params": run.facts.active_params}
    return {name: getattr(run.config, name) for name in names} | sizes


def _machine(run: Run, device: torch.device) -> dict[str, Any]:
    system = f"{platform.system()} {platform.release()}"
    facts: dict[str, Any] = {"system": system, "cpu": cpu_name(), "cores": usable_cores()}
    facts |= {"threads": torch.get_num_threads(), "memory": memory_bytes()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory": properties.total_memory}
    return facts | {"device": device.type, "devices": run.devices, "machines": run.settings.num_nodes}


def _data(run: Run) -> dict[str, Any]:
    if run.data_dir is None:
        return {"class_path": run.settings.data.get("class_path")}
    try:
        manifest = read_manifest(run.data_dir, check_shards=False)
    except (ValueError, OSError):
        return {"folder": str(run.data_dir)}  # changed since they were checked: the loaders say so
    facts = {"folder": str(run.data_dir), "vocab_size": manifest["tokenizer"]["vocab_size"]}
    for split, counts in manifest["splits"].items():
        facts[split] = {name: counts[name] for name in ("n_tokens", "n_stories", "n_bytes")}
    return facts | {"mix": manifest.get("mix", []), "fingerprint": manifest_fingerprint(manifest)}


def commit(checkout: Path) -> dict[str, Any] | None:
    """Return the git commit of a checkout and whether files that git knows are changed; None if unknown."""
    if not (checkout / ".git").exists():
        return None  # an installed copy, which may lie inside of another project's checkout
    git = ["git", "--no-optional-locks", "-C", str(checkout)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True, "env": env}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **options).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or a checkout of somebody else's, which it refuses to read
    # uv rewrites the addresses in the lock where another package index is the default
    changed = [line[3:] for line in changes.splitlines()]
    return {"id": head, "is_changed": bool({*changed} - {"uv.lock"})}
