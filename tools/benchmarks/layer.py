"""Time one MoE layer: ours, stock LitGPT's, Hugging Face's, and the dense floor of the same active FLOPs.

Run: uv run python tools/benchmark_moe.py     (--shapes 30M --rounds 5 for a first look)

All variants have the same weights and take turns in every round; a figure is the median over rounds, a
ratio the median of the rounds' ratios. Hugging Face's blocks run in a process and an environment of their
own, which uv makes below --hf_env at the first run: their huggingface-hub is not LitGPT's. What gives another
output than stock is not timed. float32 is TF32 on CUDA, as in training. The JSON, beside this script with the
GPU in its name, holds the machine and the versions too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litgpt_moe.cli import FlagParser

ROOT = Path(__file__).resolve().parents[1]

SHAPES = {  # n_embd, moe_intermediate_size, n_expert, n_expert_per_token
    "30M": (256, 512, 8, 2),
    "200M": (768, 1536, 8, 2),
    "400M": (1024, 2048, 8, 2),
    "E64": (512, 256, 64, 8),
}
HF_VARIANTS = [
    f"hf {family} {backend}{mode}"
    for family in ("mixtral", "qwen3")
    for backend, modes in (("eager", [""]), ("batched_mm", [""]), ("grouped_mm", ["", " compiled"]))
    for mode in modes
]
# glibc returns blocks of 32 MB to the system each time; page faults would then be most of what is measured
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the checked flags."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("--shapes", default="30M,200M,400M,E64", help=f"of {', '.join(SHAPES)} (default all)")
    add("--dtypes", default="float32,bfloat16", help="float32, bfloat16 (default both)")
    add("--tokens", type=int, default=2048, help="tokens in the micro-batch (default 2048)")
    add("--rounds", type=int, default=9, help="timed rounds, after two that are not (default 9)")
    add("--device", default="auto", help="cpu, cuda or auto (default auto)")
    add("--only", default="", help="words; only variants that contain one of them, beside stock and dense")
    add(
        "--hf_env",
        default=str(ROOT / ".hf_env"),
        help="environment for Hugging Face's blocks; '' leaves them out",
    )
    add("--out", default="", help="JSON to write (default: beside this script, named by the GPU)")
    add("--hf_worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for flag, choices in (("shapes", list(SHAPES)), ("dtypes", ["float32", "bfloat16"])):
        for name in getattr(args, flag).split(","):
            if name not in choices:
                parser.error(f"--{flag} {name!r} is unknown; choose of {', '.join(choices)}")
    if args.tokens < 4 or args.tokens % 4 or args.rounds < 1:
        parser.error("--tokens must be a multiple of 4, --rounds 1 or more")
    return args


def make_step(layer: Any, x: Any) -> Callable[[], tuple[float, float]]:
    """Return a function that runs forward and backward once and returns the seconds of both."""
    import torch

    is_cuda = x.device.type == "cuda"
    ones = torch.ones_like(x)

    def now() -> float:
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> tuple[float, float]:
        layer.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_(True)
        start = now()
        y = layer(leaf)
        middle = now()
        y.backward(ones)
        return middle - start, now() - middle

    return step


def check_output(y: Any, expected: Any) -> None:
    """Raise RuntimeError if a variant does not compute what stock does.

    The median of the tokens' relative errors must be small, not each: with a router in bf16 or TF32 two close
    experts change places for some tokens.
    """
    import torch

    errors = (y.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    allowed = 2e-3 if y.dtype == torch.float32 else 3e-2  # TF32 has 10 bits, bf16 7
    if not (error := errors.median().item()) <= allowed:
        raise RuntimeError(f"its output differs from stock's by {error:.2g}")


def make_input(shape: str, dtype: str, device: str, n_tokens: int) -> Any:
    """Return the seeded input, (4, tokens / 4, C)."""
    import torch

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, n_tokens // 4, SHAPES[shape][0], generator=generator)
    return x.to(device, getattr(torch, dtype))


def our_layers(shape: str, dtype: str, device: str) -> dict[str, Any]:
    """Return name -> layer for stock, the dense floor and ours, with the same weights."""
    import torch
    from litgpt.model import LLaMAMLP, LLaMAMoE

    from moe_layers import MoE, MoEConfig, choose_way, has_triton

    n_embd, width, n_expert, top_k = SHAPES[shape]
    config = MoEConfig(
        name=f"MoE-{shape}",
        n_layer=1,
        n_embd=n_embd,
        n_head=4,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMoE",
        moe_intermediate_size=width,
        intermediate_size=width,
        n_expert=n_expert,
        n_expert_per_token=top_k,
    )
    torch.manual_seed(0)
    kind = {"dtype": getattr(torch, dtype), "device": device}
    layers = {"stock": LLaMAMoE(config), "dense": LLaMAMLP(config, intermediate_size=width * top_k)}
    fast = {choose_way(config, torch.device(device), kind["dtype"]), "segments"}
    if has_triton(torch.device(device).type, kind["dtype"]):
        fast.add("triton")
    for way in sorted(fast | {"loop"}):
        layers[f"ours {way}"] = MoE(config)
        layers[f"ours {way}"].way = way
        layers[f"ours {way}"].load_state_dict(layers["stock"].state_dict())
    layers = {name: layer.to(**kind) for name, layer in layers.items()}
    for way in sorted(fast):
        # a layer of its own: its eager twin must not share its gradients
        layer = MoE(config).to(**kind)
        layer.load_state_dict(layers["stock"].state_dict())
        layer.way = way
        layers[f"ours {way} compiled"] = torch.compile(layer, fullgraph=True, dynamic=False)
    return layers


# --- Hugging Face, in an environment of its own -------------------------------------------------------------


def make_hf_environment(folder: Path) -> Path:
    """Return the Python of an environment with the newest transformers and this torch, made if absent."""
    import torch

    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        version, _, build = torch.__version__.partition("+")
        print(f"Making {folder} with torch {version} and the newest transformers...", file=sys.stderr)
        subprocess.run(["uv", "venv", "-q", "--python", "3.12", str(folder)], check=True)
        packages = [f"torch=={version}", "transformers>=5", "numpy"]
        if sys.platform == "win32" and build.startswith("cu"):  # where the index has torch for the CPU alone
            packages = [f"torch=={torch.__version__}", "--find-links", str(ROOT / "tools/torch-cu128.html")]
            packages += ["transformers>=5", "numpy"]
        subprocess.run(["uv", "pip", "install", "-q", "--python", str(python), *packages], check=True)
    return python


class HuggingFace:
    """A process that times Hugging Face's blocks one step at a time, when it is asked."""

    def __init__(
        self, python: Path, shape: str, dtype: str, device: str, n_tokens: int, stock: Any, expected: Any
    ) -> None:
        import torch

        self._folder = tempfile.TemporaryDirectory()
        weights = Path(self._folder.name) / "stock.pth"
        torch.save({"weights": stock.state_dict(), "output": expected}, weights)
        self._command = [str(python), __file__, "--hf_worker", str(weights)]
        self._command += [shape, dtype, device, str(n_tokens)]
        self._start()

    def _start(self) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
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
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


