"""What README.md, CONTRIBUTING.md, SECURITY.md and docs/ say: commands parse, files are there."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ASSETS, OFFLINE, ROOT, start_scripts

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]
NOTEBOOK, DOCKERFILE = ROOT / "docs/notebook.ipynb", ROOT / "docs/Dockerfile"
PAGES += [NOTEBOOK]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = ["uv", "run", "python"]
# what begins with these is not ours to parse
OTHERS = (
    *(["uv", "run", name] for name in ("litgpt", "pre-commit", "wandb")),
    *(["uv", "venv"], ["../newest/bin/python", "-m"], ["bash", ".ci/run"]),
    *(["uv", "pip", "install"], ["git", "clone"], ["cd", "litgpt-moe"], ["mkdir", "-p"]),
    *(["docker", "build", "-f", "docs/Dockerfile"], ["pip", "install", "-q", "uv"]),
    ["PYTHONPATH=tests", "uv", "run", "python", "docs/make_pictures.py"],
)
LAUNCHERS = (["uv", "run", "torchrun"], ["srun"], ["docker", "run"])
LINTERS = (["uv", "run", "ruff"], ["uv", "run", "codespell"], ["uv", "run", "pyright"])
NAMED_FILE = re.compile(
    r"`((?:litgpt_moe|tools|tests|docs|configs|\.ci)/[\w./-]+|[\w]+\.(?:py|yaml|md|toml))(?:::\w+)?`"
)
# what a run, a checkpoint or a data folder holds, or what a link leads to
MADE = re.compile(r"(train_config|checkpoint|manifest|model_config)\.\w+")


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return [text for name, text in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def cells(page: Path) -> list[list[str]]:
    """Return the lines of each cell of code in a notebook, continued ones joined."""
    found = json.loads(page.read_text(encoding="utf-8"))["cells"]
    codes = ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]
    return [code.replace("\\\n", " ").splitlines() for code in codes]


def shell_of(page: Path) -> str:
    """Return the commands that a notebook gives to the shell, one a line."""
    lines = [line.strip() for cell in cells(page) for line in cell]
    return "\n".join(line[1:] for line in lines if line.startswith("!"))


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page as words, what stands around `&&` one by one."""
    found = []
    for block in [shell_of(page)] if page == NOTEBOOK else blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            parts = " ".join("\0" if word == "&&" else shlex.quote(word) for word in words).split("\0")
            found += [shlex.split(part) for part in parts if part.strip()]
    return found


def script_of(command: list[str]) -> tuple[str, list[str]] | None:
    """Return the script that a command starts and its arguments; None if it starts none of ours."""
    if command[:3] == PYTHON and command[3] != "-c":
        return command[3], command[4:]
    if command[:4] == [*PYTHON[:2], "--no-project", "python"]:
        return command[4], command[5:]
    if command[0] == "../cpu/bin/python":
        return command[1], command[2:]
    if any(command[: len(launcher)] == launcher for launcher in LAUNCHERS):
        at = next(i for i, word in enumerate(command) if word.endswith(".py"))
        return command[at], command[at + 1 :]
    return None


