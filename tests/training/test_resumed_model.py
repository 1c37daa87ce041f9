"""The model of a run that goes on: the checkpoint's own; one that the user names must be the same."""

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import TINY_CONFIG
from helpers.runs import edit_yaml, run, save

from litgpt_moe.training.forecast import plan_text
from litgpt_moe.training.given import resumed_model
from litgpt_moe.training.run import Run, set_up
from litgpt_moe.training.sources import choose_configs

pytestmark = pytest.mark.usefixtures("workspace")
NAMED = ("--model_config", "model_config.yaml")
RESUMED = ("--resume", "auto")


def set_up_here(*flags: object) -> Run:
    return set_up(["--config", "train_config.yaml", *map(str, flags)])


def told(capsys: pytest.CaptureFixture[str], beginning: str) -> list[str]:
    """Return the lines on stderr with this beginning, their paths with slashes."""
    lines = capsys.readouterr().err.replace("\\", "/").splitlines()
    return [line for line in lines if line.startswith(beginning)]


def refused(*flags: object) -> str:
    with pytest.raises((ValueError, OSError)) as raised:
        set_up_here(*flags)
    return str(raised.value).replace("\\", "/")


def test_a_run_goes_on_with_its_model_when_the_default_file_has_changed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save("out/step-00000004", 4)
    for key, value in (("n_expert", 8), ("norm_eps", 0.1), ("name", "MoE-new")):
        edit_yaml("model_config.yaml", key, value)
    resumed = set_up_here(*RESUMED)
    assert resumed.start_step == 4 and resumed.settings.model_config == folder / "model_config.yaml"
    assert (resumed.config.n_expert, resumed.config.norm_eps, resumed.config.name) == (4, 1e-5, "MoE-tiny")
    (line,) = told(capsys, "The model is")
    assert line == (
        "The model is that of out/step-00000004/model_config.yaml, not of model_config.yaml, which differs: "
        "norm_eps 1e-05 (there 0.1); n_expert 4 (there 8)."
    )
    # a plan is of the same run, and a checkpoint elsewhere has its model too
    assert plan_text(set_up_here(*RESUMED, "--plan")).startswith("Model   MoE-tiny: ")
    more = set_up_here("--resume", "out/step-00000004", "--out_dir", "more")
    assert more.config.n_expert == 4 and len(told(capsys, "The model is that of out/step-00000004")) == 2


def test_a_model_that_is_named_must_be_that_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    save("out/step-00000004", 4)
    edit_yaml("model_config.yaml", "norm_eps", 0.1)
    why = "model_config.yaml: norm_eps was 1e-05, now 0.1; resume with what it was"
    assert why in refused(*RESUMED, *NAMED)
    # settings that name the model's file name it as well as a flag does
    Path("mine.yaml").write_bytes(Path("model_config.yaml").read_bytes())
    edit_yaml("train_config.yaml", "model_config", "mine.yaml")
    assert why in refused(*RESUMED)
    assert not told(capsys, "The model is")


