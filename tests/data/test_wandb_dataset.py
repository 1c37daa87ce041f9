"""The command wandb_dataset.py: push, pull and verify, their flags, messages and statuses."""

from pathlib import Path

import pytest
from helpers.data import REFERENCE, fingerprint

import wandb_dataset
from litgpt_moe.flags import normalize_flags
from wandb_dataset import main


def test_verify_command_prints_count_and_fingerprint(data_dir, capsys):
    assert main(["verify", "--data-dir", str(data_dir)]) == 0
    out = capsys.readouterr().out
    assert f"3 files match manifest.json; fingerprint {fingerprint(data_dir)}" in out
    assert out.endswith(f"uv run python wandb_dataset.py push --data_dir {data_dir}\n")


def test_verify_command_ends_with_status_1_on_damage(data_dir, capsys):
    (data_dir / "train" / "a.txt").write_bytes(b"")
    assert main(["verify", "--data_dir", str(data_dir)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "not found; run prepare_data.py"), ("{", "damaged"), ('{"splits": {"train": {}}}', "damaged")],
)
def test_a_manifest_that_is_missing_or_damaged_is_one_sentence(data_dir, capsys, content, words):
    path = data_dir / "manifest.json"
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    assert main(["verify", "--data_dir", str(data_dir)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err and words in err and err.count("\n") == 1


def test_offline_push_records_a_run_with_the_real_sdk(data_dir, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["--data-dir", str(data_dir), "--wandb-alias", "first", "--wandb-tag", "small"]) == 0
    sync_dir = Path(capsys.readouterr().out.strip().partition("wandb sync ")[2])
    (record,) = sync_dir.glob("*.wandb")
    assert record.stat().st_size > 0 and sync_dir.is_relative_to(tmp_path / "WANDB_DIR")


def test_push_takes_variables_and_flags_win_over_them(data_dir, monkeypatch):
    pushed = []
    monkeypatch.setattr("litgpt_moe.data.artifact.push", lambda *args: pushed.append(args) or "pushed")
    settings = {"PROJECT": "p", "ENTITY": "e", "DATA_ARTIFACT": "a", "DATA_ALIASES": "x, y", "TAGS": "t"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert main(["push", "--data_dir", str(data_dir), "--wandb-entity", "mine", "--wandb-tag", "u"]) == 0
    ((folder, upload, _),) = pushed
    assert (folder, upload.wandb_project, upload.wandb_entity) == (data_dir, "p", "mine")
    assert (upload.wandb_artifact, upload.wandb_alias, upload.wandb_tag) == ("a", ["x", "y"], ["u"])


def test_a_variable_of_spaces_is_an_empty_one(monkeypatch):
    monkeypatch.setenv("WANDB_ARTIFACTS_DIR", " ")
    monkeypatch.setenv("WANDB_PROJECT", " mine ")
    args = wandb_dataset.build_parser().parse_args([])
    assert (args.wandb_artifacts_dir, args.wandb_project) == (Path("artifacts"), "mine")


def test_push_refuses_a_tokenizer_that_did_not_make_the_shards(data_dir, tmp_path, capsys):
    (data_dir.parent / "tokenizer" / "tokenizer.json").write_text('{"other": 1}', encoding="utf-8")
    told = []
    for flags in ([], ["--tokenizer_dir", str(data_dir.parent / "tokenizer")], ["--tokenizer_dir", "none"]):
        assert main(["push", "--data_dir", str(data_dir), *flags]) == 2
        told.append(capsys.readouterr().err)
    assert f"the tokenizer that made it is not in {data_dir / 'tokenizer'}, nor in a folder beside" in told[0]
    assert "tokenizer.json: not the one that made" in told[1] and "tokenizer.json: not found" in told[2]
    assert all(text.count("\n") == 1 and "with --tokenizer_dir" in text for text in told)


def test_a_wandb_service_that_ends_is_no_success(data_dir, monkeypatch, capsys):
    import wandb

    def fail(**_):
        raise BrokenPipeError("the service has ended")

    monkeypatch.setattr(wandb, "init", fail)
    assert main(["push", "--data_dir", str(data_dir)]) == 1
    assert capsys.readouterr().err.endswith("to W&B: the service has ended\n")


def test_push_without_login_is_one_sentence_and_status_1(data_dir, tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    assert main(["push", "--data_dir", str(data_dir)]) == 1
    err = capsys.readouterr().err
    assert "wandb login" in err and err.count("\n") == 1


def test_pull_without_login_is_one_sentence_and_status_1(tmp_path, monkeypatch, capsys):
    import wandb

    def refuse():
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "Api", refuse)
    assert main(["pull", REFERENCE, "--wandb_artifacts_dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert REFERENCE in err and "wandb login" in err and err.count("\n") == 1


def test_pull_without_a_reference_says_how_to_write_one(monkeypatch, capsys):
    monkeypatch.delenv("WANDB_DATASET_ARTIFACT", raising=False)
    assert main(["pull"]) == 2
    assert "entity/project/name:alias" in capsys.readouterr().err


def test_hyphens_become_underscores_in_flag_names_only():
    values = ["my-data", "datasets--a--b-c", "stood--half-open", "x--y-z=1"]
    given = ["--data-dir", *values, "--train.max-tokens=1-2", "-x", "--", "--once upon-a time"]
    wanted = ["--data_dir", *values, "--train.max_tokens=1-2", "-x", "--", "--once upon-a time"]
    assert normalize_flags(given) == wanted
