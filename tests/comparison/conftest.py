"""Comparisons whose runs are made in this process: the scripts' own `main`, without seconds of imports."""

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evaluate
import run_train
from litgpt_moe.comparison.compare import Comparison, begin
from litgpt_moe.comparison.contestants import gather
from litgpt_moe.comparison.facts import gather_facts
from litgpt_moe.comparison.identity import for_speed, nameless
from litgpt_moe.comparison.processes import Lane, Outcome
from litgpt_moe.comparison.runs import RunsFile, RunSpec
from litgpt_moe.comparison.settings import CompareSettings
from litgpt_moe.comparison.train import CURVE, Trainer

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


@pytest.fixture
def put() -> Callable[..., dict[str, Any]]:
    """A function that records a run of a comparison which nobody has trained, and returns its row."""

    def put(comparison: Comparison, spec: RunSpec, loss: float | None, **changes: Any) -> dict[str, Any]:
        trainer, half = comparison.trainer, spec.n_steps // 2
        scores = {"loss": loss, "bits_per_byte": (loss or 0.0) / 3, "curve_columns": CURVE}
        # lines over the logarithm of the tokens: a loss of 1 more at half of them
        points = [[half, spec.tokens // 2, None, (loss or 0.0) + 1], [spec.n_steps, spec.tokens, None, loss]]
        row = {
            "kind": spec.kind,
            "name": spec.contestant.name,
            **spec.identity(trainer.facts.fingerprint),
            **{"seed": spec.seed, "lr": spec.lr, "tokens": spec.tokens, "steps": spec.n_steps},
            **({} if loss is None else {**scores, "curve": [[*point, 10.0] for point in points]}),
            **{"seconds": 10.0, "at_once": 1, **trainer.record(), **changes},
        }
        trainer.file.append(row)
        return row

    return put


@pytest.fixture
def put_speeds() -> Callable[..., dict[str, Any]]:
    """A function that records speeds of a comparison's models, by rounds, which nobody has measured."""

    def put(comparison: Comparison, *rates: list[float], load: float = 0.1, **changes: Any) -> dict[str, Any]:
        contestants = comparison.contestants
        row = {
            **{"kind": "speed", "model": {}, "settings": {}, "rates": list(rates), "load_of_others": load},
            "tokens_per_s": [sorted(each)[len(each) // 2] for each in rates],
            "models": [
                {"model": nameless(one.config), "settings": for_speed(one.settings, one.config.n_expert > 0)}
                for one in contestants
            ],
            **comparison.trainer.record(),
            **changes,
        }
        comparison.trainer.file.append(row)
        return row

    return put
