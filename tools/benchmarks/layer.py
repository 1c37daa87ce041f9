"""Time one MoE layer: ours, stock LitGPT's, Hugging Face's, and the dense floor of the same active FLOPs.

Run: uv run python tools/benchmarks/layer.py     (--shapes 30M --rounds 5 for a first look)

All variants have the same weights and take turns in every round; a figure is the median over rounds, a
ratio the median of the rounds' ratios. Hugging Face's blocks run in a process and an environment of their
own, which uv makes below --hf_env at the first run: their huggingface-hub is not LitGPT's. What gives another
output than stock is not timed. float32 is TF32 on CUDA, as in training. The JSON, in results/ with the GPU in
its name, holds the machine and the versions too.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from litgpt_moe.cli import run_command, run_script
from tools.benchmarks.machine import ROOT, machine, parse, results_path

SHAPES = {  # n_embd, moe_intermediate_size, n_expert, n_expert_per_token
    "30M": (256, 512, 8, 2),
    "200M": (768, 1536, 8, 2),
    "400M": (1024, 2048, 8, 2),
    "E64": (512, 256, 64, 8),
}
DTYPES = ("float32", "bfloat16")
# glibc returns blocks of 32 MB to the system each time; page faults would then be most of what is measured
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


@dataclass(frozen=True)
class LayerBenchmark:
    """Which layers are timed, on what, and how often."""

    shapes: str = ",".join(SHAPES)
    """Sizes of the layer, of 30M, 200M, 400M and E64 (default all)."""
    dtypes: str = ",".join(DTYPES)
    """Data types, of float32 and bfloat16 (default both)."""
    tokens: int = 2048
    """Tokens in the micro-batch, a multiple of 4."""
    rounds: int = 9
    """Timed rounds, after two that are not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to compute on."""
    only: str = ""
    """Words; only variants that contain one of them, beside stock and dense (default: all)."""
    hf_env: str = str(ROOT / ".hf_env")
    """Environment for Hugging Face's blocks; '' leaves them out."""
    hf_python: str = ""
    """Python that has Transformers 5, in place of --hf_env's (default: none)."""
    out: Path | None = None
    """JSON to write (default: in results/, named by the GPU)."""


def show(title: str, rows: dict[str, Any]) -> None:
    """Print one table."""
    print(f"\n{title}\n{'':34}{'forward':>10}{'+ backward':>12}{'of dense':>10}{'of stock':>10}")
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:34}{row['failed'][:70]}")
        else:
            times = f"{row['forward_ms']:>7.1f} ms{row['forward_backward_ms']:>9.1f} ms"
            print(f"{name:34}{times}{row['of_dense']:>10.2f}{row['of_stock']:>10.2f}", flush=True)


def run(settings: LayerBenchmark) -> Path:
    """Measure, print each table and write the figures so far after each; return where they are."""
    from litgpt_moe.files import write_json
    from litgpt_moe.hardware import pick_device
    from tools.benchmarks import layer_variants
    from tools.benchmarks.hf_blocks import use_tf32

    for flag, given, choices in (("shapes", settings.shapes, SHAPES), ("dtypes", settings.dtypes, DTYPES)):
        if odd := [name for name in given.split(",") if name not in choices]:
            raise ValueError(f"--{flag} {odd[0]!r} is unknown; choose of {', '.join(choices)}")
    if settings.tokens % 4:
        raise ValueError("--tokens must be a multiple of 4")
    device = pick_device(settings.device, "auto")[0].type
    try:
        python = Path(settings.hf_python) if settings.hf_python else None
        if python is None and settings.hf_env:
            python = layer_variants.make_hf_environment(Path(settings.hf_env))
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"--hf_env {settings.hf_env}: {error}; --hf_env '' leaves them out") from None
    use_tf32(device)
    out = settings.out or results_path(__file__, device)
    allocator = {name: os.environ.get(name, "") for name in ALLOCATOR}
    where = {**machine(), "measured_on": device, "allocator": allocator}
    results: dict[str, Any] = {"machine": where, "tokens": settings.tokens, "rounds": settings.rounds}
    for shape in settings.shapes.split(","):
        for dtype in settings.dtypes.split(","):
            case = layer_variants.Case(SHAPES[shape], dtype, device, settings.tokens)
            rows, versions = layer_variants.measure(case, settings.only.split(","), settings.rounds, python)
            where |= versions
            results[f"{shape} {dtype}"] = rows
            show(f"{shape} {case.sizes}, {dtype}, {settings.tokens} tokens, {device}", rows)
            write_json(out, results)
    return out


def main(argv: list[str] | None = None) -> int:
    """Return 0; 2 after a message when something is missing."""
    settings = parse(__doc__, LayerBenchmark, argv)
    if argv is None and sys.platform == "linux" and not ALLOCATOR.keys() <= os.environ.keys():
        # orig_argv: started by -m it is a module, whose path alone is no command
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})
    return run_command(lambda: f"\nWritten to {run(settings)}")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
