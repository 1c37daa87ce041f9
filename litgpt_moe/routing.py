"""Which tokens each expert takes: the router's choices in every layer, and how specialised the experts are.

"Token tells" is the mutual information between a token's id and its expert, divided by the experts' entropy:
0 % if the id says nothing about the expert, 100 % if an id always goes to the same one. "Overlap" of two
layers is the mutual information of a token's first choices in both, divided by the geometric mean of their
entropies: 1 if each follows from the other. Both are reduced by what chance gives, which shuffling measures.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from litgpt.model import GPT
from tqdm import tqdm

from litgpt_moe.balance import layers_of
from litgpt_moe.cli import WorkFailed, no_bar
from litgpt_moe.scoring import head_apart

N_TYPICAL = 8  # typical tokens listed per expert
Pieces = Callable[[int], str]  # a token's text by its id


@dataclass
class Expert:
    """The tokens that one expert of a layer takes."""

    share: float
    """Its share of the layer's assignments, K for each token; 1 / E is even."""
    kinds: float
    """Effective number of different tokens: 2 to the entropy, in bits, of its tokens."""
    typical: list[dict[str, Any]]
    """Tokens that it takes more often than its share: piece, count, share of the piece's occurrences."""


@dataclass
class Layer:
    """How one layer routes."""

    index: int
    load_imbalance: float
    """Largest load over the mean, 1.0 is even."""
    load_entropy: float
    """Entropy of the loads over that of even ones, 0 to 1."""
    first_weight: float
    """Mean weight of a token's first choice; 1 / K if all its experts weigh the same."""
    token_tells: float
    """Share of the routing that follows from the token alone, 0 to 1."""
    experts: list[Expert]


def inspect(
    model: GPT, ids: np.ndarray, piece_of: Callable[[int], str | None], layer: int | None
) -> tuple[list[Layer], Layer, list[list[float]]]:
    """Return all layers, the one asked for (None: the most specialised), and their overlaps."""
    if not (known := layers_of(model)):
        raise ValueError("the model has no experts; tools/upcycle.py makes some of a dense model")
    if layer is not None and layer not in known:
        have = ", ".join(map(str, known))
        raise ValueError(f"layer is {layer}; the model has experts in the layers {have}")
    if ids.max() >= model.lm_head.out_features:
        raise ValueError(f"the tokenizer is not the model's (token {ids.max():,}); copy in the right one")

    def piece(number: int) -> str:
        text = piece_of(number)
        return repr(text)[1:-1] if text else f"#{number}"  # repr escapes line breaks

    with head_apart(model):  # logits, half of the work in a small model, are not needed
        experts, weights = record_choices(model, ids)
    n_expert = model.config.n_expert
    layers = [describe_layer(i, experts[i], weights[i], ids, n_expert, piece) for i in experts]
    most = max(layers, key=lambda each: each.token_tells)
    return layers, next((each for each in layers if each.index == layer), most), overlaps(experts)


