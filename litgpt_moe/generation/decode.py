"""Autoregressive decoding: texts that advance together, each by one new token in a step."""

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from litgpt.model import GPT

from litgpt_moe.balance import layers_of
from litgpt_moe.cli import WorkFailed, is_out_of_memory
from litgpt_moe.generation.compiling import NoLibrary
from litgpt_moe.generation.decoder import Decoder, Routing, TorchDecoder
from litgpt_moe.generation.native import NativeDecoder
from litgpt_moe.generation.sampling import sample
from litgpt_moe.generation.settings import Sampling

# Most tokens that a step reads while other texts wait for their next one. 64 tokens of MoE-200M take a tenth
# of a second on two cores.
PROMPT_TOKENS = 64
# Most that it reads of a prompt alone, so that others can join and that a prompt whose reader has gone ends.
ALONE_TOKENS = 512


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


def make_decoder(model: GPT, engine: str = "auto", quantize: bool = False) -> Decoder:
    """Return the decoder for a model: compiled code where that is possible, else PyTorch.

    Args:
        model: in eval mode. Once its weights have changed it needs another decoder, since compiled code
            reads the large ones where they lie but keeps copies of others.
        engine: auto, native (ValueError where compiled code is not possible) or torch.
        quantize: round the weights to 8 bits, which only compiled code does.
    """
    try:
        if engine == "torch" and quantize:
            raise NoLibrary("8-bit weights need compiled code; leave out --engine torch or --quantize")
        if engine != "torch":
            return NativeDecoder(model, quantize)
    except NoLibrary as error:
        if engine == "native" or quantize:
            raise ValueError(str(error)) from None
    return TorchDecoder(model)


class Continuation:
    """A text under way: what the model has still to read of it, and how its next token is drawn."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        n_new: int,
        sampling: Sampling,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
        wants_routing: bool = False,
    ) -> None:
        """Continue a prompt by up to `n_new` tokens, which `room_for` has bounded, or up to `eos_id`."""
        self.unread, self.capacity, self.n_left = list(prompt_ids), len(prompt_ids) + n_new, n_new
        self.wants_routing, self.has_ended = wants_routing, False
        self.cache: Any = None
        self.sampling, self.generator = sampling, generator
        self._eos_id, self._ids = eos_id, list(prompt_ids)

    def seen(self, vocab: int, device: torch.device) -> torch.Tensor:
        """Return (V,), true for the tokens of the text so far."""
        seen = torch.zeros(vocab, dtype=torch.bool, device=device)
        seen[self._ids] = True
        return seen

    def take(self, token: int) -> int | None:
        """Add the next token; return it, or None if it ends the text."""
        if token == self._eos_id:
            self.has_ended = True
            return None
        self.n_left -= 1
        self.has_ended = self.n_left == 0
        self._ids.append(token)
        self.unread = [token]
        return token


@torch.inference_mode()
def draw(members: Sequence[Continuation], logits_BV: torch.Tensor) -> dict[Continuation, int | Diverged]:
    """Return each continuation's next token, drawn from its row of logits, or what is wrong with the row."""
    drawn: dict[Continuation, int | Diverged] = {}
    alike: dict[Sampling, list[int]] = {}
    # -inf is allowed, it is a token of probability 0; the maximum is -inf only if all of them are
    for row, highest in enumerate(logits_BV.amax(-1).tolist()):
        if math.isfinite(highest):
            alike.setdefault(members[row].sampling, []).append(row)
        else:
            way_out = "use an earlier checkpoint (or --precision 32-true, if it was 16-true)"
            drawn[members[row]] = Diverged(f"the model's logits are NaN or infinite; {way_out}")
    for sampling, rows in alike.items():
        chosen, logits, seen = [members[row] for row in rows], _rows(logits_BV, rows), None
        if sampling.repetition_penalty != 1.0:
            seen = torch.stack([member.seen(logits.size(-1), logits.device) for member in chosen])
        tokens = sample(logits, sampling, [member.generator for member in chosen], seen)
        drawn.update(zip(chosen, tokens, strict=True))
    return drawn


