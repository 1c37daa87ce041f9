"""Check and measure everything that needs a GPU: the tests marked gpu, both benchmarks, a short real run.

Run: uv run python tools/measure_gpu.py     (with CUDA; not timed yet, perhaps half an hour)

The benchmarks' JSON lies beside their scripts with the GPU in its name, to be committed; so does this one's
own, with each command, its seconds and its status. A failure does not keep the rest from being measured.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from litgpt_moe.cli import FlagParser

ROOT = Path(__file__).resolve().parents[1]

MODELS = {"30m": "configs/moe_30m_debug.yaml", "200m": "configs/moe_200m.yaml"}


def commands(out: Path) -> list[list[str]]:
    """Return the commands, the quickest to fail first."""
    from tools.machine import results_path

    train = results_path(str(ROOT / "tools/benchmark_train.py"), "cuda")
    steps = [
        ["-m", "pytest", "-m", "gpu"],
        ["tools/benchmark_moe.py", "--tokens", "16384", "--rounds", "20"],
    ]
    for name, config in MODELS.items():
        size = ["--micro_batch_size", "16", "--steps", "20"]
        path = train.with_stem(f"{train.stem}_{name}")
        steps.append(["tools/benchmark_train.py", "--model_config", config, *size, "--out", str(path)])
    demo = ["--model_config", "configs/demo_model.yaml", "--config", "configs/demo_train.yaml"]
    steps.append(["run_train.py", *demo, "--out_dir", str(out / "demo")])
    return steps


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 if a command failed; 2 without a GPU."""
    FlagParser(prog="tools/measure_gpu.py", description=__doc__).parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("error: this torch sees no CUDA device; tools/env_sanity_check.py tells more", file=sys.stderr)
        return 2
    from tools.machine import machine, results_path

    done = []
    with tempfile.TemporaryDirectory() as folder:
        for command in commands(Path(folder)):
            print("\n>", *command, flush=True)
            started = time.perf_counter()
            status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
            seconds = round(time.perf_counter() - started, 1)
            done.append({"command": command, "status": status, "seconds": seconds})
            text = json.dumps({"machine": machine(), "commands": done}, indent=1)
            results_path(__file__, "cuda").write_text(text + "\n", encoding="utf-8")
    return int(any(entry["status"] for entry in done))


if __name__ == "__main__":
    raise SystemExit(main())
