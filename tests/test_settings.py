"""The settings of a run: YAML, environment and flags, which beats which, and what is refused."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from runs import edit_yaml, run

import run_train

pytestmark = pytest.mark.usefixtures("eager")


def test_the_saved_settings_are_read_back_as_they_ran(workspace: Path) -> None:
    run("--train.min_lr", "2e-4", "--seed", 7)
    first = run_train.load_settings(
        ["--config", "train_config.yaml", "--train.min_lr", "2e-4", "--seed", "7"]
    )
    again = run_train.load_settings(["--config", "out/final/train_config.yaml"])
    assert again.model_config == Path("out/final/model_config.yaml")
    again.config, again.model_config = first.config, first.model_config
    first.devices = 1  # what auto came to
    assert again == first


@pytest.mark.parametrize("group", run_train.GROUPS)
def test_an_empty_group_has_its_defaults(workspace: Path, group: str) -> None:
    edit_yaml("train_config.yaml", group, {})
    plain = run_train.load_settings(["--config", "train_config.yaml"])
    empty = run_train.load_settings(["--config", "train_config.yaml", f"--{group}", "{}"])
    assert getattr(empty, group) == getattr(plain, group)


def test_a_flag_beats_the_environment_and_both_beat_the_yaml(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICRO_BATCH_SIZE", "1")
    monkeypatch.setenv("MAX_TOKENS", "1024")
    settings = run_train.load_settings(["--config", "train_config.yaml", "--max_tokens", "512"])
    assert (settings.train.micro_batch_size, settings.train.max_tokens) == (1, 512)
    assert settings.train.global_batch_size == 4


@pytest.mark.parametrize(
    ("flag", "key", "text", "value"),
    [
        ("--micro-batch-size", "train.micro_batch_size", "1", 1),
        ("--global_batch_size", "train.global_batch_size", "8", 8),
        ("--max-tokens", "train.max_tokens", "4096", 4096),
        ("--max-seq-length", "train.max_seq_length", "32", 32),
        ("--resume", "resume", "auto", "auto"),
        ("--dataset-dir", "dataset_dir", "elsewhere", Path("elsewhere")),
        ("--wandb-dataset", "wandb_dataset", "me/p/n:v1", "me/p/n:v1"),
        ("--wandb-artifacts-dir", "wandb_artifacts_dir", "arts", Path("arts")),
        ("--train.min_lr", "train.min_lr", "1e-5", 1e-5),
    ],
)
def test_a_flag_sets_its_key(workspace: Path, flag: str, key: str, text: str, value: object) -> None:
    argv = run_train.wandb_dataset.normalize_flags(["--config", "train_config.yaml", flag, text])
    settings: object = run_train.load_settings(argv)
    for name in key.split("."):
        settings = getattr(settings, name)
    assert settings == value


@pytest.mark.parametrize("name", run_train.VARIABLES)
def test_each_variable_of_the_design_sets_what_its_flag_sets(
    workspace: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "2" if "SIZE" in name or "MAX" in name else "auto"
    monkeypatch.setenv(name, text)
    by_variable = run_train.load_settings(["--config", "train_config.yaml"])
    monkeypatch.delenv(name)
    flag = "--" + name.lower().replace("wandb_dataset_artifact", "wandb_dataset")
    assert by_variable == run_train.load_settings(["--config", "train_config.yaml", flag, text])


@pytest.mark.parametrize(
    ("flags", "variables", "begins"),
    [
        ([], {"MAX_TOKENS": "5"}, "error: $MAX_TOKENS: train.max_tokens is 5"),
        (["--max_tokens", "5"], {}, "error: --max_tokens: train.max_tokens is 5"),
        ([], {"MICRO_BATCH_SIZE": "0"}, "error: $MICRO_BATCH_SIZE: train.micro_batch_size is 0"),
        (["--optimizer.lr", "x"], {}, "error: --optimizer.lr: optimizer.init_args: lr is 'x'"),
        (["--optimizer", "AdamV"], {}, "error: --optimizer: optimizer.class_path is AdamV"),
        (["--seed", "-1"], {}, "error: --seed: seed is -1"),
        (["--lr_warmup_fraction", "0.5"], {}, "error: --lr_warmup_fraction: unknown key"),
        (["--train.lr_warmup_fraction", "0.5"], {}, "error: train_config.yaml, --train.lr_warmup_fraction: "),
    ],
)
def test_a_problem_names_the_place_that_its_value_came_from(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    variables: dict[str, str],
    begins: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(*flags) == 2
    assert any(line.startswith(begins) for line in capsys.readouterr().err.splitlines())


def test_a_tokenizer_dir_that_is_a_file_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--tokenizer_dir", "model_config.yaml") == 2
    line = "error: --tokenizer_dir: tokenizer_dir is model_config.yaml, a file"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        (
            "0::/a/b\n",
            {"a/b/memory.max": "max\n", "a/memory.max": "3000\n", "memory.max": "9000"},
            [3000, 9000],
        ),
        ("9:memory:/docker/x\n8:cpu:/\n", {"memory/memory.limit_in_bytes": "5000\n"}, [5000]),  # of version 1
        ("0::/../other\n", {}, []),
        ("", {}, []),
    ],
)
def test_the_memory_that_a_container_may_use_is_read(
    tmp_path: Path, groups: str, files: dict[str, str], limits: list[int]
) -> None:
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{k}": v for k, v in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert run_train.cgroup_limits(tmp_path) == limits


def test_a_model_larger_than_the_container_s_memory_is_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_train, "cgroup_limits", lambda: [100_000])
    assert run() == 2
    assert "GB of memory but there are 0.0001" in capsys.readouterr().err


def test_progress_can_be_switched_off(workspace: Path) -> None:
    assert run_train.load_settings(["--config", "train_config.yaml"]).progress is True
    for off in (["--no_progress"], ["--progress=false"], ["--progress", "false"]):
        assert run_train.load_settings(["--config", "train_config.yaml", *off]).progress is False
    assert run_train.resume_command(["--overwrite", "True", "--progress", "false"]).endswith(
        "run_train.py --progress=false --resume auto"
    )


def test_a_class_chosen_by_a_flag_takes_what_it_knows_of_the_yaml_s_arguments(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_yaml("train_config.yaml", "optimizer.init_args.lr", 0.02)
    edit_yaml("train_config.yaml", "optimizer.init_args.betas", [0.9, 0.95])
    flags = ["--config", "train_config.yaml", "--optimizer"]
    settings = run_train.load_settings([*flags, "torch.optim.Muon"])
    init_args = run_train.build_classes(settings)[1]["init_args"]
    assert init_args["lr"] == settings.optimizer["init_args"]["lr"] == 0.02
    assert "betas" not in init_args and "betas" not in settings.optimizer["init_args"]
    told = "torch.optim.Muon has no betas: left out what train_config.yaml says under optimizer.init_args."
    assert told in capsys.readouterr().err
    for wrong in (["torch.optim.Muon", "--optimizer.betas", "[0.9, 0.95]"], ["AdamX"]):
        with pytest.raises(ValueError, match=r"unknown key betas|AdamX, which cannot be used"):
            run_train.build_classes(run_train.load_settings([*flags, *wrong]))


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
    "train.epochs": (1, "train.epochs is 1, which LitGPT ignores"),
    "train.max_norm": (None, "train.max_norm is null"),
    "train.log_interval": ("often", "train.log_interval is 'often'; it must be a whole number"),
    "train.save_interval": ("x", "train.save_interval is 'x'; it must be a whole number or null"),
    "resume": ([1], "resume is [1]; it must be text or true or false"),
    "optimizer.init_args.betas": (5, "optimizer.init_args: betas is 5; it must be a list of 2 values"),
    "train.max_token": (5, "unknown key train.max_token; did you mean train.max_tokens?"),
    "train.lr_warmup_fraction": (0.5, "Can't provide both"),
    "eval.interval": (0, "eval.interval is 0; choose 1 or more"),
    "eval.max_new_tokens": (-5, "eval.max_new_tokens is -5"),
    "moe.aux_loss_coef": (-0.1, "moe.aux_loss_coef is -0.1; choose 0 or more"),
    "float32_matmul_precision": ("low", "float32_matmul_precision is 'low'; it must be one of highest, high"),
    "weight_decay_on": ("some", "weight_decay_on is 'some'; it must be one of matrices, all"),
    "precision": ("16-mixed", "precision is '16-mixed'; choose one of 32-true, bf16-true, bf16-mixed"),
    "accelerator": ("tpu", "accelerator is 'tpu'; it must be one of auto, cpu, cuda, gpu, mps"),
    "devices": (0, "devices is 0; choose auto or a number of 1 or more"),
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
    "n_expert": (8, "unknown key n_expert; it describes the model: set it in the file of --model_config"),
}


@pytest.mark.parametrize("key", BAD_TRAIN_VALUES)
def test_a_bad_setting_ends_in_one_message_and_writes_nothing(
    workspace: Path, key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    value, message = BAD_TRAIN_VALUES[key]
    edit_yaml("train_config.yaml", key, value)
    assert run() == 2
    error = capsys.readouterr().err
    assert message in error
    assert all(line.startswith("error: ") for line in error.splitlines() if message in line)
    assert "Traceback" not in error
    assert sorted(path.name for path in Path().iterdir()) == ["model_config.yaml", "train_config.yaml"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--out_dir", ""], "--out_dir: out_dir is ''; it must be a path"),
        (["--dataset_dir="], "--dataset_dir: dataset_dir is ''; it must be a path or null"),
        (["--train", "5"], "--train: train is '5'; give one of its keys, as in --train.KEY VALUE"),
        (["--data.num_workers", "-1"], "--data.num_workers: data: prepare_data.TextShards does not take"),
        (["--optimizer.lr", "-1"], "--optimizer.lr, train_config.yaml: optimizer: torch.optim.AdamW does"),
        (["--max_tokens", "5"], "--max_tokens: train.max_tokens is 5, less than one step"),
    ],
)
def test_a_wrong_flag_is_told_in_one_sentence_that_names_it(
    workspace: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags) == 2
    lines = capsys.readouterr().err.splitlines()
    (told,) = [line for line in lines if not line.startswith("Settings from")]
    assert told.startswith(f"error: {sentence}")
    assert sorted(path.name for path in Path().iterdir()) == ["model_config.yaml", "train_config.yaml"]


def test_all_problems_of_both_files_are_told_at_once(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_yaml("model_config.yaml", "n_expert_per_token", 8)
    edit_yaml("train_config.yaml", "train.micro_batch_size", 3)
    edit_yaml("train_config.yaml", "precision", "8-true")
    assert run() == 2
    error = capsys.readouterr().err
    assert "n_expert_per_token is 8 but n_expert is 4" in error
    assert "not a multiple" in error
    assert "precision is '8-true'" in error


@pytest.mark.parametrize("text", ["train: [", "just text", "\x00", "seed: 1\nseed: 2\n"])
def test_a_settings_file_that_is_no_yaml_mapping_is_refused(
    workspace: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train_config.yaml").write_text(text, encoding="utf-8")
    assert run() == 2
    assert "error: train_config.yaml" in capsys.readouterr().err


def test_the_stories_settings_of_the_repository_are_valid() -> None:
    for config, model in (
        ("train_config.yaml", "model_config.yaml"),
        ("configs/demo_train.yaml", "configs/demo_model.yaml"),
    ):
        flags = ["--config", str(ROOT / config), "--model_config", str(ROOT / model)]
        settings = run_train.load_settings(flags)
        block_size = yaml.safe_load((ROOT / model).read_text(encoding="utf-8"))["block_size"]
        assert run_train.train_problems(settings, block_size, 1) == []


def test_settings_in_this_folder_are_told_as_one_would_type_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = {"model_config": (str(run_train.ROOT / "configs" / "demo_model.yaml"), "--model_config")}
    monkeypatch.chdir(run_train.ROOT)
    run_train.choose_configs(given)
    relative = Path("configs/demo_train.yaml"), Path("configs/demo_model.yaml")
    assert capsys.readouterr().err == f"Settings from {relative[0]} and {relative[1]}.\n"
    monkeypatch.chdir(tmp_path)  # from elsewhere they need the whole path
    config, model_config = run_train.choose_configs(given)
    assert config.is_absolute() and model_config.is_absolute()
    assert config.is_file() and model_config.is_file()