def problem_of(command: list[str]) -> str | None:
    """Return what is wrong with a command that starts no script of ours."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    if command[:2] == ["uv", "sync"]:
        unknown = set(command[2:]) - {"--extra", *extras}
        return f"unknown: {unknown}" if unknown else None
    if command[:3] == ["uv", "run", "pytest"]:
        lost = [word for word in command if word.startswith("tests/") and not (ROOT / word).exists()]
        return f"not there: {lost}" if lost else None
    if command[:4] == [*PYTHON, "-c"]:
        ast.parse(command[4])
        return None
    known = (*OTHERS, *LINTERS, ["pip", "install", "uv"])
    return None if any(command[: len(start)] == start for start in known) else "a command of no known kind"


@pytest.fixture(scope="session")
def parsed() -> dict[str, dict]:
    """What each script did with its arguments on a page and --help behind: it reads them, then ends."""
    found = [script_of(command) for page in PAGES for command in commands(page)]
    return start_scripts([ROOT / script, *args, "--help"] for script, args in filter(None, found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_parses(page: Path, parsed: dict[str, dict]) -> None:
    for command in commands(page):
        if started := script_of(command):
            script, args = started
            result = parsed[json.dumps([str(ROOT / script), *args, "--help"])]
            assert (result["status"], result["err"]) == (0, ""), command
        else:
            assert problem_of(command) is None, command


def test_a_wrong_command_is_found() -> None:
    (wrong,) = start_scripts([[ROOT / "generate.py", "--promt", "Tom", "--help"]]).values()
    assert wrong["status"] == 2 and "did you mean --prompt?" in wrong["err"]
    (wrong,) = start_scripts([[ROOT / "generate.py", "--max_tokens", "many", "--help"]]).values()
    assert wrong["status"] == 2
    assert problem_of(["uv", "sync", "--extra", "nothing"]) and problem_of(["make", "all"])
    assert problem_of(["uv", "run", "pytest", "tests/test_nothing.py"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    lost = [link for link in links if not (page.parent / link).exists()]
    names = [name for name in NAMED_FILE.findall(text) if not MADE.fullmatch(name)]
    in_tools = {path.name for path in ROOT.glob("tools/*.py")}
    lost += [name for name in names if not (ROOT / name).exists() and name not in in_tools]
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_example_of_yaml_and_python_can_be_read(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)
    for text in blocks(page, "python"):
        ast.parse(text)


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_every_setting_of_a_run_is_explained() -> None:
    (help_text,) = start_scripts([[ROOT / "run_train.py", "--help_all"]]).values()
    flags = set(re.findall(r"(?<![\w-])--(?:\[no_\])?([a-z][\w.]*)", help_text["out"]))
    flags = {flag for flag in flags if not flag.startswith(("help", "log."))}
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    groups = {flag.partition(".")[0] for flag in flags if "." in flag}
    missing = {flag for flag in flags - groups if f"`{flag}`" not in page and f"--{flag}`" not in page}
    assert len(flags) > 30 and missing == set()


def test_the_notebook_can_be_read() -> None:
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    for cell in whole["cells"]:
        assert cell["id"] and (
            cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
        )
    for cell in cells(NOTEBOOK):
        # what begins with ! or % is not Python
        ast.parse("\n".join(re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in cell))


@pytest.mark.skipif(os.name != "posix", reason="the container's shell is a Linux one")
def test_the_container_starts_the_script_that_is_named() -> None:
    lines = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    (entry,) = (
        json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT")
    )
    on_this_machine = [word.replace("/litgpt-moe/", f"{ROOT}/") for word in entry]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*on_this_machine, "generate.py", "--prompt", "a  b", "--help"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and "Continue a text" in done.stdout
    (flags,) = re.findall(r"uv sync ([^;&]+)", "\n".join(lines))
    assert problem_of(["uv", "sync", *flags.replace("--frozen --no-dev", "").split()]) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (
            ROOT / "README.md",
            {"run_train.py", "generate.py", "evaluate.py", "prepare_data.py", "tools/report.py"},
        ),
        (NOTEBOOK, {"run_train.py", "generate.py", "evaluate.py", "prepare_data.py", "tools/report.py"}),
    ],
    ids=["README.md", "notebook"],
)
def test_the_commands_of_a_page_run(page: Path, expected: set[str], tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "fairytales", tmp_path / "my_stories")
    # a hundredth of the training; the settings are those of the page
    env = {**os.environ, **OFFLINE, "MAX_TOKENS": "20000", "PYTHONUTF8": "1"}
    ran = []
    for command in commands(page):
        started = script_of(command)
        if started and "--serve" not in command and started[0] != "tools/env_sanity_check.py":
            script, args = started
            args = [str(ROOT / arg) if arg.startswith(("configs/", "tests/")) else arg for arg in args]
            done = subprocess.run(
                [sys.executable, str(ROOT / script), *args], cwd=tmp_path, env=env, timeout=300
            )
            assert done.returncode == 0, command
            ran.append(script)
    assert set(ran) == expected
