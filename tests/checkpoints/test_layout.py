"""Names of checkpoints, which of them is found, and the record that says what a whole one holds."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from litgpt_moe.checkpoints.layout import (
    CheckpointArgs,
    checkpoints_of,
    find_checkpoint,
    read_files,
    read_record,
    recorded_files,
    step_name,
    step_of,
    write_record,
)


def make(folder: Path, step: int | None = None) -> Path:
    """A directory with the two files that a checkpoint has, and a record where `step` is given."""
    folder.mkdir(parents=True)
    (folder / "lit_model.pth").write_bytes(b"weights")
    (folder / "model_config.yaml").write_text("n_layer: 2\n", encoding="utf-8")
    if step is not None:
        write_record(folder, step, {})
    return folder


# --- names --------------------------------------------------------------------------------------------------


def test_a_step_has_the_name_that_litgpt_s_loop_gives() -> None:
    assert step_name(100) == "step-00000100"
    assert step_name(123_456_789) == "step-123456789"


@pytest.mark.parametrize("step", [0, 7, 100, 99_999_999, 100_000_000, 10**15])
def test_a_name_gives_its_step_back(step: int) -> None:
    assert step_of(Path("out", step_name(step))) == step


@pytest.mark.parametrize(
    "name",
    [
        "step-best",
        "step-100",
        "step-000000100",
        "step-0000010x",
        "step-00000100.old",
        ".step-00000100.tmp",
        "superseded-step-00000100",
        "step-\u0660\u0660\u0660\u0660\u0660\u0661\u0660\u0660",  # decimal digits, not those that we write
        "logs",
    ],
)
def test_another_name_is_no_step(name: str) -> None:
    assert step_of(Path("out", name)) is None


def test_final_has_the_step_of_its_record(tmp_path: Path) -> None:
    final = make(tmp_path / "final")
    assert step_of(final) is None
    write_record(final, 390, {})
    assert step_of(final) == 390
    (final / "checkpoint.json").write_text("{", encoding="utf-8")
    assert step_of(final) is None


def test_the_last_step_comes_first_and_a_name_of_somebody_s_own_is_not_counted(tmp_path: Path) -> None:
    for name in ("step-00000020", "step-00000100", "step-123456789", "step-best", "logs"):
        (tmp_path / name).mkdir()
    make(tmp_path / "final", step=100)
    names = [path.name for path in checkpoints_of(tmp_path)]
    assert names == ["step-123456789", "step-00000100", "final", "step-00000020"]


def test_a_final_without_a_step_comes_last(tmp_path: Path) -> None:
    make(tmp_path / "final")
    make(tmp_path / "step-00000004")
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-00000004", "final"]


def test_a_checkpoint_is_found_by_its_folder_its_file_or_its_parent(tmp_path: Path) -> None:
    for name in ("step-00000100", "step-00000900"):
        make(tmp_path / name)
    assert find_checkpoint(tmp_path / "step-00000100") == tmp_path / "step-00000100"
    assert find_checkpoint(tmp_path / "step-00000100" / "lit_model.pth").name == "step-00000100"
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000900"
    (tmp_path / "step-00000900" / "lit_model.pth").unlink()
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000100"
    make(tmp_path / "final")
    assert find_checkpoint(tmp_path) == tmp_path / "final"


def test_a_checkpoint_that_lost_a_file_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path / "step-00000100", step=100)
    make(tmp_path / "step-00000900", step=900)
    with (tmp_path / "step-00000900/lit_model.pth").open("ab") as file:
        file.write(b"more")
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000100"
    (tmp_path / "step-00000100/lit_model.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-00000900.*it has 11 bytes, checkpoint\.json says 7"):
        find_checkpoint(tmp_path)


def test_no_checkpoint_is_told_with_the_place(tmp_path: Path) -> None:
    make(tmp_path / "step-best")
    with pytest.raises(FileNotFoundError, match="holds no lit_model"):
        find_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint directory"):
        find_checkpoint(tmp_path / "absent")
    for step in (100, 200):
        make(tmp_path / f"step-00000{step}")
    with pytest.raises(FileNotFoundError, match=r"has step-00000200, step-00000100$"):
        find_checkpoint(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; name a checkpoint directory"):
        find_checkpoint(tmp_path / "file")


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        (CheckpointArgs(), [3, 4, 5, 6]),
        (CheckpointArgs(keep_last=1), []),
        (CheckpointArgs(keep_last=1, keep_every=3), [3, 6]),
    ],
)
def test_what_is_kept_for_good(args: CheckpointArgs, kept: list[int]) -> None:
    assert [step for step in (3, 4, 5, 6) if args.keeps(step)] == kept


# --- checkpoint.json ----------------------------------------------------------------------------------------


def test_the_record_has_the_size_and_digest_of_every_file(tmp_path: Path) -> None:
    write_record(make(tmp_path / "final"), 7, {}, selection_bias=True)
    record = read_record(tmp_path / "final")
    assert (record["format"], record["step"], record["selection_bias"]) == (1, 7, True)
    assert set(record["files"]) == {"lit_model.pth", "model_config.yaml"}
    assert record["files"]["lit_model.pth"] == {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert json.loads((tmp_path / "final/checkpoint.json").read_text(encoding="utf-8")) == record


def test_a_checkpoint_of_litgpt_s_own_has_no_record(tmp_path: Path) -> None:
    assert read_record(make(tmp_path / "final")) == {}
    assert recorded_files(tmp_path / "final") == {}


ENTRY = {"bytes": 7, "sha256": ""}
GOOD = {"format": 1, "step": 4, "files": {"lit_model.pth": ENTRY}}
RECORDS = {
    "no JSON": "{",
    "a list": "[]",
    "brackets": "[" * 100_000,
    "a megabyte": json.dumps({**GOOD, "notes": "x" * 2**20}),
    "another format": json.dumps({**GOOD, "format": 2}),
    "no weights": json.dumps({**GOOD, "files": {}}),
    "text as size": json.dumps({**GOOD, "files": {"lit_model.pth": {"bytes": "7", "sha256": ""}}}),
    "a step that is text": json.dumps({**GOOD, "step": "4"}),
    "a negative step": json.dumps({**GOOD, "step": -4}),
    "true as step": json.dumps({**GOOD, "step": True}),
}


@pytest.mark.parametrize("text", RECORDS.values(), ids=RECORDS.keys())
def test_a_damaged_record_is_told_in_one_sentence(text: str, tmp_path: Path) -> None:
    make(tmp_path / "final")
    (tmp_path / "final/checkpoint.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged or not a checkpoint's") as caught:
        read_record(tmp_path / "final")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_record_that_is_a_pipe_is_damage_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(make(tmp_path / "final") / "checkpoint.json")
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged .*\(it is no file\)"):
        read_record(tmp_path / "final")


@pytest.mark.parametrize("name", ["../lit_model.pth", "/etc/passwd", "C:\\x", "..", ".", ""])
def test_a_record_that_lists_a_file_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "final")
    content = {**GOOD, "files": {**GOOD["files"], name: ENTRY}}
    (folder / "checkpoint.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="not a file of its folder"):
        recorded_files(folder)


def test_files_that_are_there_are_read_and_others_left_out(tmp_path: Path) -> None:
    make(tmp_path / "final")
    assert read_files(tmp_path / "final", ("lit_model.pth", "absent")) == {"lit_model.pth": b"weights"}


def test_the_settings_of_a_run_import_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'litgpt'}"
    code = f"import litgpt_moe.checkpoints.layout, sys; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
