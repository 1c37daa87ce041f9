"""Texts that advance together: the same as alone, whoever joins and leaves, however long a prompt is."""

import weakref
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG
from helpers.native import need_compiler
from litgpt.model import GPT

from litgpt_moe.config import MoEConfig
from litgpt_moe.generation import decode
from litgpt_moe.generation.decode import (
    PROMPT_TOKENS,
    Batch,
    Continuation,
    Diverged,
    generate,
    generate_together,
)
from litgpt_moe.generation.decoder import Decoder, Read, TorchDecoder
from litgpt_moe.generation.native import NativeDecoder
from litgpt_moe.generation.settings import Sampling

pytestmark = pytest.mark.usefixtures("eager")
CONTEXT = 3 * PROMPT_TOKENS
SLIDING = {"sliding_window_size": CONTEXT, "sliding_window_indices": [1, 0]}
SHORT, OTHER, LONG = [5, 9, 300], [41, 7], [n % 500 for n in range(2 * PROMPT_TOKENS + 9)]


def make_model(**changes: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(MoEConfig(**{**TINY_CONFIG, "block_size": CONTEXT, **changes})).requires_grad_(False).eval()
    model.lm_head.weight.mul_(20)  # so that no two tokens are nearly equal
    return model


@pytest.fixture(params=["torch", "torch, sliding window", "native"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    if request.param != "native":
        return TorchDecoder(make_model(**(SLIDING if "sliding" in request.param else {})))
    need_compiler()
    return NativeDecoder(make_model())


def member(prompt: list[int], n_new: int, seed: int | None = None, eos_id: int | None = None) -> Continuation:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return Continuation(prompt, n_new, Sampling(temperature=0.0 if seed is None else 0.8), eos_id, generator)


def alone(decoder: Decoder, prompt: list[int], n_new: int, seed: int | None = None) -> list[int]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    sampling = Sampling(temperature=0.0 if seed is None else 0.8)
    return list(generate(decoder, prompt, n_new, sampling, None, generator))


def test_samples_are_those_that_each_seed_gives_alone(decoder: Decoder) -> None:
    members = [member(SHORT, 12, seed) for seed in range(4)]
    with closing(generate_together(decoder, members)) as texts:
        found = [list(ids) for ids in texts]
    assert found == [alone(decoder, SHORT, 12, seed) for seed in range(4)]
    assert len({tuple(ids) for ids in found}) == 4


def test_members_join_and_leave_between_steps(decoder: Decoder) -> None:
    batch, found = Batch(decoder), {}

    def advance(count: int) -> None:
        for _ in range(count):
            for one in batch.step():
                found.setdefault(one.member, []).append(one.token)

    first, second, third = member(SHORT, 20), member(OTHER, 30), member(SHORT, 9, seed=3)
    batch.join(first)
    advance(4)
    batch.join(second)
    batch.join(third)
    advance(3)
    batch.leave(first)  # whose place another takes
    late = member([7], 25)
    batch.join(late)
    advance(40)
    assert not batch.members and [len(found[m]) for m in (first, second, third, late)] == [7, 30, 9, 25]
    assert found[first] == alone(decoder, SHORT, 20)[:7]
    assert found[second] == alone(decoder, OTHER, 30)
    assert found[third] == alone(decoder, SHORT, 9, seed=3)
    assert found[late] == alone(decoder, [7], 25)


def test_a_long_prompt_is_read_in_parts_while_the_others_go_on(decoder: Decoder) -> None:
    batch, going, new = Batch(decoder), member(SHORT, 20), member(LONG, 5)
    batch.join(going)
    batch.step()
    batch.join(new)
    tokens: dict[Continuation, list[int | None]] = {going: [], new: []}
    steps = 0
    while batch.members:
        steps += 1
        for one in batch.step():
            tokens[one.member].append(one.token)
    assert all(token is not None for token in tokens[going]) and len(tokens[going]) == 19
    n_parts = tokens[new].index(next(token for token in tokens[new] if token is not None))
    assert n_parts == len(LONG) // (PROMPT_TOKENS - 1)
    assert tokens[new][n_parts:] == alone(decoder, LONG, 5)


def test_a_new_text_has_its_first_token_within_two_steps(decoder: Decoder) -> None:
    batch = Batch(decoder)
    for seed in range(3):
        batch.join(member(SHORT, 20, seed))
    batch.step()
    new = member([*range(30)], 5)
    batch.join(new)
    [advance] = [one for one in batch.step() if one.member is new]
    assert advance.token == alone(decoder, [*range(30)], 1)[0]


def test_a_short_prompt_does_not_wait_for_a_long_one(decoder: Decoder) -> None:
    batch, new = Batch(decoder), member([*range(20)], 5)
    for one in (member(OTHER, 20), member(LONG, 5), new):
        batch.join(one)
    [advance] = [one for one in batch.step() if one.member is new]
    assert advance.token == alone(decoder, [*range(20)], 1)[0]


def test_a_long_prompt_alone_is_read_in_parts_so_that_others_can_join(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = alone(decoder, LONG, 5)
    monkeypatch.setattr(decode, "ALONE_TOKENS", len(LONG) // 2)
    batch, one = Batch(decoder), member(LONG, 5)
    batch.join(one)
    # 137 tokens are 68, 68 and one
    assert [batch.step()[0].token for _ in range(4)] == [None, None, *whole[:2]]


def test_the_end_of_one_text_is_not_that_of_the_others(decoder: Decoder) -> None:
    whole = alone(decoder, SHORT, 20)
    members = [member(SHORT, 20, eos_id=whole[5]), member(SHORT, 20)]
    with closing(generate_together(decoder, members)) as texts:
        found = [list(ids) for ids in texts]
    assert found == [whole[: whole.index(whole[5])], whole]


def test_many_prompts_at_once_all_come_to_their_end(decoder: Decoder) -> None:
    prompts = [LONG[: 2 * n + 1] for n in range(PROMPT_TOKENS // 2, PROMPT_TOKENS // 2 + 6)]
    members = [member(prompt, 3) for prompt in prompts]
    with closing(generate_together(decoder, members)) as texts:
        found = [list(ids) for ids in texts]
    assert found == [alone(decoder, prompt, 3) for prompt in prompts]


def test_closing_frees_the_memory(decoder: Decoder) -> None:
    members = [member(SHORT, 20, seed) for seed in range(3)]
    with closing(generate_together(decoder, members)) as texts:
        assert len([token for token, _ in zip(next(texts), range(4), strict=False)]) == 4
        caches = [weakref.ref(one.cache) for one in members]
    assert not any(cache() for cache in caches)
    if isinstance(decoder, TorchDecoder):
        assert not decoder._open and not decoder._store.layers and decoder.model.mask_cache is None
    assert [list(ids) for ids in generate_together(decoder, [member(OTHER, 3)])] == [alone(decoder, OTHER, 3)]


def test_without_memory_for_one_more_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = TorchDecoder(make_model())
    batch, going, late = Batch(decoder), member(SHORT, 6), member(OTHER, 6)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    for under_way in ([], [going]):
        for one in under_way:
            batch.join(one)
            batch.step()
        with monkeypatch.context() as patched:
            patched.setattr(decoder.model.transformer.h[1].attn, "build_kv_cache", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                batch.join(late)
    batch.join(late)
    while batch.members:
        batch.step()
    assert going._ids[len(SHORT) :] == alone(decoder, SHORT, 6)
    assert late._ids[len(OTHER) :] == alone(decoder, OTHER, 6)


def test_texts_for_which_there_is_no_memory_wait_for_others_to_end(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [alone(decoder, prompt, n) for prompt, n in ((SHORT, 4), (OTHER, 9), (LONG, 5), (SHORT, 6))]
    open_cache, close_cache, n_open = decoder.open, decoder.close, 0

    def open_two(capacity: int) -> object:
        nonlocal n_open
        if n_open == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        n_open += 1
        return open_cache(capacity)

    def close(cache: object) -> None:
        nonlocal n_open
        n_open -= cache is not None
        close_cache(cache)

    monkeypatch.setattr(decoder, "open", open_two)
    monkeypatch.setattr(decoder, "close", close)
    members = [member(SHORT, 4), member(OTHER, 9), member(LONG, 5), member(SHORT, 6)]
    with closing(generate_together(decoder, members)) as texts:
        assert [list(ids) for ids in texts] == expected
    assert n_open == 0
    n_open = 2
    with pytest.raises(torch.OutOfMemoryError):
        list(generate_together(decoder, [member(SHORT, 4)]))


def test_one_that_diverges_ends_alone(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, bad, good = Batch(decoder), member(SHORT, 6), member(OTHER, 6)
    expected, read = alone(decoder, OTHER, 6), decoder.read

    def diverge(work: Any, with_routing: bool = False) -> Read:
        found = read(work, with_routing)
        logits = found.logits.clone()
        for row, (cache, _) in enumerate(work):
            if cache is bad.cache and bad.n_left < 4:
                logits[row] = float("nan")
        return found._replace(logits=logits)

    monkeypatch.setattr(decoder, "read", diverge)
    batch.join(bad)
    batch.join(good)
    found: list[int | None] = []
    errors: list[Diverged] = []
    while batch.members:
        for one in batch.step():
            found += [one.token] if one.member is good else []
            errors += [one.error] if one.error else []
    assert found == expected and len(errors) == 1 and bad.has_ended


@pytest.mark.parametrize("where", ["reading", "drawing"])
def test_a_step_that_failed_can_be_made_again(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected = alone(decoder, LONG, 6)
    batch, first, second = Batch(decoder), member(LONG, 6), member(OTHER, 6)
    batch.join(first)
    batch.join(second)
    found, n_calls = [], 0
    place: Any = decoder if where == "reading" else decode
    name = "sample" if place is decode else "_step" if isinstance(decoder, NativeDecoder) else "_forward"
    real = getattr(place, name)

    def fail_now_and_then(*args: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        # also in the midst of a step that calls it for each text
        if n_calls % 3 == 0:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(place, name, fail_now_and_then)
    while not first.has_ended:
        try:
            found += [one.token for one in batch.step() if one.member is first and one.token is not None]
        except MemoryError:
            continue
    assert found == expected and n_calls > 3
    batch.leave(second)


def test_alternating_iterators_share_one_decoder(decoder: Decoder) -> None:
    steps: list[Iterator[int]] = [
        generate(decoder, prompt, 10, Sampling(temperature=0)) for prompt in (SHORT, OTHER)
    ]
    assert list(zip(*steps, strict=True)) == list(
        zip(alone(decoder, SHORT, 10), alone(decoder, OTHER, 10), strict=True)
    )
