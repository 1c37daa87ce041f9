"""logs/run.json: what a run records about itself, and what is known of the code."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from litgpt_moe.config import MoEConfig
from litgpt_moe.training.facts import commit, write_run_facts
from litgpt_moe.training.run import set_up


def git(folder: Path, *words: str) -> None:
    """Run git as nobody in particular."""
    who = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, "-C", str(folder), *words], check=True, capture_output=True)


def test_a_run_records_model_machine_and_data(workspace: Path, tiny_data: Path) -> None:
    run = set_up(["--config=train_config.yaml", "--model_config=model_config.yaml"])
    (workspace / "out/logs").mkdir(parents=True)
    write_run_facts(run, torch.device("cpu"))
    facts = json.loads((workspace / "out/logs/run.json").read_text(encoding="utf-8"))
    n_params = sum(
        p.numel() for p in MoEConfig.model_from_file(workspace / "model_config.yaml")[1].parameters()
    )
    assert facts["model"]["name"] == "MoE-tiny" and facts["model"]["total_params"] == n_params
    assert facts["machine"]["device"] == "cpu" and facts["machine"]["cores"] >= 1
    manifest = json.loads((tiny_data / "manifest.json").read_text(encoding="utf-8"))
    counts = manifest["splits"]["train"]
    assert facts["data"]["train"] == {name: counts[name] for name in ("n_tokens", "n_stories", "n_bytes")}
    assert facts["data"]["folder"] == str(tiny_data)
    assert facts["settings"]["seed"] == 42 and torch.__version__.startswith(facts["versions"]["torch"])


def test_data_that_were_removed_meanwhile_are_for_the_loaders_to_tell(
    workspace: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = set_up(["--config=train_config.yaml", "--model_config=model_config.yaml"])
    shutil.copytree(tiny_data, workspace / "data")
    (workspace / "data/manifest.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr(run.data, "train_data_path", workspace / "data/train")
    (workspace / "out/logs").mkdir(parents=True)
    write_run_facts(run, torch.device("cpu"))
    facts = json.loads((workspace / "out/logs/run.json").read_text(encoding="utf-8"))
    assert facts["data"] == {"folder": str(workspace / "data")}


def test_the_commit_is_that_of_the_checkout_and_says_if_files_are_changed(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert commit(tmp_path) is None  # nothing is committed yet
    for name in ("code.py", "uv.lock"):
        (tmp_path / name).write_text("1", encoding="utf-8")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    (tmp_path / "uv.lock").write_text("2", encoding="utf-8")  # as uv does
    (tmp_path / "new.txt").write_text("2", encoding="utf-8")
    known = commit(tmp_path)
    assert known and len(known["id"]) == 40 and not known["is_changed"]
    (tmp_path / "code.py").write_text("2", encoding="utf-8")
    assert commit(tmp_path) == {**known, "is_changed": True}
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert commit(inside) is None  # of the project around it
