"""Training in fp16 (`precision: 16-mixed`): the loss is scaled, so that small gradients do not become zero.

Mixed Precision Training, section 3.2 (arxiv.org/abs/1710.03740). The scale halves after each step whose
gradient overflows, which is skipped, and doubles after 2,000 steps without one (torch.amp.GradScaler).
"""

from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, Precision
from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import Optimizer

# below 1 the scale would make gradients smaller than they are: an overflow then has another cause
MIN_SCALE = 1.0


class LossScaling(Precision):
    """What Fabric's two plugins for 16-mixed lack: fused optimizers, and a scale that others can multiply by.

    lightning 2.6.6 refuses to clip gradients for a fused optimizer, since such a one can unscale them itself.
    It does not if `unscale_` has done so already.

    The caller drops the gradients of a step whose norm is not finite, before it calls `optimizer_step`.
    """

    scaler: GradScaler
    current: torch.Tensor
    """The scale, a scalar on the device. It is changed in place, so whoever multiplies by it may keep it."""
    n_overflows: int = 0
    """Steps skipped so far because their gradient overflowed."""

    def start(self, device: torch.device) -> None:
        """Make the scale on the device where the model is."""
        self.current = self._scale(device)

    def _scale(self, device: torch.device) -> torch.Tensor:
        return self.scaler.scale(torch.ones((), device=device))

    def can_lower(self) -> bool:
        """Return whether the scale is above its minimum; the host waits for the device."""
        return self.current.item() > MIN_SCALE

    def count_overflow(self) -> str:
        """Count a step whose gradient overflows, and return what to say about it."""
        self.n_overflows += 1
        scale = self.current.item()
        lower = max(MIN_SCALE, scale * self.scaler.get_backoff_factor())
        return f"the gradient overflows in fp16 at a loss scale of {scale:,g}, which is now {lower:,g}"

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, and note on the device whether one is infinite or NaN."""
        self.scaler.unscale_(optimizer)

    def optimizer_step(self, optimizer: Any, **options: Any) -> Any:
        """Take a step, and adapt the scale to what `unscale_gradients` has found."""
        # `scaler.step` would skip a step too, but makes the host wait for an optimizer that is not fused, and
        # torch 2.10's ShardedGradScaler gives a fused one a `found_inf` of a shape that it refuses
        output = optimizer.step(**options)
        self.scaler.update()
        self.current.copy_(self._scale(self.current.device).clamp_(min=MIN_SCALE))
        self.scaler.update(self.current)
        return output

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on with; the host waits for the device."""
        state = self.scaler.state_dict()
        return {
            "scale": state["scale"],
            "growth_tracker": state["_growth_tracker"],
            "n_overflows": self.n_overflows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        scale, tracker = float(state_dict["scale"]), state_dict["growth_tracker"]
        self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": tracker})
        self.current.fill_(scale)
        self.n_overflows = state_dict["n_overflows"]


class MixedLossScaling(LossScaling, MixedPrecision):
    """16-mixed with whole weights on each device."""

    def __init__(self, device_type: str) -> None:
        super().__init__("16-mixed", device_type, GradScaler(device_type))


class ShardedLossScaling(LossScaling, FSDPPrecision):
    """16-mixed with FSDP: a gradient that overflows in one process is skipped in all."""

    def __init__(self, device_type: str) -> None:
        super().__init__("16-mixed")
        self.scaler = ShardedGradScaler(device_type)


def loss_scaling(fabric: Fabric) -> LossScaling | None:
    """Return the loss scaling of a run, None in other precisions than 16-mixed."""
    precision = fabric.strategy.precision
    return precision if isinstance(precision, LossScaling) else None
