"""Lock the packages with every address on one public mirror. Run: uv run python tools/lock.py (seconds).

`uv lock` writes the addresses of whatever index this machine uses; committed, they would bind the project to
that machine. This tool locks, rewrites the hosts by pattern (the path behind `/packages/` is the same on
every mirror), and checks the result: the addresses, and that each package has a wheel for Windows where it is
needed there (nobody is to need a compiler). To check only, with no network:
uv run --no-project python tools/lock.py --check
(a plain `uv run` would re-lock with this machine's index before the tool starts).
"""

import argparse
import ast
import itertools
import operator
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIRROR_SIMPLE = "https://mirrors.aliyun.com/pypi/simple"
MIRROR_PACKAGES = "https://mirrors.aliyun.com/pypi/packages/"
WHEELS_OF_FLAT_INDEX = "https://download.pytorch.org/whl/"  # what tools/torch-cu128.html links

# the folders named by hash are what mirrors share; a proxy with other paths must not be guessed at
HASHED_PATH = r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{60}/[^/\"]+"
REGISTRY = re.compile(r'registry = "(?:https?|file)://[^"]*/simple/?"')
ARCHIVE = re.compile(rf'url = "[a-z]+://[^"]*?/packages/({HASHED_PATH})"')
SOURCE = re.compile(r'\bsource = \{ (\w+) = "([^"]*)"')
URL = re.compile(r'\{ url = "([^"]*)"')

PYTHONS = ("3.12", "3.13")  # those of requires-python in pyproject.toml
WINDOWS = {
    "sys_platform": "win32",
    "os_name": "nt",
    "platform_system": "Windows",
    "platform_machine": "AMD64",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
}
COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def rewrite(lock_text: str) -> str:
    """Return the lock file's text with every registry address on the mirror; local and torch links stay."""
    lock_text = REGISTRY.sub(f'registry = "{MIRROR_SIMPLE}"', lock_text)
    return ARCHIVE.sub(rf'url = "{MIRROR_PACKAGES}\1"', lock_text)


def find_problems(lock_text: str) -> list[str]:
    """Return one sentence for each line that works on some machines only; [] for a good lock file."""
    lines = enumerate(lock_text.splitlines(), start=1)
    return [f"uv.lock:{number}: {problem}" for number, line in lines if (problem := _line_problem(line))]


def _line_problem(line: str) -> str:
    for kind, place in SOURCE.findall(line):
        is_flat_index = "://" not in place and not Path(place).is_absolute()
        if kind == "registry" and (place == MIRROR_SIMPLE or is_flat_index):
            continue
        if (kind, place) != ("editable", "."):  # the project itself
            return f"source {place} is neither {MIRROR_SIMPLE} nor the local flat index; run tools/lock.py"
    for url in URL.findall(line):
        on_mirror = re.fullmatch(re.escape(MIRROR_PACKAGES) + HASHED_PATH, url)
        if not on_mirror and not url.startswith(WHEELS_OF_FLAT_INDEX):
            return f"{url} is not an address of the mirror ({MIRROR_PACKAGES}...); run tools/lock.py"
    # uv makes the `index` of a requirement absolute (astral-sh/uv issue 15055): it holds in one folder only
    if "file://" in line:
        return (
            "a path of this machine; list the flat index under tool.uv.find-links instead of tool.uv.sources"
        )
    return ""


def find_missing_wheels(lock_text: str) -> list[str]:
    """Return one sentence for each package that would have to be compiled on Windows; [] for a good one."""
    packages = tomllib.loads(lock_text)["package"]
    problems = []
    for python in PYTHONS:
        values = {**WINDOWS, "python_version": python, "python_full_version": python}
        for package in _packages_needed(packages, values):
            wheels = [wheel["url"].rpartition("/")[2] for wheel in package.get("wheels", [])]
            if not any(_fits_windows(wheel, python) for wheel in wheels):
                named = f"{package['name']} {package.get('version', '')}".strip()
                problems.append(
                    f"uv.lock: {named} has no wheel for Python {python} on Windows, where it is needed; lock "
                    "another version of it, or leave it out there by a marker in pyproject.toml"
                )
    return problems


def _packages_needed(packages: list[dict[str, Any]], values: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield each package that the project with all its extras and groups needs where markers see `values`."""
    project = next(package for package in packages if package["source"] == {"editable": "."})
    needs = [*project.get("dependencies", [])]
    for kind in ("optional-dependencies", "dev-dependencies"):
        needs += itertools.chain.from_iterable(project.get(kind, {}).values())
    seen = set()
    while needs:
        need = needs.pop()
        if "marker" in need and not marker_holds(need["marker"], values):
            continue
        # one package, or of several versions the one that is named with the need
        same_name = [package for package in packages if package["name"] == need["name"]]
        package = next(p for p in same_name if need.get("version", p.get("version")) == p.get("version"))
        for extra in ("", *need.get("extra", [])):
            key = (package["name"], package.get("version"), extra)
            if key in seen:
                continue
            seen.add(key)
            if extra:
                needs += package["optional-dependencies"][extra]
            else:
                needs += package.get("dependencies", [])
                yield package


def marker_holds(marker: str, values: dict[str, str]) -> bool:
    """Return whether a marker of the lock file holds, such as "sys_platform == 'win32' and ...".

    Its syntax is that of a Python expression. `packaging` would do the same, but this tool needs no package.
    """
    try:
        return bool(_marker_value(ast.parse(marker, mode="eval").body, values))
    except (SyntaxError, KeyError, TypeError) as error:
        raise ValueError(f"uv.lock: tools/lock.py does not understand the marker {marker!r}") from error


def _marker_value(node: ast.AST, values: dict[str, str]) -> Any:
    match node:
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_marker_value(part, values) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_marker_value(part, values) for part in parts)
        case ast.Compare(left=left, ops=[operation], comparators=[right]):
            return COMPARE[type(operation)](_marker_value(left, values), _marker_value(right, values))
        case ast.Name(id=name):
            return _version_or_text(values[name])
        case ast.Constant(value=str(text)):
            return _version_or_text(text)
    raise KeyError(ast.dump(node))


def _version_or_text(text: str) -> str | tuple[int, ...]:
    """Return "3.13" as (3, 13, 0), which compares as a number, and any other text as it is."""
    if not re.fullmatch(r"\d+(\.\d+){0,2}", text):
        return text
    return (*map(int, text.split(".")), 0, 0)[:3]


def _fits_windows(wheel: str, python: str) -> bool:
    """Return whether Windows (64 bits) with this Python takes a wheel, by the tags in its name (PEP 425)."""
    *_, interpreters, abi, platforms = wheel.removesuffix(".whl").split("-")
    if not {"any", "win_amd64"} & set(platforms.split(".")):
        return False
    minor = int(python.partition(".")[2])
    for kind, digits in re.findall(r"\b(cp|py)3(\d*)\b", interpreters):
        wanted = int(digits or 0)
        if kind == "cp" and wanted == minor and abi in (f"cp3{minor}", "abi3", "none"):
            return True
        if wanted <= minor and abi == ("abi3" if kind == "cp" else "none"):
            return True
    return False


def matches_pyproject() -> bool:
    """Return whether the lock file is what uv would lock with the mirror as its index; asks uv, offline."""
    other_indexes = {"UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX"}
    env = {name: value for name, value in os.environ.items() if name not in other_indexes}
    env["UV_DEFAULT_INDEX"] = MIRROR_SIMPLE
    # a lock file that holds is accepted from its own metadata; only a stale one makes uv look for packages
    return _uv(["lock", "--check", "--offline", "--quiet"], env, quiet=True).returncode == 0


def _uv(args: list[str], env: dict[str, str], quiet: bool = False) -> subprocess.CompletedProcess[bytes]:
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` tells its own path in UV
    if uv is None:
        raise FileNotFoundError("uv is not on PATH; install it with: pip install uv")
    return subprocess.run([uv, *args], cwd=ROOT, env=env, capture_output=quiet, check=False)


def lock(upgrade: bool) -> list[str]:
    """Lock, rewrite and return the problems left; with any, uv.lock stays as it was."""
    path = ROOT / "uv.lock"
    before = path.read_text(encoding="utf-8") if path.exists() else None
    if _uv(["lock", *(["--upgrade"] if upgrade else [])], dict(os.environ)).returncode != 0:
        return ["uv lock failed; its message is above"]
    after = rewrite(path.read_text(encoding="utf-8"))
    problems = find_problems(after) or find_missing_wheels(after)
    if (text := before if problems else after) is not None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    return problems


def main(argv: list[str] | None = None) -> int:
    """Lock (or only check) and return 0 when uv.lock is fit to commit, 1 when not."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--check", action="store_true", help="check uv.lock, change nothing, use no network")
    add("--upgrade", action="store_true", help="take the newest allowed version of every package")
    args = parser.parse_args(argv)
    try:
        if args.check:
            text = (ROOT / "uv.lock").read_text(encoding="utf-8")
            problems = find_problems(text) or find_missing_wheels(text)
        else:
            problems = lock(args.upgrade)
        if not problems and not matches_pyproject():
            problems = ["uv.lock does not match pyproject.toml; run: uv run python tools/lock.py"]
    except tomllib.TOMLDecodeError as error:  # conflict marks of git, for instance
        problems = [f"uv.lock is no TOML: {error}"]
    except (OSError, ValueError) as error:
        problems = [str(error)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        print(f"error: {problems[0]}{more}", file=sys.stderr)
        return 1
    wheels = f"wheels for Windows with Python {' and '.join(PYTHONS)}"
    fit = f"uv.lock is fit to commit: packages from {MIRROR_SIMPLE}, {wheels}, in step with pyproject.toml"
    try:
        print(fit, flush=True)
    except OSError as error:
        print(f"error: standard output could not be written ({error.strerror})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
