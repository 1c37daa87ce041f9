"""The experts by one GEMM each: exact in float64, one graph, few operators, little memory."""

import pytest
import torch
from conftest import TINY_CONFIG
from helpers.layers import WIDE, pair, per_token, run
from litgpt.model import LLaMAMoE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe.balance import set_balance
from litgpt_moe.config import MoEConfig
from litgpt_moe.kernels import cpu, matmul
from moe_layers import MoE

pytestmark = pytest.mark.usefixtures("eager")

CASES = {
    "many tokens": ((3, 17), None),
    "one token": ((1, 1), None),
    "empty experts": ((2, 9), "empty"),
    "ties": ((2, 9), "ties"),
}


@pytest.mark.parametrize("kernel", ["segments", "loop", "compiled"])
@pytest.mark.parametrize(("shape", "special"), CASES.values(), ids=CASES.keys())
def test_outputs_and_every_gradient_are_those_of_the_definition(kernel, shape, special) -> None:
    _, layer = pair(LLaMAMoE, torch.float64, n_expert=8, n_expert_per_token=3)
    with torch.no_grad():
        if special == "empty":
            layer.gate.weight[3:, 0] = -1e3
        if special == "ties":
            layer.gate.weight[4:] = layer.gate.weight[:4]
    x = torch.randn(*shape, 16, dtype=torch.float64)
    x[..., 0] = x[..., 0].abs() + 0.5
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    leaf = x.clone().requires_grad_(True)
    y = per_token(layer, leaf)
    (y * weight).sum().backward()
    zero = torch.zeros((), dtype=x.dtype)
    expected = {name: p.grad if p.grad is not None else zero * p for name, p in layer.named_parameters()}
    expected |= {"y": y.detach(), "x.grad": leaf.grad}

    layer.kernel = "segments" if kernel == "compiled" else kernel
    if kernel == "compiled":
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
    got = run(torch.compile(layer, backend="aot_eager", fullgraph=True) if kernel == "compiled" else layer, x)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=name)
    assert special != "empty" or not expected["experts.7.proj.weight"].any()


@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("shape", "special"), CASES.values(), ids=CASES.keys())
def test_either_library_gives_the_definition_in_float32(
    monkeypatch, library, compiled, shape, special
) -> None:
    monkeypatch.setattr(matmul, "_is_amd_with_avx512", lambda: library == "oneDNN")
    sizes = {"n_expert": 8, "n_expert_per_token": 3, **WIDE}
    exact, layer = (pair(LLaMAMoE, dtype, **sizes)[1] for dtype in (torch.float64, torch.float32))
    with torch.no_grad():
        if special == "empty":
            exact.gate.weight[3:, 0] = -1e3
        if special == "ties":
            exact.gate.weight[4:] = exact.gate.weight[:4]
        for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
            theirs.copy_(ours.copy_(theirs))  # what float32 holds
    x = torch.randn(*shape, 64)
    x[..., 0] = x[..., 0].abs() + 0.5
    exact.kernel = "loop"
    expected = run(exact, x.double())
    if compiled:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
        layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for name, found in run(layer, x).items():
        wanted = expected[name]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4, msg=name)


def test_onednn_is_asked_for_few_sizes() -> None:
    sizes = set()
    for n in range(1, 4097):
        sizes.add(size := cpu.padded_size(n))
        assert n <= size < n + max(16, n / 16 + 1)
    assert len(sizes) <= 96
    assert cpu.padded_size(0) == 0


def test_padded_rows_hold_every_row_once_and_padding_weighs_nothing(monkeypatch) -> None:
    monkeypatch.setattr(matmul, "_is_amd_with_avx512", lambda: True)
    x, token_R, weights_R1 = torch.empty(1, 1), torch.arange(100, 124), torch.rand(24, 1) + 0.1
    ends_E = torch.tensor([0, 3, 20, 20, 24], dtype=torch.int32)
    padded = cpu.PaddedRows.of(token_R, ends_E, x)
    assert padded.sizes == [0, 16, 32, 0, 16]
    assert len(padded.token) == 64 <= cpu.max_padded_rows(x, 24, 5)
    assert torch.equal(padded.token[padded.position], token_R)
    wanted = [range(0), range(100, 103), range(103, 120), range(0), range(120, 124)]
    assert [set(part.tolist()) for part in padded.split(padded.token)] == [set(tokens) for tokens in wanted]
    weights_P1 = padded.weights(weights_R1)
    assert torch.equal(weights_P1[padded.position], weights_R1)
    assert weights_P1.count_nonzero() == 24
    monkeypatch.setattr(matmul, "_is_amd_with_avx512", lambda: False)
    assert cpu.PaddedRows.of(token_R, ends_E, x).sizes == [0, 3, 17, 0, 4]  # what MKL multiplies stays
    nothing = cpu.PaddedRows.of(token_R[:0], torch.zeros(5, dtype=torch.int32), x.bfloat16())
    assert nothing.sizes == [0] * 5


