"""How often a model gives the good sentence of a minimal pair the higher probability; chance is one half.

The log-probability of a sentence is the sum over its tokens, each given those before it, the first given the
token that begins every training text (BOS; EOS where a tokenizer has no other). No EOS is scored at the end.
Transformers' figure for a converted model is this one, when its tokenizer adds BOS as ours does.
"""

import math
import time
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt.model import GPT
from tqdm import tqdm

from litgpt_moe.cli import WorkFailed, no_bar
from litgpt_moe.data.tokenizer import StoryEncoder, read_tokenizer_facts
from litgpt_moe.loss import chunk_rows
from litgpt_moe.quality.pairs import Paradigm
from litgpt_moe.scoring import check_vocabulary, head_apart, memory_for, window_nats


def score_pairs(
    model: GPT, tokenizer_dir: Path, paradigms: list[Paradigm], batch_size: int
) -> dict[str, Any]:
    """Return the accuracy of each paradigm, phenomenon and field, and `accuracy`, the mean of the paradigms.

    A forward pass has about as many tokens as `batch_size` windows.
    """
    encoder, start = StoryEncoder(read_tokenizer_facts(tokenizer_dir)), time.perf_counter()
    check_vocabulary(encoder.facts.vocab_size, tokenizer_dir, model)
    sentences = [text for paradigm in paradigms for pair in paradigm.pairs for text in pair]
    # without the EOS that ends a training text: a sentence of the pairs may go on
    ids = [np.frombuffer(packed, encoder.facts.dtype)[:-1] for packed in encoder.pack(sentences)]
    if (longest := max(map(len, ids)) - 1) > model.config.block_size:
        sizes = f"a sentence of {longest} tokens, over the block_size of {model.config.block_size}"
        raise ValueError(f"the minimal pairs have {sizes}; a larger vocabulary makes fewer tokens")
    nats_P2 = sentence_nats(model, ids, batch_size).reshape(-1, 2)
    if not np.isfinite(nats_P2).all():
        raise WorkFailed(
            "the log-probability of a sentence is not finite: damaged weights, or --precision too narrow"
        )
    is_right = iter((nats_P2[:, 0] < nats_P2[:, 1]).tolist())
    right = {each.name: sum(next(is_right) for _ in each.pairs) for each in paradigms}
    return summarize(paradigms, right) | {"seconds": time.perf_counter() - start}


def sentence_nats(model: GPT, sentences: list[np.ndarray], batch_size: int) -> np.ndarray:
    """Return -log p of each sentence, given as token ids, in nats; its first token is given."""
    device, n_most = model.lm_head.weight.device, batch_size * model.config.block_size
    # of one length only, so that nothing is padded; the same sentence stands in several pairs
    by_length: dict[int, dict[bytes, list[int]]] = {}
    for place, ids in enumerate(sentences):
        by_length.setdefault(len(ids), {}).setdefault(ids.tobytes(), []).append(place)
    nats, rows = np.zeros(len(sentences)), chunk_rows(device, model.lm_head.out_features)
    n_tokens = sum((length - 1) * len(same) for length, same in by_length.items())
    with (
        torch.inference_mode(),
        head_apart(model) as logits,
        tqdm(total=n_tokens, unit=" tokens", desc="minimal pairs", disable=no_bar()) as progress,
    ):
        for length, same in sorted(by_length.items()):
            for places in batched(same.values(), max(1, n_most // length)):
                batch = np.stack([sentences[first] for first, *_ in places]).astype(np.int64)
                with memory_for(batch_size):
                    found = window_nats(model, logits, torch.from_numpy(batch).to(device), rows)
                for same_places, value in zip(places, found, strict=True):
                    nats[same_places] = value
                progress.update(len(places) * (length - 1))
    return nats


def summarize(paradigms: list[Paradigm], right: dict[str, int]) -> dict[str, Any]:
    """Return the shares of right pairs from their number by paradigm; groups are means of their paradigms."""
    shares = {each.name: right[each.name] / len(each.pairs) for each in paradigms}
    # of independent draws within each paradigm; the paradigms themselves are given
    variance = sum(shares[each.name] * (1 - shares[each.name]) / len(each.pairs) for each in paradigms)
    groups: dict[str, dict[str, list[float]]] = {"fields": {}, "phenomena": {}}
    for each in paradigms:
        groups["fields"].setdefault(each.branch, []).append(shares[each.name])
        groups["phenomena"].setdefault(each.phenomenon, []).append(shares[each.name])
    return {
        "accuracy": sum(shares.values()) / len(shares),
        "accuracy_stderr": math.sqrt(variance) / len(shares),
        "n_paradigms": len(shares),
        "n_pairs": sum(len(each.pairs) for each in paradigms),
        **{
            kind: {name: sum(parts) / len(parts) for name, parts in sorted(found.items())}
            for kind, found in groups.items()
        },
        "paradigms": shares,
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """Return the figures as readable lines."""
    n, size = f"{figures['n_pairs']:,} pairs", f"{figures['n_paradigms']} paradigms"
    stderr = f"+- {figures['accuracy_stderr']:.2%}"
    head = f"minimal pairs {figures['accuracy']:.2%} {stderr} right of {n} in {size}; chance is 50%"
    found = [head]
    for title, kind in (("by field", "fields"), ("by phenomenon", "phenomena")):
        found += [f"  {title}", *(f"    {name:<26} {share:7.2%}" for name, share in figures[kind].items())]
    return found
