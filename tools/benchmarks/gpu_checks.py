"""The checks of measure_gpu.py: is what a device computes right, and does a step wait for it?

Run: uv run python tools/benchmarks/gpu_checks.py --part check --out check.json
"""

import collections
import contextlib
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litgpt_moe.cli import run_script
from tools.benchmarks.gpu_parts import GpuPart
from tools.benchmarks.machine import machine, parse

# Of the norm of the difference over that of what is right: bf16 keeps 8 bits, and a token whose experts
# change places may be far off.
LIMITS = {"float32": 2e-3, "bfloat16": 5e-2, "float16": 1e-2}


def error_of(found: Any, expected: Any) -> float:
    """Return the norm of the difference over that of what is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def verdict(errors: dict[str, float], limit: float) -> dict[str, Any]:
    """Return the largest errors, and whether all are within the limit."""
    worst = dict(sorted(errors.items(), key=lambda item: -item[1])[:3])
    is_right = all(error <= limit for error in errors.values())
    return {"right": is_right, "limit": limit, "worst": {key: float(f"{e:.3g}") for key, e in worst.items()}}


def check_layer(kernel: str, dtype_name: str, device: str) -> dict[str, Any]:
    """Compare a layer's output and gradients with LitGPT's own layer on the CPU in float64."""
    import torch
    from litgpt.model import LLaMAMoE

    from moe_layers import MoE
    from tools.benchmarks.gpu_step import model_config

    config, dtype = model_config("configs/moe_200m.yaml", device), getattr(torch, dtype_name)
    torch.manual_seed(0)
    stock = LLaMAMoE(config)
    with torch.no_grad():  # logits far apart: in 16 bits the same experts are chosen
        stock.gate.weight.mul_(8)
        for weight in stock.parameters():
            weight.copy_(weight.to(dtype))
    stock.double()
    ours = MoE(config)
    ours.load_state_dict(stock.state_dict())
    ours.to(device, dtype).kernel = kernel
    x = torch.randn(1, 512, config.n_embd).to(dtype)
    outcomes = []
    for layer, leaf in ((stock, x.double()), (ours, x.to(device))):
        leaf.requires_grad_()
        y = layer(leaf)
        y.sum().backward()
        outcomes.append({"output": y, "input": leaf.grad, "router": layer.gate.weight.grad})
        for name in ("fc_1", "fc_2", "proj"):
            grads = [getattr(expert, name).weight.grad for expert in layer.experts]
            zero = torch.zeros_like(getattr(layer.experts[0], name).weight)
            outcomes[-1][name] = torch.stack([zero if grad is None else grad for grad in grads])
    expected, found = outcomes
    return verdict({name: error_of(found[name], expected[name]) for name in expected}, LIMITS[dtype_name])


def check_norm(device: str) -> dict[str, Any]:
    """Compare the compiled gradients of an RMSNorm in bf16, where torch 2.10 was wrong, with float64's."""
    import torch
    from litgpt.model import RMSNorm

    from tools.benchmarks.gpu_step import compiled

    torch.manual_seed(0)
    n_tokens, width = (16384, 768) if device == "cuda" else (64, 32)
    x, factors = torch.randn(n_tokens, width).bfloat16(), torch.randn(n_tokens, width).bfloat16()
    grads = {}
    for kind in ("exact", "eager", "compiled"):
        norm = RMSNorm(width)
        norm = norm.double() if kind == "exact" else norm.to(device, torch.bfloat16)
        leaf = x.to(norm.weight, copy=True).requires_grad_()
        y = (compiled(norm, device) if kind == "compiled" else norm)(leaf)
        (y * factors.to(norm.weight)).sum().backward()
        grads[kind] = {"input": leaf.grad, "weight": norm.weight.grad}
    errors = {
        f"{kind} {name}": error_of(grads[kind][name], grads["exact"][name])
        for kind in ("eager", "compiled")
        for name in ("input", "weight")
    }
    return verdict(errors, LIMITS["bfloat16"])


def check_model(device: str, precision: str) -> dict[str, Any]:
    """Compare a small model's loss and gradients: on the device eager and compiled, on the CPU in float32."""
    import torch

    from tools.benchmarks.gpu_step import TrainStep, small_config

    config, losses, grads, weights = small_config(device), {}, {}, {}
    for kind, place, its_precision in (
        ("eager", device, precision),
        ("compiled", device, precision),
        ("CPU", "cpu", "32-true"),
    ):
        step = TrainStep(config, place, its_precision, is_compiled=kind == "compiled")
        # drawn on each device by another generator
        weights = weights or step.model.state_dict()
        step.model.load_state_dict(weights)
        loss = step.loss(step.tokens(2))
        loss.backward()
        losses[kind] = loss.item()
        found: dict[str, Any] = {name: weight.grad for name, weight in step.model.named_parameters()}
        # all experts together: a few tokens more or less are much for one of them
        experts = torch.cat([found.pop(name).flatten() for name in list(found) if "experts" in name])
        grads[kind] = {**found, "experts": experts}
    errors = {
        f"{kind}, {other}: {name}": error_of(grads[kind][name], expected)
        for kind, other in (("compiled", "eager"), ("eager", "CPU"))
        for name, expected in grads[other].items()
    }
    result = verdict(errors, 0.05 if precision == "32-true" else 0.5)  # as in training/compiled.py
    close = all(abs(losses[kind] - losses["CPU"]) < 0.01 * losses["CPU"] for kind in ("eager", "compiled"))
    return {**result, "right": result["right"] and close, "losses": losses}


