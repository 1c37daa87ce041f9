"""A CUDA device that is not there: fake tensors on it, and a backward pass for them that needs no device."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction

from litgpt_moe.kernels import grouped_mm, rows, triton

OPERATORS = (triton._expert_rows, triton._expert_matrices, rows._exact_product)


class Driver:
    """What Triton asks of a driver to compile for `arch`, without a device to ask."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends import compiler  # not every machine has Triton

        return compiler.GPUTarget("cuda", self.arch, 32)


class Started:
    """A kernel whose start is noted and not done."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **__: self.grids.append(grid)


def run_bodies(patch: pytest.MonkeyPatch) -> Started:
    """Let fake tensors run the operators' own code, not only its shapes; return what they start."""
    started = Started()
    patch.setattr(triton._kernels(), "rows_kernel", started)
    patch.setattr(triton._kernels(), "matrices_kernel", started)
    patch.setattr(torch.cuda, "device_of", contextlib.nullcontext)  # asks the driver
    for operator in OPERATORS:
        patch.setattr(torch.ops.moe, operator._name, operator._init_fn)
    return started


@contextlib.contextmanager
def fake_gpu(capability: tuple[int, int], with_bodies: bool = True) -> Iterator[Started]:
    """A GPU of this compute capability: what is created is fake and lies there; `.item()` and such raise.

    Yields the grids of the Triton kernels that would be started, if operators run `with_bodies`.
    """
    with pytest.MonkeyPatch.context() as patch:
        started = run_bodies(patch) if with_bodies else Started()
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: capability >= (8, 0))
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(triton, "_triton_arch", lambda: 10 * capability[0] + capability[1])
        assert not grouped_mm.has_fast_grouped_mm(torch.device("cuda"), torch.float32)
        with FakeTensorMode(), torch.device("cuda"):
            yield started


def backward(loss: torch.Tensor) -> set[str]:
    """Do what `loss.backward()` does, node by node; return the names of the nodes.

    PyTorch's own engine asks for the streams and threads of a device. It also brings what a node returns to
    the shape and dtype of the input; for our own functions this asserts that there is nothing to bring.
    """
    order = _order(loss.grad_fn)
    found: dict[Any, dict[int, torch.Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        for node in order:
            grads = found.pop(node, {})
            if hasattr(node, "variable"):
                _accumulate(node.variable, grads[0])
            elif grads:
                for (following, place), grad in _call(node, grads):
                    total = found.setdefault(following, {})
                    total[place] = total[place] + grad if place in total else grad
    return {node.name() for node in order}


def _order(root: Any) -> list[Any]:
    """Return the nodes of the graph, each before those that it gives gradients to."""
    order, seen, path = [], {root}, [(root, iter(root.next_functions))]
    while path:
        new = next((each for each, _ in path[-1][1] if each is not None and each not in seen), None)
        if new is None:
            order.append(path.pop()[0])
        else:
            seen.add(new)
            path.append((new, iter(new.next_functions)))
    return order[::-1]


def _accumulate(weight: torch.Tensor, grad: torch.Tensor) -> None:
    weight.grad = grad if weight.grad is None else weight.grad + grad


def _call(node: Any, grads: dict[int, torch.Tensor]) -> Iterable[tuple[tuple[Any, int], torch.Tensor]]:
    """Return the gradients of one node's inputs, each with the node and the place where it goes."""
    arguments = [grads.get(i) for i in range(len(node._input_metadata))]
    edges, is_ours = node.next_functions, isinstance(node, BackwardCFunction)
    returned = node.apply(*arguments) if is_ours else node(*arguments)
    returned = returned if isinstance(returned, tuple) else (returned,)
    if is_ours:  # written in Python: gradients for all arguments, edges for tensors alone
        assert len(returned) == len(node.needs_input_grad), node.name()
        returned = [grad for grad, needed in zip(returned, node.needs_input_grad, strict=True) if needed]
        edges = [edge for edge in edges if edge[0] is not None]
    for edge, grad in zip(edges, returned, strict=True):
        if edge[0] is not None and grad is not None:
            yield edge, _checked(node.name(), edge, grad, is_ours)


def _checked(name: str, edge: tuple[Any, int], grad: torch.Tensor, is_ours: bool) -> torch.Tensor:
    following, place = edge
    is_weight = hasattr(following, "variable")
    wanted = following.variable if is_weight else following._input_metadata[place]
    if not is_ours:
        grad = grad.sum_to_size(tuple(wanted.shape)).to(wanted.dtype)
    assert tuple(grad.shape) == tuple(wanted.shape), (name, grad.shape, wanted.shape)
    assert (grad.dtype, grad.device) == (wanted.dtype, wanted.device), (name, grad, wanted)
    return grad
