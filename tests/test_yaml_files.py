"""YAML files and values: what YAML reads as something else than it looks like is refused, not converted."""

from pathlib import Path

import pytest

from litgpt_moe.config import MoEConfig
from litgpt_moe.training.parse import read_flags, read_yaml, typed_settings
from litgpt_moe.yaml_files import read_mapping, typed

MISREAD = ["010000", "-010", "00", "0_1", "1:30", "190:20:30", "1:30.5", "!!int '012'"]  # base 8, base 60
READ_AS_THEY_LOOK = {"10": 10, "+10": 10, "1_000": 1000, "0": 0, "0x10": 16, "'16'": 16}


def from_file(text: str) -> object:
    Path("settings.yaml").write_text(f"train:\n  max_tokens: {text}\n", encoding="utf-8")
    return typed_settings(read_yaml(Path("settings.yaml"))).train.max_tokens


def from_flag(text: str) -> object:
    return typed_settings(read_flags(["--train.max_tokens", text])).train.max_tokens


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("text", MISREAD)
def test_a_number_that_yaml_reads_in_another_base_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"settings\.yaml is not readable YAML: line 2 has .* without"):
        from_file(text)
    if text.startswith("!"):
        return
    for give in (lambda: from_file(f"'{text}'"), lambda: from_flag(text)):
        with pytest.raises(ValueError, match=r"max_tokens is '.*'; it must be a whole number .* without"):
            give()
    with pytest.raises(ValueError, match=r"--optimizer\.lr: .* without leading zeros or colons"):
        read_flags(["--optimizer.lr", text])


@pytest.mark.parametrize("text", READ_AS_THEY_LOOK)
def test_a_number_that_is_what_it_looks_like_is_read(text: str) -> None:
    assert from_file(text) == READ_AS_THEY_LOOK[text]
    if not text.startswith("'"):
        assert from_flag(text) == READ_AS_THEY_LOOK[text]


def test_a_model_s_number_in_quotes_is_read_in_no_other_base_either() -> None:
    path = Path("model_config.yaml")
    path.write_text("n_layer: '010'\n", encoding="utf-8")
    with pytest.raises(ValueError, match="n_layer is '010'; it must be a whole number, without"):
        typed(read_mapping(path), MoEConfig, path)
    assert typed({"n_layer": "10"}, MoEConfig, path) == {"n_layer": 10}


@pytest.mark.parametrize(("text", "shown"), [("no", "False"), ("2024-01-01", "2024-01-01"), ("0x1f", "31")])
def test_a_text_that_yaml_reads_as_another_type_is_told_with_the_quotes(text: str, shown: str) -> None:
    Path("settings.yaml").write_text(f"out_dir: {text}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"out_dir is {shown}; it must be a path; put it in quotes"):
        typed_settings(read_yaml(Path("settings.yaml")))
    Path("settings.yaml").write_text(f"out_dir: '{text}'\n", encoding="utf-8")
    assert typed_settings(read_yaml(Path("settings.yaml"))).out_dir == Path(text)


@pytest.mark.parametrize(
    "name", ["data_dir", "tokenizer_dir", "out_dir", "initial_checkpoint_dir", "wandb_artifacts_dir"]
)
def test_a_folder_name_that_is_not_utf_8_is_told_as_such(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name}: {name} is .*, which is not UTF-8; rename it"):
        typed_settings(read_flags([f"--{name}", "caf\udce9"]))
