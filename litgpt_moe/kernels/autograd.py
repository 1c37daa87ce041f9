"""`torch.autograd.Function` with types."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch


class Function(torch.autograd.Function):
    """`torch.autograd.Function`, typed so that type checkers know that `apply` returns one tensor."""

    if TYPE_CHECKING:
        apply: ClassVar[Callable[..., torch.Tensor]]
