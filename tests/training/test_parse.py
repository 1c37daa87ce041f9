"""Settings from YAML files, the environment and flags: which beats which, and which two files are taken."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_CONFIG
from helpers.runs import edit_yaml, refusal

from litgpt_moe.flags import normalize_flags
from litgpt_moe.hardware import has_cuda
from litgpt_moe.training.given import has_own_data
from litgpt_moe.training.parse import GROUPS, load_settings, resume_command
from litgpt_moe.training.settings import Settings
from litgpt_moe.training.sources import PAIRS, VARIABLES, choose_configs
from litgpt_moe.words import ROOT

pytestmark = pytest.mark.usefixtures("workspace")


def load(*flags: object) -> Settings:
    argv = ["--config", "train_config.yaml", *map(str, flags)]
    return load_settings(normalize_flags(argv)).settings


# --- flag > environment variable > YAML > default -----------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_an_empty_group_has_its_defaults(group: str) -> None:
    edit_yaml("train_config.yaml", group, {})
    assert getattr(load(f"--{group}", "{}"), group) == getattr(load(), group) == getattr(Settings(), group)
    assert getattr(load(f"--{group}={{}}"), group) == getattr(Settings(), group)


def test_a_flag_beats_the_environment_and_both_beat_the_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICRO_BATCH_SIZE", "1")
    monkeypatch.setenv("MAX_TOKENS", "1024")
    settings = load("--max_tokens", "512")
    assert (settings.train.micro_batch_size, settings.train.max_tokens) == (1, 512)
    assert settings.train.global_batch_size == 4
    assert settings.train.log_interval == Settings().train.log_interval


def test_a_tilde_is_the_home_folder_in_yaml_flags_and_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    home = tmp_path / "home"
    edit_yaml("train_config.yaml", "out_dir", "~/runs")
    edit_yaml("train_config.yaml", "data.init_args.val_data_path", "~/data/val")
    monkeypatch.setenv("WANDB_ARTIFACTS_DIR", "~/arts")
    settings = load("--dataset_dir=~/data", "--resume=~/old")
    assert (settings.out_dir, settings.data_dir) == (home / "runs", home / "data")
    assert settings.wandb_artifacts_dir == home / "arts" and Path(str(settings.resume)) == home / "old"
    assert Path(settings.data["init_args"]["val_data_path"]) == home / "data/val"
    # a file may have such a name, and other text is no path
    assert load("--out_dir", "a~/x", "--log.run", "~/x").out_dir == Path("a~/x")
    assert load("--logger_name", "wandb", "--log.run", "~/x").log.run == "~/x"


@pytest.mark.parametrize(
    ("flag", "key", "text", "value"),
    [
        ("--micro-batch-size", "train.micro_batch_size", "1", 1),
        ("--global_batch_size", "train.global_batch_size", "8", 8),
        ("--max-tokens", "train.max_tokens", "4096", 4096),
        ("--max-seq-length", "train.max_seq_length", "32", 32),
        ("--resume", "resume", "auto", "auto"),
        ("--data-dir", "data_dir", "elsewhere", Path("elsewhere")),
        # its name in earlier versions
        ("--dataset-dir", "data_dir", "elsewhere", Path("elsewhere")),
        ("--train.max_tokens", "train.max_tokens", "1.5M", 1_500_000),
        ("--micro_batch_size", "train.micro_batch_size", "1k", 1000),
        ("--train.max_time", "train.max_time", "1h30m", 5400.0),
        ("--wandb-dataset", "wandb_dataset", "me/p/n:v1", "me/p/n:v1"),
        ("--wandb-artifacts-dir", "wandb_artifacts_dir", "arts", Path("arts")),
        ("--train.min_lr", "train.min_lr", "1e-5", 1e-5),
        ("--train-config", "config", "train_config.yaml", Path("train_config.yaml")),
        ("--wandb-dataset-artifact", "wandb_dataset", "me/p/n:v1", "me/p/n:v1"),
        ("--eval.initial_validation", "eval.initial_validation", "true", True),
    ],
)
def test_a_flag_sets_its_key(flag: str, key: str, text: str, value: object) -> None:
    settings: object = load(flag, text)
    for name in key.split("."):
        settings = getattr(settings, name)
    assert settings == value


@pytest.mark.parametrize("name", VARIABLES)
def test_each_variable_of_the_design_sets_what_its_flag_sets(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "3" if "SIZE" in name or "MAX" in name else "auto"
    monkeypatch.setenv(name, text)
    by_variable = load()
    monkeypatch.delenv(name)
    flag = "--" + name.lower().replace("wandb_dataset_artifact", "wandb_dataset")
    assert by_variable == load(flag, text) != load()


def test_arguments_of_classes_are_set_with_and_without_init_args() -> None:
    settings = load("--optimizer.lr", "3e-4", "--optimizer.init_args.eps", "0.1", "--data.num_workers=2")
    assert settings.optimizer["init_args"] == {"lr": "3e-4", "weight_decay": 0.1, "eps": 0.1}
    assert settings.data["init_args"]["num_workers"] == 2
    assert load("--optimizer", "SGD").optimizer["class_path"] == "SGD"
    assert load("--optimizer.class_path", "SGD") == load("--optimizer=SGD")


def test_a_short_number_in_yaml_is_a_number_too() -> None:
    edit_yaml("train_config.yaml", "train.max_tokens", "10k")
    edit_yaml("train_config.yaml", "train.max_time", "2h")
    train = load().train
    assert (train.max_tokens, train.max_time) == (10_000, 7200.0)
    # text stays text
    assert load("--logger_name", "wandb", "--log.run", "1M").log.run == "1M"


def test_the_data_directory_has_its_earlier_name_in_yaml_too_but_not_both() -> None:
    edit_yaml("train_config.yaml", "dataset_dir", "before")
    assert load().data_dir == Path("before") and load("--data_dir", "now").data_dir == Path("now")
    edit_yaml("train_config.yaml", "data_dir", "now")
    told = "train_config.yaml: data_dir is given twice, under its old name too; keep one"
    with pytest.raises(ValueError, match=told):
        load()


def test_a_configuration_is_named_as_in_configs() -> None:
    assert load("--model_config", "moe_30m_debug").model_config == ROOT / "configs/moe_30m_debug.yaml"
    edit_yaml("train_config.yaml", "model_config", "moe_200m")
    assert load().model_config == ROOT / "configs/moe_200m.yaml"
    assert load_settings(["--config", "demo_train"]).settings.model_config == ROOT / "configs/demo_model.yaml"


def test_progress_can_be_switched_off() -> None:
    assert load().progress is True
    for off in (["--no_progress"], ["--no-progress"], ["--progress=false"], ["--progress", "false"]):
        assert load(*off).progress is False
    assert load("--progress").progress is load("--progress", "true").progress is True


def test_switches_of_groups_need_no_value_either() -> None:
    assert load("--eval.initial_validation").eval.initial_validation is True
    assert load("--no_eval.final_validation").eval.final_validation is False


def test_the_command_to_go_on_keeps_the_flags_but_those_of_the_beginning() -> None:
    command = resume_command(["--overwrite", "True", "--progress", "false"])
    assert command.endswith("run_train.py --progress=false --resume auto")
    begun = ["--initial_checkpoint_dir", "a", "--out_dir", "b c", "--resume=b", "--no_overwrite"]
    assert resume_command(begun).endswith("run_train.py --out_dir 'b c' --resume auto")


# --- what is refused, and where it came from ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "variables", "begins"),
    [
        ([], {"MAX_TOKENS": "5"}, "$MAX_TOKENS: train.max_tokens is 5"),
        (["--max_tokens", "5"], {}, "--max_tokens: train.max_tokens is 5"),
        ([], {"MICRO_BATCH_SIZE": "0"}, "$MICRO_BATCH_SIZE: train.micro_batch_size is 0"),
        (["--optimizer.lr", "x"], {}, "--optimizer.lr: optimizer.init_args: lr is 'x'"),
        (["--optimizer", "AdamV"], {}, "--optimizer: optimizer.class_path is AdamV"),
        (["--seed", "-1"], {}, "--seed: seed is -1"),
        (["--lr_warmup_fraction", "0.5"], {}, "--lr_warmup_fraction: unknown key"),
        (["--train.lr_warmup_fraction", "0.5"], {}, "train_config.yaml, --train.lr_warmup_fraction: "),
    ],
)
def test_a_problem_names_the_place_that_its_value_came_from(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], variables: dict[str, str], begins: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert any(line.startswith(begins) for line in refusal(*flags).splitlines())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--out_dir", ""], "--out_dir: out_dir is ''; it must be a path"),
        (["--dataset_dir="], "--dataset_dir: data_dir is ''; it must be a path or null"),
        (
            ["--compile", "of"],
            "--compile: compile is 'of'; it must be one of auto, on, off; did you mean",
        ),
        (["--precision", "bf16-tru"], "--precision: precision is 'bf16-tru'; did you mean bf16-true? Choose"),
        (["--optimizer", "AdmW"], "--optimizer: optimizer.class_path is AdmW, which cannot be used: module"),
        (
            ["--train.max_tokens", "1.0001k"],
            "--train.max_tokens: train.max_tokens is '1.0001k'; it must",
        ),
        (["--train.max_time", "10M"], "--train.max_time: train.max_time is '10M'; it must be a number"),
        (["--train", "5"], "--train: train is '5'; give one of its keys, as in --train.KEY VALUE"),
        (["--data.num_workers", "-1"], "--data.num_workers: data: prepare_data.TextShards does not take"),
        (["--optimizer.lr", "-1"], "--optimizer.lr, train_config.yaml: optimizer: torch.optim.AdamW does"),
        (["--max_tokens", "5"], "--max_tokens: train.max_tokens is 5, less than one step"),
        (["--optimizer", "LBFGS"], "--optimizer: optimizer.class_path is LBFGS, which computes the loss"),
        (["--optimizer", "SparseAdam"], "--optimizer: optimizer.class_path is SparseAdam, for sparse"),
        (["--optimizer.differentiable", "true"], "--optimizer.differentiable: optimizer: torch.optim.AdamW"),
        (["--optimizer.fused", "1", "--optimizer.foreach", "1"], "--optimizer.f"),
        (
            ["--optimizer", "NAdam", "--optimizer.capturable", "true"],
            "--optimizer.capturable: optimizer: NAdam does not take these init_args: If capturable=True",
        ),
        (
            ["--optimizer", "Muon", "--optimizer.ns_steps", "200"],
            "train_config.yaml, --optimizer.ns_steps: optimizer: Muon does not take these init_args: Number",
        ),
        (["--optimizer.weight_decay", "1e30"], "--optimizer.weight_decay: optimizer: torch.optim.AdamW does"),
        (["max_tokens"], "'max_tokens' is not a flag; write --key value"),
        (["--max_tokens"], "--max_tokens needs a value"),
        (["--optimizer.lr", "["], "--optimizer.lr: '[' is not readable as a YAML value"),
        (["--config", "absent.yaml"], "absent.yaml: no such configuration file"),
        (["--model_config", "absent.yaml"], "absent.yaml: no such configuration file"),
    ],
)
def test_a_wrong_flag_is_told_in_one_sentence_that_names_it(flags: list[str], sentence: str) -> None:
    (told,) = refusal(*flags).splitlines()
    assert told.startswith(sentence)


@pytest.mark.parametrize("key", ["out_dir", "model_config", "data.init_args.train_data_path"])
def test_a_path_with_a_zero_byte_is_named_with_its_key(key: str) -> None:
    *groups, name = key.split(".")
    text = f'{name}: "a\\0b"'
    for group in reversed(groups):
        text = f"{group}: {{{text}}}"
    Path("zero.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"^zero\.yaml: {re.escape(key)} is 'a\\x00b'; a zero byte is in it"
    ):
        load_settings(["--config", "zero.yaml"])


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("optimizer.lr", "unknown key optimizer.lr; did you mean optimizer.init_args.lr?"),
        ("optimizer.foo", "unknown key optimizer.foo; did you mean optimizer.init_args.foo?"),
        ("optimizer.init_arg", "unknown key optimizer.init_arg; did you mean optimizer.init_args?"),
        ("data.seed", "unknown key data.seed; did you mean data.init_args.seed?"),
        ("data.nonsense", "unknown key data.nonsense; did you mean data.init_args.nonsense?"),
        ("train.nonsense", "unknown key train.nonsense; did you mean train.max_tokens?"),
        ("checkpoints.keep_lats", "unknown key checkpoints.keep_lats; did you mean checkpoints.keep_last?"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(key: str, sentence: str) -> None:
    edit_yaml("train_config.yaml", key, 3)
    assert refusal() == f"train_config.yaml: {sentence}"


def test_arguments_without_a_class_are_those_of_the_usual_one() -> None:
    values = yaml.safe_load(Path("train_config.yaml").read_text(encoding="utf-8"))
    for key in ("data", "optimizer"):
        values.pop(key, None)
    Path("train_config.yaml").write_text(yaml.dump(values), encoding="utf-8")
    usual = Settings()
    settings = load("--data.seed", 3, "--data.num_workers", 2)
    assert settings.data == {**usual.data, "init_args": {"seed": 3, "num_workers": 2}}
    assert settings.optimizer == usual.optimizer
    edit_yaml("train_config.yaml", "optimizer", {"init_args": {"lr": 0.1}})
    assert load().optimizer == {**usual.optimizer, "init_args": {"lr": 0.1}}


@pytest.mark.parametrize("text", ["train: [", "just text", "\x00", "seed: 1\nseed: 2\n"])
def test_a_settings_file_that_is_no_yaml_mapping_is_refused(text: str) -> None:
    Path("train_config.yaml").write_text(text, encoding="utf-8")
    assert refusal().startswith("train_config.yaml")


# --- the two files ------------------------------------------------------------------------------------------


def chosen(**named: str) -> tuple[Path, Path]:
    return choose_configs({key: (path, f"--{key}") for key, path in named.items()}, has_cuda, has_own_data)


@pytest.fixture(params=[True, False])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch is to see a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return request.param


def test_settings_in_this_folder_are_told_as_one_would_type_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    demo = str(ROOT / "configs" / "demo_model.yaml")
    monkeypatch.chdir(ROOT)
    chosen(model_config=demo)
    relative = Path("configs/demo_train.yaml"), Path("configs/demo_model.yaml")
    why = "(beside the model's; another: --config PATH)"
    assert capsys.readouterr().err == f"Settings from {relative[0]} {why} and {relative[1]}.\n"
    monkeypatch.chdir(tmp_path)  # from elsewhere they need the whole path
    config, model_config = chosen(model_config=demo)
    assert config.is_absolute() and model_config.is_absolute()
    assert config.is_file() and model_config.is_file()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("checkpoints/final/train_config.yaml", "checkpoints/final/model_config.yaml"),
        ("configs/demo_train.yaml", "configs/demo_model.yaml"),
    ],
)
def test_of_a_standard_pair_in_one_folder_each_brings_the_other(
    cuda: bool, one: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in map(Path, (one, other)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    pair = (Path(one), Path(other))
    assert chosen(config=one) == chosen(model_config=other) == chosen(config=one, model_config=other) == pair
    first, second, both = capsys.readouterr().err.splitlines()
    assert first == f"Settings from {pair[0]} and {pair[1]} (beside it; another: --model_config PATH)."
    assert second == f"Settings from {pair[0]} (beside the model's; another: --config PATH) and {pair[1]}."
    assert both == f"Settings from {pair[0]} and {pair[1]}."


def test_a_name_that_is_near_pairs_no_files(cuda: bool, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("my_train.yaml", "my_model.yaml"):
        Path(name).touch()
    default = "model_config.yaml" if cuda else "configs/demo_model.yaml"
    assert chosen(config="my_train.yaml") == (Path("my_train.yaml"), ROOT / default)
    told = capsys.readouterr().err.splitlines()
    assert told[-1].endswith(f"{Path(default)} (the default; another: --model_config PATH).")
    assert any("No CUDA and no model config named" in line for line in told) is not cuda
    assert chosen(model_config="my_model.yaml") == (ROOT / "train_config.yaml", Path("my_model.yaml"))
    told = capsys.readouterr().err
    assert "train_config.yaml (the default; another: --config PATH) and my_model.yaml." in told


def test_without_a_name_the_pair_is_that_for_this_machine(
    cuda: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data/custom_text/train").mkdir(parents=True)
    Path("data/custom_text/train/a.txt").touch()
    pair = ("train_config.yaml", "model_config.yaml") if cuda else ("demo_train.yaml", "demo_model.yaml")
    folder = ROOT if cuda else ROOT / "configs"
    assert chosen() == (folder / pair[0], folder / pair[1])
    told = capsys.readouterr().err
    assert told.endswith(f"Settings from {folder / pair[0]} and {folder / pair[1]}.\n")
    assert ("training the small demo model on the CPU" in told) is not cuda


def test_where_there_is_no_text_the_pair_is_the_demo_s_on_a_gpu_too(
    cuda: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = (ROOT / "configs/demo_train.yaml", ROOT / "configs/demo_model.yaml")
    train, manifest = Path("data/custom_text/train"), Path("data/custom_text/manifest.json")
    assert chosen() == demo
    assert "training the small demo model" in capsys.readouterr().err
    # the demo's own text is there the second time
    train.mkdir(parents=True)
    for name in ("demo.txt", "demo.json"):
        (train / name).touch()
    assert chosen() == demo
    own = (ROOT / "train_config.yaml", ROOT / "model_config.yaml") if cuda else demo
    assert chosen(data_dir="data/mine") == own
    # shards without their text, as of a mixture
    manifest.write_text("{}", encoding="utf-8")
    assert chosen() == own
    manifest.unlink()
    (train / "mine.txt").touch()
    assert chosen() == own


def test_a_model_config_in_the_settings_is_the_model_s_file_unless_a_flag_names_another() -> None:
    Path("models").mkdir()
    for name in ("models/a.yaml", "models/b.yaml"):
        Path(name).write_text(yaml.dump(TINY_CONFIG), encoding="utf-8")
    edit_yaml("train_config.yaml", "model_config", "models/a.yaml")
    assert load().model_config == Path("models/a.yaml")
    assert load("--model_config", "models/b.yaml").model_config == Path("models/b.yaml")
    edit_yaml("train_config.yaml", "model_config", None)
    assert load().model_config == Path("model_config.yaml")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (
            "model_config",
            TINY_CONFIG,
            "model_config is a mapping; put its lines into a file of their own and",
        ),
        ("model_config", 5, "model_config is 5; it must be a path or null"),
        ("model_config", "absent.yaml", "absent.yaml: no such configuration file"),
        ("config", "other.yaml", "config is 'other.yaml'; settings name no other settings file: remove it"),
    ],
)
def test_a_file_that_the_settings_cannot_name_is_refused(key: str, value: object, sentence: str) -> None:
    edit_yaml("train_config.yaml", key, value)
    told = refusal()
    assert sentence in told and told.startswith(("train_config.yaml: ", "absent.yaml"))


def test_each_place_of_a_value_is_known_and_defaults_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_TOKENS", "1024")
    places = load_settings(["--config", "train_config.yaml", "--optimizer.lr", "0.1"]).places
    assert places["train.max_tokens"] == "$MAX_TOKENS" and places["out_dir"] == "train_config.yaml"
    assert places["optimizer.init_args.lr"] == "--optimizer.lr" and "seed" not in places


def test_the_names_of_a_pair_are_those_of_the_repository() -> None:
    for folder, pair in zip((ROOT, ROOT / "configs"), PAIRS, strict=True):
        assert all((folder / name).is_file() for name in pair)