def hf_block(name: str, weights: dict[str, Any], shape: str) -> Any:
    """Return Hugging Face's block of that family and backend, with stock LitGPT's weights."""
    import torch

    _, family, backend, *mode = name.split()
    n_embd, width, n_expert, top_k = SHAPES[shape]
    sizes = {"hidden_size": n_embd, "num_experts_per_tok": top_k, "hidden_act": "silu"}
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

        config = MixtralConfig(intermediate_size=width, num_local_experts=n_expert, **sizes)
        block_class = MixtralSparseMoeBlock
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

        config = Qwen3MoeConfig(
            moe_intermediate_size=width, num_experts=n_expert, norm_topk_prob=True, **sizes
        )
        block_class = Qwen3MoeSparseMoeBlock
    config._experts_implementation = backend
    block = block_class(config).to(weights["gate.weight"])

    def stacked(part: str) -> torch.Tensor:
        return torch.stack([weights[f"experts.{e}.{part}.weight"] for e in range(n_expert)])

    with torch.no_grad():
        block.gate.weight.copy_(weights["gate.weight"])
        block.experts.gate_up_proj.copy_(torch.cat([stacked("fc_1"), stacked("fc_2")], dim=1))
        block.experts.down_proj.copy_(stacked("proj"))
    return torch.compile(block.train(), dynamic=False) if mode else block.train()


