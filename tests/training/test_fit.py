"""What settings leave open is decided by data, tokenizer and model, and saved as a number."""

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import TINY_CONFIG
from helpers.runs import edit_yaml, refusal, run
from litgpt.config import Config
from litgpt.data import LitData

from litgpt_moe.config import ModelFacts, MoEConfig, model_facts
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.training import batches, fit
from litgpt_moe.training import run as runs
from litgpt_moe.training.settings import TrainArgs

pytestmark = pytest.mark.usefixtures("workspace", "eager")


def open_the_vocabulary() -> None:
    values = {key: value for key, value in TINY_CONFIG.items() if key != "padded_vocab_size"}
    Path("model_config.yaml").write_text(yaml.dump(values | {"vocab_size": "auto"}), encoding="utf-8")


def settled(*flags: object) -> runs.Run:
    return runs.settle(runs.set_up(["--config", "train_config.yaml", *map(str, flags)]))


def saved(folder: str, name: str) -> dict:
    return yaml.safe_load(Path(folder, name).read_text(encoding="utf-8"))


def pass_of(data: Path, block_size: int = 64) -> int:
    return (read_manifest(data)["splits"]["train"]["n_tokens"] - 1) // block_size * block_size


def test_an_open_vocabulary_is_that_of_the_tokenizer_and_is_saved_as_a_number(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_the_vocabulary()
    n_pieces = read_manifest(tiny_data)["tokenizer"]["vocab_size"]
    assert run("--max_tokens", 512) == 0
    told = capsys.readouterr().err
    config = saved("out/final", "model_config.yaml")
    rows = -(-n_pieces // 64) * 64
    n_params = model_facts(MoEConfig.from_file("out/final/model_config.yaml")).total_params
    assert f"MoE-tiny: {n_params:,} parameters" in told
    assert (config["vocab_size"], config["padded_vocab_size"]) == (n_pieces, rows)
    # as stock LitGPT reads it
    assert Config.from_file("out/final/model_config.yaml").padded_vocab_size == rows
    # goes on, also from a checkpoint whose rows are not those of this rule
    assert run("--max_tokens", 1024, "--resume", "auto") == 0


def test_a_checkpoint_s_vocabulary_stays_when_its_run_goes_on(tiny_data: Path) -> None:
    assert run("--max_tokens", 512) == 0
    open_the_vocabulary()
    for flags in (("--resume", "auto"), ("--initial_checkpoint_dir", "out/final", "--out_dir", "other")):
        config = settled("--max_tokens", 1024, *flags).config
        assert (config.vocab_size, config.padded_vocab_size) == (512, 512)


def test_a_vocabulary_has_one_owner(tmp_path: Path) -> None:
    open_the_vocabulary()
    edit_yaml("model_config.yaml", "padded_vocab_size", 640)
    assert "vocab_size is auto but padded_vocab_size is 640; remove that" in refusal()
    edit_yaml("model_config.yaml", "vocab_size", "many")
    assert "vocab_size is 'many'; it must be a whole number" in refusal()


def test_a_tokenizer_that_is_missing_is_trained_with_the_vocabulary_of_the_header(tiny_data: Path) -> None:
    open_the_vocabulary()
    text = Path("model_config.yaml").read_text(encoding="utf-8")
    Path("model_config.yaml").write_text(f"# A model at a vocabulary of 360\n{text}", encoding="utf-8")
    shutil.copytree(
        tiny_data, "data/custom_text", ignore=shutil.ignore_patterns("*.bin", "*.json", "tokenizer")
    )
    edit_yaml("train_config.yaml", "data", {"class_path": "prepare_data.TextShards"})
    assert run("--tokenizer_dir", "data/tokenizer", "--max_tokens", 512) == 0
    n_pieces = read_manifest(Path("data/custom_text"))["tokenizer"]["vocab_size"]
    assert saved("out/final", "model_config.yaml")["vocab_size"] == n_pieces <= 360


@pytest.mark.parametrize(("flags", "passes"), [(["--train.epochs", 2], 2), (["--max_tokens", "auto"], 4)])
def test_a_length_in_passes_is_saved_in_tokens(flags: list, passes: int, tiny_data: Path) -> None:
    whole_steps = passes * pass_of(tiny_data) // 256 * 256
    assert run(*flags, "--global_batch_size", 4, "--eval.final_validation", "false") == 0
    train = saved("out/final", "train_config.yaml")["train"]
    assert (train["max_tokens"], train["epochs"]) == (whole_steps, None)


def test_a_run_that_goes_on_keeps_its_length_unless_it_is_asked_for_passes(tiny_data: Path) -> None:
    assert run("--max_tokens", 1024) == 0
    assert settled("--max_tokens", "auto", "--resume", "auto").settings.train.max_tokens == 1024
    longer = settled("--train.epochs", 1, "--resume", "auto").settings.train.max_tokens
    assert longer == pass_of(tiny_data) // 256 * 256 > 1024


def test_of_two_lengths_the_one_on_the_command_line_holds_and_in_one_place_they_are_refused() -> None:
    assert "train.max_tokens" not in refusal("--train.epochs", 1, "--train.min_lr", -1)
    edit_yaml("train_config.yaml", "train.epochs", 1)
    assert "train.epochs is 1 and train.max_tokens is 2048, two lengths; drop one" in refusal()
    assert settled("--max_tokens", 512).settings.train.max_tokens == 512


def test_many_passes_are_told(capsys: pytest.CaptureFixture[str], tiny_data: Path) -> None:
    settled("--train.epochs", 8)
    assert "passes" not in capsys.readouterr().err
    settled("--train.epochs", 9)
    assert f"9.0 passes through the {pass_of(tiny_data):,} of {tiny_data}" in capsys.readouterr().err


def test_too_little_text_for_a_step_is_told() -> None:
    with pytest.raises(ValueError, match=r"train\.max_tokens is auto, .* less than one step of 1024 x 64"):
        settled("--max_tokens", "auto", "--global_batch_size", 1024)


def test_data_of_another_class_need_a_number() -> None:
    facts = ModelFacts(10**6, 10**6, 6 * 10**6)
    with pytest.raises(ValueError, match="how many tokens LitData has is not known; give"):
        fit.settled_length(TrainArgs(epochs=2), LitData("x"), 64, facts)
    assert fit.settled_length(TrainArgs(max_tokens=512), LitData("x"), 64, facts).max_tokens == 512


def test_the_learning_rate_is_a_number_when_it_runs_and_stays_when_the_run_goes_on() -> None:
    assert run("--max_tokens", 512, "--optimizer.lr", "auto") == 0
    optimizer = saved("out/final", "train_config.yaml")["optimizer"]["init_args"]
    assert optimizer["lr"] == 3e-3
    assert run("--max_tokens", 512, "--optimizer.lr", 0.004, "--out_dir", "other") == 0
    again = settled("--out_dir", "other", "--max_tokens", 1024, "--optimizer.lr", "auto", "--resume", "auto")
    assert again.optimizer["init_args"]["lr"] == again.settings.optimizer["init_args"]["lr"] == 0.004


def test_a_model_with_problems_of_its_own_makes_the_rate_none() -> None:
    edit_yaml("model_config.yaml", "n_layer", 0)
    assert refusal("--optimizer.lr", "auto") == "model_config.yaml: n_layer is 0; choose 1 or more"


def test_a_rule_for_adamw_is_not_used_for_another_optimizer() -> None:
    spec = {"class_path": "torch.optim.SGD", "init_args": {"lr": "auto"}}
    edit_yaml("train_config.yaml", "optimizer", spec)
    assert "optimizer.init_args.lr is auto, a rule for AdamW; give a number for SGD" in refusal()


def test_data_that_change_while_other_processes_wait_are_started_once_more(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_data, "data/copy")
    open_run = runs.set_up(
        ["--config", "train_config.yaml", "--dataset_dir", "data/copy", "--max_tokens", "auto"]
    )
    monkeypatch.setattr(batches, "launcher", lambda: "torchrun")
    monkeypatch.setattr(runs.Run, "world_size", 2)
    batches.prepare_data_of(open_run)
    Path("data/copy/train/more.txt").write_text("One more story.\n" * 9, encoding="utf-8")
    with pytest.raises(ValueError, match="prepared just now, which decides the run; start it once more"):
        batches.prepare_data_of(open_run)
