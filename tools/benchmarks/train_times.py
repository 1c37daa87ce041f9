"""How long the steps of a training run take, and where their time goes."""

import contextlib
import functools
import io
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from litgpt import pretrain
from torch.optim.optimizer import register_optimizer_step_post_hook

from litgpt_moe.training import loop

PARTS = ("data", "forward", "loss", "backward", "optimizer", "logging")
LEFT_OUT = 2  # first steps of a run: allocations, compilation


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what is printed in here to itself."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def step_times(train: Callable[[], None], at_step: Callable[[int], None] = lambda _: None) -> list[float]:
    """Return the seconds of each step but the first ones; `at_step` hears of the end of each step."""
    ends: list[float] = []

    def note_end(optimizer: Any, *_: Any) -> None:
        if type(optimizer).__name__ == "AdamW":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            at_step(len(ends))

    hook = register_optimizer_step_post_hook(note_end)
    try:
        with quiet():
            train()
    finally:
        hook.remove()
    return [end - start for start, end in zip(ends[LEFT_OUT - 1 :], ends[LEFT_OUT:], strict=False)]


@contextlib.contextmanager
def part_times() -> Iterator[list[tuple[str, float, float]]]:
    """Yield (part, start, end) of each of its calls in here; a call within another counts as the outer."""
    spans: list[tuple[str, float, float]] = []
    busy = False

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:
                return function(*args, **kwargs)
            busy, started = True, _now()
            try:
                return function(*args, **kwargs)
            finally:
                busy = False
                spans.append((part, started, _now()))

        return call

    ours = loop.TrainingFabric
    places = [
        ("data", pretrain.CycleIterator, "__next__"),
        ("forward", _FabricModule, "forward"),
        ("loss", pretrain, "chunked_cross_entropy"),
        ("loss", loop, "linear_cross_entropy"),
        ("optimizer", _FabricOptimizer, "step"),
        *(("backward", kind, "backward") for kind in (ours, L.Fabric)),
        *(("optimizer", kind, "clip_gradients") for kind in (ours, L.Fabric)),
        *(("logging", kind, "log_dict") for kind in (ours, L.Fabric)),
    ]
    with contextlib.ExitStack() as patches:
        for part, owner, name in places:
            patches.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield spans


def share_of_parts(train: Callable[[], None], n_steps: int) -> dict[str, float]:
    """Return part -> its share of the time of the timed steps."""
    ends: list[float] = []
    with part_times() as spans:
        step_times(train, lambda _: ends.append(time.perf_counter()))
    begin, end = ends[LEFT_OUT - 1], ends[LEFT_OUT + n_steps - 1]
    shares: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for part, started, ended in spans:  # a step ends inside its optimizer's call
        shares[part] += max(0.0, min(ended, end) - max(started, begin)) / (end - begin)
    return {part: round(share, 3) for part, share in shares.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
