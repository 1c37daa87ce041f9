"""The lock of a folder: where the system has locks, where it has none, and where somebody else's is."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from litgpt_moe.locks import FolderInUse, locked_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_what_a_process_that_was_killed_left_of_its_identity_is_removed(tmp_path: Path) -> None:
    for name in (".run.123456.tmp", ".run.notes.tmp", "run.123456.tmp"):
        (tmp_path / name).touch()
    with lock(tmp_path):
        pass
    assert names(tmp_path) == [".run.notes.tmp", "run.123456.tmp"]


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
        "from litgpt_moe.locks import locked_folder\n"
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


def test_a_disk_that_can_only_be_read_needs_no_lock(small_disk: Path) -> None:
    (small_disk / ".run.lock").touch()  # of a process that was killed
    read_only = ["mount", "-o", "remount,ro", str(small_disk)]
    if subprocess.run(read_only, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk so")
    with lock(small_disk):
        pass
    assert names(small_disk) == [".run.lock"]


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


@pytest.mark.parametrize("name", [".run.lock", ".run.json", ".run.123456.tmp"])
def test_a_folder_of_somebody_else_in_the_place_of_a_lock_s_file_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis").touch()
    if name == ".run.lock":
        with pytest.raises(FolderInUse, match=r"\.run\.lock is a folder; move it elsewhere"), lock(tmp_path):
            pass
    else:
        with lock(tmp_path):
            pass
    assert names(tmp_path) == [name] and names(tmp_path / name) == ["thesis"]
