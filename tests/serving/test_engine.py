"""The engine: stop sequences, the routing it tells, turns, and clients that go away."""

import http.client
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import SENTENCE, wait_until
from helpers.server import Running, complete, serving

from litgpt_moe.serving.engine import Choice, StopText

pytestmark = pytest.mark.usefixtures("eager")


OVERLAPPING = ("abc", "b")  # whoever sees "ab" first stops at b, and whoever sees "abc" at a


@pytest.mark.parametrize("stops", [("ab",), ("aab", "ba"), ("c",), (), OVERLAPPING])
def test_any_cut_into_pieces_stops_at_the_same_place(stops: tuple[str, ...]) -> None:
    for text in map("".join, itertools.product("abc", repeat=5)):
        ends = [text.find(stop) for stop in stops if stop in text]
        expected = text[: min(ends)] if ends else text
        for cut in range(6):
            stop = StopText(stops)
            got = "".join([*map(stop.put, (text[:cut], *text[cut:])), stop.end()])
            assert stop.found == bool(ends) and text.startswith(got)
            assert got == expected or (stops == OVERLAPPING and not any(s in got for s in stops))


# --- the routing --------------------------------------------------------------------------------------------


def read_tokens(server: Running, **options: Any) -> tuple[str, list[dict]]:
    """Return the text, prompt included, and what the stream told of each token that the model read."""
    text, reads = "", []
    for chunk in complete(server, stream=True, echo=True, routing=True, **options):
        text += chunk.choices[0].text
        reads += chunk.choices[0].routing
    return text, reads


GROUPS = {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2}
DENSE_FIRST = {"first_k_dense_replace": 1, "intermediate_size": 32}


@pytest.mark.parametrize("change", [{}, GROUPS, DENSE_FIRST], ids=["softmax", "grouped", "dense-first"])
def test_the_routing_told_is_the_routing_that_was(
    change: dict[str, int], overfitted: Callable[..., Path]
) -> None:
    from litgpt_moe.balance import count_expert_load, expert_load

    with serving(overfitted(SENTENCE, **change), "--temperature=0") as server:
        text, reads = read_tokens(server, prompt="Lily had")
        model, told = server.engine.served.model, server.client.models.list().data[0].routing
        count_expert_load(model, True)
        with torch.no_grad():
            model(server.engine.served.tokenizer.encode(text)[None])
    assert text == SENTENCE == "".join(read["text"] for read in reads)
    assert told["scores"] == ("sigmoid" if change == GROUPS else "softmax")
    assert told["layers"] == ([1] if change == DENSE_FIRST else [0, 1])
    for place, load_E in enumerate(expert_load(model).values()):
        chosen = torch.tensor([read["experts"][place] for read in reads])
        assert torch.equal(torch.bincount(chosen.flatten(), minlength=4).double(), load_E)
        probs = torch.tensor([read["probs"][place] for read in reads])
        first, second = probs.gather(1, chosen).unbind(1)
        assert (first >= second).all()  # the first named has the largest weight
        if change != GROUPS:
            assert (first == probs.max(1).values).all() and ((probs.sum(1) - 1000).abs() <= 2).all()


def test_a_dense_model_is_served_without_routing(overfitted: Callable[..., Path]) -> None:
    dense = {"mlp_class_name": "LLaMAMLP", "intermediate_size": 32, "n_expert": 0, "n_expert_per_token": 0}
    with serving(overfitted(SENTENCE, **dense), "--temperature=0") as server:
        assert server.client.models.list().data[0].routing is None
        text, reads = read_tokens(server, prompt="Lily had")
    assert text == SENTENCE == "".join(read["text"] for read in reads)
    assert not any(read["experts"] or read["probs"] for read in reads)


def test_the_last_token_of_a_cut_story_was_not_read(tiny: Running) -> None:
    text, reads = read_tokens(tiny, prompt="Tom", max_tokens=5)
    assert text.startswith("".join(read["text"] for read in reads))
    assert len(reads) == len(tiny.engine.served.tokenizer.encode("Tom")) + 4


# --- clients that go away -----------------------------------------------------------------------------------