@pytest.mark.parametrize("flags", [RESUMED, ()])
def test_where_nothing_is_resumed_the_default_file_counts(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_yaml("model_config.yaml", "n_expert", 8)
    assert set_up_here(*flags).config.n_expert == 8
    assert not told(capsys, "The model is")


def test_a_default_file_that_is_the_model_s_is_not_worth_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    save("out/step-00000004", 4)
    open_vocabulary = {key: value for key, value in TINY_CONFIG.items() if key != "padded_vocab_size"}
    for values in (TINY_CONFIG, open_vocabulary | {"vocab_size": "auto"}):
        Path("model_config.yaml").write_text(yaml.dump(values), encoding="utf-8")
        assert set_up_here(*RESUMED).config.vocab_size == 512
    assert not told(capsys, "The model is")
    # a number is compared
    edit_yaml("model_config.yaml", "vocab_size", 1024)
    assert set_up_here(*RESUMED).config.padded_vocab_size == 512
    assert told(capsys, "The model is")[0].endswith(
        "vocab_size 512 (there 1024); padded_vocab_size 512 (there 1024)."
    )


def test_a_default_file_that_cannot_be_read_holds_no_resume_up(capsys: pytest.CaptureFixture[str]) -> None:
    save("out/step-00000004", 4)
    edit_yaml("model_config.yaml", "n_expert", 0)
    assert set_up_here(*RESUMED).start_step == 4
    (line,) = told(capsys, "The model is")
    assert (
        "out/step-00000004/model_config.yaml, not of the default, which cannot be read: model_config" in line
    )


def test_a_checkpoint_s_model_is_read_as_a_stranger_s(capsys: pytest.CaptureFixture[str]) -> None:
    path = save("out/step-00000004", 4) / "model_config.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "hf_config: &a {}\nrope_adjustments: *a\n", "utf-8")
    assert "out/step-00000004/model_config.yaml" in (text := refused(*RESUMED)) and "alias" in text


@pytest.mark.usefixtures("eager")
def test_what_a_resumed_run_saves_is_its_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--max_tokens", 1024, "--schedule.name", "constant") == 0
    edit_yaml("model_config.yaml", "rope_base", 5000)
    for n_steps in (5, 6):
        flags = ("--max_tokens", n_steps * 256, "--schedule.name", "constant", "--resume", "auto")
        assert run(*flags) == 0
        saved = Path("out/final/model_config.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(saved)["rope_base"] == 10000
        assert told(capsys, "The model is")[0].endswith("rope_base 10000 (there 5000).")


def test_what_the_settings_leave_out_or_keep_less_of_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    init_args = {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": init_args}
    save("out/step-00000004", 4, optimizer=optimizer, checkpoints={"keep_last": None})
    edit_yaml("train_config.yaml", "checkpoints.keep_last", 2)
    edit_yaml("train_config.yaml", "eval.max_iters", 3)
    set_up_here(*RESUMED)
    (line,) = told(capsys, "Changed since")
    assert "optimizer.init_args.betas [0.9, 0.95] -> not set" in line and "init_args.lr" not in line
    assert "checkpoints.keep_last None -> 2" in line and "eval.max_iters 100 -> 3" in line


# --- the defaults -------------------------------------------------------------------------------------------


def chosen(has_cuda: bool, resumed: str | None, **named: str) -> tuple[str, str]:
    given = {key: (path, f"--{key}") for key, path in named.items()}
    pair = choose_configs(given, lambda: has_cuda, lambda _: True, resumed=resumed)
    return pair[0].name, pair[1].name


@pytest.mark.parametrize("has_cuda", [True, False])
def test_a_run_that_goes_on_keeps_the_defaults_of_its_model_on_any_machine(
    has_cuda: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, demo = ("train_config.yaml", "model_config.yaml"), ("demo_train.yaml", "demo_model.yaml")
    assert chosen(has_cuda, "MoE-200M") == chosen(has_cuda, "mine") == usual
    assert chosen(has_cuda, "MoE-4M") == demo
    assert chosen(has_cuda, None) == (usual if has_cuda else demo)
    # only that of the fresh start trains the demo for want of a GPU
    assert len(told(capsys, "No CUDA")) == (not has_cuda)


def test_the_model_of_the_run_is_known_before_the_files_are_chosen() -> None:
    shutil.move(save("out/step-00000004", 4), "checkpoints/step-00000004")
    for given, name in (
        ({"resume": ("auto", "")}, "MoE-tiny"),
        ({"resume": (True, "")}, "MoE-tiny"),
        ({"resume": ("checkpoints/step-00000004", "")}, "MoE-tiny"),
        ({"resume": ("auto", ""), "out_dir": ("more", "")}, None),
        ({"resume": ("absent", "")}, None),
        ({"resume": (False, "")}, None),
        ({}, None),
    ):
        assert resumed_model(given) == name
    Path("checkpoints/step-00000004/model_config.yaml").write_text("[", encoding="utf-8")
    assert resumed_model({"resume": ("auto", "")}) is None
