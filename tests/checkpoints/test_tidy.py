"""What a killed process or an earlier run leaves, a checkpoint of bare weights, and what a state holds."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY_CONFIG
from litgpt.model import GPT

from litgpt_moe.checkpoints.overwrite import delete_run
from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.checkpoints.state import non_finite, tensor_bytes, tensors_of
from litgpt_moe.checkpoints.writer import foreign_files, tidy, write_checkpoint
from litgpt_moe.config import MoEConfig
from litgpt_moe.folders import put_in_place, staging_for

pytestmark = pytest.mark.usefixtures("eager")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_weights(folder: Path) -> None:
    """A checkpoint with its record."""
    model = GPT(MoEConfig(**TINY_CONFIG))
    write_checkpoint(folder, model.state_dict(), model.config, {})


# --- what a killed process leaves ---------------------------------------------------------------------------


def test_what_a_kill_amid_a_save_leaves_is_removed_or_put_back(tmp_path: Path) -> None:
    for name in ("step-00000004", ".step-00000008.tmp", ".final.old", ".step-00000004.old"):
        (tmp_path / name).mkdir()
    tidy(tmp_path, start_step=4)
    # final/ had been moved aside, and the new one had not come
    assert names(tmp_path) == ["final", "step-00000004"]
    staging, aside = staging_for(tmp_path / "step-00000008"), staging_for(tmp_path / "final", "old")
    staging.mkdir()
    (tmp_path / "final").rename(aside)
    tidy(tmp_path, start_step=4)
    assert names(tmp_path) == ["final", "step-00000004"]


class Killed(BaseException):
    """What no handler of ours catches, as a kill or a power cut."""


@pytest.fixture
def killed_amid_deletion(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the first deletion of a folder get as far as all but the tokenizer's files."""

    def begin(folder: Path, **_: bool) -> None:
        monkeypatch.undo()
        for path in folder.iterdir():
            if "tokenizer" not in path.name:
                path.unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", begin)
    yield
    assert shutil.rmtree is not begin


def write_with_tokenizer(folder: Path) -> None:
    model = GPT(MoEConfig(**TINY_CONFIG))
    write_checkpoint(folder, model.state_dict(), model.config, {"tokenizer.json": b"{}"})


@pytest.mark.usefixtures("killed_amid_deletion")
def test_a_kill_while_the_old_checkpoint_is_deleted_leaves_nothing_of_it_in_the_new_one(
    tmp_path: Path,
) -> None:
    for name in ("final", "new"):
        write_with_tokenizer(tmp_path / name)
    before = names(tmp_path / "new")
    (tmp_path / "final/notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(Killed):
        put_in_place(tmp_path / "new", tmp_path / "final", foreign_files)
    assert len(names(tmp_path)) == 2
    tidy(tmp_path, start_step=0)
    assert names(tmp_path) == ["final"] and names(tmp_path / "final") == sorted([*before, "notes.txt"])


@pytest.mark.usefixtures("killed_amid_deletion")
def test_a_kill_while_an_earlier_run_is_deleted_leaves_no_half_of_a_checkpoint(tmp_path: Path) -> None:
    write_with_tokenizer(tmp_path / "step-00000004")
    with pytest.raises(Killed):
        delete_run(tmp_path)
    assert not (tmp_path / "step-00000004").exists()
    tidy(tmp_path, start_step=0)
    assert names(tmp_path) == []


@pytest.mark.usefixtures("killed_amid_deletion")
def test_a_kill_while_the_next_run_tidies_up_leaves_nothing_of_the_old_one_either(tmp_path: Path) -> None:
    write_with_tokenizer(tmp_path / "final")
    write_with_tokenizer(staging_for(tmp_path / "final", "old"))
    before = names(tmp_path / "final")
    with pytest.raises(Killed):
        tidy(tmp_path, start_step=0)
    tidy(tmp_path, start_step=0)
    assert names(tmp_path) == ["final"] and names(tmp_path / "final") == before


def test_the_start_of_a_run_deletes_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    others = [".cache.tmp", ".vim.old", ".step-best.tmp", ".notes.litgpt_moe-0-1.tmp", ".step-4.old"]
    others += [staging_for(tmp_path / "export").name]  # of an export beside it
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".final.tmp").symlink_to(".cache.tmp")
    tidy(tmp_path, start_step=0)
    assert names(tmp_path) == sorted(others)


@pytest.mark.parametrize("is_final_there", [False, True])
def test_a_link_under_a_name_of_ours_is_removed_and_its_folder_stays_as_it_is(
    tmp_path: Path, is_final_there: bool
) -> None:
    (out := tmp_path / "out").mkdir()
    (mine := tmp_path / "mine").mkdir()
    (mine / "thesis.txt").touch()
    if is_final_there:
        write_weights(out / "final")
    for name in (".final.old", ".step-00000004.old", ".step-00000008.tmp"):
        (out / name).symlink_to(mine)
    tidy(out, start_step=4)
    assert names(out) == ["final"] * is_final_there and names(mine) == ["thesis.txt"]