def test_clients_that_go_away_free_their_slots_and_too_many_are_refused(talker: Running) -> None:
    engine = talker.engine
    streams = [complete(talker, stream=True) for _ in range(engine.RUNNING)]
    for stream in streams:
        next(stream)
    assert engine.n_running == engine.RUNNING
    body = json.dumps({"prompt": "Tom"}).encode()
    waiting = [http.client.HTTPConnection("127.0.0.1", talker.port) for _ in range(engine.WAITING)]
    for connection in waiting:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    wait_until(lambda: engine.n_waiting == engine.WAITING)
    with pytest.raises(openai.InternalServerError, match="requests wait already") as caught:
        complete(talker)
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
    for connection in waiting[1:]:
        connection.close()
    wait_until(lambda: engine.n_waiting == 1)
    streams[0].close()
    wait_until(lambda: engine.n_waiting == 0)  # the first in the queue has the slot
    assert engine.n_running == engine.RUNNING
    for gone in (*streams[1:], waiting[0]):
        gone.close()
    wait_until(lambda: engine.n_running == 0)
    # the steps under way have ended, and no cache is left behind
    engine._thread.submit(lambda: None).result()
    assert not engine.batch.members
    assert complete(talker, max_tokens=3).usage.completion_tokens == 3


# --- steps that fail ----------------------------------------------------------------------------------------


@pytest.fixture
def quick(tiny: Running) -> Running:
    """The server with a client that does not wait for an answer that never comes."""
    return replace(tiny, client=tiny.client.with_options(timeout=20))


def fail(*_: Any) -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_sample_for_whose_cache_there_is_no_memory_is_an_error(
    quick: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(quick.engine.batch.decoder, "open", fail)
        with pytest.raises(openai.InternalServerError, match="CUDA out of memory"):
            complete(quick)
    assert complete(quick, max_tokens=3).usage.completion_tokens == 3


def test_a_sample_for_which_there_is_no_memory_does_not_end_those_under_way(
    tiny: Running, talker: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = talker.engine
    stream = complete(talker, stream=True)
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr(engine.batch.decoder, "open", fail)
        with pytest.raises(openai.InternalServerError, match="CUDA out of memory"):
            complete(talker)
    assert next(stream).choices[0].text is not None and engine.n_running == 1
    stream.close()


def test_a_step_for_which_there_is_no_memory_ends_the_newest_sample_alone(
    tiny: Running, talker: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = talker.engine
    read, widths = engine.batch.decoder.read, []

    def read_one(work: Any, *rest: Any) -> Any:
        widths.append(len(work))
        return read(work, *rest) if len(work) == 1 else fail()

    alone = complete(talker, seed=5, max_tokens=600).choices[0].text
    stream = complete(talker, stream=True, seed=5, max_tokens=600)
    text = next(stream).choices[0].text
    with monkeypatch.context() as patched:
        patched.setattr(engine.batch.decoder, "read", read_one)
        with pytest.raises(openai.InternalServerError, match="CUDA out of memory"):
            complete(talker, n=2)
    assert text + "".join(part.choices[0].text for part in stream) == alone
    # it was under way when the two came
    assert 3 in widths


def test_an_error_while_memory_is_freed_reaches_the_client(
    quick: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(quick.engine.batch.decoder, "read", fail)
        patched.setattr(quick.engine.batch.decoder, "close", fail)
        with pytest.raises(openai.InternalServerError, match="CUDA out of memory"):
            complete(quick, n=2)
    assert complete(quick, max_tokens=3).usage.completion_tokens == 3


def test_a_text_that_cannot_be_decoded_does_not_end_the_others(
    tiny: Running, talker: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Choice.put

    def put_or_fail(choice: Choice, advance: Any) -> Any:
        return panic() if choice.sampling.temperature == 0 else put(choice, advance)

    alone = complete(talker, seed=5, max_tokens=300).choices[0].text
    stream = complete(talker, stream=True, seed=5, max_tokens=300)
    text = next(stream).choices[0].text
    with monkeypatch.context() as patched:
        patched.setattr(Choice, "put", put_or_fail)
        with pytest.raises(openai.InternalServerError, match="an error in the server"):
            complete(talker, temperature=0)
    assert text + "".join(part.choices[0].text for part in stream) == alone


class PanicException(BaseException):
    """As of the tokenizers library, when its Rust code panics."""


def panic(*_: Any) -> None:
    raise PanicException("index out of range")


@pytest.mark.parametrize(("failure", "words"), [(fail, "CUDA out of memory"), (panic, ".")])
def test_a_sample_that_ends_in_a_step_that_fails_is_an_error(
    quick: Running, monkeypatch: pytest.MonkeyPatch, failure: Any, words: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Choice, "put", failure)
        with pytest.raises(openai.InternalServerError, match=words):
            complete(quick, max_tokens=1)
    assert complete(quick, max_tokens=3).usage.completion_tokens == 3
