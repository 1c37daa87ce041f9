"""Training for real with a tiny model: losses, resume, and the folders and data that a run is given."""

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_CONFIG, alter

import prepare_data
import run_train

pytestmark = pytest.mark.usefixtures("eager")

GOLDEN = Path(__file__).parent / "assets" / "golden_losses.json"


@pytest.fixture
def workspace(
    tmp_path: Path, tiny_data: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder to run in: model and train settings for the tiny data, eight steps of 4 x 64 tokens."""
    monkeypatch.chdir(tmp_path)
    for name in run_train.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "model_config.yaml").write_text(yaml.dump(TINY_CONFIG), encoding="utf-8")
    settings = {
        "out_dir": "out",
        "accelerator": "cpu",
        "precision": "32-true",
        "tokenizer_dir": str(tiny_tokenizer_dir),
        "data": {
            "class_path": "prepare_data.TextShards",
            "init_args": {
                "train_data_path": str(tiny_data / "train"),
                "val_data_path": str(tiny_data / "val"),
            },
        },
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_tokens": 8 * 4 * 64,
            "max_norm": 1.0,
            "min_lr": 1e-4,
            "lr_warmup_steps": 2,
            "save_interval": 4,
        },
        "eval": {"interval": 4, "max_iters": 2},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}},
    }
    (tmp_path / "train_config.yaml").write_text(yaml.dump(settings), encoding="utf-8")
    return tmp_path


def run(*flags: object) -> int:
    return run_train.main(["--config", "train_config.yaml", *map(str, flags)])


def rows(out_dir: str = "out") -> list[dict[str, str]]:
    with Path(out_dir, "logs/csv/metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def losses(out_dir: str = "out") -> list[float]:
    return [float(row["loss"]) for row in rows(out_dir) if row["loss"]]


def weights(folder: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(folder, "lit_model.pth"), weights_only=True)["model"]


def edit_yaml(path: str, key: str, value: object) -> None:
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    *groups, last = key.split(".")
    target = values
    for group in groups:
        target = target.setdefault(group, {})
    target[last] = value
    Path(path).write_text(yaml.dump(values), encoding="utf-8")


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


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_yaml("model_config.yaml", "padded_vocab_size", 100)
    edit_yaml("model_config.yaml", "vocab_size", 100)
    assert run() == 2
    assert "pieces but padded_vocab_size in model_config.yaml is 100" in capsys.readouterr().err
    assert not Path("out").exists()


def test_rows_that_no_piece_of_the_tokenizer_uses_are_told_where_they_are_most(
    workspace: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = prepare_data.read_tokenizer(tiny_tokenizer_dir).vocab_size
    warning = f"Warning: {tiny_tokenizer_dir}: the tokenizer has {size} pieces but padded_vocab_size"
    for rows_of_model, is_told in ((2 * size, False), (3 * size, True)):
        edit_yaml("model_config.yaml", "padded_vocab_size", rows_of_model)
        edit_yaml("model_config.yaml", "vocab_size", rows_of_model)
        assert run("--max_tokens", 1024, "--overwrite") == 0
        assert (warning in (err := capsys.readouterr().err)) is is_told
    assert f"in model_config.yaml is {3 * size}" in err and f"set that and vocab_size to {size}" in err
    # now the model is what it is
    for flags in (("--resume", "auto"), ("--initial_checkpoint_dir", "out/final", "--out_dir", "other")):
        assert run("--max_tokens", 2048, *flags) == 0
        assert warning not in capsys.readouterr().err


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


def test_a_run_that_left_only_its_end_is_not_sent_to_resume(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--max_tokens", 256)  # shorter than save_interval: no step-*
    capsys.readouterr()
    for flags in ([], ["--resume", "auto"]):
        assert run(*flags) == 2
        error = capsys.readouterr().err
        assert "--initial_checkpoint_dir" in error and "continue it with --resume auto" not in error


def test_a_named_run_without_a_whole_step_is_not_started_afresh(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--max_tokens", 1024)
    Path("out/step-00000004/model_config.yaml").unlink()
    assert run("--resume", "out", "--out_dir", "more") == 2
    assert "out holds no whole step-*" in capsys.readouterr().err
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


def test_too_little_text_for_one_batch_is_told_before_anything_is_written(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--micro_batch_size", 4096, "--global_batch_size", 4096, "--max_tokens", 4096 * 64) == 2
    assert "micro_batch_size" in capsys.readouterr().err
    assert not Path("out").exists()


def test_without_a_tokenizer_and_the_hub_the_two_ways_on_are_named(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("--tokenizer_dir", "absent") == 1
    error = capsys.readouterr().err
    assert "--tokenizer_dir" in error and "--train_tokenizer" in error
    assert not Path("out").exists() and not Path("absent").exists()


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
    assert run("--resume", "auto", "--global_batch_size", 8) == 2
    assert "train.global_batch_size was 4, now 8" in capsys.readouterr().err
    assert run("--resume", "auto", "--max_tokens", 256) == 2
    assert "is past the 1 steps of train.max_tokens" in capsys.readouterr().err
    assert run("--resume", "auto", "--optimizer", "SGD") == 2
    assert "optimizer.class_path was torch.optim.AdamW, now torch.optim.sgd.SGD" in capsys.readouterr().err
    edit_yaml("model_config.yaml", "n_expert", 8)
    assert run("--resume", "auto") == 2
    assert "do not fit the model config MoE-tiny" in capsys.readouterr().err


def test_a_loss_that_diverges_ends_the_run_with_the_last_good_checkpoint_named(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--optimizer.lr", "1e30", "--guard.max_skipped_steps", 4, "--train.save_interval", 1)
    assert run(*flags) == 1
    error = capsys.readouterr().err
    assert "step 2: the loss is" in error and "step skipped (1 in a row)" in error
    assert "in 4 steps in a row; lower optimizer.init_args.lr" in error
    assert "continue from out/step-00000004 with --resume auto" in error.replace("\\", "/")
    assert all(weight.isfinite().all() for weight in weights("out/step-00000004").values())


def test_a_mistyped_data_folder_is_not_filled_with_demo_stories(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--dataset_dir", "data/custom_txt") == 2
    assert "custom_txt" in capsys.readouterr().err
    assert not Path("data").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_with_tokens_above_the_vocabulary_is_told_though_all_hashes_agree(
    workspace: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    shutil.copytree(tiny_data, "copy")
    manifest = json.loads(Path("copy/manifest.json").read_text(encoding="utf-8"))
    for entry in manifest["splits"]["train"]["shards"]:
        shard = Path("copy", entry["path"])
        shard.write_bytes(b"\xff\x7f" * entry["n_tokens"])
        entry["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    Path("copy/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert run("--dataset_dir", "copy", "--data.init_args.num_workers", num_workers) == 1
    err = capsys.readouterr().err
    assert "damaged: token 32767 of a vocabulary of" in err and "error: copy/train/train" in err


def test_a_shard_altered_at_equal_size_and_time_is_made_again(
    workspace: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, "copy")
    shard = next(Path("copy/train/train").glob("*.bin"))
    whole = shard.read_bytes()
    alter(shard)
    assert run("--dataset_dir", "copy", "--max_tokens", 256) == 0
    assert "altered since it was made" in capsys.readouterr().err
    assert shard.read_bytes() == whole


def test_a_shard_altered_where_the_text_is_gone_is_refused(
    workspace: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, "copy", ignore=shutil.ignore_patterns("*.txt"))
    alter(next(Path("copy/train/train").glob("*.bin")))
    assert run("--dataset_dir", "copy", "--max_tokens", 256) == 2
    err = capsys.readouterr().err
    assert "altered since it was made" in err and "no text to make it again from" in err


def test_shards_are_hashed_once_in_a_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    check = prepare_data.altered_shards
    monkeypatch.setattr(prepare_data, "altered_shards", lambda *args: hashed.append(1) or check(*args))
    assert run("--max_tokens", 256) == 0
    assert len(hashed) == 1


def test_the_seed_sets_the_order_of_the_data_too(workspace: Path) -> None:
    settings = run_train.load_settings(["--config", "train_config.yaml", "--seed", "7"])
    assert run_train.check_run(settings).data.seed == 7


def test_missing_data_of_the_user_s_own_is_told_with_its_place(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine/train").mkdir(parents=True)
    Path("mine/train/a.txt").touch()
    assert run("--dataset_dir", "mine") == 2
    assert "mine" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_the_disk_is_refused_before_training(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert run() == 2
    assert "a checkpoint needs" in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_metrics_file_keeps_its_rows_when_a_new_column_comes(tmp_path: Path) -> None:
    metrics = run_train.LogFile(tmp_path / "logs/metrics.csv")
    metrics.write({"step": 1, "loss": 3.0})
    metrics.write({"step": 1, "val_loss": 2.5})
    metrics.write({"step": 2, "loss": 2.0})
    text = (tmp_path / "logs/metrics.csv").read_text(encoding="utf-8").split()
    assert text == ["step,loss,val_loss", "1,3.0,", "1,,2.5", "2,2.0,"]


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


def test_the_summary_tells_the_loss_of_the_last_step(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out_dir", "each", "--train.log_interval", 1) == 0
    capsys.readouterr()
    assert run("--train.log_interval", 3) == 0
    assert f"Loss       {losses('each')[-1]:.3f} in training" in capsys.readouterr().out


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