def hf_worker(path: str, shape: str, dtype: str, device: str, n_tokens: str) -> int:
    """Answer each name on stdin with the seconds of one step, as JSON; an error is answered as text."""
    import torch
    import transformers

    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    stock = torch.load(path, weights_only=True, map_location=device)
    use_tf32(device)
    x, steps = make_input(shape, dtype, device, int(n_tokens)), {}
    print(json.dumps({"transformers": transformers.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        name = line.strip()
        try:
            if name not in steps:
                block = hf_block(name, stock["weights"], shape)
                with torch.no_grad():
                    check_output(block(x), stock["output"])
                steps[name] = make_step(block, x)
            answer: Any = steps[name]()
        except Exception as error:  # a backend that this machine lacks
            answer = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def use_tf32(device: str) -> None:
    """Multiply float32 as training does on that device (run_train.py, float32_matmul_precision)."""
    import torch

    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")


# --- measuring ----------------------------------------------------------------------------------------------


def measure(
    args: argparse.Namespace, where: dict[str, Any], shape: str, dtype: str, device: str, python: Path | None
) -> dict[str, Any]:
    """Return name -> figures of every variant, at one shape and dtype; `where` hears of HF's version."""
    import torch

    torch._dynamo.reset()
    layers = our_layers(shape, dtype, device)
    x = make_input(shape, dtype, device, args.tokens)
    steps = {name: make_step(layer, x) for name, layer in layers.items()}
    with torch.no_grad():
        expected = layers["stock"](x)
    hf = None
    if python:
        hf = HuggingFace(python, shape, dtype, device, args.tokens, layers["stock"], expected)
        where |= hf.versions
    for name in HF_VARIANTS if hf else []:
        steps[name] = lambda name=name: hf.step(name)
    words = args.only.split(",") if args.only else [""]
    steps = {
        name: step
        for name, step in steps.items()
        if name in ("stock", "dense") or any(word in name for word in words)
    }
    failures = {}
    for name in list(steps):
        try:
            if name.startswith("ours"):
                with torch.no_grad():
                    check_output(layers[name](x), expected)
            for _ in range(2):  # compiles, and fills the caches
                steps[name]()
        except RuntimeError as error:
            failures[name] = str(error).splitlines()[0]
            del steps[name]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(step())
    if hf:
        hf.close()
    return {**figures(times), **{name: {"failed": reason} for name, reason in failures.items()}}


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


def show(title: str, rows: dict[str, Any]) -> None:
    """Print one table."""
    print(f"\n{title}\n{'':34}{'forward':>10}{'+ backward':>12}{'of dense':>10}{'of stock':>10}")
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:34}{row['failed'][:70]}")
        else:
            times = f"{row['forward_ms']:>7.1f} ms{row['forward_backward_ms']:>9.1f} ms"
            print(f"{name:34}{times}{row['of_dense']:>10.2f}{row['of_stock']:>10.2f}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Return 0; 2 after a message when something is missing."""
    args = parse(argv)
    if args.hf_worker:
        return hf_worker(*args.hf_worker)
    if argv is None and sys.platform == "linux" and not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        python = make_hf_environment(Path(args.hf_env)) if args.hf_env else None
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: --hf_env {args.hf_env}: {error}; --hf_env '' leaves them out", file=sys.stderr)
        return 2
    from tools.machine import machine, results_path

    use_tf32(device)
    out = Path(args.out) if args.out else results_path(__file__, device)
    allocator = {name: os.environ.get(name, "") for name in ALLOCATOR}
    where = {**machine(), "measured_on": device, "allocator": allocator}
    results: dict[str, Any] = {"machine": where, "tokens": args.tokens, "rounds": args.rounds}
    for shape in args.shapes.split(","):
        for dtype in args.dtypes.split(","):
            rows = measure(args, where, shape, dtype, device, python)
            results[f"{shape} {dtype}"] = rows
            show(f"{shape} {SHAPES[shape]}, {dtype}, {args.tokens} tokens, {device}", rows)
            partial = out.with_suffix(".tmp")
            partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            partial.replace(out)
    print(f"\nWritten to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
