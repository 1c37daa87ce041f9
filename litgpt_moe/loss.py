"""The loss of a large vocabulary, computed from the hidden states without all logits in memory at once."""

from typing import Any, cast

import torch
import torch.nn as nn
from litgpt.model import GPT

from litgpt_moe.kernels.autograd import Function
from litgpt_moe.kernels.matmul import Linear, add_matmul, matmul, prefers_onednn
from litgpt_moe.kernels.rows import accumulation_dtype

# a target without loss, as in LitGPT and PyTorch
IGNORED_TOKEN = -100
# Logits in a chunk. CPU: 64 MB in float32, on a Xeon 2 to 7 % faster than 28 MB, the most that glibc keeps
# without `keep_freed_memory`. CUDA: 256 MB, so that the GEMMs are large.
CHUNK_VALUES = {"cpu": 16 << 20, "cuda": 1 << 26}


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    """Return how many tokens' logits to hold at once."""
    return max(1, CHUNK_VALUES.get(device.type, 1 << 22) // vocab_size)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight_VC: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype | None = None,
    expected_grad: torch.Tensor | None = None,
    *,
    as_on: torch.device | None = None,
) -> torch.Tensor:
    """Return the mean cross-entropy, float32 or wider, of the logits `hidden @ weight_VC.T`, chunk by chunk.

    The logits and their gradient never exist as a whole: for 32,000 tokens in the vocabulary they would be
    the largest tensors of a small model's step. The gradients are computed in forward, while a chunk's logits
    are there. Liger Kernel, section 3.2 (arxiv.org/abs/2410.10989).

    `hidden` (..., C) is the input of the head, `targets` (...) are token ids or IGNORED_TOKEN, and `dtype` is
    that of the GEMMs; the weight's if not given. `as_on` is the device whose chunks to take in place of those
    of `hidden`: memory is planned for CUDA on a CPU.

    `expected_grad` is the gradient that backward will give to the loss, by which the gradients are multiplied
    before they are rounded to `dtype`: in fp16 the scale of loss scaling, or else what is below 6e-8 would be
    0. Another gradient costs precision only.
    """
    hidden_NC = hidden.reshape(-1, hidden.size(-1))
    # asked here: inside `forward` of an autograd.Function gradients are always off
    has_backward = torch.is_grad_enabled() and (hidden.requires_grad or weight_VC.requires_grad)
    dtype = dtype or weight_VC.dtype
    device = as_on or hidden.device
    return _LinearCrossEntropy.apply(
        hidden_NC, weight_VC, targets.reshape(-1), dtype, expected_grad, has_backward, device
    )


