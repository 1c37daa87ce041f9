"""Start each script of the project in this one process and write what it did to stdout, as JSON.

Run: python tests/helpers/start_scripts.py '["run_train.py", "--help"]'... (a path alone imports the script)
A process for each would take minutes. A package that is not in LIGHT is reported and not imported.
"""

import contextlib
import io
import json
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
# what litgpt_moe.cli, litgpt_moe.files and the settings need: imported in a tenth of a second
LIGHT = {"colorama", "docstring_parser", "filelock", "tqdm", "yaml"}


class Watch:
    """An import hook that stops every package from outside that is not light, and remembers its name."""

    def __init__(self) -> None:
        self.heavy: list[str] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = name.partition(".")[0]
        if "." in name or top in LIGHT or top in sys.stdlib_module_names:
            return None  # found as usual
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or "site-packages" not in (spec.origin or ""):
            return None  # ours, or not there
        self.heavy.append(top)
        raise ImportError(f"{top} is imported before the script knows that it is needed")


def start(script: str, args: list[str], watch: Watch) -> dict[str, object]:
    """Return the exit status, what was printed, and the heavy packages that the script asked for."""
    before, path, watch.heavy = set(sys.modules), sys.path.copy(), []
    out, err, status = io.StringIO(), io.StringIO(), None
    # a script that is only imported must not read the flag
    sys.argv = [script, *(args or ["--no_such_flag"])]
    sys.path[0] = str(Path(script).parent)  # as for `python SCRIPT`
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__" if args else "imported")
        except SystemExit as end:
            status = end.code
        except (ImportError, FileNotFoundError) as error:
            status = f"{type(error).__name__}: {error}"
    for name in set(sys.modules) - before:  # two folders may each have a generate.py
        file = getattr(sys.modules[name], "__file__", None) or ""
        if Path(file).is_relative_to(ROOT) and not name.startswith("litgpt_moe") and name in sys.modules:
            del sys.modules[name]
    sys.path[:] = path
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "heavy": watch.heavy}


def main(jobs: list[str]) -> None:
    """Start each script in turn."""
    watch = Watch()
    sys.meta_path.insert(0, watch)
    results = {}
    for job in jobs:
        script, *args = json.loads(job)
        results[job] = start(script, args, watch)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
