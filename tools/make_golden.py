"""Write tests/assets/golden_losses.json anew: what eight training steps of the tests' tiny model give.

Run: uv run python tools/make_golden.py     (30 s; only after a change that is meant to change results)
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST = "tests/test_run_train.py::test_eight_steps_give_the_golden_losses"


def main(argv: list[str] | None = None) -> int:
    """Return pytest's status for the golden test, run so that it writes its figures instead of comparing."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args(argv)
    environment = {**os.environ, "WRITE_GOLDEN": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", TEST], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