def _rows(logits_BV: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits_BV if len(rows) == len(logits_BV) else logits_BV[rows]


class Advance(NamedTuple):
    """What a step has brought to one continuation."""

    member: Continuation
    token: int | None
    """The new token; None for the end of the text, or while a long prompt is being read."""
    routing: list[Routing]
    """Of each layer with experts, for the tokens that were read; empty if no member asked for it."""
    error: Diverged | None = None


class Batch:
    """Continuations that advance together; they join and leave between steps."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.members: list[Continuation] = []

    def join(self, member: Continuation) -> None:
        """Let a continuation take part from the next step on. Without memory for it the others stay."""
        member.cache = self.decoder.open(member.capacity)
        self.members.append(member)

    def leave(self, member: Continuation) -> None:
        """Free a continuation's memory. One that has ended leaves by itself."""
        if member in self.members:
            self.members.remove(member)
            cache, member.cache = member.cache, None
            self.decoder.close(cache)

    def step(self) -> list[Advance]:
        """Read each member's next tokens and draw a new one for each that has read all of its own.

        After an error, as for lack of memory, the step can be made again.
        """
        if not self.members:
            return []
        counts = self._counts()
        work = [(member.cache, member.unread[:n]) for member, n in zip(self.members, counts, strict=True)]
        found = self.decoder.read(work, any(member.wants_routing for member in self.members))
        members = list(self.members)
        ready = [row for row, n in enumerate(counts) if n == len(members[row].unread)]
        try:
            drawn = draw([members[row] for row in ready], _rows(found.logits, ready))
        except (RuntimeError, MemoryError):
            # as after a failed read: the same tokens can be read again
            for cache, tokens in work:
                cache.n_read -= len(tokens)
            raise
        advances, first = [], 0
        for member, n in zip(members, counts, strict=True):
            del member.unread[:n]
            rows, first = slice(first, first + n), first + n
            routing = [Routing(layer.experts[rows], layer.probs[rows]) for layer in found.routing]
            new, token, error = drawn.get(member), None, None
            if isinstance(new, Diverged):
                error, member.has_ended = new, True
            elif new is not None:
                token = member.take(new)
            if member.has_ended:
                self.leave(member)
            advances.append(Advance(member, token, routing, error))
        return advances

    def _counts(self) -> list[int]:
        """Return how many tokens each member reads now: a long prompt in parts, so that the others go on."""
        lengths = [len(member.unread) for member in self.members]
        room = PROMPT_TOKENS if len(lengths) > 1 else ALONE_TOKENS
        counts = [0] * len(lengths)
        # the shortest first: no new text waits for the whole of a long prompt
        for place in sorted(range(len(lengths)), key=lengths.__getitem__):
            counts[place] = min(lengths[place], max(room, 1))  # at least one, so that each prompt ends
            room -= counts[place]
        return counts


def generate(
    decoder: Decoder,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Generator[int]:
    """Yield up to `max_tokens` new token ids, stopping before `eos_id` and when the context is full.

    Several of these iterators can alternate on one decoder.
    """
    n_new = room_for(prompt_ids, max_tokens, decoder.block_size)
    batch, member = Batch(decoder), Continuation(prompt_ids, n_new, sampling or Sampling(), eos_id, generator)
    batch.join(member)
    try:
        while not member.has_ended:
            [advance] = batch.step()
            if advance.error:
                raise advance.error
            if advance.token is not None:
                yield advance.token
    finally:
        batch.leave(member)


def generate_together(
    decoder: Decoder, members: Sequence[Continuation], at_once: int | None = None
) -> Generator[Iterator[int]]:
    """Yield an iterator over each continuation's new tokens, in their order; meanwhile all advance together.

    Those beyond `at_once`, or for which there is no memory, begin when others have ended. The iterator raises
    Diverged. Closing it frees the memory of those that have not ended.
    """
    batch, waiting = Batch(decoder), {member: deque[int | Diverged]() for member in members}
    outside, at_once = deque(members), at_once or len(members)

    def tokens_of(member: Continuation) -> Iterator[int]:
        while waiting[member] or not member.has_ended:
            _let_in(outside, batch, at_once)
            for advance in batch.step() if not waiting[member] else ():
                new = advance.error if advance.token is None else advance.token
                waiting[advance.member].extend([] if new is None else [new])
            if waiting[member]:
                new = waiting[member].popleft()
                if isinstance(new, Diverged):
                    raise new
                yield new

    try:
        _let_in(outside, batch, at_once)
        yield from map(tokens_of, members)
    finally:
        for member in members:
            batch.leave(member)


def _let_in(outside: deque[Continuation], batch: Batch, at_once: int) -> None:
    """Let continuations join, in their order, as far as there are places and memory for them."""
    while outside and len(batch.members) < at_once:
        try:
            batch.join(outside[0])
        except (RuntimeError, MemoryError) as error:
            if not batch.members or not is_out_of_memory(error):
                raise
            return
        outside.popleft()


def lay_out_for_decoding(model: GPT) -> None:
    """Transpose the weights in memory for one-token steps by PyTorch on a CPU; shapes, values, names stay.

    The speed of a step is that of reading the weights. MKL reads the layout (in, out) at 17 to 26 GB/s on an
    AMD EPYC core and (out, in) at 10 (torch 2.10, tools/benchmarks/generate.py).
    """
    for layer in layers_of(model).values():
        layer.pack_for_decoding()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.is_contiguous():
            module.weight.data = module.weight.data.t().contiguous().t()
