"""Inductor's code for a GPU that is not there: the graph of a whole training step, and its Triton kernels."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch._subclasses.fake_tensor as fake_tensor
import torch.utils._triton
from helpers.fake_cuda import Driver
from torch._inductor import async_compile, compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime import driver

from litgpt_moe.hardware import avoid_wrong_gradients

RTX_3090 = types.SimpleNamespace(
    name="NVIDIA GeForce RTX 3090",
    type="cuda",
    index=0,
    major=8,
    minor=6,
    multi_processor_count=82,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=1536,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=101376,
    L2_cache_size=6 << 20,
    total_memory=24 << 30,
)


def trace(
    step: Callable[..., Any], fakes: list[torch.Tensor]
) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    """Return the graph of `step` in the operators that Inductor takes, and its inputs; in the fakes' mode.

    What the step reads beside its arguments, such as buffers, becomes an input too: of a constant Inductor
    reads the values, which a fake tensor has not.
    """
    module = make_fx(step, decomposition_table=select_decomp_table())(*fakes)
    inputs, nodes = list(fakes), list(module.graph.nodes)
    last = [node for node in nodes if node.op == "placeholder"][-1]
    for node in [node for node in nodes if node.op == "get_attr"]:
        with module.graph.inserting_after(last):
            last = module.graph.placeholder(f"read_{len(inputs)}")
        inputs.append(getattr(module, node.target))
        last.meta["val"] = inputs[-1]
        node.replace_all_uses_with(last)
        module.graph.erase_node(node)
    module.recompile()
    return module, inputs


def code_of(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> str:
    """Return the code that Inductor makes of a graph, for an RTX 3090; its fake inputs lie on CUDA.

    Nothing is started, nor compiled by Triton.
    """
    codes: list[str] = []
    with pytest.MonkeyPatch.context() as patch, forgotten_answers():
        pretend(patch)
        patch.setattr(GraphLowering, "save_output_code", staticmethod(codes.append))
        patch.setattr(async_compile.AsyncCompile, "triton", lambda *_, **__: None)
        patch.setattr(async_compile.AsyncCompile, "wait", lambda *_: None)
        avoid_wrong_gradients()
        with inductor_config.patch(compile_threads=1, force_disable_caches=True):
            compile_fx.compile_fx_inner(graph, inputs)
    (code,) = codes
    return code


@contextlib.contextmanager
def forgotten_answers() -> Iterator[None]:
    """Let torch ask anew, now and after the block, whether Triton finds a GPU here: it keeps the answers."""
    functions = [answer for answer in vars(torch.utils._triton).values() if hasattr(answer, "cache_clear")]
    for function in functions:
        function.cache_clear()
    try:
        yield
    finally:
        for function in functions:
            function.cache_clear()


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Answer what Inductor asks of the driver."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "get_device_properties": lambda *_: RTX_3090,
        "get_device_capability": lambda *_: (RTX_3090.major, RTX_3090.minor),
        "_get_device_properties": lambda *_: RTX_3090,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "_lazy_init": lambda: None,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer, raising=False)
    patch.setattr(driver, "_active", Driver(10 * RTX_3090.major + RTX_3090.minor))
    patch.setattr(fake_tensor, "init_gpu_context", lambda _: None)
    patch.setattr(compile_fx.dynamo_utils, "preserve_rng_state", contextlib.nullcontext)