class Counter(TorchDispatchMode):
    """Counts the operators that make new memory, and the bytes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(layer: torch.nn.Module, x: torch.Tensor) -> list[str]:
    """The names of the operators of one forward and backward."""
    with Counter() as counter:
        layer(x.requires_grad_(True)).sum().backward()
    return [name for name in counter.names if "ones_like" not in name]


@pytest.mark.parametrize(
    "balance", [{}, {"aux_loss_coef": 0.01, "z_loss_coef": 0.001, "bias_update_rate": 0.001}]
)
def test_operators_are_few_at_any_number_of_experts_and_wait_for_nothing(balance: dict) -> None:
    counts = []
    for n_expert, top_k in ((4, 2), (64, 8)):
        _, layer = pair(LLaMAMoE, torch.float32, n_expert=n_expert, n_expert_per_token=top_k, **WIDE)
        if balance:
            holder = torch.nn.Module()
            holder.transformer = torch.nn.Module()
            holder.transformer.h = torch.nn.ModuleList([torch.nn.Module()])
            holder.transformer.h[0].mlp = layer
            set_balance(holder, **balance)
        names = operators(layer, torch.randn(4, 32, 64))
        assert not [name for name in names if "nonzero" in name or "_local_scalar_dense" in name]
        counts.append(len(names))
    assert counts[0] == counts[1]
    assert counts[0] <= (110 if balance else 50), counts


def saved_bytes(layer: torch.nn.Module, x: torch.Tensor) -> int:
    """The bytes that one forward keeps for its backward, parameters and the input left out."""
    known = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # else another tensor may get this address
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_expert", "top_k"), [(8, 2), (64, 8)])
def test_saved_activations_are_at_most_three_quarters_of_stock_s(n_expert, top_k, dtype, compiled) -> None:
    stock, ours = pair(
        LLaMAMoE, dtype, n_expert=n_expert, n_expert_per_token=top_k, n_embd=128, moe_intermediate_size=128
    )
    x = torch.randn(8, 64, 128, dtype=dtype, requires_grad=True)
    if compiled:  # what Inductor's partition of the graph keeps, which may be more than the layer asks for
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
        ours = torch.compile(ours, backend="aot_eager_decomp_partition", fullgraph=True)
    assert saved_bytes(ours, x) <= 0.75 * saved_bytes(stock, x)


def test_a_shifted_load_neither_recompiles_nor_breaks_the_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    _, layer = pair(LLaMAMoE, torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(2, 32, 16)
    for shift in (0.0, 5.0, -5.0):
        with torch.no_grad():
            layer.gate.weight[0] += shift
        compiled(x).sum().backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_gives_eager_s_outputs_and_gradients() -> None:
    torch.compiler.set_stance("default")
    _, layer = pair(LLaMAMoE, torch.float32, n_shared_expert=1)
    x = torch.randn(2, 32, 16)
    expected, got = run(layer, x), run(torch.compile(layer, fullgraph=True), x)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_flops_of_a_real_run_are_those_of_the_active_experts() -> None:
    layer = MoE(MoEConfig(**{**TINY_CONFIG, "n_expert": 8}))
    with FlopCounterMode(display=False) as flops:
        layer(torch.randn(2, 32, 16, requires_grad=True)).sum().backward()
    forward = 2 * 64 * (2 * 3 * 16 * 8 + 16 * 8)
    assert flops.get_total_flops() == 3 * forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_compiled_layer_is_bit_equal_to_eager(dtype: torch.dtype) -> None:
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    _, layer = pair(LLaMAMoE, dtype, n_expert=8, n_expert_per_token=3, **WIDE)
    x = torch.randn(2, 40, 64, dtype=dtype)
    expected = run(layer, x)
    got = run(torch.compile(layer, backend="aot_eager", fullgraph=True), x)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operators_keep_torch_s_rules(dtype: torch.dtype) -> None:
    x, ends = torch.randn(4, 6, dtype=dtype), torch.tensor([2, 2, 8])
    token, inverse = torch.tensor([0, 1, 3, 2, 2, 0, 1, 3]), torch.tensor([[0, 5], [1, 6], [3, 4], [2, 7]])
    weights = torch.rand(8, 1, dtype=dtype)
    fc_1, fc_2 = ([torch.randn(8, 6, dtype=dtype) for _ in range(3)] for _ in range(2))
    maps = (fc_1, fc_2, [torch.randn(6, 8, dtype=dtype) for _ in range(3)])
    forward = (x, weights, token, inverse, ends, *maps)
    _, gate, up = torch.ops.moe.experts(*forward)
    backward = (torch.randn(4, 6, dtype=dtype), gate, up, *forward)
    for name, arguments in {"experts": forward, "experts_grad": backward}.items():
        operator = getattr(torch.ops.moe, name)
        torch.library.opcheck(operator, arguments, test_utils="test_schema")
        # opcheck's own comparison takes values too, and behind the last row any may lie
        with FakeTensorMode() as mode:
            fake = operator(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        made = operator(*arguments)
        for found, promised in zip(pytree.tree_leaves(made), pytree.tree_leaves(fake), strict=True):
            assert (found.shape, found.stride()) == (promised.shape, promised.stride())
            assert (found.dtype, found.device) == (promised.dtype, promised.device)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_under_autocast_the_experts_compute_in_16_bits_and_their_gradients_are_float32(
    dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    _, layer = pair(LLaMAMoE, torch.float32)
    exact = pair(LLaMAMoE, torch.float32)[1]
    exact.load_state_dict(layer.state_dict())
    if compiled:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
        layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 32, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    assert not torch.equal(exact(x), y)
    torch.testing.assert_close(exact(x), y, rtol=tolerance, atol=tolerance)
