"""The variables of launchers: which process is the first, and which values do not fit a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OFFLINE, ROOT
from helpers.runs import refusal
from lightning.fabric import Fabric

from litgpt_moe.processes import (
    IN_ALL,
    MACHINES,
    NUMBERS,
    ON_MACHINE,
    is_first_on_machine,
    is_main_process,
    launcher_problems,
)

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
SLURM = {
    **{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "train"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NUMBERS, *TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("name", [*IN_ALL, *ON_MACHINE, *MACHINES])
def test_a_rank_that_a_run_of_one_process_does_not_have_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    assert refusal().startswith(f"${name} is 1 but ")
    monkeypatch.setenv(name, "01")
    assert f"${name} is '01'; a launcher sets it to a number" in "".join(launcher_problems())


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "x"}, "$SLURM_NTASKS is 2 but devices times num_nodes is 1"),
        ({"SLURM_NTASKS": "1"}, "$SLURM_NTASKS is set but SLURM_PROCID is not"),
        ({"SLURM_NTASKS": "x"}, "$SLURM_NTASKS is 'x'; a launcher sets it to a number"),
        ({**SLURM, "SLURM_NTASKS": "1"}, "$SLURM_NTASKS_PER_NODE is 2 but the number of devices is 1"),
        ({"SLURM_NNODES": "3", **SLURM}, "$SLURM_NTASKS is 2 but devices times num_nodes is 1"),
        ({"TORCHELASTIC_RUN_ID": "a"}, "$TORCHELASTIC_RUN_ID is set but WORLD_SIZE is not"),
        ({"LT_DEVICES": "4"}, "$LT_DEVICES is '4', by which Lightning would replace this run's setting"),
        (
            {"JSM_NAMESPACE_SIZE": "1", "JSM_NAMESPACE_LOCAL_RANK": "0", "LSB_JOBID": "7"}
            | {"LSB_DJOB_RANKFILE": "hosts", "JSM_NAMESPACE_RANK": "0"},
            "$LSB_DJOB_RANKFILE is hosts, which is no file",
        ),
    ],
)
def test_what_lightning_would_end_or_go_astray_with_is_named_before_anything_is_written(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, variables)
    assert told in refusal()


def test_variables_of_two_tasks_fit_two_devices_and_lightning_takes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(monkeypatch, SLURM | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"})
    assert launcher_problems(2) == [] and not is_main_process() and not is_first_on_machine()
    # what was accepted is what Lightning accepts
    assert Fabric(accelerator="cpu", devices=2).global_rank == 1
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    assert launcher_problems(2) == [
        "$SLURM_NTASKS is set without SLURM_NTASKS_PER_NODE: give Slurm --ntasks-per-node"
    ]
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:80")
    assert launcher_problems(2)[1].startswith("$MASTER_PORT is 'tcp://10.0.0.1:80'; the number of a port")


def test_a_run_by_torchrun_within_a_task_of_slurm_counts_by_torchrun_s_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # four tasks, each with a torchrun of its own: this is the third
    set_all(monkeypatch, SLURM | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"} | TORCHRUN | {"WORLD_SIZE": "1"})
    assert launcher_problems(1) == [] and is_main_process() and is_first_on_machine()


def test_in_a_shell_of_slurm_the_process_that_lightning_starts_is_not_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(monkeypatch, SLURM | {"SLURM_JOB_NAME": "bash"})
    assert launcher_problems(1) == launcher_problems(2) == [] and is_main_process()
    set_all(monkeypatch, {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "RANK": "0"})
    assert launcher_problems(2) == [] and not is_main_process() and not is_first_on_machine()


def test_a_stray_rank_ends_the_script_without_a_file(workspace: Path) -> None:
    script = [sys.executable, str(ROOT / "run_train.py"), "--config", "train_config.yaml"]
    env = {**os.environ, **OFFLINE, "LOCAL_RANK": "5"}
    ended = subprocess.run(script, env=env, capture_output=True, encoding="utf-8", timeout=300)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "error: $LOCAL_RANK is 5 but the number of devices is 1; unset LOCAL_RANK" in ended.stderr
    assert sorted(path.name for path in workspace.iterdir()) == ["model_config.yaml", "train_config.yaml"]
