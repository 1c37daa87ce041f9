"""A throw-away environment for measure_gpu.py: this Python's packages, and before them those of a folder.

The standard library alone: what the other files need may be in the wheels.
"""

import importlib.util
import site
import subprocess
import sys
import venv
from pathlib import Path


class CannotInstall(Exception):
    """The environment cannot be made; the text says why."""


def make_environment(folder: Path, wheels: Path) -> Path:
    """Return the Python of a new environment in `folder`; CannotInstall with the last line of pip's.

    The wheels are installed without what they need: their `torch<2.11` must not keep this Python's torch
    away, and of an index there is none.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise CannotInstall(f"--wheels {wheels}: there is no .whl in it; fill it with pip download")
    venv.create(folder, system_site_packages=True, symlinks=sys.platform != "win32")
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    # system_site_packages means the Python under a virtual environment, not that environment itself
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(_run([python, "-c", ask]).strip())
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    lines = [f"import site; site.addsitedir({each!r})" for each in folders]
    (own / "packages_of_the_parent.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if importlib.util.find_spec("pip") is None:
        _run([python, "-m", "ensurepip"])
    install = ["install", "--no-index", "--no-deps", "--ignore-installed", "--no-compile", "--quiet"]
    _run([python, "-m", "pip", "--disable-pip-version-check", *install, *files])
    return python


def _run(command: list[object]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise CannotInstall(f"the environment for the wheels cannot be made: {lines[-1]}")
    return done.stdout
