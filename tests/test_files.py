"""Files and folders that are complete or absent; what others have beside them stays untouched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt_moe.files import check_no_links, open_whole, write_whole
from litgpt_moe.folders import new_folder, put_in_place, staging_for


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pid_of_a_process_that_has_ended() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --- what others have beside it -----------------------------------------------------------------------------


def test_a_new_folder_touches_nothing_of_others_beside_it(tmp_path: Path) -> None:
    others = [".out.tmp", ".out.old", ".cache.tmp", ".out.litgpt_moe-notes.tmp"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    with new_folder(tmp_path / "out", 0) as staging:
        (staging / "file").touch()
    assert names(tmp_path) == sorted([*others, "out"]) and names(tmp_path / "out") == ["file"]
    assert all((tmp_path / name / "mine").exists() for name in others)


def test_the_staging_folder_of_a_live_export_stays_and_that_of_a_killed_one_goes(tmp_path: Path) -> None:
    ours = staging_for(tmp_path / "out").name
    live, killed = (
        tmp_path / ours.replace(str(os.getpid()), str(pid))
        for pid in (os.getppid(), pid_of_a_process_that_has_ended())
    )
    live.mkdir()
    killed.mkdir()
    with new_folder(tmp_path / "out", 0):
        assert live.exists() and not killed.exists()


def test_a_folder_that_is_replaced_may_have_been_a_link_which_is_not_followed(tmp_path: Path) -> None:
    for name in ("staging", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "final").symlink_to("elsewhere")
    put_in_place(tmp_path / "staging", tmp_path / "final")
    assert names(tmp_path) == ["elsewhere", "final"]
    assert names(tmp_path / "final") == ["staging"] and names(tmp_path / "elsewhere") == ["elsewhere"]


# --- links --------------------------------------------------------------------------------------------------


def test_a_staging_folder_that_is_a_link_of_somebody_else_s_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / staging_for(tmp_path / "out").name).symlink_to("elsewhere")
    with new_folder(tmp_path / "out", 0) as staging:
        (staging / "file").touch()
    assert names(tmp_path) == ["elsewhere", "out"] and names(tmp_path / "elsewhere") == []


def test_a_file_replaces_a_link_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept", encoding="utf-8")
    (tmp_path / "file").symlink_to("elsewhere")
    write_whole(tmp_path / "file", "new")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "elsewhere").read_text(encoding="utf-8") == "kept"


def test_a_file_is_never_written_into_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.randbelow", lambda _: 7)
    (tmp_path / "elsewhere").write_text("kept", encoding="utf-8")
    (tmp_path / "file.7.tmp").symlink_to("elsewhere")
    with pytest.raises(FileExistsError), open_whole(tmp_path / "file"):
        pass
    assert (tmp_path / "elsewhere").read_text(encoding="utf-8") == "kept"
    assert (tmp_path / "file.7.tmp").is_symlink()


def test_a_link_or_a_pipe_among_what_is_to_be_written_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "run.json").touch()
    check_no_links(folder, *folder.iterdir(), tmp_path / "absent")
    (folder / "spikes.csv").symlink_to("absent")
    with pytest.raises(ValueError, match=r"spikes\.csv is a link .*; delete it"):
        check_no_links(folder, *folder.iterdir())
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
        with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
            check_no_links(folder / "pipe")