def record_choices(model: GPT, ids: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Return by layer the K experts of each token, (N, K) with the first choice first, and their weights."""
    experts: dict[int, list[np.ndarray]] = {}
    weights: dict[int, list[np.ndarray]] = {}

    def record(index: int, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        _, weights_NK, indices_NK = layer.route(inputs[0].flatten(0, 1))
        if not weights_NK.isfinite().all():
            raise WorkFailed(f"the router of layer {index} gives NaN or infinity; use an earlier checkpoint")
        weights_NK, order_NK = weights_NK.float().sort(dim=1, descending=True, stable=True)
        experts.setdefault(index, []).append(indices_NK.gather(1, order_NK).cpu().numpy())
        weights.setdefault(index, []).append(weights_NK.cpu().numpy())

    device, window = next(model.parameters()).device, model.max_seq_length
    with torch.inference_mode(), ExitStack() as hooks:
        for index, layer in layers_of(model).items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(record, index)))
        progress = hooks.enter_context(tqdm(total=len(ids), unit="tok", unit_scale=True, disable=no_bar()))
        for start in range(0, len(ids), window):
            part = torch.from_numpy(ids[start : start + window]).to(device)
            model(part[None])
            progress.update(len(part))
    joined = [{i: np.concatenate(parts) for i, parts in kept.items()} for kept in (experts, weights)]
    return joined[0], joined[1]


def entropy(counts: np.ndarray) -> float:
    """Return the entropy, in nats, of the distribution with these counts."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def mutual_information(a: np.ndarray, b: np.ndarray, seed: int = 0) -> float:
    """Return the mutual information, in nats, of two sequences, minus that of `a` and a shuffled `b`.

    The latter, which is due to chance, is large for many different tokens with few occurrences each.
    """
    a, b = (np.unique(kinds, return_inverse=True)[1] for kinds in (a, b))
    shuffled = np.random.default_rng(seed).permutation(b)
    # shuffling does not change the entropies of a and of b, so only those of the pairs differ
    joint, chance = (entropy(np.bincount(a * (b.max() + 1) + other)) for other in (b, shuffled))
    return max(0.0, chance - joint)


def describe_layer(
    index: int, experts_NK: np.ndarray, weights_NK: np.ndarray, ids: np.ndarray, n_expert: int, pieces: Pieces
) -> Layer:
    """Return the figures of a layer."""
    kinds, kind_N = np.unique(ids, return_inverse=True)
    top_k = experts_NK.shape[1]
    flat = np.repeat(kind_N, top_k) * n_expert + experts_NK.ravel()
    counts_TE = np.bincount(flat, minlength=len(kinds) * n_expert).reshape(-1, n_expert)
    load_E = counts_TE.sum(axis=0)
    spread, shared = entropy(load_E), mutual_information(np.repeat(ids, top_k), experts_NK.ravel())
    return Layer(
        index=index,
        load_imbalance=float(load_E.max() / load_E.mean()),
        load_entropy=spread / np.log(n_expert) if n_expert > 1 else 1.0,
        first_weight=float(weights_NK[:, 0].mean() / weights_NK.sum(axis=1).mean()),
        token_tells=min(1.0, shared / spread) if spread else 0.0,
        experts=[
            Expert(
                share=float(load_E[e] / load_E.sum()),
                kinds=float(np.exp(entropy(counts_TE[:, e]))) if load_E[e] else 0.0,
                typical=typical_tokens(counts_TE, e, kinds, top_k, pieces),
            )
            for e in range(n_expert)
        ],
    )


def typical_tokens(
    counts_TE: np.ndarray, e: int, kinds: np.ndarray, top_k: int, pieces: Pieces
) -> list[dict[str, Any]]:
    """Return the tokens most typical of expert `e`, which have the largest n log(n / expected n)."""
    n_T, all_T = counts_TE[:, e].astype(float), counts_TE.sum(axis=1)
    expected_T = all_T * (n_T.sum() / all_T.sum())
    score_T = np.zeros_like(n_T)
    taken = n_T > expected_T
    score_T[taken] = n_T[taken] * np.log(n_T[taken] / expected_T[taken])
    best = [t for t in np.argsort(-score_T, kind="stable")[:N_TYPICAL] if score_T[t] > 0]
    return [
        {"piece": pieces(int(kinds[t])), "count": int(n_T[t]), "share": float(n_T[t] * top_k / all_T[t])}
        for t in best
    ]


def overlaps(experts: dict[int, np.ndarray]) -> list[list[float]]:
    """Return the matrix of the layers' overlaps, from the experts of the first choice."""
    first = [choices[:, 0] for choices in experts.values()]
    spread = [entropy(np.bincount(choices)) for choices in first]
    values = np.eye(len(first))
    for i, j in combinations(range(len(first)), 2):
        scale = (spread[i] * spread[j]) ** 0.5
        shared = mutual_information(first[j], first[i]) / scale if scale else 0.0
        values[i, j] = values[j, i] = min(1.0, shared)
    return values.tolist()


def table(layers: list[Layer], shown: Layer) -> str:
    """Return two tables as text: the figures of all layers, and the typical tokens of `shown`'s experts."""
    lines = ["layer  max/mean load  entropy of load  first weight  token tells"]
    lines += [
        f"{layer.index:>5}  {layer.load_imbalance:>13.2f}  {layer.load_entropy:>15.3f}"
        f"  {layer.first_weight:>12.2f}  {layer.token_tells:>11.0%}"
        for layer in layers
    ]
    lines += ["", f"layer {shown.index}: what each expert takes (of the piece's occurrences)"]
    lines += ["expert   load   kinds  most typical"]
    for e, expert in enumerate(shown.experts):
        typical = "  ".join(f"{token['piece']} {token['share']:.0%}" for token in expert.typical)
        lines.append(f"{e:>6} {expert.share:>6.1%} {expert.kinds:>7.0f}  {typical or '-'}")
    return "\n".join(lines)
