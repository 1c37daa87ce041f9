"""From a command line to a Run: what is decided, and that settings have one writer."""

import itertools
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from helpers.runs import edit_yaml

from litgpt_moe.data.module import TextShards
from litgpt_moe.training import run as run_module
from litgpt_moe.training.parse import load_settings
from litgpt_moe.training.run import Run, optimizer_spec, set_up
from litgpt_moe.training.run_data import with_tokenizer
from litgpt_moe.training.settings import Settings, plain_settings, saved_text

pytestmark = pytest.mark.usefixtures("workspace")


def set_up_here(*flags: object) -> Run:
    return set_up(["--config", "train_config.yaml", *map(str, flags)])


def test_what_runs_is_what_is_saved() -> None:
    run = set_up_here("--max_tokens", 2100, "--train.log_interval", 100)
    assert (run.tokens_per_step, run.n_steps, run.accumulation, run.world_size) == (256, 8, 2, 1)
    assert (run.settings.train.max_tokens, run.settings.train.log_interval) == (2048, 8)
    assert (run.settings.precision, run.settings.devices) == (run.precision, run.devices) == ("32-true", 1)
    assert (run.start_step, run.resume, run.initial, run.demo_data) == (0, None, None, False)


def test_saved_settings_are_read_back_as_they_ran() -> None:
    first = set_up_here("--train.min_lr", "2e-4", "--seed", 7).settings
    Path("final").mkdir()
    Path("final/train_config.yaml").write_text(saved_text(first), encoding="utf-8")
    Path("final/model_config.yaml").write_bytes(Path("model_config.yaml").read_bytes())
    again = load_settings(["--config", "final/train_config.yaml"]).settings
    assert again.model_config == Path("final/model_config.yaml")
    assert replace(again, config=first.config, model_config=first.model_config) == first


def test_settings_are_saved_in_the_shape_of_litgpt_s_files() -> None:
    plain = yaml.safe_load(saved_text(Settings()))
    assert list(plain)[:4] == ["out_dir", "initial_checkpoint_dir", "data", "data_dir"]
    assert not {"config", "model_config", "resume", "overwrite"} & plain.keys()
    assert plain["train"] == asdict(Settings().train) and plain["log"] == asdict(Settings().log)
    assert plain == plain_settings(Settings())


def test_the_facts_of_a_model_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = set_up_here()
    monkeypatch.setattr(run_module, "model_facts", None)
    # max_time asks for it at each step
    assert run.checkpoint_bytes == 3 * 4 * run.facts.total_params
    assert replace(run, precision="bf16-true").checkpoint_bytes == run.checkpoint_bytes // 2


def test_the_seed_sets_the_order_of_the_data_unless_that_has_its_own() -> None:
    assert set_up_here("--seed", 7).data.seed == 7
    assert set_up_here("--seed", 7, "--data.seed", 8).data.seed == 8


def test_a_data_folder_brings_its_own_tokenizer(tiny_data: Path, tiny_tokenizer_dir: Path) -> None:
    folder = Path("whole/tokenizer")
    folder.mkdir(parents=True)
    data = TextShards(folder.parent / "train")
    assert with_tokenizer(Settings(), data).tokenizer_dir == Settings().tokenizer_dir
    (folder / "tokenizer.json").write_bytes((tiny_tokenizer_dir / "tokenizer.json").read_bytes())
    assert with_tokenizer(Settings(), data).tokenizer_dir == data.tokenizer_dir == folder
    named = with_tokenizer(Settings(tokenizer_dir=tiny_tokenizer_dir), data)
    assert named.tokenizer_dir == data.tokenizer_dir == tiny_tokenizer_dir
    run = set_up_here("--dataset_dir", tiny_data)
    assert (run.data.train_data_path, run.data.val_data_path) == (tiny_data / "train", tiny_data / "val")


def test_demo_stories_are_for_the_default_folder_alone() -> None:
    edit_yaml("train_config.yaml", "data", {"class_path": "prepare_data.TextShards"})
    assert set_up_here().demo_data is True
    assert set_up_here("--data.train_data_path", "data/custom_txt/train").demo_data is False
    assert set_up_here("--dataset_dir", "data/custom_text").demo_data is False
    Path("data/custom_text/train").mkdir(parents=True)
    Path("data/custom_text/train/a.txt").touch()
    assert set_up_here().demo_data is False


def test_the_optimizer_s_class_has_one_name_and_its_values_their_types() -> None:
    edit_yaml("train_config.yaml", "optimizer.init_args.betas", [0.9, 0.95])
    edit_yaml("train_config.yaml", "optimizer.init_args.lr", "2e-2")
    assert set_up_here("--optimizer", "AdamW").optimizer == {
        "class_path": "torch.optim.adamw.AdamW",
        "init_args": {"betas": (0.9, 0.95), "lr": 0.02, "weight_decay": 0.1},
    }


def test_a_class_named_by_a_flag_takes_what_it_knows_of_the_yaml_s_arguments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_yaml("train_config.yaml", "optimizer.init_args.betas", [0.9, 0.95])
    edit_yaml("train_config.yaml", "optimizer.init_args.lr", "2e-2")
    flags = ["--config", "train_config.yaml", "--optimizer"]
    settings = load_settings([*flags, "torch.optim.Muon"]).settings
    assert optimizer_spec(settings)["init_args"] == {"lr": 0.02, "weight_decay": 0.1}
    assert "betas" not in settings.optimizer["init_args"]
    note = "torch.optim.Muon has no betas: left out what train_config.yaml says under optimizer.init_args."
    assert note in capsys.readouterr().err
    for wrong in (["torch.optim.Muon", "--optimizer.betas", "[0.9, 0.95]"], ["AdamX"]):
        with pytest.raises(ValueError, match=r"unknown key betas|AdamX, which cannot be used"):
            optimizer_spec(load_settings([*flags, *wrong]).settings)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("SparseAdam", "for sparse gradients; use AdamW"), ("LBFGS", "several times in a step; use AdamW")],
)
def test_an_optimizer_that_no_run_can_use_is_refused_before_it(name: str, reason: str) -> None:
    settings = Settings(optimizer={"class_path": f"torch.optim.{name}"})
    with pytest.raises(ValueError, match=f"torch.optim.{name}.*{reason}"):
        optimizer_spec(settings)


def test_an_older_train_config_gives_the_settings_that_it_was_saved_with() -> None:
    plain = plain_settings(Settings())
    for group, key in itertools.product(("train", "eval"), ("max_norm", "interval")):
        plain[group].pop(key, None)  # a key that came later
    Path("older.yaml").write_text(yaml.dump(plain), encoding="utf-8")
    flags = ["--config", "older.yaml", "--model_config", "model_config.yaml"]
    settings = load_settings(flags).settings
    assert replace(settings, config=None, model_config=None) == Settings()
