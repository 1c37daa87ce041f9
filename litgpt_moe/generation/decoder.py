"""Decoders read the tokens of several sequences in one step and return the logits of the next ones."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from litgpt.model import GPT, KVCache, build_mask_cache

from litgpt_moe.balance import layers_of


class Routing(NamedTuple):
    """How one layer routed the tokens of a step, in the order in which they were given."""

    experts: torch.Tensor
    """(N, K) the chosen experts, the one with the largest weight first."""
    probs: torch.Tensor
    """(N, E) the router's probabilities of all experts."""

    @classmethod
    def of(cls, probs_NE: torch.Tensor, weights_NK: torch.Tensor, indices_NK: torch.Tensor) -> "Routing":
        """Return the routing with each token's experts in the order of their weights."""
        return cls(indices_NK.gather(1, weights_NK.argsort(dim=-1, descending=True)), probs_NE)


class Read(NamedTuple):
    """What a step computed."""

    logits: torch.Tensor
    """(sequences, vocabulary) those that follow each sequence's last token."""
    routing: list[Routing]
    """Of each layer with experts, if it was asked for."""


class Decoder(Protocol):
    """Reads tokens into caches. Used by one thread at a time."""

    name: str
    block_size: int
    """Tokens that a sequence may have."""

    def open(self, capacity: int) -> Any:
        """Return a cache for a new sequence of up to `capacity` tokens."""
        ...

    def close(self, cache: Any) -> None:
        """Free a cache's memory."""
        ...

    def read(self, work: Sequence[tuple[Any, Sequence[int]]], with_routing: bool = False) -> Read:
        """Read the next tokens of some sequences, one or more of each, given as (cache, tokens).

        After an error all sequences are as before.
        """
        ...


@dataclass
class TorchCache:
    """One sequence's slot in a store of keys and values."""

    store: "_Store"
    slot: int
    n_read: int = 0


class _Layer(NamedTuple):
    """Keys and values of one layer, (slots, n_query_groups, capacity, head_size), and LitGPT's module."""

    k: torch.Tensor
    v: torch.Tensor
    view: KVCache


@dataclass
class _Store:
    """Room for the keys and values of several sequences, a slot for each."""

    capacity: int = 0
    n_slots: int = 0
    layers: list[_Layer] = field(default_factory=list)
    mask: torch.Tensor | None = None


