"""The memory that a training step takes, by its parts.

The memory is counted: the real model takes a step on fake tensors, which have shapes and no values, and every
tensor that is created or freed is noted. On a CPU the peak is what the allocator counts in a real step. On
CUDA it is that of an eager step, which has not been compared with a device yet.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import HalfPrecision, MixedPrecision, Precision
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt_moe import balance
from litgpt_moe.config import MoEConfig
from litgpt_moe.kernels.matmul import use_fast_linear
from litgpt_moe.loss import defer_head, linear_cross_entropy
from litgpt_moe.recompute import recompute_blocks


@dataclass(frozen=True)
class StepMemory:
    """The bytes that are allocated at the peak of a step, by what they are for."""

    weights: int
    """With the buffers."""
    gradients: int
    buckets: int
    """DDP's copies of the gradients, which it sends to the other devices."""
    optimizer: int
    """The optimizer's state."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    """The chunks of logits, and the gradients that the loss computes with them."""
    others: int
    """What the backward pass or the optimizer needs for a moment."""

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        """Return the parts and their sum in gigabytes, 1e9 bytes."""
        parts = [(field.name, getattr(self, field.name)) for field in fields(self)]
        words = [f"{name} {size / 1e9:.3g}" for name, size in parts if size > self.peak / 200]
        return f"{' + '.join(words)} = {self.peak / 1e9:.3g} GB"


class Peak(NamedTuple):
    """The bytes that are allocated at a moment, and how many of them are gradients."""

    live: int
    gradients: int


class AllocationCounter(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operators create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.gradients = 0
        self.highest = Peak(0, 0)
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it returns."""
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        if self.live > self.highest.live:
            self.highest = Peak(self.live, self.gradients)
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def free(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, free)
        self.live += size

    def begin(self) -> int:
        """Forget the peak so far; return the live bytes."""
        self.highest = Peak(self.live, self.gradients)
        return self.live

    def add_gradient(self, weight: torch.Tensor) -> None:
        """Note that the gradient of a weight is complete."""
        self.gradients += weight.grad.nbytes if weight.grad is not None else 0


