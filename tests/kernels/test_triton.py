"""The experts in Triton: exact by its interpreter, compiled for each kind of GPU without having one."""

import importlib
import re
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG
from helpers.fake_cuda import Driver
from helpers.layers import GROUPS, pair, run
from litgpt.model import GPT, LLaMAMoE
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe import balance
from litgpt_moe.config import MoEConfig
from litgpt_moe.kernels import triton as triton_experts
from litgpt_moe.kernels.grouped_mm import has_fast_grouped_mm

triton = pytest.importorskip("triton")
triton_kernels = importlib.import_module("litgpt_moe.kernels.triton_kernels")
pytestmark = pytest.mark.usefixtures("eager")

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run: on the CPU by Triton's interpreter, or on a GPU."""
    if request.param == "cuda":
        yield "cuda"
        return
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch)
        importlib.reload(triton_kernels)  # `@triton.jit` asks then whether to interpret
        yield "cpu"
    importlib.reload(triton_kernels)


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Make Triton interpret what is jitted from now on, and mend its interpreter (3.6) in two places."""
    import numpy as np
    from triton.runtime import interpreter

    patch.setattr(triton.knobs.runtime, "interpret", True)
    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)  # its __index__ asks int() of an array, which numpy 2.4 refuses
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def with_bf16(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        def widened(operand: Any) -> Any:  # it multiplies the bits of bf16 as integers
            if operand.dtype != triton.language.bfloat16:
                return operand
            data = (operand.data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(data, triton.language.float32)

        return dot(self, widened(a), widened(b), *rest)

    patch.setattr(interpreter, "_patch_lang_tensor", with_index)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", with_bf16)


def check_against_stock(device: str, dtype: torch.dtype, n_tokens: int, special: str = "", **config) -> None:
    """Compare outputs and every gradient with stock's in float64, on the same numbers and choices."""
    stock, ours = pair(LLaMAMoE, torch.float64, **config)
    with torch.no_grad():
        if special == "empty":
            stock.gate.weight[config["n_expert_per_token"] :, 0] = -100.0
        if special == "ties":
            stock.gate.weight[1::2] = stock.gate.weight[::2]
        for parameter in stock.parameters():
            parameter.copy_(parameter.to(dtype))
    ours.load_state_dict(stock.state_dict())
    ours.kernel = "triton"
    x = torch.randn(1, n_tokens, config["n_embd"]).to(dtype).double()
    x[..., 0] = 1.0
    expected = run(stock, x)
    ours.to(device, dtype)
    got = run(ours, x.to(device, dtype))
    assert expected.keys() == got.keys()
    worst = 2e-5 if dtype == torch.float32 else 0.04 if dtype == torch.bfloat16 else 0.005
    for name, value in expected.items():
        difference = (got[name].cpu().double() - value).abs().max()
        assert difference <= worst * (1e-3 + value.abs().max()), (name, difference, value.abs().max())


SHAPES = {  # n_tokens, n_expert, n_expert_per_token, n_embd, moe_intermediate_size
    "one token": (1, 4, 2, 16, 8),
    "one token and choice": (1, 1, 1, 8, 72),
    "fewer rows than experts": (2, 8, 3, 16, 24),
    "odd widths": (17, 5, 3, 26, 33),
    "wider than a tile": (9, 3, 2, 72, 136),
    "several tiles of rows": (150, 2, 2, 16, 24),
    "four of eight": (40, 8, 4, 40, 16),
}


