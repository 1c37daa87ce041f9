"""What is known to be wrong with a run before anything is written: all of it at once, a sentence each."""

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from helpers.runs import edit_yaml, refusal, run

from litgpt_moe.checkpoints.writer import BESIDE_BYTES
from litgpt_moe.locks import FolderInUse
from litgpt_moe.training import checks, folder_checks
from litgpt_moe.training.checks import train_problems
from litgpt_moe.training.parse import load_settings
from litgpt_moe.training.run import set_up
from litgpt_moe.training.settings import Settings

BAD_TRAIN_VALUES = {
    "train.micro_batch_size": (3, "train.global_batch_size is 4, not a multiple of train.micro_batch_size 3"),
    "train.global_batch_size": (0, "train.global_batch_size is 0; choose 1 or more"),
    "train.max_tokens": (100, "train.max_tokens is 100, less than one step of 4 x 64 = 256 tokens"),
    "train.max_seq_length": (65, "the model's block_size is 64; choose 1 to 64"),
    "train.max_time": (0, "train.max_time is 0.0; choose 1 or more"),
    "schedule.name": ("linear", "schedule.name is 'linear'; it must be one of cosine, wsd, constant"),
    "schedule.decay_fraction": (2, "schedule.decay_fraction is 2.0; choose 0 to 1"),
    "checkpoints.keep_last": (0, "checkpoints.keep_last is 0; choose 1 or more"),
    "guard.max_skipped_steps": (0, "guard.max_skipped_steps is 0; choose 1 or more"),
    "train.max_steps": (5, "train.max_steps is 5, which LitGPT ignores in pretraining; use train.max_tokens"),
    "train.epochs": (0, "train.epochs is 0; choose 1 or more"),
    "train.max_norm": (None, "train.max_norm is null"),
    "train.log_interval": ("often", "train.log_interval is 'often'; it must be a whole number"),
    "train.save_interval": ("x", "train.save_interval is 'x'; it must be a whole number or null"),
    "resume": ([1], "resume is [1]; it must be text or true or false"),
    "optimizer.init_args.betas": (5, "optimizer.init_args: betas is 5; it must be a list of 2 values"),
    "train.max_token": (5, "unknown key train.max_token; did you mean train.max_tokens?"),
    "train.lr_warmup_fraction": (0.5, "train.lr_warmup_fraction is 0.5: Can't provide both"),
    "eval.interval": (0, "eval.interval is 0; choose 1 or more"),
    "eval.max_new_tokens": (-5, "eval.max_new_tokens is -5"),
    "moe.z_loss_coef": (float("inf"), "moe.z_loss_coef is inf; choose 0 or more"),
    "moe.aux_loss_coef": (-0.1, "moe.aux_loss_coef is -0.1; choose 0 or more"),
    "float32_matmul_precision": ("low", "float32_matmul_precision is 'low'; it must be one of highest, high"),
    "weight_decay_on": ("some", "weight_decay_on is 'some'; it must be one of matrices, all"),
    "precision": ("16-mixed", "precision is 16-mixed, which is for CUDA; use bf16-mixed or 32-true"),
    "accelerator": ("tpu", "accelerator is 'tpu'; it must be one of auto, cpu, cuda, gpu, mps"),
    "devices": (0, "devices is 0; choose auto (or -1, the same) or a number of 1 or more"),
    "num_nodes": (0, "num_nodes is 0"),
    "logger_name": ("paper", "logger_name is 'paper'; it must be one of csv, tensorboard, wandb"),
    "optimizer": ({"class_path": 5}, "optimizer.class_path is 5; name a class, such as torch.optim.AdamW"),
    "data": ({"class_path": None}, "data.class_path is None; name a class, such as prepare_data.TextShards"),
    "optimizer.class_path": (
        "torch.optim.AdamX",
        "optimizer.class_path is torch.optim.AdamX, which cannot be used",
    ),
    "optimizer.init_args.lr": ("fast", "optimizer.init_args: lr is 'fast'; it must be a number"),
    "optimizer.init_args.weight_decay": (-1, "torch.optim.AdamW does not take these init_args"),
    "optimizer.init_args.momentumm": (0.9, "optimizer.init_args: unknown key momentumm"),
    "data.class_path": (
        "nowhere.Data",
        "No module named 'nowhere'; name another, such as prepare_data.TextShards",
    ),
    "optimizer.init_args.learning_rate": (1e-3, "unknown key learning_rate; did you mean lr?"),
    "data.init_args.train_path": ("x", "unknown key train_path; did you mean train_data_path?"),
    "data.init_args.tokenizer_dir": ("x", "data.init_args.tokenizer_dir is x but tokenizer_dir is"),
    "train": (None, "train is None; write `key: value` lines under it"),
    "out_dir": (None, "out_dir is None; it must be a path"),
    "seed": (2**32, "seed is 4294967296; choose 0 or more, up to 4294967295"),
    "log.metadata": ({"a": 1}, "log.metadata is {'a': 1}, which logger_name csv does not read"),
    "sed": (1, "unknown key sed; did you mean seed?"),
    "train.learning_rate": (1e-3, "unknown key train.learning_rate; did you mean optimizer.init_args.lr?"),
    "lr": (1e-3, "unknown key lr; did you mean optimizer.init_args.lr?"),
    "places": ({}, "unknown key places"),
    "eval.evaluate_example": ("random", "eval.evaluate_example is for finetuning; remove it"),
    "schedule.warmup_tokens": (-1, "schedule.warmup_tokens is -1; choose 0 or more"),
    "checkpoints.to_wandb": ("kept", "checkpoints.to_wandb needs logger_name wandb; it is csv"),
    "n_expert": (8, "unknown key n_expert; it describes the model: set it in the file of --model_config"),
}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("key", BAD_TRAIN_VALUES)
def test_a_bad_setting_ends_in_one_message_and_writes_nothing(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    value, message = BAD_TRAIN_VALUES[key]
    edit_yaml("train_config.yaml", key, value)
    assert message in refusal()


@pytest.mark.usefixtures("workspace")
def test_all_problems_of_both_files_are_told_at_once() -> None:
    edit_yaml("model_config.yaml", "n_expert_per_token", 8)
    edit_yaml("train_config.yaml", "train.micro_batch_size", 3)
    edit_yaml("train_config.yaml", "precision", "8-true")
    error = refusal("--optimizer.lr", "x", "--resume", "true")
    assert "model_config.yaml: n_expert_per_token is 8 but n_expert is 4" in error
    assert "not a multiple" in error
    assert "train_config.yaml: precision is '8-true'" in error
    assert "--optimizer.lr: optimizer.init_args: lr is 'x'" in error
    assert "--resume: resume is true but out holds no whole step-* or final" in error


def test_the_stories_settings_of_the_repository_are_valid() -> None:
    for config, model in (
        ("train_config.yaml", "model_config.yaml"),
        ("configs/demo_train.yaml", "configs/demo_model.yaml"),
        ("configs/small_train.yaml", "configs/moe_10m.yaml"),
        ("configs/small_train.yaml", "configs/demo_model.yaml"),
    ):
        flags = ["--config", str(ROOT / config), "--model_config", str(ROOT / model)]
        settings = load_settings(flags).settings
        block_size = yaml.safe_load((ROOT / model).read_text(encoding="utf-8"))["block_size"]
        assert train_problems(settings, block_size, 1) == []


def test_checks_of_settings_need_no_files() -> None:
    settings = Settings(train=replace(Settings().train, max_tokens=64 * 8))
    assert train_problems(settings, 8, 1) == []
    (problem,) = train_problems(settings, 8, 3)
    assert "not a multiple of train.micro_batch_size 4 times 3 device(s); choose a multiple of 12" in problem
    twice = replace(settings.train, lr_warmup_fraction=1.5)
    assert len(train_problems(replace(settings, train=twice), 8, 1)) == 2


@pytest.mark.usefixtures("workspace")
def test_a_warmup_longer_than_the_run_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for steps, is_warned in ((8, False), (9, True)):
        set_up(["--config", "train_config.yaml", "--train.lr_warmup_steps", str(steps)])
        assert ("the learning rate never gets to its top" in capsys.readouterr().err) is is_warned


@pytest.mark.usefixtures("workspace")
def test_a_tokenizer_dir_that_is_a_file_is_refused() -> None:
    line = "--tokenizer_dir: tokenizer_dir is model_config.yaml, a file"
    assert line in refusal("--tokenizer_dir", "model_config.yaml")


@pytest.mark.usefixtures("workspace")
def test_a_tokenizer_with_more_pieces_than_the_model_has_rows_is_refused() -> None:
    edit_yaml("model_config.yaml", "padded_vocab_size", 100)
    edit_yaml("model_config.yaml", "vocab_size", 100)
    assert "pieces but padded_vocab_size in model_config.yaml is 100" in refusal()


@pytest.mark.skipif(sys.platform == "win32", reason="torch finds Visual Studio's compiler by itself there")
@pytest.mark.usefixtures("workspace")
def test_a_cpu_run_that_is_to_be_compiled_without_a_compiler_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    error = refusal("--compile", "on")
    assert (
        "compile is on, but there is no C++ compiler no-such-compiler; install it, or drop compile" in error
    )


@pytest.mark.usefixtures("workspace")
def test_a_model_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "memory_bytes", lambda: 100_000)
    assert "GB of memory but there are 0.0001; choose a smaller model" in refusal()