class StepPlanner:
    """Counts the memory of a step of one model at any micro-batch size."""

    def __init__(
        self,
        config: MoEConfig,
        precision: str,
        make_optimizer: Callable[[GPT], Optimizer] | None,
        *,
        kernel: str | None = None,
        block_size: int | None = None,
        is_recomputed: bool = False,
        is_tied: bool = False,
        is_deferred: bool = True,
    ) -> None:
        """Build the model on fake tensors; a second or two.

        Args:
            config: the model's.
            precision: Fabric's name of it, such as bf16-true.
            make_optimizer: returns the optimizer of a model; None is an 8-bit AdamW, which only CUDA can run.
            kernel: the key of kernels.choice.KERNELS that a CUDA device runs the experts with; None on a CPU.
            block_size: tokens in a sequence (default: the model's).
            is_recomputed: whether the run has activation checkpointing.
            is_tied: whether the embedding and the head share one weight matrix.
            is_deferred: whether the loss computes the logits chunk by chunk; not with FSDP.
        """
        self.block_size, self.kernel = block_size or config.block_size, kernel
        self._precision, self._loss_dtype = _precision_of(precision)
        self._counter, self._mode = AllocationCounter(), FakeTensorMode()
        with self._counting():
            self.model = self._build(config, is_tied)
            if is_recomputed:
                recompute_blocks(self.model)
            self._head = defer_head(self.model) if is_deferred else None
            self._weights = self._counter.live
            self._all_gradients = sum(weight.nbytes for weight in self.model.parameters())
            self._state, self._optimizer_peak = self._optimizer_step(make_optimizer)

    def _build(self, config: MoEConfig, is_tied: bool) -> GPT:
        with self._precision.module_init_context():
            model = GPT(config)
        model.max_seq_length = self.block_size
        if is_tied:
            model.get_submodule("transformer.wte").weight = model.lm_head.weight
        if self.kernel is None:
            # oneDNN's products need memory of their own
            use_fast_linear(model)
        balance.set_balance(model)
        for layer in balance.layers_of(model).values():
            layer.kernel = "loop" if config.bias else self.kernel
        return model

    def memory(
        self, micro_batch_size: int, accumulates: bool = True, has_buckets: bool = False
    ) -> StepMemory:
        """Return the memory of a step.

        `accumulates`: whether a step has several micro-batches, of which all but the first find gradients.
        `has_buckets`: whether DDP trains the model.
        """
        with self._counting():
            before = self._counter.live
            if accumulates:
                for weight in self.model.parameters():
                    weight.grad = torch.zeros_like(weight)
            self._counter.gradients = self._counter.live - before
            peaks, activations, logits = self._micro_batch(micro_batch_size)
            self.model.zero_grad(set_to_none=True)
        peaks.append(self._optimizer_peak)
        peak = max(peaks, key=lambda peak: peak.live)
        in_forward, _, _, in_optimizer = (peak is each for each in peaks)
        rest = peak.live - self._weights - self._state - peak.gradients
        activations = 0 if in_optimizer else min(activations, rest)
        logits = 0 if in_optimizer or in_forward else min(logits, rest - activations)
        return StepMemory(
            weights=self._weights,
            gradients=peak.gradients,
            buckets=self._all_gradients if has_buckets else 0,
            optimizer=self._state,
            activations=activations,
            logits=logits,
            others=rest - activations - logits,
        )

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        with self._mode, self._counter:
            yield

    def _optimizer_step(self, make_optimizer: Callable[[GPT], Optimizer] | None) -> tuple[int, Peak]:
        """Return the bytes of the optimizer's state, and the peak of its step."""
        before = self._counter.live
        if make_optimizer is None:
            state = sum(adamw_8bit_bytes(weight.numel()) for weight in self.model.parameters())
            self._optimizer: Any = torch.empty(state, dtype=torch.uint8)
            return state, Peak(self._counter.live + self._all_gradients, self._all_gradients)
        self._optimizer = make_optimizer(self.model)
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight)
        # the first step creates the state, the second is as all others
        for _ in range(2):
            self._counter.begin()
            self._optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return self._counter.live - before, Peak(self._counter.highest.live, self._all_gradients)

    def _micro_batch(self, size: int) -> tuple[list[Peak], int, int]:
        """Return the peaks of forward, loss and backward, and the bytes of activations and logits."""
        counter, shape = self._counter, (size, self.block_size)
        start = counter.begin()
        ids = torch.zeros(shape, dtype=torch.int64)
        # LitGPT's loop still holds the output of the micro-batch before
        last = torch.empty(*shape, self.model.config.n_embd)
        with self._precision.forward_context():
            output = self.model(ids)
        output = self._precision.convert_output(output)
        del last
        peaks = [counter.highest]
        before_loss = counter.begin()
        loss = self._loss(output, ids)
        peaks.append(counter.highest)
        logits = counter.highest.live - before_loss
        counter.begin()
        hooks = [w.register_post_accumulate_grad_hook(counter.add_gradient) for w in self.model.parameters()]
        loss.backward()
        for hook in hooks:
            hook.remove()
        peaks.append(counter.highest)
        return peaks, before_loss - start, logits

    def _loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self._head is None:
            return chunked_cross_entropy(output, targets)
        device = torch.device("cpu" if self.kernel is None else "cuda")
        return linear_cross_entropy(output, self._head.weight, targets, self._loss_dtype, as_on=device)


def adamw_8bit_bytes(n_values: int) -> int:
    """Return the bytes of the state of bitsandbytes' AdamW8bit for a weight.

    Two moments of a byte a value and a float32 for each 256 of them; small weights have float32 moments
    (bitsandbytes 0.44 and later, optim/optimizer.py).
    """
    return 8 * n_values if n_values < 4096 else 2 * (n_values + 4 * -(-n_values // 256))


def _precision_of(name: str) -> tuple[Precision, torch.dtype | None]:
    """Return Fabric's plugin for a precision, and the dtype of the products in the loss, if it is another."""
    if name in ("bf16-true", "16-true"):
        return HalfPrecision(name), None
    if name in ("bf16-mixed", "16-mixed"):
        # no scaler: it multiplies the loss, which takes no memory
        plugin = MixedPrecision("bf16-mixed", "cpu")
        return plugin, torch.bfloat16
    return Precision(), None