class _LinearCrossEntropy(Function):
    """Forward computes the gradients too; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: torch.Tensor,
        weight_VC: torch.Tensor,
        targets_N: torch.Tensor,
        dtype: torch.dtype,
        expected_grad: torch.Tensor | None,
        has_backward: bool,
        device: torch.device,
    ) -> torch.Tensor:
        is_kept_N1 = (targets_N != IGNORED_TOKEN)[:, None]
        # any other id outside the vocabulary makes `gather` raise, as it makes torch's cross-entropy
        targets_N1 = targets_N[:, None].masked_fill(~is_kept_N1, 0)
        n_kept = is_kept_N1.sum().clamp_min(1)
        x_NC, w_VC, exact = hidden_NC.to(dtype), weight_VC.to(dtype), accumulation_dtype(hidden_NC)
        loss = torch.zeros((), dtype=exact, device=x_NC.device)
        gradients, factor = None, None
        if has_backward:
            factor = None if expected_grad is None else expected_grad / n_kept
            # the sum over many chunks needs more than bfloat16
            weight_grad_VC = torch.zeros(weight_VC.shape, dtype=exact, device=x_NC.device)
            if prefers_onednn(x_NC):  # see `_add_gradients`
                weight_grad_VC = weight_grad_VC.view(weight_VC.shape[::-1]).t()
            gradients = torch.empty_like(hidden_NC), weight_grad_VC
        size = chunk_rows(device, w_VC.size(0))
        for at in range(0, x_NC.size(0), size):
            rows = slice(at, at + size)
            logits_SV = matmul(x_NC[rows], w_VC.t())
            log_probs_SV = _log_softmax(logits_SV, exact, in_place=device.type == "cpu")
            loss -= (log_probs_SV.gather(1, targets_N1[rows]) * is_kept_N1[rows]).sum()
            if gradients is not None:
                probs_SV = log_probs_SV.exp_()
                _add_gradients(probs_SV, targets_N1, is_kept_N1, rows, factor, x_NC, w_VC, *gradients)
                del probs_SV
            # before the next chunk needs the memory
            del logits_SV, log_probs_SV
        if gradients is not None:
            ctx.save_for_backward(*gradients, n_kept if expected_grad is None else expected_grad)
            ctx.weight_dtype = weight_VC.dtype
        return loss / n_kept

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad_NC, sum_VC, divisor = ctx.saved_tensors
        scale = grad / divisor
        weight_grad_VC = sum_VC.new_empty(sum_VC.shape, dtype=ctx.weight_dtype)
        torch.mul(sum_VC, scale, out=weight_grad_VC)
        return hidden_grad_NC * scale.to(hidden_grad_NC.dtype), weight_grad_VC, *[None] * 5


def _log_softmax(logits_SV: torch.Tensor, dtype: torch.dtype, in_place: bool) -> torch.Tensor:
    """Return the log-probabilities in `dtype`, if asked to in place where the logits have that dtype."""
    if not in_place:
        return logits_SV.log_softmax(1, dtype=dtype)  # one kernel, which reads the narrower dtype
    logits_SV = logits_SV.to(dtype)
    return torch.log_softmax(logits_SV, 1, out=logits_SV)


def _add_gradients(
    probs_SV: torch.Tensor,
    targets_N1: torch.Tensor,
    is_kept_N1: torch.Tensor,
    rows: slice,
    factor: torch.Tensor | None,
    x_NC: torch.Tensor,
    w_VC: torch.Tensor,
    hidden_grad_NC: torch.Tensor,
    weight_grad_VC: torch.Tensor,
) -> None:
    """Add one chunk's gradients of the summed loss, times `factor`, to the last two arguments.

    Overwrites `probs_SV`.
    """
    targets_S1, is_kept_S1 = targets_N1[rows], is_kept_N1[rows]
    grad_SV = probs_SV.scatter_add_(1, targets_S1, -torch.ones_like(targets_S1, dtype=probs_SV.dtype))
    if factor is not None:
        grad_SV *= factor
    grad_SV = grad_SV.to(x_NC.dtype)
    hidden_grad_NC[rows] = matmul(grad_SV, w_VC) * is_kept_S1
    x_SC = x_NC[rows] * is_kept_S1
    if prefers_onednn(x_SC):  # oneDNN copies a transposed factor: here x, the smaller one
        add_matmul(weight_grad_VC.t(), x_SC.t(), grad_SV)
    else:
        add_matmul(weight_grad_VC, grad_SV.t(), x_SC)


class LossHead(Linear):
    """LitGPT's `lm_head` that can leave its product to `linear_cross_entropy`; see `defer_head`."""

    is_deferred = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., V), or the input while the loss multiplies by the weight itself."""
        return input if self.is_deferred else super().forward(input)


def defer_head(model: GPT) -> LossHead | None:
    """Leave the head's product to the loss from now on; return the head, or None if that is impossible.

    It is impossible where something comes between product and loss: a bias, or a soft cap on the logits.
    """
    head, config = model.lm_head, model.config
    is_plain = type(head) in (nn.Linear, Linear) and head.bias is None
    if not is_plain or config.final_logit_softcapping is not None:
        return None
    head.__class__ = LossHead  # the same object, so hooks and parameters stay
    deferred = cast(LossHead, head)
    deferred.is_deferred = True
    return deferred
