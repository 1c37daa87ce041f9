"""What others put into a run's out_dir under names that the run uses: it stays as it is."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import assert_same_run, run

from litgpt_moe.checkpoints.layout import checkpoints_of, others_of
from litgpt_moe.checkpoints.reader import checkpoint_flaw

pytestmark = pytest.mark.usefixtures("eager", "workspace")


def export_to(name: str) -> Path:
    """Write an export of a model, without a file of a checkpoint."""
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def told(name: str) -> str:
    return f"{name} is no checkpoint, but has a name under which this run saves; move it elsewhere"


@pytest.mark.parametrize("name", ["out/step-00000050", "out/final"])
def test_an_export_among_the_checkpoints_is_neither_renamed_nor_counted(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--max_tokens", 1024) == 0
    shutil.rmtree("out/final")
    export_to(name)
    before = snapshot(Path("out"))
    for flags in (["--resume", "auto"], ["--overwrite"], []):
        assert run(*flags) == 2
        assert told(name) in capsys.readouterr().err.replace("\\", "/")
    assert snapshot(Path("out")) == before
    assert checkpoints_of(Path("out")) == [Path("out/step-00000004")]
    assert others_of(Path("out")) == [Path(name)]


def test_an_export_that_comes_during_a_run_is_kept_in_the_checkpoint(at_step: Callable) -> None:
    at_step(3, lambda: [export_to("out/step-00000004"), export_to("out/step-00000099")])
    # the export is no newest checkpoint, beside which all others are old
    assert run("--checkpoints.keep_last", 1) == 0
    assert Path("out/step-00000008").is_dir() and checkpoint_flaw(Path("out/step-00000008")) is None
    assert Path("out/step-00000004/model.safetensors").read_bytes() == b"weights"
    assert Path("out/step-00000099/model.safetensors").read_bytes() == b"weights"
    assert checkpoint_flaw(Path("out/step-00000004")) is None


def test_overwrite_deletes_what_the_run_wrote_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out_dir", "whole") == 0
    assert run("--max_tokens", 1024) == 0
    for name in ("out/final/notes.txt", "out/logs/mine.log", "out/logs/csv/mine.csv"):
        Path(name).write_text("mine", encoding="utf-8")
    before = snapshot(Path("out"))
    assert run("--overwrite") == 2
    words = "out/final/notes.txt is not the run's, and --overwrite would delete it; move it elsewhere"
    assert words in capsys.readouterr().err.replace("\\", "/") and snapshot(Path("out")) == before
    Path("out/final/notes.txt").unlink()
    assert run("--overwrite") == 0
    assert_same_run("out", "whole")
    for name in ("out/logs/mine.log", "out/logs/csv/mine.csv"):
        assert Path(name).read_text(encoding="utf-8") == "mine"
