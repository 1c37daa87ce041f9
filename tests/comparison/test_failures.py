"""A run that fails ends no comparison: it is told, recorded where it diverged, and the rest goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from litgpt_moe.comparison.compare import Comparison
from litgpt_moe.comparison.processes import Outcome
from tools import compare as tool

DIVERGED = "the loss is nan, its gradient's norm nan in 10 steps in a row; lower optimizer.init_args.lr"
# what others than one model have to put right
FULL = ("out: the disk is full; make room and continue with --resume auto", "No space left on device")
KILLED, NO_MEMORY = Outcome(-9, "", None), Outcome(1, "out of memory with train.micro_batch_size 16", None)


def rows() -> list[dict]:
    return [json.loads(line) for line in Path("runs.jsonl").read_text(encoding="utf-8").splitlines()]


def result() -> dict:
    return json.loads(Path("comparison/comparison.json").read_text(encoding="utf-8"))


def put_all_but_last(comparison: Comparison, put: Callable) -> None:
    """Record all runs of a comparison but the last one of the first model."""
    for contestant, loss in zip(comparison.contestants, (3.0, 3.5), strict=True):
        for spec in comparison.specs(contestant):
            if (contestant, spec.seed) != (comparison.contestants[0], 44):
                put(comparison, spec, loss + spec.seed / 1000)


def test_a_run_that_diverges_is_recorded_and_the_verdict_stands_on_the_others(
    compare: Callable, put: Callable, starts: Callable
) -> None:
    put_all_but_last(compare(seeds=3), put)
    starts.acts[1] = lambda: Outcome(1, DIVERGED, None)
    text = compare(seeds=3).run()
    assert rows()[-1]["failed"] == DIVERGED and rows()[-1]["kind"] == "run"
    moe, twin = result()["models"]
    assert moe["failed"] == {"seed 44": DIVERGED} and twin["failed"] == {}
    assert (moe["loss"]["n"], twin["loss"]["n"], result()["missing"]) == (2, 3, 0)
    assert f"MoE-tiny, seed 44 failed: {DIVERGED}" in text and "with 2 of 3 seeds" in text
    assert "seed 44 failed" in Path("comparison/comparison.html").read_text(encoding="utf-8")
    # a recorded failure is not tried again
    again = compare(seeds=3)
    again.run()
    assert len(starts.commands) == 1 and len(again.failures()) == 1


@pytest.mark.parametrize("outcome", [KILLED, NO_MEMORY])
def test_a_run_that_was_killed_is_told_and_tried_again(
    compare: Callable, put: Callable, starts: Callable, outcome: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare(seeds=1)
    put(comparison, comparison.specs(comparison.contestants[1])[0], 3.5)
    starts.acts[1] = starts.acts[2] = lambda: outcome
    before, first = rows(), compare(seeds=1)
    text = first.run()
    assert rows() == before and len(starts.commands) == 1
    assert "MoE-tiny, seed 42 failed: " in text and first.failures()
    assert "the same command tries it again" in capsys.readouterr().err
    compare(seeds=1).run()
    assert len(starts.commands) == 2


@pytest.mark.parametrize("text", FULL)
def test_a_full_disk_ends_everything(compare: Callable, starts: Callable, text: str) -> None:
    starts.acts[1] = lambda: Outcome(1, text, None)
    with pytest.raises(RuntimeError, match=text):
        compare().run()
    assert len(starts.commands) == 1 and not Path("runs.jsonl").exists()


def test_a_model_without_a_rate_is_left_out(compare: Callable, put: Callable, starts: Callable) -> None:
    for n in range(1, 7):  # two rates and four below them
        starts.acts[n] = lambda: Outcome(1, DIVERGED, None)
    other = compare(rate=0.01, seeds=1)
    twin = other.contestants[1]
    put(other, other.specs(twin)[0], 3.5)
    sweep = {"rate": None, "lr_first": 0.01, "lr_count": 2, "sweep_tokens": 512, "seeds": 1}
    starts.acts |= {n: lambda: KILLED for n in (7, 8)}
    comparison = compare(**sweep)
    text = comparison.run()
    assert comparison.rates == {}
    moe, dense = result()["models"]
    assert moe["failed"]["sweep"].startswith("it diverges with every rate from 0.000625 on")
    assert dense["failed"]["sweep"].startswith("the run with rate 0.02 went wrong")
    assert result()["missing"] == 0 and "MoE-tiny, sweep failed" in text
    assert (moe["lr"], moe["loss"]) == (None, None)


def test_the_command_ends_with_status_1_after_its_figures(
    compare: Callable, put: Callable, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare(seeds=1, dense=False)
    put(comparison, comparison.specs(comparison.contestants[0])[0], None, failed=DIVERGED)
    flags = ["--budget", "2048", "--lr", "0.01", "--seeds", "1", "--results_file", "runs.jsonl"]
    usual = ["model_config.yaml", "--config", "train_config.yaml", "--data_dir", str(tiny_data)]
    assert tool.main([*usual, *flags]) == 1
    said = capsys.readouterr()
    assert "seed 42 failed" in said.out and "shows it in a browser" in said.out
    assert "error: 1 failed: MoE-tiny, seed 42 failed: the loss is nan" in said.err
    assert "stands in runs.jsonl as failed" in said.err