class TorchDecoder:
    """Reads tokens by LitGPT's own model, on any device: sequences that read one token each are a batch."""

    name = "torch"

    def __init__(self, model: GPT) -> None:
        self.model, self.block_size = model, model.max_seq_length
        self.device = model.lm_head.weight.device
        blocks: Any = model.transformer.h
        self._attentions = [block.attn for block in blocks]
        config = model.config
        # these caches have their own shapes and orders
        self._has_plain_caches = config.sliding_window_size is None and not config.latent_attention
        self._open: list[TorchCache] = []
        self._store = _Store()

    def open(self, capacity: int) -> TorchCache:
        """Return a cache for a new sequence of up to `capacity` tokens."""
        if not self._has_plain_caches:
            store = _Store()
            self._grow(store, capacity, 1)
            return TorchCache(store, 0)
        store = self._store
        if capacity > store.capacity or len(self._open) == store.n_slots:
            n_slots = store.n_slots if len(self._open) < store.n_slots else max(1, 2 * store.n_slots)
            self._grow(store, max(capacity, store.capacity), n_slots)
        self._open.append(TorchCache(store, len(self._open)))
        return self._open[-1]

    def close(self, cache: TorchCache) -> None:
        """Free the cache's slot, in which the last one's content is then kept."""
        if cache not in self._open:
            return
        last = self._open.pop()
        if last is not cache:
            with torch.inference_mode():
                for tensor in (tensor for layer in self._store.layers for tensor in (layer.k, layer.v)):
                    tensor[cache.slot, :, : last.n_read] = tensor[last.slot, :, : last.n_read]
            last.slot = cache.slot
            self._open[last.slot] = last
        if not self._open:
            self._store = _Store()

    def _grow(self, store: _Store, capacity: int, n_slots: int) -> None:
        """Make room for more sequences, or longer ones; what the store holds is kept."""
        length, dtype = self.model.rope_cache_length(), self.model.lm_head.weight.dtype
        layers = []
        with torch.inference_mode():
            mask = build_mask_cache(capacity, self.device)
            for attention in self._attentions:
                view = attention.build_kv_cache(n_slots, capacity, length, self.device, dtype)
                layers.append(_Layer(view.k, view.v, view))
            for new, old in zip(layers, store.layers, strict=False):  # nothing is there at first
                new.k[: old.k.size(0), :, : old.k.size(2)] = old.k
                new.v[: old.v.size(0), :, : old.v.size(2)] = old.v
        # only now: without memory for the new ones, the store stays as it was
        store.capacity, store.n_slots, store.layers, store.mask = capacity, n_slots, layers, mask

    def read(self, work: Sequence[tuple[TorchCache, Sequence[int]]], with_routing: bool = False) -> Read:
        """Read the next tokens of some sequences; see `Decoder.read`."""
        n_single = sum(len(tokens) == 1 for _, tokens in work)
        with torch.inference_mode():
            together = {}
            if self._has_plain_caches and n_single > 1 and not with_routing:
                together = self._read_together({c.slot: tokens[0] for c, tokens in work if len(tokens) == 1})
            rows, routing = [], []
            for cache, tokens in work:
                if together and len(tokens) == 1:
                    rows.append(together[cache.slot])
                else:
                    with record_routing(self.model, with_routing) as found:
                        ids = torch.tensor([list(tokens)], device=self.device)
                        positions = torch.arange(cache.n_read, cache.n_read + len(tokens), device=self.device)
                        rows.append(
                            self._forward(cache.store, slice(cache.slot, cache.slot + 1), ids, positions)[0]
                        )
                    routing.append(found)
            by_layer = [
                Routing(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*routing, strict=True)
            ]
            read = Read(torch.stack(rows).float(), by_layer)
        # only now: after a step that failed, the same tokens can be read again
        for cache, tokens in work:
            cache.n_read += len(tokens)
        return read

    def _read_together(self, tokens: dict[int, int]) -> dict[int, torch.Tensor]:
        """Read one token of each slot that is named, in one forward pass of all slots."""
        # one that reads nothing now gets any token: what it stores at its next position will be overwritten
        ids = [[tokens.get(cache.slot, 0)] for cache in self._open]
        positions = [[min(cache.n_read, self._store.capacity - 1)] for cache in self._open]
        ids_B1, positions_B1 = torch.tensor([ids, positions], device=self.device)
        logits = self._forward(self._store, slice(0, len(self._open)), ids_B1, positions_B1)
        return {slot: logits[slot] for slot in tokens}

    def _forward(
        self, store: _Store, slots: slice, ids: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits after each sequence's last token; the model is left without caches."""
        model = self.model
        try:
            model.mask_cache = store.mask
            for attention, layer in zip(self._attentions, store.layers, strict=True):
                layer.view.k, layer.view.v = layer.k[slots], layer.v[slots]
                attention.kv_cache = layer.view
            # the end lets attention skip the empty part of the caches
            return model(ids, positions, input_pos_maxp1=int(positions.max()) + 1)[:, -1]
        finally:
            model.clear_kv_cache()


@contextmanager
def record_routing(model: GPT, is_wanted: bool) -> Iterator[list[Routing]]:
    """In the block, collect the routing of each layer with experts, in their order."""
    found: list[Routing] = []

    def record(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        logits_NE, weights_NK, indices_NK = layer.route(inputs[0].flatten(0, 1))
        # the grouped router scores each expert by a sigmoid of its own (DeepSeek-V3, eq. 15)
        probs_NE = logits_NE.sigmoid() if layer.config.n_expert_groups else logits_NE.softmax(dim=-1)
        found.append(Routing.of(probs_NE, weights_NK, indices_NK))

    with ExitStack() as hooks:
        for layer in layers_of(model).values() if is_wanted else ():
            hooks.enter_context(layer.register_forward_pre_hook(record))
        yield found
