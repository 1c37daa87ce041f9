"""The lock file: addresses that hold on every machine, and wheels for Windows. No network, no package."""

import subprocess
from pathlib import Path

import pytest

from tools import lock

HASHED = f"packages/1f/1d/{'0a' * 30}/six-1.17.0-py2.py3-none-any.whl"
LOCK = f"""version = 1

[[package]]
name = "six"
version = "1.17.0"
source = {{ registry = "https://index.example/team/simple/" }}
wheels = [
    {{ url = "https://files.example/some/{HASHED}", hash = "sha256:00", size = 1 }},
]

[[package]]
name = "torch"
source = {{ registry = "tools/torch-cu128.html" }}
wheels = [
    {{ url = "https://download.pytorch.org/whl/cu128/torch-2.10.0-cp312-win_amd64.whl", hash = "sha256:00" }},
]

[[package]]
name = "litgpt-moe"
source = {{ editable = "." }}
dependencies = [
    {{ name = "six", version = "1.17.0", source = {{ registry = "https://index.example/simple" }} }},
]
"""


@pytest.fixture
def lock_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that tools/lock.py takes for the project's root, with a good lock file in it."""
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    (tmp_path / "uv.lock").write_text(lock.rewrite(LOCK), encoding="utf-8")
    return tmp_path


def test_lock_puts_every_address_on_the_mirror() -> None:
    text = lock.rewrite(LOCK)
    assert ".example" not in text
    assert text.count(f'registry = "{lock.MIRROR_SIMPLE}"') == 2
    assert f'url = "https://mirrors.aliyun.com/pypi/{HASHED}", hash' in text


def test_lock_leaves_the_flat_index_and_its_wheels_alone() -> None:
    torch_lines = [line for line in LOCK.splitlines() if "torch" in line]
    assert [line for line in lock.rewrite(LOCK).splitlines() if "torch" in line] == torch_lines


def test_lock_finds_nothing_wrong_with_what_it_wrote() -> None:
    assert lock.find_problems(lock.rewrite(LOCK)) == []


def test_lock_names_the_line_of_another_index() -> None:
    assert lock.find_problems(LOCK)[0].startswith("uv.lock:6: source https://index.example/team/simple/ ")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{ url = "https://proxy.example/packages/six/1.17.0/six.whl" }', "not an address of the mirror"),
        ('source = { git = "https://git.example/six?rev=1" }', "is neither"),
        ('source = { registry = "/opt/wheels/simple" }', "is neither"),
        ('{ name = "torch", index = "file:///home/me/tools/torch-cu128.html" }', "a path of this machine"),
    ],
)
def test_lock_refuses_a_line_that_other_machines_cannot_use(line: str, problem: str) -> None:
    assert problem in lock.find_problems(lock.rewrite(line))[0]


