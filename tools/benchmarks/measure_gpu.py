"""Check and measure on a GPU all that needs one, in ten minutes: what tells most comes first.

Run: uv run python tools/benchmarks/measure_gpu.py     (10 min with CUDA; --device cpu rehearses it in 3)

The first minute tells whether training works and is right: compiled, eager and the CPU must agree. Then: a
step that must not wait for the device, a short real run, steps of the shipped models with MFU, memory and a
profile, layer and step beside stock LitGPT, Transformers and a dense model, generation, the tests marked gpu.

Each part is a process that is ended at the end of its budget; the others go on after one that fails. Results
are in the JSON as soon as they are known, all output in the .log beside it. Without an install `--wheels DIR`
takes litgpt and what else this Python lacks from wheels (docs/results.md, "On a GPU").
"""

# The standard library alone: what the others need may be in the wheels.
import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.benchmarks.gpu_wheels import CannotInstall, make_environment

MODULE = "tools.benchmarks.measure_gpu"


def with_wheels(wheels: Path, minutes: float, argv: list[str]) -> int:
    """Do all in a throw-away environment that has the wheels; return the exit status."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            python = make_environment(Path(folder), wheels)
        except CannotInstall as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        left = minutes - (time.monotonic() - began) / 60
        # this Python's own packages, not the wheels, are Transformers'
        flags = ["--minutes", f"{left:.2f}"]
        if importlib.util.find_spec("transformers"):
            flags += ["--hf_python", sys.executable]
        root = Path(__file__).parents[2]
        return subprocess.run([str(python), "-m", MODULE, *argv, *flags], cwd=root, check=False).returncode


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 if a part failed or was ended; 2 for bad settings or without a GPU."""
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--wheels", type=Path)
    first.add_argument("--minutes", type=float, default=10.0)
    own, others = first.parse_known_args(argv)
    if own.wheels is not None:
        return with_wheels(own.wheels.resolve(), own.minutes, [_whole(word) for word in others])
    from tools.benchmarks.gpu_run import main as run_parts  # needs the packages

    return run_parts(argv, __doc__)


def _whole(word: str) -> str:
    """Return a path that holds in another folder; other words as they are."""
    return str(Path(word).resolve()) if word.endswith(".json") else word


if __name__ == "__main__":
    raise SystemExit(main())
