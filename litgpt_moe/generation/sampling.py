"""From logits to tokens: the candidates with their probabilities, and the random draw."""

from collections.abc import Sequence

import torch

from litgpt_moe.generation.settings import Sampling

MAX_LOGIT = 1e30


def candidates(
    logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the tokens' relative probabilities and the ids they belong to (None: position i is id i).

    Applied in this order: repetition penalty (CTRL, section 4.1, arxiv.org/abs/1909.05858; negative logits
    are multiplied, as Hugging Face does), temperature, top_k, top_p (nucleus, arxiv.org/abs/1904.09751),
    min_p (arxiv.org/abs/2407.01082). `logits` is (..., V), so is `seen`, true for tokens that occurred.
    """
    scores, ids = logits.float(), None
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        scores = scores.where(~seen, (scores / penalty).where(scores > 0, scores * penalty))
    if sampling.temperature == 0:
        ids = scores.argmax(dim=-1, keepdim=True)
        return torch.ones_like(ids, dtype=scores.dtype), ids
    # the bound, which no sound model's logits reach, keeps the quotient finite
    scores = scores.clamp(-MAX_LOGIT, MAX_LOGIT) / sampling.temperature
    if 0 < sampling.top_k < scores.size(-1):
        scores, ids = scores.topk(sampling.top_k)
    probs = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        if ids is None:
            probs, ids = _most_probable(probs, sampling.top_p)
        # a token is kept if the more probable ones sum to less than top_p, so the first one always is
        probs = probs.where(probs.cumsum(-1) - probs < sampling.top_p, 0.0)
    if sampling.min_p > 0:
        probs = probs.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs, ids


def _most_probable(probs: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest probabilities, in descending order, that sum to `mass` or more, and their ids."""
    # the first 1,024 nearly always suffice, and sorting all 32,000 costs more than twice as much
    values, ids = probs.topk(min(1024, probs.size(-1)))
    return (values, ids) if bool((values.sum(-1) >= mass).all()) else probs.sort(descending=True)


def sample(
    logits: torch.Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator | None],
    seen: torch.Tensor | None = None,
) -> list[int]:
    """Return the next token of each row of `logits` (B, V), drawn by `sampling` with the row's own generator.

    A row's token does not depend on the other rows.
    """
    if len(logits) > 1 and sampling.top_p < 1 and not 0 < sampling.top_k < logits.size(-1):
        # how many candidates a row has, and with it the random numbers, depends on its probabilities
        marks = [None] * len(logits) if seen is None else seen.split(1)
        rows = zip(logits.split(1), generators, marks, strict=True)
        return [sample(row, sampling, [generator], own)[0] for row, generator, own in rows]
    probs, ids = candidates(logits, sampling, seen)
    places = torch.zeros_like(probs[:, :1], dtype=torch.long)
    if probs.size(-1) > 1:
        # as torch.multinomial draws one, by an exponential race: the largest p / e, with e from Exp(1)
        noise = torch.empty_like(probs)
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
        places = (probs / noise).argmax(dim=-1, keepdim=True)
    return (places if ids is None else ids.gather(-1, places)).flatten().tolist()
