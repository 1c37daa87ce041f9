"""A stand-in for litgpt_moe.generation.text, which is being written elsewhere.

For the integrator: delete this file, and import tell_story from litgpt_moe.generation.text and Sampling from
litgpt_moe.generation.sampling in training/stories.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from litgpt.generate.base import generate


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0


def tell_story(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, sampling: Sampling, seed: int
) -> str:
    weight = model.lm_head.weight
    prompt_ids = tokenizer.encode(prompt, device=weight.device)
    length = min(model.max_seq_length, prompt_ids.numel() + max_new_tokens)
    if prompt_ids.numel() >= length:
        return prompt  # a toy model whose context the prompt fills
    torch.manual_seed(seed)
    model.eval()
    model.set_kv_cache(batch_size=1, max_seq_length=length, device=weight.device, dtype=weight.dtype)
    try:
        ids = generate(
            model,
            prompt_ids,
            length,
            temperature=sampling.temperature,
            top_k=sampling.top_k or None,
            top_p=sampling.top_p,
            eos_id=tokenizer.eos_id,
        )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        return "(none: the model's logits are not finite)"
    finally:
        model.clear_kv_cache()
    return tokenizer.decode(ids).strip()