@pytest.mark.parametrize(("n_tokens", "n_expert", "top_k", "n_embd", "width"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_every_gradient_are_stock_s(
    device: str, dtype: torch.dtype, n_tokens: int, n_expert: int, top_k: int, n_embd: int, width: int
) -> None:
    config = {"n_expert": n_expert, "n_expert_per_token": top_k, "moe_intermediate_size": width}
    check_against_stock(device, dtype, n_tokens, n_embd=n_embd, **config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("special", ["empty", "ties", "large"])
def test_experts_without_tokens_ties_and_large_tiles_are_exact(
    device: str, dtype: torch.dtype, special: str
) -> None:
    n_tokens = 1024 if special == "large" else 19  # 512 rows an expert: the larger tiles
    n_expert = 2 if special == "large" else 6
    config = {"n_expert": n_expert, "n_expert_per_token": 2, "n_embd": 16, "moe_intermediate_size": 8}
    check_against_stock(device, dtype, n_tokens, special, **config)


@pytest.mark.by_hand
def test_more_than_65535_tiles_are_exact(device: str) -> None:
    # of 33,000 experts with no, one or two rows, and two tiles of outputs; minutes in the interpreter
    n_expert, n_out, n_in = 33_000, 65, 4
    ends = torch.arange(n_expert).mul(7).remainder(3).cumsum(0)
    n_rows = int(ends[-1])
    expert_R = torch.searchsorted(ends, torch.arange(n_rows), right=True)
    has_rows = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)) > 0
    tile_ends = has_rows.cumsum(0)
    tiles = torch.searchsorted(tile_ends, torch.arange(n_rows // 64 + n_expert), right=True)
    assert tiles.size(0) * 2 > 65_535
    x, w = torch.randn(n_rows, n_in), torch.randn(n_expert, n_out, n_in)
    where = [tensor.to(device) for tensor in (ends.int(), tile_ends, tiles)]
    y = torch.ops.moe.expert_rows(x.to(device), w.to(device), None, *where).cpu()
    torch.testing.assert_close(y, (w[expert_R] @ x[:, :, None])[..., 0], rtol=1e-4, atol=1e-5)


def test_one_expert_a_token_is_exact(device: str) -> None:
    config = {**GROUPS, "n_expert": 4, "n_expert_per_token": 1, "norm_topk_prob": False}
    check_against_stock(device, torch.float32, 21, n_embd=16, moe_intermediate_size=8, **config)


def test_the_operators_keep_torch_s_rules(device: str) -> None:
    ends = torch.tensor([3, 3, 8], dtype=torch.int32, device=device)
    tiles = (torch.tensor([1, 1, 2], device=device), torch.tensor([0, 2, 3], device=device))
    x, w = torch.randn(5, 12, device=device), torch.randn(3, 10, 12, device=device)
    rows = torch.tensor([0, 1, 2, 3, 4, 4, 0, 1], device=device)
    torch.library.opcheck(torch.ops.moe.expert_rows, (x, w, rows, ends, *tiles))
    y = torch.ops.moe.expert_rows(x, w, rows, ends, *tiles)
    torch.testing.assert_close(y[3:], x[rows[3:]] @ w[2].t(), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.moe.expert_rows, (y, w.mT, None, ends, *tiles))
    torch.library.opcheck(torch.ops.moe.expert_matrices, (y, None, x, rows, ends))
    torch.library.opcheck(torch.ops.moe.exact_product, (x, w[0].t(), torch.float32))


def test_one_graph_serves_every_load(device: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    _, layer = pair(LLaMAMoE, torch.float32)
    layer.to(device).kernel = "triton"
    backend = CompileCounterWithBackend("aot_eager" if device == "cpu" else "inductor")
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(2, 32, 16, device=device)
    for shift in (0.0, 5.0, -5.0):
        with torch.no_grad():
            layer.gate.weight[0] += shift
        expected, got = run(layer, x), run(compiled, x)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert backend.frame_count == 1


def test_flops_are_those_of_the_active_experts(device: str) -> None:
    _, layer = pair(LLaMAMoE, torch.float32, n_expert=8)
    layer.to(device).kernel = "triton"
    with FlopCounterMode(display=False) as flops:
        layer(torch.randn(2, 32, 16, requires_grad=True, device=device)).sum().backward()
    assert flops.get_total_flops() == 3 * 2 * 64 * (2 * 3 * 16 * 8 + 16 * 8)


# --- compiled for GPUs that are not there -------------------------------------------------------------------


class Compiled:
    """A kernel that is compiled for its arguments when it is started, and not started."""

    def __init__(self, kernel: Any, binaries: list[Any]) -> None:
        self.kernel, self.binaries = kernel, binaries

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*args: Any, **kwargs: Any) -> None:
            self.binaries.append(self.kernel.warmup(*args, grid=grid, **kwargs))

        return start


def compile_layer(arch: int, dtype: torch.dtype, n_rows: int, patch: pytest.MonkeyPatch) -> list[Any]:
    """Return the kernels of forward and backward at `arch`, as a layer of C = 64 and F = 32 starts them."""
    binaries: list[Any] = []
    for name in ("rows_kernel", "matrices_kernel"):
        patch.setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name), binaries))
    patch.setattr(triton.runtime.driver, "_active", Driver(arch))
    x, w, hidden = (torch.zeros(*shape, dtype=dtype) for shape in ((8, 64), (2, 64, 64), (n_rows, 32)))
    proj, rows = torch.zeros(2, 64, 32, dtype=dtype), torch.zeros(n_rows, dtype=torch.int64)
    ends = torch.tensor([n_rows, n_rows], dtype=torch.int32)
    tiles = (torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    both = torch.ops.moe.expert_rows(x, w, rows, ends, *tiles)
    torch.ops.moe.expert_rows(hidden, proj, None, ends, *tiles)
    torch.ops.moe.expert_rows(x, proj.mT, rows, ends, *tiles)
    torch.ops.moe.expert_matrices(x, rows, hidden, None, ends)
    torch.ops.moe.expert_rows(both, w.mT, None, ends, *tiles)
    torch.ops.moe.expert_matrices(both, None, x, rows, ends)
    return binaries


def stack_bytes(binary: Any, folder: Path) -> int:
    """Return the bytes of a thread's stack, which is where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():  # the wheels for Windows have none
        return 0
    (folder / "kernel.cubin").write_bytes(binary.asm["cubin"])
    command = [str(tool), "-res-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


TARGETS = [  # SM75 RTX 20, SM80 A100, SM86 RTX 30, SM89 RTX 40, SM90 H100, SM100 B200, SM120 RTX 50
    (75, torch.float32, 64, "highest"),
    (86, torch.bfloat16, 64, "highest"),
    (120, torch.bfloat16, 1024, "highest"),
    (89, torch.float32, 64, "high"),
    *(
        pytest.param(arch, dtype, n_rows, precision, marks=pytest.mark.slow)
        for arch in (80, 86, 89, 90, 100, 120)
        for dtype, precision in (
            (torch.bfloat16, "highest"),
            (torch.float16, "highest"),
            (torch.float32, "highest"),
            (torch.float32, "high"),
        )
        for n_rows in ((64,) if dtype == torch.float32 else (64, 1024))
    ),
]


@pytest.mark.parametrize(("arch", "dtype", "n_rows", "precision"), TARGETS)
def test_kernels_compile_within_each_gpu_s_memory_and_registers(
    arch: int,
    dtype: torch.dtype,
    n_rows: int,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    torch.set_float32_matmul_precision(precision)
    try:
        binaries = compile_layer(arch, dtype, n_rows, monkeypatch)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(binaries) == 6
    room = 64 if arch == 75 else 99  # KB that one program may use on the smallest cards of the kind
    for binary in binaries:
        assert binary.metadata.shared <= room * 1024
        assert stack_bytes(binary, tmp_path) <= 64  # a few bytes at most; a real spill is thousands
        has_tensor_cores = dtype != torch.float32 or precision == "high"
        assert has_tensor_cores == bool(re.search(r"mma\.sync|wgmma\.mma|tcgen05\.mma", binary.asm["ptx"]))


# --- on a GPU; without one, training/test_fake_cuda.py finds what waits for the device ----------------------


def balanced_model() -> torch.nn.Module:
    """A tiny bf16 model that has everything on: both losses, selection bias, counters, statistics."""
    model = GPT(MoEConfig(**TINY_CONFIG)).bfloat16()
    balance.set_balance(model, aux_loss_coef=0.01, z_loss_coef=0.001, bias_update_rate=0.001)
    balance.count_expert_load(model, True)
    return model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["grouped_mm", "triton"])
def test_a_training_step_on_a_gpu_asks_it_for_nothing(kernel: str) -> None:
    if kernel == "grouped_mm" and not has_fast_grouped_mm(torch.device("cuda"), torch.bfloat16):
        pytest.skip("torch has no fast grouped GEMM for this GPU")
    with torch.device("cuda"):
        model = balanced_model()
        x = torch.zeros(2, 64, dtype=torch.int64)
    for layer in balance.layers_of(model).values():
        layer.kernel = kernel
    model(x).float().mean().backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).float().mean().backward()
        balance.update_selection_bias(model)
        balance.router_statistics(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_router_keeps_float32_where_tf32_is_allowed() -> None:
    _, layer = pair(LLaMAMoE, torch.float32, n_embd=512)
    layer.cuda()
    x = torch.randn(64, 512, device="cuda")
    torch.set_float32_matmul_precision("high")
    try:
        logits = layer.route(x)[0]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = x.double() @ layer.gate.weight.double().t()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)  # TF32 is off by 1e-3


@pytest.mark.parametrize(
    ("arch", "dtypes"),
    [(75, [torch.float32]), (86, [torch.float32, torch.bfloat16, torch.float16]), (70, [])],
)
def test_triton_is_taken_where_it_has_the_hardware(arch: int, dtypes: list, monkeypatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(arch))
    triton_experts._triton_arch.cache_clear()
    try:
        kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        assert [dtype for dtype in kinds if triton_experts.has_triton("cuda", dtype)] == dtypes
        assert not triton_experts.has_triton("cpu", torch.float32)
    finally:
        triton_experts._triton_arch.cache_clear()


def test_asking_for_triton_breaks_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_experts, "_triton_arch", lru_cache(lambda: 86))
    torch.compiler.set_stance("default")

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if triton_experts.has_triton("cuda", x.dtype) else x

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(())) == 1


def test_without_a_driver_triton_is_not_taken() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    triton_experts._triton_arch.cache_clear()
    assert not triton_experts.has_triton("cuda", torch.float32)
