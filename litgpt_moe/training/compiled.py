"""The first micro-batch of a compiled run, computed eagerly too: wrong gradients of a compiler are silent.

pytorch issue 193061 is such a case, an RMSNorm whose gradients are wrong in torch 2.10 to 2.13
(`hardware.avoid_wrong_gradients` switches that one off).
"""

import math
import re
from typing import TYPE_CHECKING, NamedTuple

import lightning as L
import torch
from litgpt import pretrain

from litgpt_moe import balance
from litgpt_moe.checkpoints.state import rng_state, set_rng_state
from litgpt_moe.cli import is_out_of_memory
from litgpt_moe.training.model import router_counts, set_router_counts
from litgpt_moe.training.optimizer import plain_name

if TYPE_CHECKING:
    from litgpt_moe.training.hooks import LoopHooks


class Limits(NamedTuple):
    """How far compiled may be from eager, relative to eager, before rounding no longer explains it."""

    loss: float
    norm: float
    """Of the norm of a group's gradients."""
    gradient: float
    """Of a group's gradients: the norm of their difference."""


# In 16 bits a few tokens in a hundred choose another expert, which changes the gradients and not their norms.
HALF, FLOAT32 = Limits(0.01, 0.1, 0.5), Limits(0.003, 0.03, 0.2)
# a group with a smaller share of the whole gradient is compared with this share of it
SMALLEST_SHARE = 1e-3


class Difference(NamedTuple):
    """How far compiled is from eager, relative to eager, and the group of weights that is the worst."""

    loss: float
    group: str
    norm: float
    gradient: float

    def excess(self, limits: Limits) -> float:
        """Return the gradients' largest share of a limit: above 1 it is not rounding."""
        shares = self.norm / limits.norm, self.gradient / limits.gradient
        return max(shares) if all(map(math.isfinite, shares)) else math.inf

    def is_beyond(self, limits: Limits) -> bool:
        """Return whether rounding does not explain it; NaN is beyond every limit."""
        return not (self.loss <= limits.loss and self.excess(limits) <= 1)


Outcome = tuple[torch.Tensor, list[torch.Tensor | None]]  # the loss, and the gradient of each weight


def check_compiled(hooks: "LoopHooks", batch: torch.Tensor) -> None:
    """Train eagerly from here on if compiled and eager differ on `batch`, the first micro-batch.

    It costs two forward and backward passes, and as much memory as eager training does; nothing is updated,
    and counters and random generators are as they were.
    """
    limits = FLOAT32 if hooks.run.precision == "32-true" else HALF
    counts, rng = router_counts(hooks.gpt, lambda tensor: tensor), rng_state()
    try:
        compiled = _outcome(hooks, batch)
        set_rng_state(rng)
        with torch.compiler.set_stance("force_eager"):
            eager = _outcome(hooks, batch)
        worst = compare(hooks, compiled, eager, limits)
    except RuntimeError as error:
        # with several processes the others would wait for this one
        if hooks.run.world_size > 1 or not is_out_of_memory(error):
            raise
        hooks.metrics.print("Compiled and eager are not compared: eager needs more memory than there is.")
        return
    finally:
        _forget(hooks)
        set_router_counts(hooks.gpt, counts)
        set_rng_state(rng)
        if hooks.fabric.device.type == "cuda":
            # the peak in the log is that of training
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if worst is None:
        hooks.metrics.print("Compiled and eager are not compared: eager's own gradient is not finite.")
        return
    hooks.metrics.print(describe(worst, limits))
    if worst.is_beyond(limits):
        torch.compiler.set_stance("force_eager")


def describe(worst: Difference, limits: Limits) -> str:
    """Return the sentence on the comparison."""
    found = (
        f"the loss by {worst.loss:.2%} (limit {limits.loss:.1%}), the gradients of {worst.group} by "
        f"{worst.gradient:.1%} (limit {limits.gradient:.0%}), their norm by {worst.norm:.1%} "
        f"(limit {limits.norm:.0%})"
    )
    if worst.is_beyond(limits):
        way_on = f"the run goes on eager, slower; another torch than {torch.__version__} may be right."
        return f"Warning: compiled differs from eager beyond rounding: {found}; {way_on}"
    return f"Compiled differs from eager by no more than rounding: {found}."


def _outcome(hooks: "LoopHooks", batch: torch.Tensor) -> Outcome:
    """Return what a micro-batch gives in LitGPT's loop; the model is left without gradients."""
    length = hooks.gpt.max_seq_length
    output = hooks.module(batch[:, :length].contiguous().long())
    loss = pretrain.chunked_cross_entropy(output, batch[:, 1 : length + 1].contiguous().long())
    # Fabric multiplies by the scale in 16-mixed, and a gradient that overflows cannot be compared
    scale = 1.0 if hooks.scaling is None else hooks.scaling.current
    # not TrainingFabric's, which would count the loss as one of the step
    L.Fabric.backward(hooks.fabric, loss / scale)
    gradients = [weight.grad for weight in hooks.gpt.parameters()]
    _forget(hooks)
    return loss.detach().float(), gradients


def _forget(hooks: "LoopHooks") -> None:
    for weight in hooks.gpt.parameters():
        weight.grad = None
    balance.discard_step_load(hooks.gpt)


def compare(hooks: "LoopHooks", compiled: Outcome, eager: Outcome, limits: Limits) -> Difference | None:
    """Return the difference of the loss and the worst group, over all ranks; None if eager is not finite."""
    losses = hooks.sum_over_ranks(torch.stack([compiled[0], eager[0]])).tolist()
    groups: dict[str, torch.Tensor] = {}
    for (name, _), one, other in zip(hooks.gpt.named_parameters(), compiled[1], eager[1], strict=True):
        # one group for all experts of a layer: a few tokens more or less are much for one of them
        group = re.sub(r"experts\.\d+", "experts", plain_name(name))
        groups[group] = groups.get(group, 0.0) + _squares(one, other, hooks.fabric.device)
    rows = hooks.sum_over_ranks(torch.stack(list(groups.values()))).sqrt().tolist()
    whole = math.hypot(*(eager_norm for _, eager_norm, _ in rows))
    if not math.isfinite(whole + losses[1]):
        return None
    loss = abs(losses[0] - losses[1]) / abs(losses[1])
    found = []
    for group, (norm, eager_norm, difference) in zip(groups, rows, strict=True):
        size = max(eager_norm, SMALLEST_SHARE * whole)
        found.append(Difference(loss, group, abs(norm - eager_norm) / size, difference / size))
    return max(found, key=lambda one: one.excess(limits))


def _squares(compiled: torch.Tensor | None, eager: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Return the squared norms of both gradients and of their difference, (3,) float32."""
    zero = torch.zeros((), device=device)
    a, b = (zero if gradient is None else gradient.float() for gradient in (compiled, eager))
    return torch.stack([each.square().sum() for each in (a, b, a - b)])