def test_lock_check_ends_in_one_sentence_and_status_1(
    lock_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (lock_folder / "uv.lock").write_text(LOCK, encoding="utf-8")
    assert lock.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("error: uv.lock:6: ")


def test_lock_keeps_the_old_file_when_the_new_one_cannot_be_used(
    lock_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (lock_folder / "uv.lock").read_bytes()

    def uv_with_a_proxy(
        args: list[str], env: dict[str, str], **_: bool
    ) -> subprocess.CompletedProcess[bytes]:
        bad = '    { url = "https://proxy.example/packages/six/six.whl" },\n'
        (lock_folder / "uv.lock").write_text(bad, encoding="utf-8")
        return subprocess.CompletedProcess(args, 0)

    monkeypatch.setattr(lock, "_uv", uv_with_a_proxy)
    assert lock.main([]) == 1
    assert (lock_folder / "uv.lock").read_bytes() == before


# --- wheels for Windows -------------------------------------------------------------------------------------

# the dependencies of a lock file of our own: only what Windows needs must have a wheel there
PACKAGES = """
[[package]]
name = "litgpt-moe"
source = {{ editable = "." }}
dependencies = [{needs}]

[package.optional-dependencies]
bnb = [{{ name = "everywhere" }}]

[[package]]
name = "everywhere"
version = "1.0"
source = {{ registry = "simple" }}
sdist = {{ url = "https://files.example/everywhere-1.0.tar.gz" }}
wheels = [{{ url = "https://files.example/everywhere-1.0-py3-none-any.whl" }}]

[package.optional-dependencies]
fast = [{{ name = "compiled" }}]

[[package]]
name = "compiled"
version = "2.0"
source = {{ registry = "simple" }}
sdist = {{ url = "https://files.example/compiled-2.0.tar.gz" }}
wheels = [{wheels}]

[[package]]
name = "compiled"
version = "2.0+cu128"
source = {{ registry = "tools/flat.html" }}
wheels = [{{ url = "https://files.example/compiled-2.0%2Bcu128-cp312-abi3-win_amd64.whl" }}]
"""
LINUX_WHEEL = "cp312-abi3-manylinux_2_28_x86_64"


def missing(need: str, *tags: str) -> list[str]:
    """What is found where the project needs `need`, and compiled 2.0 has wheels with these tags."""
    wheels = ", ".join(f'{{ url = "https://files.example/compiled-2.0-{tag}.whl" }}' for tag in tags)
    return lock.find_missing_wheels(PACKAGES.format(needs=need, wheels=wheels))


@pytest.mark.parametrize(
    "tags",
    [
        ["py2.py3-none-any"],
        ["py3-none-win_amd64"],
        ["cp38-abi3-win_amd64"],
        ["cp312-cp312-win_amd64", "cp313-cp313-win_amd64"],
        ["cp312-none-win_amd64", "cp313-none-win32.win_amd64"],
    ],
)
def test_lock_is_content_with_wheels_that_both_pythons_on_windows_take(tags: list[str]) -> None:
    assert missing('{ name = "compiled", version = "2.0" }', *tags) == []


@pytest.mark.parametrize(
    ("tags", "pythons"),
    [
        ([LINUX_WHEEL], ["3.12", "3.13"]),
        ([], ["3.12", "3.13"]),
        (["cp312-cp312-win_amd64"], ["3.13"]),
        (["cp313-cp313-win_amd64"], ["3.12"]),
        (["cp312-cp312-win_amd64", "cp313-cp313t-win_amd64"], ["3.13"]),
        (["cp312-cp312-win_amd64", "cp314-abi3-win_amd64"], ["3.13"]),
        (["cp312-cp312-win_arm64", "cp313-cp313-win32"], ["3.12", "3.13"]),
        (["py312-none-win_amd64"], []),
        (["py313-none-win_amd64"], ["3.12"]),
        (["py2-none-any"], ["3.12", "3.13"]),
    ],
)
def test_lock_names_a_package_that_windows_would_have_to_compile(tags: list[str], pythons: list[str]) -> None:
    problems = missing('{ name = "compiled", version = "2.0" }', *tags)
    starts = [f"uv.lock: compiled 2.0 has no wheel for Python {python} on Windows" for python in pythons]
    assert [problem.partition(",")[0] for problem in problems] == starts


@pytest.mark.parametrize(
    ("marker", "pythons"),
    [
        ("sys_platform == 'linux'", []),
        ("sys_platform != 'win32'", []),
        ("platform_machine == 'x86_64' and sys_platform == 'linux'", []),
        ("platform_machine == 'AMD64' or platform_machine == 'x86_64'", ["3.12", "3.13"]),
        ("python_full_version < '3.13'", ["3.12"]),
        ("python_full_version >= '3.13' and (sys_platform == 'win32' or os_name != 'nt')", ["3.13"]),
        ("python_version > '3.9'", ["3.12", "3.13"]),  # as a number: as text, 3.9 would come last
    ],
)
def test_lock_asks_for_a_windows_wheel_only_where_the_marker_does(marker: str, pythons: list[str]) -> None:
    need = f'{{ name = "compiled", version = "2.0", marker = "{marker}" }}'
    problems = missing(need, LINUX_WHEEL)
    assert len(problems) == len(pythons)
    assert all(f"Python {python} " in problem for python, problem in zip(pythons, problems, strict=True))


def test_lock_looks_at_the_version_that_windows_takes() -> None:
    windows = '{ name = "compiled", version = "2.0+cu128", marker = "sys_platform == \'win32\'" }'
    others = '{ name = "compiled", version = "2.0", marker = "sys_platform != \'win32\'" }'
    assert missing(f"{others}, {windows}", LINUX_WHEEL) == []


def test_lock_follows_the_extras_of_a_dependency() -> None:
    assert missing('{ name = "everywhere" }', LINUX_WHEEL) == []
    with_extra = missing('{ name = "everywhere", extra = ["fast"] }, { name = "everywhere" }', LINUX_WHEEL)
    assert len(with_extra) == 2 and "compiled" in with_extra[0]


def test_lock_refuses_a_marker_that_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="does not understand the marker"):
        missing('{ name = "compiled", version = "2.0", marker = "extra == \'x\'" }', LINUX_WHEEL)


def test_lock_check_tells_a_missing_wheel_with_status_1(
    lock_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (lock_folder / "uv.lock").read_text(encoding="utf-8")
    assert "py2.py3-none-any" in text
    text = text.replace("py2.py3-none-any", "cp312-cp312-win_amd64")
    (lock_folder / "uv.lock").write_text(text, encoding="utf-8")
    assert lock.main(["--check"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: uv.lock: six 1.17.0 has no wheel for Python 3.13 on Windows")


def test_lock_check_tells_a_lock_file_with_conflict_marks(
    lock_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (lock_folder / "uv.lock").write_text("<<<<<<< HEAD\nversion = 1\n", encoding="utf-8")
    assert lock.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("error: uv.lock is no TOML: ")


def test_the_committed_lock_file_has_a_wheel_for_windows_of_each_package() -> None:
    text = (Path(lock.__file__).parents[1] / "uv.lock").read_text(encoding="utf-8")
    assert lock.find_missing_wheels(text) == []
    without = lock.find_missing_wheels(text.replace("win_amd64", "win32"))
    assert any(problem.startswith("uv.lock: torch 2.10.0+cu128 has no wheel") for problem in without)
    assert not any("triton" in problem for problem in without)  # for Linux alone, by its marker
