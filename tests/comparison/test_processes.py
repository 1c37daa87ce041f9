"""The tool as a user starts it: real processes, an interruption, and the same command again."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import OFFLINE, ROOT, wait_until

from litgpt_moe.comparison.processes import run_to_end
from litgpt_moe.threads import usable_cores


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    code = "import sys; print('some line'); print('error: it is full', file=sys.stderr); sys.exit(1)"
    outcome = run_to_end([sys.executable, "-c", code], tmp_path / "log.txt")
    assert (outcome.status, outcome.last_error) == (1, "it is full")
    # the log goes on; an earlier error is none of the next process
    outcome = run_to_end([sys.executable, "-c", "print('fine')"], tmp_path / "log.txt")
    assert (outcome.status, outcome.last_error) == (0, "fine")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize(("number", "at_once"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_an_interrupted_comparison_goes_on_where_it_stopped(
    workspace: Path,
    tiny_data: Path,
    run_script: Callable,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    at_once: int,
) -> None:
    if at_once > usable_cores():
        pytest.skip("two runs at once need two cores, and this machine has one")
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    flags = ["model_config.yaml", "--config", "train_config.yaml", "--data", str(tiny_data)]
    flags += ["--budget", "400K", "--lr", "0.01", "--results_file", "runs.jsonl", "--keep"]
    flags += ["--seeds", str(at_once), "--at_once", str(at_once)]
    command = [sys.executable, str(ROOT / "tools/compare.py"), *flags]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background has SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        # on a busy machine each takes a while
        for made in ("runs/*", "runs/*/logs/csv/metrics.csv", "runs/*/step-*"):
            wait_until(lambda made=made: len({*Path("comparison").glob(made)}) >= at_once)
    finally:
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in err
    assert not Path("runs.jsonl").exists()
    stopped = list(Path("comparison/runs").iterdir())
    assert len(stopped) == at_once and all(list(run.glob("step-*")) for run in stopped)

    again = run_script("tools/compare.py", *flags, cwd=workspace)
    assert again.returncode == 0, again.stderr
    rows = [json.loads(line) for line in Path("runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["steps"], row["at_once"]) for row in rows] == [(1562, at_once)] * at_once
    for run in stopped:
        log = Path(f"comparison/logs/{run.name}.txt").read_text(encoding="utf-8")
        assert "resuming after step" in log
        assert (run / "final/lit_model.pth").is_file()


@pytest.mark.slow
def test_find_lr_says_the_best_and_what_the_rule_proposes(
    workspace: Path, tiny_data: Path, run_script: Callable
) -> None:
    flags = ["--config", "train_config.yaml", "--data_dir", tiny_data, "--results_file", "runs.jsonl"]
    flags += ["--sweep_tokens", 512, "--lr_first", 0.01, "--lr_count", 1, "--lr_factor", 100]
    done = run_script("tools/find_lr.py", "model_config.yaml", *flags, cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert "  best" in done.stdout and "proposes 0.003" in done.stdout
    assert "train_config.yaml names 0.01" in done.stdout
    assert Path("comparison/find_lr.svg").read_text(encoding="utf-8").startswith("<svg")
