"""From logits to a token: the candidates with their probabilities, and the random draw."""

import torch

from litgpt_moe.generation.settings import Sampling

MAX_LOGIT = 1e30


def candidates(
    logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the tokens' relative probabilities and the ids they belong to (None: position i is id i).

    Applied in this order: repetition penalty (CTRL, section 4.1, arxiv.org/abs/1909.05858; negative logits
    are multiplied, as Hugging Face does), temperature, top_k, top_p (nucleus, arxiv.org/abs/1904.09751),
    min_p (arxiv.org/abs/2407.01082). `logits` is (V,), `seen` is (V,), true for tokens that occurred.
    """
    scores, ids = logits.float(), None
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        scores = scores.where(~seen, (scores / penalty).where(scores > 0, scores * penalty))
    if sampling.temperature == 0:
        return scores.new_ones(1), scores.argmax(dim=-1, keepdim=True)
    # the bound, which no sound model's logits reach, keeps the quotient finite
    scores = scores.clamp(-MAX_LOGIT, MAX_LOGIT) / sampling.temperature
    if 0 < sampling.top_k < scores.size(0):
        scores, ids = scores.topk(sampling.top_k)
    probs = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        if ids is None:
            probs, ids = _most_probable(probs, sampling.top_p)
        # a token is kept if the more probable ones sum to less than top_p, so the first one always is
        probs = probs.where(probs.cumsum(-1) - probs < sampling.top_p, 0.0)
    if sampling.min_p > 0:
        probs = probs.where(probs >= sampling.min_p * probs.max(), 0.0)
    return probs, ids


def _most_probable(probs: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest probabilities, in descending order, that sum to `mass` or more, and their ids."""
    # the first 1,024 nearly always suffice, and sorting all 32,000 costs more than twice as much
    values, ids = probs.topk(min(1024, probs.size(0)))
    return (values, ids) if values.sum() >= mass else probs.sort(descending=True)


def sample(
    logits: torch.Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    seen: torch.Tensor | None = None,
) -> int:
    """Return the id of the next token, drawn from `logits` (V,) by `sampling`."""
    probs, ids = candidates(logits, sampling, seen)
    place = torch.multinomial(probs, 1, generator=generator) if probs.numel() > 1 else 0
    return int(place if ids is None else ids[place])