@pytest.mark.usefixtures("workspace")
def test_a_checkpoint_that_does_not_fit_the_disk_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "a checkpoint needs" in refusal()


@pytest.mark.usefixtures("workspace", "eager")
def test_a_start_asks_for_as_much_room_as_a_save_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage, free = shutil.disk_usage("."), []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[-1]))
    free.append(1000)
    (needed,) = re.findall(r"a checkpoint needs ([\d,]+) bytes", refusal())
    free.append(int(needed.replace(",", "")))
    assert run("--max_tokens", 256) == 0
    assert "could not be saved" not in capsys.readouterr().err


@pytest.mark.usefixtures("workspace")
def test_a_disk_without_room_for_all_checkpoints_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(".")
    needed = set_up(["--config", "train_config.yaml"]).checkpoint_bytes + BESIDE_BYTES
    for n_fit, is_warned in ((3, False), (2, True)):  # two step-* and final/
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=n_fit: usage._replace(free=n * needed))
        capsys.readouterr()
        set_up(["--config", "train_config.yaml"])
        assert ("set checkpoints.keep_last" in capsys.readouterr().err) is is_warned


@pytest.mark.usefixtures("workspace")
@pytest.mark.skipif(sys.platform == "win32" or os.name != "posix" or os.geteuid() == 0, reason="root writes")
def test_an_output_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    Path("locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r"out_dir is locked/out, but .*locked cannot be written"):
        set_up(["--config", "train_config.yaml", "--out_dir", "locked/out"])


@pytest.mark.usefixtures("workspace")
def test_an_output_directory_below_a_file_is_refused() -> None:
    text = refusal("--out_dir", "train_config.yaml/out")
    assert text.startswith("--out_dir: out_dir is train_config.yaml/out, but ".replace("/", os.sep))
    assert text.endswith("cannot be written; choose another --out_dir")


@pytest.mark.usefixtures("workspace")
def test_fsdp_needs_gpus_and_an_optimizer_that_takes_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        train=replace(Settings().train, max_tokens=10**6), optimizer={"class_path": "torch.optim.Muon"}
    )
    sharded = replace(settings, strategy="fsdp")
    no_gpu, no_muon = train_problems(sharded, 8, 2)
    assert no_gpu == "strategy is fsdp, which needs GPUs; use strategy: ddp"
    monkeypatch.setattr(checks, "has_cuda", lambda: True)
    assert train_problems(sharded, 8, 2) == [no_muon]
    assert no_muon.startswith("torch.optim.Muon needs whole matrices, which FSDP splits")
    assert train_problems(sharded, 8, 1) == train_problems(settings, 8, 2) == []
    (on_cpu,) = train_problems(replace(sharded, accelerator="cpu", optimizer={}), 8, 2)
    assert on_cpu == no_gpu


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("name", "text"), [("WORLD_SIZE", "8"), ("RANK", "5"), ("WORLD_SIZE", "0x2")])
def test_a_launcher_s_variable_that_does_not_fit_the_devices_is_named(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    told = refusal()
    assert told.startswith(f"${name} is ") and text in told


@pytest.mark.usefixtures("workspace")
def test_a_negative_number_of_machines_is_named_by_its_key() -> None:
    assert "--num_nodes: num_nodes is -297; choose 1 or more" in refusal("--num_nodes", "-297")


@pytest.mark.usefixtures("workspace")
def test_a_second_run_into_a_live_folder_is_refused_whatever_lies_there() -> None:
    with folder_checks.run_lock(Path("out")):
        for flags in ([], ["--resume", "auto"], ["--overwrite"]):
            with pytest.raises(FolderInUse) as raised:
                set_up(["--config", "train_config.yaml", *flags])
            assert str(raised.value).startswith(f"out: a run is live there (process {os.getpid()} on ")
    assert set_up(["--config", "train_config.yaml"]).n_steps == 8
