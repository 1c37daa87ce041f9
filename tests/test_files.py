"""Files and folders that are complete or absent, what of others stays untouched, and locks."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from litgpt_moe.files import (
    FolderInUse,
    check_no_links,
    locked_folder,
    new_folder,
    open_whole,
    put_in_place,
    staging_for,
    write_whole,
)


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


# --- locks --------------------------------------------------------------------------------------------------


def lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    return locked_folder(folder, "run", "a run is live", "wait for it")


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock, as some NFS mounts are."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_locked_folder_keeps_others_out_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with (
        lock(folder),
        pytest.raises(FolderInUse, match=rf"a run is live there \(process {os.getpid()} on "),
        lock(folder),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
def test_where_no_lock_can_be_taken_another_way_keeps_a_second_process_out_and_this_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock(tmp_path):
        assert "takes no locks (No locks available)" in capsys.readouterr().err
        with pytest.raises(FolderInUse, match=rf"a run is live there \(process {os.getpid()} on "):
            lock(tmp_path).__enter__()
    assert names(tmp_path) == []
    with lock(tmp_path):
        pass


@pytest.mark.usefixtures("no_locks")
def test_the_other_way_holds_nobody_up_once_its_process_has_been_killed(tmp_path: Path) -> None:
    code = (
        "import errno, fcntl, os, signal, sys; from pathlib import Path\n"
        "def flock(*_): raise OSError(errno.ENOLCK, 'No locks available')\n"
        "fcntl.flock = flock\n"
        "from litgpt_moe.files import locked_folder\n"
        "held = locked_folder(Path(sys.argv[1]), 'run', '', ''); held.__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    assert names(tmp_path) != []
    with lock(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_lock_file_that_is_a_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    if not hasattr(os, "O_NOFOLLOW"):
        pytest.skip("this system opens links")
    (tmp_path / "elsewhere").touch()
    (tmp_path / ".run.lock").symlink_to("elsewhere")
    with pytest.raises(FolderInUse, match=r"\.run\.lock is a link .*; delete it"), lock(tmp_path):
        pass
    assert names(tmp_path) == [".run.lock", "elsewhere"]


@pytest.fixture
def as_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account without rights, in a working directory of root's that it may write to."""
    if sys.platform == "win32" or os.geteuid() != 0:
        pytest.skip("only root can become another user")
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o777)
    Path("readable").mkdir(mode=0o755)
    Path(".run.lock").touch(mode=0o600)
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.usefixtures("as_nobody")
def test_a_lock_file_of_another_user_is_refused() -> None:
    with pytest.raises(FolderInUse, match=r"\.run\.lock .*Permission denied.*delete it"), lock(Path()):
        pass


@pytest.mark.usefixtures("as_nobody")
def test_a_folder_in_which_nothing_can_be_written_needs_no_lock() -> None:
    with lock(Path("readable")), lock(Path("readable/more")):
        pass
