"""Data, run and checkpoints on W&B: the real SDK against a small server, online and offline."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, TINY_CONFIG, wait_until
from helpers.wandb_server import WandbServer, serve

from litgpt_moe.data.artifact import lineage
from litgpt_moe.data.manifest import verify
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings

KEY = "0123456789abcdef0123456789abcdef01234567"  # made up; 40 characters, as W&B demands


class Workspace:
    """A folder with data and settings, from which scripts run with a W&B server of their own."""

    def __init__(self, folder: Path, server: WandbServer, tiny_data: Path, tokenizer_dir: Path) -> None:
        self.folder, self.server, self.output = folder, server, ""
        shutil.copytree(tiny_data, folder / "data/stories")
        shutil.copytree(tokenizer_dir, folder / "data/tokenizer")
        (folder / "model_config.yaml").write_text(yaml.dump(TINY_CONFIG), encoding="utf-8")
        settings = {"accelerator": "cpu", "compile": "off", "out_dir": "out", "logger_name": "wandb"}
        settings |= {"dataset_dir": "data/stories", "tokenizer_dir": "data/tokenizer"}
        settings["train"] = {"global_batch_size": 4, "micro_batch_size": 4, "max_tokens": 8 * 4 * 64}
        settings["train"] |= {"max_norm": 1.0, "save_interval": 2, "lr_warmup_steps": 0, "log_interval": 1}
        settings["checkpoints"] = {"to_wandb": "kept", "keep_last": 1, "keep_every": 4}
        (folder / "train_config.yaml").write_text(yaml.dump(settings), encoding="utf-8")
        names = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
        places = {name: str(folder / name) for name in names}
        self.environment = {name: value for name, value in os.environ.items() if "WANDB" not in name}
        self.environment |= {**places, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        self.environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        self.environment |= {"WANDB_ERROR_REPORTING": "false", "PYTHONUNBUFFERED": "1"}

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        script, *flags = words
        command = [sys.executable, *([str(ROOT / script)] if script.endswith(".py") else ["-m", script])]
        return subprocess.Popen(
            [*command, *flags],
            env=self.environment | environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )

    def run(self, *words: str, **environment: str) -> str:
        """Return what a script prints, after a check that it succeeds."""
        process = self.start(*words, **environment)
        output, _ = process.communicate(timeout=240)
        self.output += output
        assert process.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def online(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_tokenizer_dir: Path
) -> Iterator[Workspace]:
    """A data set pushed, and a run of eight steps that keeps step 4, step 8 and final/, all online."""
    with serve() as server:
        workspace = Workspace(tmp_path_factory.mktemp("online"), server, tiny_data, tiny_tokenizer_dir)
        workspace.run("wandb_dataset.py", "push", "--data_dir", "data/stories")
        workspace.run("run_train.py", "--config", "train_config.yaml")
        yield workspace


def test_a_run_uses_its_data_and_makes_the_checkpoints_that_stay(online: Workspace) -> None:
    run_id = (online.folder / "out/.wandb_run_id").read_text(encoding="utf-8")
    assert online.server.used == [(run_id, "stories:v0")]
    made = [artifact for run, artifact in online.server.made if run == run_id]
    assert made == [f"MoE-tiny-{run_id}:v{version}" for version in range(3)]
    aliases = [a["aliases"] for a in online.server.artifacts if a["type"] == "model"]
    assert aliases == [["latest", "step-00000004"], ["latest", "step-00000008"], ["final", "latest"]]
    assert {path.name for path in (online.folder / "out").glob("step-*")} == {
        "step-00000004",
        "step-00000008",
    }


def test_a_checkpoint_says_on_wandb_which_data_made_it(online: Workspace) -> None:
    final = yaml.safe_load(online.server.artifacts[-1]["metadata"])
    assert (final["step"], final["tokens"]) == (8, 8 * 256) and final["val_loss"] > 0
    here = lineage(online.folder / "data/stories")
    assert final["dataset"] == here and here["artifact"] == "team/litgpt-moe/stories:v0"


def test_the_key_is_in_no_output_and_no_file(online: Workspace) -> None:
    assert "run_train.py" in online.output and KEY not in online.output
    files = [path for path in online.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any(path.suffix == ".pth" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_only_what_changed_is_sent_again(online: Workspace) -> None:
    (online.folder / "data/stories/val/more.txt").write_text("Tom had a hat.\n", encoding="utf-8")
    settings = {"data_dir": online.folder / "data/stories", "tokenizer_dir": online.folder / "data/tokenizer"}
    prepare(PrepareSettings(**settings, workers=1))
    del online.server.sent[:]
    online.run("wandb_dataset.py", "push", "--data_dir", "data/stories")
    (shard,) = (online.folder / "data/stories/val/val").glob("*.bin")
    assert sorted(online.server.sent) == ["manifest.json", "val/more.txt", f"val/val/{shard.name}"]
    del online.server.sent[:]
    assert "stories:v1: uploaded" in online.run("wandb_dataset.py", "push", "--data_dir", "data/stories")
    assert online.server.sent == []


def test_a_pull_that_is_killed_in_the_middle_is_made_whole_by_the_next(online: Workspace) -> None:
    online.server.downloads_left = 2
    elsewhere = {"WANDB_CACHE_DIR": str(online.folder / "empty")}  # push left its files in the usual one
    process = online.start("wandb_dataset.py", "pull", "team/litgpt-moe/stories:v0", **elsewhere)
    assert online.server.stalled.wait(240)
    artifacts = online.folder / "artifacts"
    wait_until(lambda: any(artifacts.glob(".*.tmp/**/*")))  # the first of the two that came
    process.kill()
    process.communicate()
    assert list(artifacts.glob(".*.tmp/")) and not list(artifacts.glob("[!.]*"))
    online.server.downloads_left = -1
    online.run("wandb_dataset.py", "pull", "team/litgpt-moe/stories:v0", **elsewhere)
    (folder,) = artifacts.glob("*/")  # the half one is gone
    assert verify(folder) == [] and lineage(folder)["artifact"] == "team/litgpt-moe/stories:v0"


OFFLINE_RUN = """
import wandb
from pathlib import Path
from litgpt_moe.data import artifact
run = wandb.init(project="tests", settings=wandb.Settings(console="off"))
artifact.use_dataset(run, Path("data/stories"), Path("data/tokenizer"))
artifact.log_checkpoint(run, Path("data/tokenizer"), "model", {})  # any folder of files does
"""


def test_what_is_recorded_offline_has_its_lineage_after_wandb_sync(
    tmp_path: Path, tiny_data: Path, tiny_tokenizer_dir: Path
) -> None:
    with serve() as server:
        workspace = Workspace(tmp_path, server, tiny_data, tiny_tokenizer_dir)
        offline = {"WANDB_MODE": "offline", "WANDB_RUN_ID": "trained", "PYTHONPATH": str(ROOT)}
        workspace.run("wandb_dataset.py", "push", "--data_dir", "data/stories", WANDB_MODE="offline")
        (tmp_path / "train.py").write_text(OFFLINE_RUN, encoding="utf-8")
        workspace.run(str(tmp_path / "train.py"), **offline)
        assert server.asked == []
        runs = sorted(map(str, tmp_path.rglob("offline-run-*")))
        for folder in sorted(runs, key=lambda name: "trained" in name):  # at once, both would send the data
            workspace.run("wandb", "sync", folder)
        assert len(runs) == 2 and [run for run, _ in server.used] == ["trained"]
        assert ("trained", "model-trained:v0") in server.made
        assert len(server.sent) == len(set(server.sent))  # data that two runs have is sent once


@pytest.mark.slow
def test_training_outlives_the_sdk_and_a_server_that_refuses(
    tmp_path: Path, tiny_data: Path, tiny_tokenizer_dir: Path
) -> None:
    with serve() as server:
        workspace = Workspace(tmp_path, server, tiny_data, tiny_tokenizer_dir)
        server.refuses = "CreateArtifact"
        assert "is not recorded on W&B" in workspace.run("run_train.py", "--config", "train_config.yaml")
        server.refuses = ""
        process = workspace.start("run_train.py", "--config", "train_config.yaml", "--overwrite")
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "step 2/" in line:
                for child in psutil.Process(process.pid).children(recursive=True):
                    if "wandb-core" in child.name():
                        child.kill()
        output = "".join(lines)
        assert process.wait() == 0, output
        assert "Warning: W&B is lost" in output and "Checkpoint out" in output