def check_training(device: str) -> dict[str, Any]:
    """Train a small compiled model on one batch: its loss must fall."""
    from litgpt_moe.hardware import default_precision
    from tools.benchmarks.gpu_step import TrainStep, now, small_config

    step = TrainStep(small_config(device), device, default_precision(device))
    tokens = step.tokens(2)
    started = now(device)
    first = step.step(tokens).item()
    first_step_s = round(now(device) - started, 1)
    last = [step.step(tokens) for _ in range(20)][-1].item()
    return {"right": last < first - 0.02, "losses": [first, last], "first_step_s": first_step_s}


def check(settings: Any, records: Any) -> bool:
    """Add every check, the cheapest first; return whether all are right."""
    import torch

    device = settings.device
    records.add("machine", {**machine(), **driver()})
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    half = ["bfloat16"] if capability >= (8, 0) or device == "cpu" else []
    cases = [("segments", "float32"), *(("segments", name) for name in half)]
    if device == "cuda":
        from litgpt_moe.kernels.grouped_mm import has_fast_grouped_mm
        from litgpt_moe.kernels.triton import has_triton

        cases += [("triton", n) for n in LIMITS if has_triton("cuda", getattr(torch, n))]
        if has_fast_grouped_mm(torch.device("cuda"), torch.bfloat16):
            cases.append(("grouped_mm", "bfloat16"))
    checks: list[tuple[str, Callable[[], Any]]] = [
        (f"layer {kernel} {dtype}", lambda kernel=kernel, dtype=dtype: check_layer(kernel, dtype, device))
        for kernel, dtype in cases
    ]
    checks.append(("norm", lambda: check_norm(device)))
    precisions = (["bf16-true"] if half else []) + ["32-true"]
    checks.append(("training", lambda: check_training(device)))
    checks += [(f"model {name}", lambda name=name: check_model(device, name)) for name in precisions]
    for name, act in checks:
        records.attempt(name, act)
    right = [records.values[name].get("right", False) for name, _ in checks]
    records.add("all right", all(right))
    return all(right)


def driver() -> dict[str, Any]:
    """Return the GPU's driver, CUDA, capability and memory; nothing without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    facts = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gb": round(facts.total_memory / 1e9, 1),
        "multiprocessors": facts.multi_processor_count,
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
        found["driver"] = said.splitlines()[0]
    return found


def sync(settings: Any, records: Any) -> bool:
    """Add whether a step waits for the device, eager and compiled, and where the loop of a run does."""
    from litgpt_moe.hardware import default_precision
    from tools.benchmarks.gpu_step import TrainStep, model_config, shorter

    config = shorter(model_config(settings.model_config, settings.device), 2)

    def steps(is_compiled: bool) -> dict[str, Any]:
        step = TrainStep(config, settings.device, default_precision(settings.device), is_compiled)
        tokens = step.tokens(2)
        step.step(tokens)
        with sync_debug_mode("error", settings.device):
            try:
                step.step(tokens)
            except RuntimeError as error:
                where = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
                return {"right": False, "waits at": where[-6:], "error": str(error)[:300]}
        return {"right": True}

    for is_compiled in (False, True):
        records.attempt("compiled step" if is_compiled else "eager step", lambda c=is_compiled: steps(c))
    records.attempt("waits in LitGPT's loop, 4 steps of 2 micro-batches", lambda: waits_of_loop(settings))
    return all(records.values[name].get("right", False) for name in ("eager step", "compiled step"))


@contextlib.contextmanager
def sync_debug_mode(mode: str, device: str) -> Any:
    """Let torch report, or refuse, what waits for the device."""
    import torch

    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_of_loop(settings: Any) -> dict[str, int]:
    """Return where a run's own loop waits for the device, and how often."""
    from tools.benchmarks.gpu_step import model_config, shorter
    from tools.benchmarks.train_contestants import make_run, step_ends, train_ours, write_tokenizer
    from tools.benchmarks.train_settings import TrainBenchmark

    benchmark = TrainBenchmark(steps=2, micro_batch_size=1, accumulation=2, compile="off")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        write_tokenizer(Path(folder))
        run = make_run(
            benchmark, shorter(model_config(settings.model_config, settings.device), 2), Path(folder)
        )
        warnings.simplefilter("always")
        with sync_debug_mode("warn", settings.device):
            step_ends(lambda: train_ours(run))
    places = (f"{one.filename}:{one.lineno}" for one in caught if "synchronizing" in str(one.message))
    return dict(collections.Counter(places).most_common(20))


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 if a check is not right."""
    settings: GpuPart = parse(__doc__, GpuPart, argv)
    from tools.benchmarks.gpu_step import Records  # not at the top: it imports torch

    parts = {"check": check, "sync": sync}
    return 0 if parts[settings.part](settings, Records(settings.out)) else 1


if __name__ == "__main__":
    raise SystemExit(run_script(main))
