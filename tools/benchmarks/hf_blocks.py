"""Hugging Face's MoE blocks, timed in a process and an environment of their own by layer_variants.py.

Their environment has neither our library nor LitGPT, so this file imports nothing of either. What both sides
of the comparison must do alike is here: the input, the timed step, the check of the output.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def make_input(n_embd: int, dtype: str, device: str, n_tokens: int) -> torch.Tensor:
    """Return the seeded input, (4, tokens / 4, C)."""
    x = torch.randn(4, n_tokens // 4, n_embd, generator=torch.Generator().manual_seed(1))
    return x.to(device, getattr(torch, dtype))


def make_step(layer: Any, x: torch.Tensor) -> Callable[[], tuple[float, float]]:
    """Return a function that runs forward and backward once and returns the seconds of both."""
    ones = torch.ones_like(x)

    def now() -> float:
        if x.is_cuda:
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


def check_output(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise RuntimeError if a variant does not compute what stock does.

    The median of the tokens' relative errors must be small, not each: with a router in bf16 or TF32 two close
    experts change places for some tokens.
    """
    errors = (y.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    allowed = 2e-3 if y.dtype == torch.float32 else 3e-2  # TF32 has 10 bits, bf16 7
    if not (error := errors.median().item()) <= allowed:
        raise RuntimeError(f"its output differs from stock's by {error:.2g}")


def use_tf32(device: str) -> None:
    """Multiply float32 as training does on that device (run_train.py, float32_matmul_precision)."""
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")


def hf_block(name: str, weights: dict[str, torch.Tensor], sizes: list[int]) -> Any:
    """Return Hugging Face's block of that family and backend, with stock LitGPT's weights."""
    _, family, backend, *mode = name.split()
    n_embd, width, n_expert, top_k = sizes
    shared = {"hidden_size": n_embd, "num_experts_per_tok": top_k, "hidden_act": "silu"}
    if family == "mixtral":
        module: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
        config = module.MixtralConfig(intermediate_size=width, num_local_experts=n_expert, **shared)
        block_class = module.MixtralSparseMoeBlock
    else:
        module = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        widths = {"moe_intermediate_size": width, "num_experts": n_expert, "norm_topk_prob": True}
        config = module.Qwen3MoeConfig(**widths, **shared)
        block_class = module.Qwen3MoeSparseMoeBlock
    config._experts_implementation = backend
    block = block_class(config).to(weights["gate.weight"])

    def stacked(part: str) -> torch.Tensor:
        return torch.stack([weights[f"experts.{e}.{part}.weight"] for e in range(n_expert)])

    with torch.no_grad():
        block.gate.weight.copy_(weights["gate.weight"])
        block.experts.gate_up_proj.copy_(torch.cat([stacked("fc_1"), stacked("fc_2")], dim=1))
        block.experts.down_proj.copy_(stacked("proj"))
    return torch.compile(block.train(), dynamic=False) if mode else block.train()


def serve_steps(path: str, sizes_text: str, dtype: str, device: str, n_tokens: str) -> int:
    """Answer each name on stdin with the seconds of one step, as JSON; an error is answered as text."""
    import transformers  # which this environment has

    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    stock = torch.load(path, weights_only=True, map_location=device)
    use_tf32(device)
    sizes = [int(size) for size in sizes_text.split(",")]
    x, steps = make_input(sizes[0], dtype, device, int(n_tokens)), {}
    print(json.dumps({"transformers": transformers.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        name = line.strip()
        try:
            if name not in steps:
                block = hf_block(name, stock["weights"], sizes)
                with torch.no_grad():
                    check_output(block(x), stock["output"])
                steps[name] = make_step(block, x)
            answer: Any = steps[name]()
        except Exception as error:  # noqa: BLE001 (a backend that this machine lacks)
            answer = f"{type(error).__name__}: {str(error).partition('\n')[0]}"[:200]
        print(json.dumps(answer), file=answers, flush=True)
    return 0
