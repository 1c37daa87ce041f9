"""Check and measure everything that needs a GPU: the tests marked gpu, both benchmarks, a short real run.

Run: uv run python tools/benchmarks/measure_gpu.py     (with CUDA; not timed yet, perhaps half an hour)

The benchmarks' JSON lies in results/ with the GPU in its name, to be committed; so does this one's own, with
each command, its seconds and its status. A failure does not keep the rest from being measured.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from litgpt_moe.cli import FlagParser, fail, run_script
from litgpt_moe.files import write_json
from tools.benchmarks.machine import ROOT, machine, results_path

MODELS = {"30m": "configs/moe_30m_debug.yaml", "200m": "configs/moe_200m.yaml"}


def commands(out: Path) -> list[list[str]]:
    """Return the commands, the quickest to fail first."""
    train = results_path(str(ROOT / "tools/benchmarks/train.py"), "cuda")
    steps = [
        ["-m", "pytest", "-m", "gpu"],
        ["tools/benchmarks/layer.py", "--tokens", "16384", "--rounds", "20"],
    ]
    for name, config in MODELS.items():
        size = ["--micro_batch_size", "16", "--steps", "20"]
        path = train.with_stem(f"{train.stem}_{name}")
        steps.append(["tools/benchmarks/train.py", "--model_config", config, *size, "--out", str(path)])
    demo = ["--model_config", "configs/demo_model.yaml", "--config", "configs/demo_train.yaml"]
    steps.append(["run_train.py", *demo, "--out_dir", str(out / "demo")])
    return steps


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 if a command failed; 2 without a GPU."""
    FlagParser(description=__doc__).parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        return fail("this torch sees no CUDA device; tools/env_sanity_check.py says more", 2)
    done = []
    with tempfile.TemporaryDirectory() as folder:
        for command in commands(Path(folder)):
            print("\n>", *command, flush=True)
            started = time.perf_counter()
            status = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
            seconds = round(time.perf_counter() - started, 1)
            done.append({"command": command, "status": status, "seconds": seconds})
            write_json(results_path(__file__, "cuda"), {"machine": machine(), "commands": done})
    return int(any(entry["status"] for entry in done))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
