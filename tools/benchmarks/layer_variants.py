"""The layers that layer.py compares, and how they are timed."""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from litgpt.model import LLaMAMLP, LLaMAMoE

from litgpt_moe.config import MoEConfig
from litgpt_moe.hardware import avoid_wrong_gradients
from litgpt_moe.kernels.choice import choose_kernel
from litgpt_moe.kernels.triton import has_triton
from moe_layers import MoE
from tools.benchmarks.hf_blocks import check_output, make_input, make_step
from tools.benchmarks.machine import ROOT

BACKENDS = ("eager", "batched_mm", "grouped_mm", "grouped_mm compiled")
HF_VARIANTS = [f"hf {family} {backend}" for family in ("mixtral", "qwen3") for backend in BACKENDS]
WORKER = "import sys, hf_blocks; sys.exit(hf_blocks.serve_steps(*sys.argv[1:]))"
FOLDER = Path(__file__).parent  # of hf_blocks.py
Step = Callable[[], tuple[float, float]]
"""Runs forward and backward once and returns the seconds of both."""


class Case(NamedTuple):
    """What all layers of a table have in common."""

    sizes: tuple[int, int, int, int]
    """n_embd, moe_intermediate_size, n_expert, n_expert_per_token."""
    dtype: str
    device: str
    n_tokens: int


def our_layers(case: Case) -> dict[str, Any]:
    """Return name -> layer for stock, the dense floor and ours, with the same weights."""
    n_embd, width, n_expert, top_k = case.sizes
    widths = {"n_embd": n_embd, "moe_intermediate_size": width, "intermediate_size": width}
    experts = {"mlp_class_name": "LLaMAMoE", "n_expert": n_expert, "n_expert_per_token": top_k}
    kind = {"n_layer": 1, "n_head": 4, "bias": False, "norm_class_name": "RMSNorm"}
    config = MoEConfig(name="layer", **kind, **widths, **experts)
    torch.manual_seed(0)
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    layers = {"stock": LLaMAMoE(config), "dense": LLaMAMLP(config, intermediate_size=width * top_k)}
    layers = {name: layer.to(device, dtype) for name, layer in layers.items()}

    def ours(kernel: str) -> MoE:
        layer = MoE(config).to(device, dtype)
        layer.load_state_dict(layers["stock"].state_dict())
        layer.kernel = kernel
        return layer

    fast = {choose_kernel(config, device, dtype), "segments"}
    if has_triton(device.type, dtype):
        fast.add("triton")
    layers |= {f"ours {kernel}": ours(kernel) for kernel in sorted(fast | {"loop"})}
    avoid_wrong_gradients()
    for kernel in sorted(fast):  # layers of their own: their eager twins must not share their gradients
        layers[f"ours {kernel} compiled"] = torch.compile(ours(kernel), fullgraph=True, dynamic=False)
    return layers


def make_hf_environment(folder: Path) -> Path:
    """Return the Python of an environment with the newest transformers and this torch, made if absent."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        version, _, build = torch.__version__.partition("+")
        print(f"Making {folder} with torch {version} and the newest transformers...", file=sys.stderr)
        subprocess.run(["uv", "venv", "-q", "--python", "3.12", str(folder)], check=True)
        packages = [f"torch=={version}", "transformers>=5", "numpy"]
        if sys.platform == "win32" and build.startswith("cu"):  # where the index has torch for the CPU alone
            packages[0] = f"torch=={torch.__version__}"
            packages += ["--find-links", str(ROOT / "tools/torch-cu128.html")]
        subprocess.run(["uv", "pip", "install", "-q", "--python", str(python), *packages], check=True)
    return python


class HuggingFace:
    """A process that times Hugging Face's blocks one step at a time, when it is asked."""

    def __init__(self, python: Path, case: Case, stock: torch.nn.Module, expected: torch.Tensor) -> None:
        self._folder = tempfile.TemporaryDirectory()
        weights = Path(self._folder.name) / "stock.pth"
        torch.save({"weights": stock.state_dict(), "output": expected}, weights)
        sizes = ",".join(map(str, case.sizes))
        words = (python, "-c", WORKER, weights, sizes, case.dtype, case.device, case.n_tokens)
        self._command = [str(word) for word in words]
        self._start()

    def _start(self) -> None:
        env, pipe = {**os.environ, "HF_HUB_OFFLINE": "1"}, subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, text=True, env=env, cwd=FOLDER
        )
        self.versions = self._answer()

    def step(self, name: str) -> tuple[float, float]:
        """Return the seconds of one forward and backward; RuntimeError with what the block raised."""
        if self._process.poll() is not None:  # the block before took more memory than there is
            self._start()
        print(name, file=self._process.stdin, flush=True)
        answer = self._answer()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return tuple(answer)

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


def measure(
    case: Case, words: list[str], rounds: int, python: Path | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return name -> figures of the variants that contain one of `words`, and Hugging Face's versions."""
    torch._dynamo.reset()
    layers = our_layers(case)
    x = make_input(case.sizes[0], case.dtype, case.device, case.n_tokens)
    with torch.no_grad():
        expected = layers["stock"](x)
    steps: dict[str, Step] = {name: make_step(layer, x) for name, layer in layers.items()}
    hf = HuggingFace(python, case, layers["stock"], expected) if python else None
    if hf:
        steps |= {name: functools.partial(hf.step, name) for name in HF_VARIANTS}
    for name in list(steps):
        if name not in ("stock", "dense") and not any(word in name for word in words):
            del steps[name]
    failures = warm_up(steps, layers, x, expected)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step())
    if hf:
        hf.close()
    failed = {name: {"failed": reason} for name, reason in failures.items()}
    return {**figures(times), **failed}, hf.versions if hf else {}


def warm_up(
    steps: dict[str, Step], layers: dict[str, Any], x: torch.Tensor, expected: torch.Tensor
) -> dict[str, str]:
    """Compile, fill the caches and check; take from `steps` what fails, and return name -> reason."""
    failures = {}
    for name in list(steps):
        try:
            if name.startswith("ours"):
                with torch.no_grad():
                    check_output(layers[name](x), expected)
            for _ in range(2):
                steps[name]()
        except RuntimeError as error:
            failures[name] = str(error).splitlines()[0]
            del steps[name]
    return failures


def figures(times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Return medians in ms, and ratios of speed: above 1 is faster than stock, below 1 slower than dense."""
    totals = {name: [sum(pair) for pair in pairs] for name, pairs in times.items()}

    def ratio(name: str, other: str) -> float:
        pairs = zip(totals[other], totals[name], strict=True)
        return round(statistics.median(theirs / mine for theirs, mine in pairs), 3)

    return {
        name: {
            "forward_ms": round(1000 * statistics.median(pair[0] for pair in pairs), 2),
            "forward_backward_ms": round(1000 * statistics.median(totals[name]), 2),
            "of_dense": ratio(name, "dense"),
            "of_stock": ratio(name, "stock"),
        }
        for name, pairs in times.items()
    }
