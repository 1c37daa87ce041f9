"""A training step of each configuration on GPUs that are not there: devices, dtypes, shapes, no waiting."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, TINY_CONFIG
from helpers.fake_cuda import backward, fake_gpu
from helpers.layers import GROUPS
from litgpt.model import GPT
from torch._subclasses.fake_tensor import DataDependentOutputException

from litgpt_moe import balance
from litgpt_moe.config import MoEConfig
from litgpt_moe.kernels.choice import choose_kernel
from litgpt_moe.loss import defer_head, linear_cross_entropy
from litgpt_moe.training.optimizer import make_optimizer
from litgpt_moe.training.settings import Settings

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("eager")

H100, RTX_3090, RTX_2080 = (9, 0), (8, 6), (7, 5)
CONFIGS = (
    "model_config.yaml",
    "configs/demo_model.yaml",
    "configs/moe_30m_debug.yaml",
    "configs/moe_400m.yaml",
)
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
OUR_FUNCTIONS = {
    "_LinearCrossEntropyBackward",
    "_RouterLogitsBackward",
    "GeneratedBackwardFor_moe_attach_loss_defaultBackward",
}
OF_KERNELS = {
    "grouped_mm": {"_GatherBackward", "_SwiGLUBackward", "_CombineBackward"},
    "triton": {"_TritonExpertsBackward"},
}
OPTIMIZERS = {
    "AdamW": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.1}},
    "Muon": {"class_path": "torch.optim.Muon", "init_args": {"lr": 1e-3, "weight_decay": 0.1}},
}


def train_a_step(config: MoEConfig, precision: str, optimizer: str, n_tokens: int = 128) -> set[str]:
    """Build a model on the fake GPU, train it for a step as the loop does; return the nodes of backward."""
    dtype, kind = precision.split("-")
    with torch.device("cuda"):
        torch.set_default_dtype(DTYPES[dtype] if kind == "true" else torch.float32)  # fakes cannot be cast
        try:
            model = GPT(config)
        finally:
            torch.set_default_dtype(torch.float32)
    balance.set_balance(model, aux_loss_coef=0.01, z_loss_coef=0.001, bias_update_rate=0.001, scale=0.5)
    balance.count_expert_load(model, True)
    head = defer_head(model)
    made = make_optimizer(Settings(), model, OPTIMIZERS[optimizer])
    x = torch.zeros(2, n_tokens // 2, dtype=torch.int64)
    # as Fabric's precision plugin
    autocast = torch.autocast("cuda", DTYPES[dtype]) if kind == "mixed" else nullcontext()
    for _ in range(2):  # micro-batches
        with autocast:
            hidden = model(x)
        loss = linear_cross_entropy(hidden, head.weight, x, DTYPES[dtype] if kind == "mixed" else None)
        assert (loss.dtype, loss.device.type, loss.shape) == (torch.float32, "cuda", ())
        nodes = backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # what Fabric's clip_gradients calls
    made.step()
    balance.update_selection_bias(model)
    statistics, _ = balance.router_statistics(model)
    assert statistics.device.type == "cuda"
    assert statistics.shape == (len(balance.layers_of(model)), config.n_expert + 4)
    with pytest.raises(DataDependentOutputException):  # what waits for a device raises here
        statistics.sum().item()
    check_state(model, made)
    return nodes


def check_state(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Hold that each weight has a gradient and moments of its own kind on its device."""
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.device.type == "cuda", name
        for tensor in (weight.grad, *optimizer.state[weight].values()):
            assert tensor.device == weight.device, name
            assert tensor.shape in (weight.shape, ()), name  # AdamW counts its steps
    for layer in balance.layers_of(model).values():
        assert layer.selection_bias.dtype == torch.float32


@pytest.fixture
def ways() -> Iterator[set[tuple[str, torch.dtype]]]:
    """The kernels that layers have chosen, and the dtypes for which they did."""
    chosen: set[tuple[str, torch.dtype]] = set()

    def choose(config: MoEConfig, device: torch.device, dtype: torch.dtype) -> str:
        kernel = choose_kernel(config, device, dtype)
        chosen.add((kernel, dtype))
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_layers.choose_kernel", choose)
        yield chosen


Way = tuple[tuple[int, int], str, str, str]  # compute capability, precision, optimizer, the kernels chosen
WAYS: list[Way] = [
    (H100, "bf16-true", "AdamW", "grouped_mm"),
    (H100, "bf16-mixed", "Muon", "grouped_mm"),
    (RTX_3090, "bf16-true", "Muon", "triton"),
    (RTX_3090, "bf16-mixed", "AdamW", "triton"),
    (RTX_3090, "16-mixed", "AdamW", "triton"),
    (RTX_2080, "32-true", "AdamW", "triton"),
]


QUICK = [(name, WAYS[i]) for name in CONFIGS for i in (0, 3)]
QUICK += [("configs/demo_model.yaml", way) for way in WAYS if ("configs/demo_model.yaml", way) not in QUICK]
ALL = [pytest.param(name, way, None, marks=pytest.mark.slow) for name in CONFIGS for way in WAYS]


@pytest.mark.parametrize(("name", "way", "n_layer"), [(name, way, 1) for name, way in QUICK] + ALL)
def test_a_step_of_each_configuration_runs_on_each_kind_of_gpu(
    name: str, way: Way, n_layer: int | None, ways: set[tuple[str, torch.dtype]]
) -> None:
    gpu, precision, optimizer, kernel = way
    config = MoEConfig.from_file(ROOT / name, **({"n_layer": n_layer} if n_layer else {}))
    with fake_gpu(gpu) as started:
        nodes = train_a_step(config, precision, optimizer)
    assert ways == {(kernel, DTYPES[precision.split("-")[0]])}
    assert bool(started.grids) == (kernel == "triton")
    assert nodes >= OF_KERNELS[kernel] | OUR_FUNCTIONS


@pytest.mark.parametrize(("gpu", "precision", "optimizer", "kernel"), WAYS)
def test_expert_groups_and_shared_experts_run_too(
    gpu: tuple[int, int], precision: str, optimizer: str, kernel: str, ways: set[tuple[str, torch.dtype]]
) -> None:
    more = {**GROUPS, "n_shared_expert": 1, "first_k_dense_replace": 1, "intermediate_size": 24}
    with fake_gpu(gpu):
        train_a_step(MoEConfig(**{**TINY_CONFIG, **more}), precision, optimizer)
    assert {chosen for chosen, _ in ways} == {kernel}
