"""Comparisons whose runs are made in this process: the scripts' own `main`, without seconds of imports."""

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import pytest

import evaluate
import run_train
from litgpt_moe.comparison.compare import Comparison, begin
from litgpt_moe.comparison.contestants import gather
from litgpt_moe.comparison.facts import gather_facts
from litgpt_moe.comparison.processes import Lane, Outcome
from litgpt_moe.comparison.runs import RunsFile
from litgpt_moe.comparison.settings import CompareSettings
from litgpt_moe.comparison.train import Trainer

MAINS = {"run_train.py": run_train.main, "evaluate.py": evaluate.main}


def start_here(command: list[str], log: Path, low_priority: bool, lane: Lane | None) -> Outcome:
    """Run a script's `main` in this process, as `run_to_end` does in another."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        status = MAINS[Path(command[1]).name](command[2:])
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    return Outcome(status, errors[-1].removeprefix("error: ") if errors else "", 0.25)


class Starts:
    """Counts the runs of run_train.py, and lets one of them act otherwise."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.acts: dict[int, Callable[[], Outcome]] = {}

    def __call__(self, command: list[str], log: Path, low_priority: bool, lane: Lane | None) -> Outcome:
        if Path(command[1]).name == "run_train.py":
            self.commands.append(command)
            if act := self.acts.get(len(self.commands)):
                return act()
        return start_here(command, log, low_priority, lane)


@pytest.fixture
def starts(eager: None) -> Starts:
    return Starts()


@pytest.fixture
def compare(workspace: Path, tiny_data: Path, starts: Starts) -> Callable[..., Comparison]:
    """A function that begins a comparison of the tiny model and its dense twin, with settings changed."""
    base = CompareSettings(
        data_dir=tiny_data,
        config=workspace / "train_config.yaml",
        out=workspace / "comparison",
        results_file=workspace / "runs.jsonl",
        seeds=2,
        dense=True,
    )

    def make(
        budget: float | None = 8 * 256,
        rate: float | None = 0.01,
        variants: tuple = (),
        experts: tuple = (),
        **changes: object,
    ) -> Comparison:
        settings = dataclasses.replace(base, **changes)
        found = gather(
            [Path("model_config.yaml")], settings, settings.dense, list(experts), {}, list(variants), 512
        )
        trainer = Trainer(settings, gather_facts(tiny_data), RunsFile(settings.results_file), starts)
        return begin(settings, trainer, found, budget, rate)

    return make
