"""Autoregressive decoding: one new token per forward pass, with a KV cache."""

from collections.abc import Generator, Sequence

import torch
from litgpt.model import GPT, CausalSelfAttention

from litgpt_moe.balance import layers_of
from litgpt_moe.cli import WorkFailed
from litgpt_moe.generation.sampling import sample
from litgpt_moe.generation.settings import Sampling


class Diverged(WorkFailed):
    """The model's logits are NaN or infinite."""


def room_for(prompt_ids: Sequence[int], max_tokens: int, block_size: int) -> int:
    """Return how many of `max_tokens` new tokens fit; ValueError when the prompt leaves no room at all."""
    if not prompt_ids:
        raise ValueError("the prompt holds no token and this tokenizer has no BOS; give a --prompt with text")
    if len(prompt_ids) >= block_size:
        sizes = f"{len(prompt_ids):,} tokens but the model's block_size is {block_size:,}"
        raise ValueError(f"the prompt has {sizes}; shorten it to {block_size - 1:,} tokens or fewer")
    return min(max_tokens, block_size - len(prompt_ids))


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Generator[int]:
    """Yield up to `max_tokens` new token ids, stopping before `eos_id` and when the context is full.

    Several of these iterators can alternate on one model: each sets its own KV cache before each step.
    """
    sampling = sampling or Sampling()
    count = room_for(prompt_ids, max_tokens, model.max_seq_length)
    weight, device = model.lm_head.weight, model.lm_head.weight.device
    ids = torch.tensor([list(prompt_ids)], device=device)
    position = torch.arange(ids.size(1), device=device)
    seen = torch.zeros(weight.size(0), dtype=torch.bool, device=device)
    try:
        model.set_kv_cache(1, max_seq_length=ids.size(1) + count, device=device, dtype=weight.dtype)
        attentions = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
        mask, caches = model.mask_cache, [attention.kv_cache for attention in attentions]
        for end in range(ids.size(1), ids.size(1) + count):
            model.mask_cache = mask
            for attention, cache in zip(attentions, caches, strict=True):
                attention.kv_cache = cache
            # entered for each token, so that the caller's gradient mode is unchanged between two steps
            with torch.inference_mode():
                seen[ids] = True
                # only the last row is needed, and `end` lets attention skip the empty part of the cache
                logits = model(ids, position, input_pos_maxp1=end)[0, -1]
                # -inf is allowed, it is a token of probability 0; the maximum is -inf only if all of them are
                if not logits.max().isfinite():
                    way_out = "use an earlier checkpoint (or --precision 32-true, if it was 16-true)"
                    raise Diverged(f"the model's logits are NaN or infinite; {way_out}")
                token = sample(logits, sampling, generator, seen)
            if token == eos_id:
                return
            yield token
            ids, position = torch.tensor([[token]], device=device), position[-1:] + 1
    finally:
        model.clear_kv_cache()


def lay_out_for_decoding(model: GPT) -> None:
    """Transpose the weights in memory for one-token steps on a CPU; shapes, values and names do not change.

    The speed of a step is that of reading the weights. MKL reads the layout (in, out) at 17 to 26 GB/s on an
    AMD EPYC core and (out, in) at 10 (torch 2.10, tools/benchmarks/generate.py).
    """
    for layer in layers_of(model).values():
        layer.pack_for_decoding()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.is_contiguous():
            module.weight.data = module.weight.data.t().contiguous().t()