def test_what_was_moved_aside_is_not_put_back_through_a_link(tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    (mine := tmp_path / "mine").mkdir()
    write_weights(out / ".final.old")
    (out / ".final.old/notes.txt").touch()
    (out / "final").symlink_to(mine)
    with pytest.raises(ValueError, match="final is a link"):
        tidy(out, start_step=0)
    assert not names(mine) and "notes.txt" in names(out / ".final.old")


def test_a_save_over_a_link_replaces_the_link_alone(tmp_path: Path) -> None:
    write_weights(mine := tmp_path / "mine")
    (mine / "notes.txt").touch()
    before = names(mine)
    (tmp_path / "final").symlink_to(mine)
    (staging := tmp_path / "new").mkdir()
    put_in_place(staging, tmp_path / "final", foreign_files)
    assert names(mine) == before and not (tmp_path / "final").is_symlink() and not names(tmp_path / "final")


def test_a_step_is_not_renamed_over_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "step-00000008").mkdir()
    (tmp_path / "superseded-step-00000008").symlink_to("nowhere")
    tidy(tmp_path, start_step=4)
    assert names(tmp_path) == ["superseded-step-00000008", "superseded-step-00000008.1"]


def test_steps_after_the_one_resumed_from_are_renamed_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("step-00000004", "step-00000008", "step-best", "superseded-step-00000008"):
        (tmp_path / name).mkdir()
    tidy(tmp_path, start_step=4)
    assert names(tmp_path) == [
        "step-00000004",
        "step-best",
        "superseded-step-00000008",
        "superseded-step-00000008.1",
    ]
    assert "renamed to superseded-step-00000008.1" in capsys.readouterr().err


def test_an_earlier_run_is_deleted_and_what_is_not_its_own_stays(tmp_path: Path) -> None:
    own = ("step-00000004", "superseded-step-00000008", "superseded-step-00000008.1", "final", "logs")
    others = ("notes", "step-best", "superseded-ideas")
    for name in (*own, *others):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000012").touch()
    delete_run(tmp_path)
    assert names(tmp_path) == sorted([*others, "step-00000012"])


def test_of_the_logs_an_earlier_run_wrote_only_its_own_files_are_deleted(tmp_path: Path) -> None:
    own = ("csv/metrics.csv", "spikes.csv", "csv/version_0/metrics.csv", "csv/version_0/hparams.yaml")
    own += ("tensorboard/version_0/events.out.tfevents.1.host.2.0", "tensorboard/version_1/hparams.yaml")
    others = ("csv/version_mine/thesis", "tensorboard/version_0/thesis", "tensorboard/version_mine/thesis")
    others += ("run.json/thesis", "csv/version_0.bak/metrics.csv")
    for name in (*own, *others):
        (tmp_path / "logs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "logs" / name).touch()
    delete_run(tmp_path)
    left = [path.relative_to(tmp_path / "logs") for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.as_posix() for path in left) == sorted(others)
    assert not (tmp_path / "logs/csv/version_0").exists()
    assert not (tmp_path / "logs/tensorboard/version_1").exists()


def test_a_folder_named_as_what_version_0_1_left_stays_if_it_holds_something_else(tmp_path: Path) -> None:
    left = (".step-00000010.tmp/lit_model.pth", ".step-00000010.tmp/checkpoint.123456789012.tmp")
    others = (".step-00000020.tmp/lit_model.pth", ".step-00000020.tmp/thesis", ".final.tmp/thesis")
    for name in (*left, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    tidy(tmp_path, start_step=0)
    assert names(tmp_path) == [".final.tmp", ".step-00000020.tmp"]
    assert names(tmp_path / ".step-00000020.tmp") == ["lit_model.pth", "thesis"]


# --- a checkpoint of bare weights, and what a state holds ---------------------------------------------------


def test_a_checkpoint_of_bare_weights_loads_and_carries_its_files(tmp_path: Path) -> None:
    model = GPT(MoEConfig(**TINY_CONFIG))
    write_checkpoint(tmp_path / "new", model.state_dict(), model.config, {"tokenizer.json": b"{}"})
    assert json.loads((tmp_path / "new/checkpoint.json").read_text(encoding="utf-8"))["step"] == 0
    again = load_model(tmp_path / "new").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
    assert (tmp_path / "new/tokenizer.json").read_bytes() == b"{}"
    with pytest.raises(FileExistsError, match="is not empty"):
        write_checkpoint(tmp_path / "new", model.state_dict(), model.config, {})


def test_tensors_of_a_nested_state_have_dotted_names() -> None:
    state = {"model": {"w": torch.zeros(2)}, "optimizer": [{"m": torch.zeros(3)}], "step": 4}
    assert [(name, t.numel()) for name, t in tensors_of(state)] == [("model.w", 2), ("optimizer.0.m", 3)]
    assert tensor_bytes(state) == 20


def test_the_first_weight_or_moment_that_is_no_number_is_named() -> None:
    model = {"w": torch.zeros(2), "n": torch.zeros(1, dtype=torch.int64)}
    good = {"model": model, "other": torch.tensor([torch.nan])}
    assert non_finite(good) is None
    bad = {**good, "optimizer": {"state": [torch.tensor([0.0, torch.inf])]}}
    assert non_finite(bad) == "optimizer.state.0"


def test_what_somebody_put_into_a_checkpoint_comes_back_from_one_that_was_moved_aside(tmp_path: Path) -> None:
    model = GPT(MoEConfig(**TINY_CONFIG))
    write_checkpoint(tmp_path / "final", model.state_dict(), model.config, {})
    (tmp_path / "final/notes.txt").write_text("mine", encoding="utf-8")
    aside = staging_for(tmp_path / "final", "old")
    (tmp_path / "final").rename(aside.with_name(aside.name.replace(f"-{os.getpid()}.", "-99999999.")))
    # killed between the two renames and the deletion
    write_checkpoint(tmp_path / "final", model.state_dict(), model.config, {})
    tidy(tmp_path, start_step=0)
    assert names(tmp_path) == ["final"]
    assert (tmp_path / "final/notes.txt").read_text(encoding="utf-8") == "mine"
