"""The speed of whole steps for measure_gpu.py: tokens/s, MFU and memory by micro-batch, time by kernel.

Run: uv run python tools/benchmarks/gpu_speed.py --part steps --micro_batch_sizes 16,32 --out steps.json

Each model is compiled anew for each size of micro-batch. `--part profile` adds the kernels of a step.
"""

import statistics
from typing import Any

from litgpt_moe.cli import run_script
from tools.benchmarks.gpu_parts import GpuPart
from tools.benchmarks.machine import parse

N_KERNELS = 30  # listed of a profile


def measured_peak(device: str, dtype_name: str) -> float:
    """Return the FLOP/s of a large product of random numbers: zeros would run faster than work does."""
    import torch

    from tools.benchmarks.gpu_step import now

    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype_name)) for _ in range(2))
    times = []
    for _ in range(8):
        started = now(device)
        torch.mm(a, b)
        times.append(now(device) - started)
    return 2 * size**3 / min(times)


def time_steps(step: Any, micro_batch_size: int, n_steps: int, peaks: dict[str, float]) -> dict[str, Any]:
    """Return the figures of steps of one micro-batch."""
    import torch

    from litgpt_moe.config import model_facts
    from litgpt_moe.hardware import peak_memory_gb
    from tools.benchmarks.gpu_step import now

    tokens = step.tokens(micro_batch_size)
    started = now(step.device)
    step.step(tokens)
    step.step(tokens)
    first_s = now(step.device) - started
    if step.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(n_steps):
        began = now(step.device)
        loss = step.step(tokens)
        times.append(now(step.device) - began)
    # in a run the host does not wait within a step: ten steps in a row show what it can hide
    began = now(step.device)
    for _ in range(n_steps):
        loss = step.step(tokens)
    rate = n_steps * tokens[:, 1:].numel() / (now(step.device) - began)
    flops = model_facts(step.config, step.config.block_size).flops_per_token
    return {
        "tokens_per_s": round(rate, 1),
        **{f"mfu_of_{name}": round(rate * flops / peak, 4) for name, peak in peaks.items()},
        "step_ms": round(1000 * statistics.median(times), 2),
        "first_two_steps_s": round(first_s, 1),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "loss": loss.item(),
    }


def steps(settings: Any, records: Any) -> bool:
    """Add the figures of each size of micro-batch; the larger ones may not fit."""
    import torch

    from litgpt_moe.hardware import default_precision, peak_flops
    from tools.benchmarks.gpu_step import TrainStep, model_config

    device = settings.device
    precision = default_precision(device)
    dtype = "float32" if precision == "32-true" else "bfloat16"
    peaks = {
        "product": measured_peak(device, dtype),
        "maker": peak_flops(torch.device(device), precision),
    }
    records.add("peak TFLOP/s", {name: round(peak / 1e12, 2) for name, peak in peaks.items()})
    config, step, works = model_config(settings.model_config, settings.device), None, True
    for size in map(int, settings.micro_batch_sizes.split(",")):
        torch._dynamo.reset()
        step = TrainStep(config, device, precision)
        name = f"{config.name}, {precision}, {size} x {config.block_size}"
        works &= records.attempt(
            name, lambda step=step, size=size: time_steps(step, size, settings.steps, peaks)
        )
        if settings.part == "profile":
            records.attempt(f"kernels of {name}", lambda step=step, size=size: kernels(step, size))
        del step
        if device == "cuda":
            torch.cuda.empty_cache()
    return works


def kernels(step: Any, micro_batch_size: int) -> dict[str, Any]:
    """Return the time and number of calls of each kernel in a step, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    from tools.benchmarks.gpu_step import now

    tokens, is_cuda = step.tokens(micro_batch_size), step.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        step.step(tokens)
        now(step.device)
    events: Any = profiler.key_averages()
    rows = {}
    for event in events:
        # on the CPU there are no kernels: operators, without those that they call
        spent = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if spent and (not is_cuda or str(event.device_type).endswith("CUDA")):
            rows[event.key[:120]] = {"ms": round(spent / 1000, 3), "calls": event.count}
    longest = dict(sorted(rows.items(), key=lambda row: -row[1]["ms"])[:N_KERNELS])
    whole = sum(row["ms"] for row in rows.values())
    n_calls = sum(row["calls"] for row in rows.values())
    return {"all_ms": round(whole, 2), "calls": n_calls, "longest": longest}


def generate(settings: Any, records: Any) -> bool:
    """Add the tokens/s of our decoding and of stock LitGPT's: one text, greedy, equal weights."""
    import torch
    from litgpt.config import Config
    from litgpt.generate.base import generate_fn
    from litgpt.model import GPT

    from litgpt_moe.balance import BIAS_NAME
    from litgpt_moe.generation import decode
    from litgpt_moe.generation.settings import Sampling
    from litgpt_moe.hardware import DTYPES, default_precision
    from tools.benchmarks.gpu_step import build_model, model_config, now

    device, config = settings.device, model_config(settings.model_config, settings.device)
    precision = default_precision(device)
    ours = build_model(config, device, precision).requires_grad_(False).eval()
    keys = Config.__annotations__
    stock = GPT(Config(**{key: value for key, value in vars(config).items() if key in keys}))
    stock = stock.to(device, DTYPES[precision]).requires_grad_(False).eval()
    stock.load_state_dict({name: value for name, value in ours.state_dict().items() if BIAS_NAME not in name})
    n_tokens, prompt = (4, [1, 2, 3]) if device == "cpu" else (128, list(range(1, 17)))

    def of_stock() -> list[int]:
        total = len(prompt) + n_tokens
        stock.max_seq_length = total
        stock.set_kv_cache(batch_size=1, device=torch.device(device))
        ids = torch.tensor(prompt, device=device)
        options = {"temperature": 0.0, "include_prompt": False, "include_eos": True}
        return [int(token) for token in generate_fn(stock, ids, total, **options)]

    def of_ours() -> list[int]:
        return list(decode.generate(decode.make_decoder(ours), prompt, n_tokens, Sampling(temperature=0.0)))

    for name, continuation in (("ours", of_ours), ("stock", of_stock)):

        def rate(continuation: Any = continuation) -> dict[str, Any]:
            continuation()
            began = now(device)
            tokens = continuation()
            return {"tokens_per_s": round(len(tokens) / (now(device) - began), 1), "tokens": tokens[:20]}

        records.attempt(f"{name}, {config.name}, {precision}", rate)
    return all("failed" not in result for result in records.values.values())


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 if something failed."""
    settings: GpuPart = parse(__doc__, GpuPart, argv)
    from tools.benchmarks.gpu_step import Records  # not at the top: it imports torch

    part = generate if settings.part == "generate" else steps
    return 0 if part(settings, Records(settings.out)) else 1


if __name__ == "__main__":
    raise SystemExit(run_script(main))
