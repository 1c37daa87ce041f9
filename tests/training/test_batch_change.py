"""A run that goes on with another global batch size: which data it trains on, what it counts, how fast."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import BALANCED, assert_same_run, edit_yaml, losses, rows, run

from litgpt_moe.data.batches import TokenBatches
from tools import show_batch

pytestmark = pytest.mark.usefixtures("eager", "workspace")
# 40 steps of 8 x 64 tokens
FLAGS = ("--max_tokens", 40 * 512, "--micro_batch_size", 4, *BALANCED, "--train.log_interval", 1)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences that were trained on, in their order."""
    taken: list[int] = []
    get = TokenBatches.__getitem__

    def watched(batches: TokenBatches, index: list[int] | range) -> torch.Tensor:
        if isinstance(index, list):  # a validation has ranges
            taken.extend(index)
        return get(batches, index)

    monkeypatch.setattr(TokenBatches, "__getitem__", watched)
    return taken


def reached(out_dir: str) -> list[tuple[int, int]]:
    """Step and tokens of each row of a step."""
    return [(int(row["step"]), int(row["total_tokens"])) for row in rows(out_dir) if row["loss"]]


def test_a_run_with_another_batch_size_trains_on_the_next_sequences_and_counts_them(
    trained: list[int], at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*FLAGS, "--global_batch_size", 8, "--out_dir", "whole") == 0
    whole = list(trained)
    trained.clear()
    at_step(19, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*FLAGS, "--global_batch_size", 8) == 0
    capsys.readouterr()
    assert run(*FLAGS, "--global_batch_size", 16, "--resume", "auto") == 0
    # 160 sequences in 20 steps, then 160 in 10
    assert len(whole) == 320 and trained == whole
    assert reached("out") == [(n, n * 512) for n in range(1, 21)] + [
        (20 + n, 20 * 512 + n * 1024) for n in range(1, 11)
    ]
    output = capsys.readouterr()
    assert "Changed since out/step-00000020: train.global_batch_size 8 -> 16." in output.err
    assert (
        "From step 21 on a step takes 16 sequences, 1,024 tokens; it took 8. The data go on where they "
        "stopped, at sequence 160. The run ends after step 30 with 20,480 tokens."
        in " ".join(output.err.split())
    )
    assert "step 21/30 | epoch 3" in output.err and "Trained    10,240 tokens in 10 steps" in output.out
    state = torch.load("out/final/lit_model.pth", weights_only=True)
    assert state["run"]["batch_sizes"] == [[0, 8], [20, 16]] and state["step_count"] == 30
    for step, n in ((20, 8), (21, 16)):
        assert show_batch.main(["out", "--step", str(step)]) == 0
        shown = capsys.readouterr().out
        assert f"sequence {n} of {n}" in shown and shown.count("--- step") == n
    assert show_batch.main(["out", "--step", "31"]) == 2 and "choose 1 to 30" in capsys.readouterr().err
    # the cosine goes on by the tokens: at the same tokens the rate is that of the other size
    by_tokens = {
        int(row["total_tokens"]): float(row["learning_rate"]) for row in rows("whole") if row["loss"]
    }
    for row in rows("out"):
        if row["loss"]:
            assert float(row["learning_rate"]) == pytest.approx(by_tokens[int(row["total_tokens"])])


def test_the_resume_of_a_run_whose_batch_size_has_changed_is_exact(
    trained: list[int], at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*FLAGS, "--global_batch_size", 8, "--max_tokens", 4 * 512) == 0
    shutil.copytree("out", "parts")
    more = (*FLAGS, "--global_batch_size", 16, "--resume", "auto", "--max_tokens", 12 * 512)
    assert run(*more) == 0
    at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*more, "--out_dir", "parts") == 0
    capsys.readouterr()
    assert run(*more, "--out_dir", "parts") == 0
    assert_same_run("parts", "out")
    told = capsys.readouterr().err
    assert "From step" not in told and "Changed since" not in told
    # and back again, at other micro-batches; the rest of train.max_tokens fills no step
    back = ("--global_batch_size", 6, "--micro_batch_size", 3, "--resume", "auto", "--max_tokens", 14 * 512)
    trained.clear()
    assert run(*FLAGS, *back) == 0
    assert "ends after step 10 with 6,912 tokens; the last 256 fill no step" in capsys.readouterr().err
    assert reached("out")[-2:] == [(9, 12 * 512 + 384), (10, 12 * 512 + 768)] and len(trained) == 12
    state = torch.load("out/final/lit_model.pth", weights_only=True)
    assert state["run"]["batch_sizes"] == [[0, 8], [4, 16], [8, 6]]


def test_a_checkpoint_without_batch_sizes_goes_on_from_steps_times_its_batch(trained: list[int]) -> None:
    assert run(*FLAGS, "--global_batch_size", 8, "--max_tokens", 4 * 512) == 0
    path = Path("out/step-00000004/lit_model.pth")
    shutil.rmtree("out/final")
    state = torch.load(path, weights_only=True)
    del state["run"]["batch_sizes"]
    torch.save(state, path)
    Path("out/step-00000004/checkpoint.json").unlink()
    assert run(*FLAGS, "--global_batch_size", 4, "--max_tokens", 6 * 512, "--resume", "auto") == 0
    assert reached("out")[-4:] == [(n, 4 * 512 + (n - 4) * 256) for n in range(5, 9)]


def test_what_is_left_for_a_larger_batch_may_be_less_than_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FLAGS, "--global_batch_size", 8, "--max_tokens", 3 * 512) == 0
    before = sorted((path, path.read_bytes()) for path in Path("out/final").iterdir())
    capsys.readouterr()
    flags = ("--global_batch_size", 16, "--resume", "auto")
    assert run(*FLAGS, *flags, "--max_tokens", 4 * 512) == 0
    assert "is at the last step of train.max_tokens" in capsys.readouterr().err
    assert sorted((path, path.read_bytes()) for path in Path("out/final").iterdir()) == before
    assert run(*FLAGS, *flags, "--max_tokens", 1024) == 2
    told = "is past the end of the run: it has been trained on 1536 tokens, and train.max_tokens is 1024"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_a_warm_up_that_another_batch_size_meets_goes_on_without_a_jump(unit: str, at_step: Callable) -> None:
    edit_yaml("train_config.yaml", "train.lr_warmup_steps", 6)
    flags = [*FLAGS, "--schedule.name", "constant"]
    flags += ["--schedule.warmup_tokens", 6 * 512] if unit == "tokens" else []
    flags += ["--max_tokens", 12 * 512]
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*flags, "--global_batch_size", 8) == 0
    assert run(*flags, "--global_batch_size", 16, "--resume", "auto") == 0
    rates = [float(row["learning_rate"]) for row in rows() if row["loss"]]
    parts = [1, 2, 3, 4, 5, 6, 6, 6] if unit == "steps" else [1, 2, 3, 4, 6, 6, 6, 6]
    assert rates == pytest.approx([0.01 * part / 6 for part in parts])
    assert len(losses()) == 8
