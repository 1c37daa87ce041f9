"""Training for real with a tiny model: losses, resume, checkpoints, and the folder that a run is given."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import edit_yaml, losses, rows, run, weights

pytestmark = pytest.mark.usefixtures("eager")

GOLDEN = Path(__file__).parent / "assets" / "golden_losses.json"


def test_eight_steps_give_the_golden_losses(workspace: Path) -> None:
    assert run() == 0
    if os.environ.get("WRITE_GOLDEN"):  # tools/make_golden.py
        figures = {"losses": losses(), "val_loss": float(rows()[-1]["val_loss"])}
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    # 1e-4: another CPU sums in another order; a change of method moves the loss far more
    assert losses() == pytest.approx(golden["losses"], abs=1e-4)
    assert float(rows()[-1]["val_loss"]) == pytest.approx(golden["val_loss"], abs=1e-4)


def test_a_checkpoint_is_complete(workspace: Path) -> None:
    run()
    for name in ("step-00000004", "step-00000008", "final"):
        files = {path.name for path in Path("out", name).iterdir()}
        assert files == {
            "lit_model.pth",
            "model_config.yaml",
            "train_config.yaml",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "checkpoint.json",
        }


def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(workspace: Path) -> None:
    # 13 sequences a step's share of the data is used up after about 7 steps: the resumed run crosses an epoch
    assert run("--out_dir", "whole", "--max_tokens", 40 * 256) == 0
    assert run("--out_dir", "parts", "--max_tokens", 40 * 256) == 0
    for step in ("final", *(f"step-{n:08d}" for n in range(24, 44, 4))):
        shutil.rmtree(Path("parts", step))
    assert run("--out_dir", "parts", "--max_tokens", 40 * 256, "--resume", "auto") == 0
    whole, parts = weights("whole/final"), weights("parts/final")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses("parts") == losses("whole")
    assert [row["step"] for row in rows("parts")] == [row["step"] for row in rows("whole")]
    assert any(float(row["epoch"] or 0) >= 1 for row in rows("whole"))


def test_an_earlier_run_is_not_written_over(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    before = Path("out/final/lit_model.pth").read_bytes()
    assert run() == 2
    assert "out already holds a run" in capsys.readouterr().err
    assert Path("out/final/lit_model.pth").read_bytes() == before
    assert run("--overwrite", "--max_tokens", 256) == 0
    assert not Path("out/step-00000008").exists()


def test_resume_true_without_a_checkpoint_is_an_error_and_auto_starts_afresh(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--resume", "true") == 2
    assert "resume is true but out holds no whole step-*" in capsys.readouterr().err
    assert run("--resume", "auto", "--max_tokens", 256) == 0
    assert "No checkpoint to resume from in out" in capsys.readouterr().err


@pytest.mark.parametrize("max_tokens", [256, 2048 - 256])  # without a step-*, and with one before the end
def test_a_run_that_came_to_its_end_is_not_trained_again(
    workspace: Path, capsys: pytest.CaptureFixture[str], max_tokens: int
) -> None:
    assert run("--max_tokens", max_tokens) == 0
    before, logged = weights("out/final"), rows()
    assert run("--max_tokens", max_tokens) == 2
    assert "out already holds a run (final); continue it with --resume auto" in capsys.readouterr().err
    assert run("--max_tokens", max_tokens, "--resume", "auto") == 0  # as a job does that was queued again
    output = capsys.readouterr()
    assert f"{Path('out/final')} is at the last step of train.max_tokens" in output.err
    assert "Trained    0 tokens in 0 steps" in output.out
    assert all(torch.equal(weight, before[name]) for name, weight in weights("out/final").items())
    assert [row["loss"] for row in rows() if row["loss"]] == [row["loss"] for row in logged if row["loss"]]


def test_a_run_goes_on_from_its_end_to_a_later_one(workspace: Path) -> None:
    flags = ("--schedule.name", "constant")
    assert run("--out_dir", "whole", "--max_tokens", 12 * 256, *flags) == 0
    assert run("--max_tokens", 7 * 256, *flags) == 0
    assert run("--max_tokens", 12 * 256, *flags, "--resume", "auto") == 0
    assert losses() == losses("whole")
    one, other = weights("out/final"), weights("whole/final")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_named_run_without_a_whole_step_is_not_started_afresh(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--max_tokens", 1024)
    for name in ("step-00000004", "final"):
        Path("out", name, "model_config.yaml").unlink()
    assert run("--resume", "out", "--out_dir", "more") == 2
    assert "out holds no whole step-* or final" in capsys.readouterr().err
    assert not Path("more").exists()


def test_the_next_commands_name_the_data_and_the_folder_of_the_run(
    workspace: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--max_tokens", 256)
    final = Path("out/final")
    out = capsys.readouterr().out
    assert f"evaluate.py --ckpt_dir {final} --data_dir {tiny_data}\n" in out
    assert out.endswith("  uv run python tools/report.py out\n")


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    shutil.rmtree("out/final")
    Path("out/step-00000008/model_config.yaml").unlink()  # LitGPT writes it last
    assert run("--resume", "auto") == 0
    error = capsys.readouterr().err
    assert "Skipping out/step-00000008: it was not written to its end" in error.replace("\\", "/")
    assert "resuming after step 4" in error


def test_a_damaged_checkpoint_named_by_hand_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    path = Path("out/step-00000004/lit_model.pth")
    path.write_bytes(path.read_bytes()[:1000])
    assert run("--resume", "out/step-00000004", "--out_dir", "more") == 2
    assert "out/step-00000004/lit_model.pth is damaged" in capsys.readouterr().err
    assert not Path("more").exists()


def test_training_starts_from_the_weights_of_another_checkpoint(workspace: Path) -> None:
    run("--max_tokens", 256)
    flags = ("--out_dir", "more", "--max_tokens", 256, "--micro_batch_size", 4)
    flags = (*flags, "--optimizer.lr", 0, "--train.min_lr", 0)  # one step that changes nothing
    assert run(*flags, "--initial_checkpoint_dir", "out/final") == 0
    first, more = weights("out/final"), weights("more/final")
    assert all(torch.equal(first[name], more[name]) for name in first)


def test_weights_that_do_not_fit_the_model_are_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--max_tokens", 256)
    edit_yaml("model_config.yaml", "n_expert", 8)
    assert run("--out_dir", "more", "--initial_checkpoint_dir", "out/final") == 2
    assert "do not fit the model config MoE-tiny" in capsys.readouterr().err
    assert not Path("more").exists()


def test_overwriting_what_is_to_be_read_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--max_tokens", 1024)
    for flags in (["--resume", "auto"], ["--initial_checkpoint_dir", "out/final"]):
        assert run("--overwrite", *flags) == 2
        assert "error: " in capsys.readouterr().err
    assert Path("out/final/lit_model.pth").is_file()


def test_a_run_is_not_continued_as_another_one(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--max_tokens", 1024)
    assert run("--resume", "auto", "--max_tokens", 256) == 2
    assert "trained on 1024 tokens, and train.max_tokens is 256" in capsys.readouterr().err
    assert run("--resume", "auto", "--optimizer", "SGD") == 2
    assert "optimizer.class_path was torch.optim.AdamW, now torch.optim.sgd.SGD" in capsys.readouterr().err
    edit_yaml("model_config.yaml", "n_expert", 8)
    assert run("--resume", "auto", "--model_config", "model_config.yaml") == 2
    assert "do not fit the model config MoE-tiny" in capsys.readouterr().err


def test_a_loss_that_diverges_ends_the_run_with_the_last_good_checkpoint_named(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--optimizer.lr", "1e30", "--optimizer.weight_decay", 0, "--guard.max_skipped_steps", 4)
    flags = (*flags, "--train.save_interval", 1)
    assert run(*flags) == 1
    error = capsys.readouterr().err
    assert "step 2: the loss is" in error and "step skipped (1 in a row)" in error
    assert "in 4 steps in a row; lower optimizer.init_args.lr" in error
    assert "continue from out/step-00000004 with --resume auto" in error.replace("\\", "/")
    assert all(weight.isfinite().all() for weight in weights("out/step-00000004").values())


def test_a_checkpoint_that_does_not_fit_the_disk_is_refused_before_training(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert run() == 2
    assert "a checkpoint needs" in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_summary_gives_true_figures(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    output = capsys.readouterr()
    assert "Trained    2,048 tokens in 8 steps" in output.out
    assert "A story from it:" in output.out
    assert "Tok/sec" not in output.err  # LitGPT's own figure, which is wrong
    assert f"Loss       {losses()[-1]:.3f} in training" in output.out
    assert f"{float(rows()[-1]['val_loss']):.3f} in validation" in output.out
    rate = float(re.search(r"([\d,]+) tokens/s", output.out)[1].replace(",", ""))
    times = [float(row["time_s"]) for row in rows() if row["loss"]]
    assert rate == pytest.approx(7 * 256 / (times[-1] - times[0]), rel=0.2)


def test_memory_that_a_step_on_a_cpu_frees_is_kept_for_the_next(
    workspace: Path, faults_of_new_memory: Callable[[], int]
) -> None:
    assert run("--max_tokens", 256) == 0
    assert faults_of_new_memory() < 100


@pytest.mark.parametrize("choice, n_calls", [("auto", 0), ("off", 0), ("on", 1)])
def test_the_model_is_compiled_where_that_is_chosen(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, choice: str, n_calls: int
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    assert run("--max_tokens", 256, "--compile", choice) == 0  # `auto` is off on a CPU
    assert len(compiled) == n_calls


def test_the_summary_tells_the_loss_that_is_in_the_log(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--train.log_interval", 3) == 0
    assert f"Loss       {losses()[-1]:.3f} in training (step 6)," in capsys.readouterr().out
    assert [row["step"] for row in rows() if row["loss"]] == ["3", "6"]


def test_a_resumed_run_goes_on_in_its_wandb_run(workspace: Path, run_script: Callable) -> None:
    def ids(
        *flags: object,
    ) -> set[str]:  # in processes of their own: wandb keeps its folder for a whole process
        flags = (
            "--config",
            "train_config.yaml",
            "--logger_name",
            "wandb",
            "--schedule.name",
            "constant",
            *flags,
        )
        assert run_script("run_train.py", *flags, cwd=workspace).returncode == 0
        return {path.name.rpartition("-")[2] for path in workspace.rglob("offline-run-*")}

    first = ids("--max_tokens", 4 * 256)
    shutil.rmtree("out/final")
    assert ids("--resume", "auto") == first == {Path("out/.wandb_run_id").read_text(encoding="utf-8")}
    assert len(ids("--overwrite")) == 2


def test_a_run_shorter_than_its_log_interval_tells_its_loss_all_the_same(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--train.log_interval", 100) == 0
    (logged,) = [row for row in rows() if row["loss"]]
    assert logged["step"] == "8"
    loss, val_loss = float(logged["loss"]), float(rows()[-1]["val_loss"])
    assert f"Loss       {loss:.3f} in training, {val_loss:.3f} in validation" in capsys.readouterr().out
