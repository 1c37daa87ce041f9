"""Requests to /v1/completions: what is refused, in OpenAI's form, and what is taken."""

import json
from typing import Any

import openai
import pytest
from helpers.server import Running, complete, post
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from litgpt_moe.balance import layers_of
from litgpt_moe.generation.settings import MAX_CHOICES
from litgpt_moe.serving import requests
from litgpt_moe.serving.requests import (
    ALLOWED,
    MAX_BODY_BYTES,
    ApiError,
    CompletionBody,
    StreamOptions,
    error_response,
    read_request,
)

pytestmark = pytest.mark.usefixtures("eager")


BAD = {
    "temperature": [(-1, "choose 0 (greedy) or 0.001 or more"), ("hot", 'is "hot"; it must be a number')],
    "top_p": [(0, "above 0"), (2, "above 0"), (10**400, "it must be a number")],
    "top_k": [(-1, "0 (off) or more"), (1.5, "is 1.5; it must be a whole number")],
    "max_tokens": [
        (0, "is 0; it must be a whole number, 1 or more"),
        (True, "is true; it must be a whole number"),
        (65, "64 or fewer"),
        (10**30, "64 or"),
    ],
    "n": [(0, "it must be a whole number from 1 to 8"), (9, "is 9; it must be a whole number from 1 to 8")],
    "seed": [
        (-1, "it must be a whole number from 0 to 9223372036854775807"),
        (2**63, "it must be a whole number from 0 to 9223372036854775807"),
    ],
    "stop": [
        ("", "a text of 1 to 100 characters or a list of up to 4 of them"),
        ("a" * 101, "a text of 1 to 100 characters"),
        (["a"] * 5, "a list of up to 4 of them"),
        ([1], "is [1]; it must be a text"),
        (7, "is 7; it must be a text"),
    ],
    "stream": [("yes", 'is "yes"; it must be true or false')],
    "stream_options": [
        (5, "is 5; it must be an object"),
        ({"include_usage": 1}, "stream_options.include_usage is 1; it must be true or false"),
    ],
    "prompt": [
        (None, "prompt is missing; it must be a text or a list of 1 to 8 texts"),
        ([], "is []; it must be a text or a list of 1 to 8 texts"),
        ([1, 2], "is [1, 2]; it must be a text or a list of"),
        ("Tom went " * 40, "block_size is 64"),
        (["x"] * 9, "a list of 1 to 8 texts"),
        ("\ud800", "half a surrogate pair"),
    ],
    "logprobs": [(1, "is 1; it must be null or left out")],
    "best_of": [(2, "is 2; it must be 1 or left out")],
    "frequency_penalty": [(0.5, "it must be 0 or left out")],
    "logit_bias": [({"5": 1}, 'is {"5": 1}; it must be {} or left out')],
    "suffix": [("x", "is \"x\"; it must be '' or left out")],
    "tempratur": [(1, "unknown parameter tempratur; leave it out")],
    "model": [(5, "is 5; it must be the name of this server's model, a text")],
    "user": [(5, "is 5; it must be a text")],
}


def test_the_words_for_each_parameter_are_ours() -> None:
    assert ALLOWED.keys() == CompletionBody.model_fields.keys() | StreamOptions.model_fields.keys()


@pytest.mark.parametrize("param", BAD)
def test_a_bad_parameter_is_told_in_openais_form(param: str, tiny: Running) -> None:
    for value, message in BAD[param]:
        body = {"model": "MoE-tiny", "prompt": "Tom", param: value}
        status, answer = post(tiny, json.dumps(body).encode())
        error = answer["error"]
        assert status == 400 and message in error["message"] and len(error["message"]) < 300, error
        assert param in error["message"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_values_without_effect_are_taken(tiny: Running) -> None:
    none = {"best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "user": "me"}
    assert complete(tiny, **none, stop=None, suffix=None).choices == complete(tiny).choices


def test_a_model_that_is_not_here_is_not_found(tiny: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' is here") as caught:
        tiny.client.completions.create(model="gpt", prompt="Tom")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="this server has /"):
        tiny.client.embeddings.create(model="MoE-tiny", input="Tom")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(), parts, max_size=3),
    max_leaves=5,
)
NESTED = [b'{"temperature": ' + b"[" * depth + b"]" * depth + b"}" for depth in (100, 500, 900, 990, 5000)]
NAMES = [*BAD, "min_p", "repetition_penalty", "presence_penalty", "user", "echo", "routing"]


@given(changes=st.dictionaries(st.sampled_from(NAMES) | st.text(), JSON, max_size=3))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_parameters_are_checked_or_told(changes: dict[str, Any], tiny: Running) -> None:
    try:
        request = read_request({"prompt": "Tom", **changes}, tiny.engine.served)
    except ApiError as error:
        assert error.status in (400, 404) and error_response(error).body
    else:
        assert request.sampling and 1 <= len(request.prompts) * request.body.n <= MAX_CHOICES


def test_extreme_settings_draw_a_token(tiny: Running) -> None:
    for extreme in (
        {"temperature": 1e308},
        {"temperature": 1e-3, "repetition_penalty": 1e30},
        {"repetition_penalty": 1e-3},
        {"top_p": 1e-12, "min_p": 1, "top_k": 10**30},
        {"max_tokens": 64},
    ):
        body = {"prompt": "Tom Tom", "max_tokens": 10, **extreme}
        status, answer = post(tiny, json.dumps(body).encode())
        assert status == 200 and answer["usage"]["completion_tokens"] >= 1, extreme


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"Tom"', b"\xff", b"[" * 100_000, b"9" * 5000, b'{"prompt": NaN}', *NESTED]
)
def test_what_is_no_request_is_told_so(body: bytes, tiny: Running) -> None:
    status, answer = post(tiny, body)
    message = answer["error"]["message"]
    assert status == 400 and len(message) < 300
    assert not any(word in message for word in ("should", "sys.", "recursion", "Input"))


def test_the_routing_of_an_answer_has_a_limit(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    # a token of the tiny model has 2 layers of 4 experts, of which 2 are chosen: 12 numbers
    config, n_layers = tiny.engine.served.model.config, len(layers_of(tiny.engine.served.model))
    assert (n_layers, config.n_expert, config.n_expert_per_token) == (2, 4, 2)
    n_prompt = complete(tiny, max_tokens=1).usage.prompt_tokens
    monkeypatch.setattr(requests, "MAX_ROUTING", 12 * 2 * (n_prompt + 10))
    assert len(complete(tiny, routing=True, n=2, max_tokens=10).choices[1].routing) >= n_prompt
    with pytest.raises(openai.BadRequestError, match="2 layers of 4 experts it is given for up to") as caught:
        complete(tiny, routing=True, n=2, max_tokens=11)
    assert caught.value.param == "routing"
    assert complete(tiny, n=2, max_tokens=11).choices


def test_a_request_that_is_too_large_is_refused_with_and_without_its_length(tiny: Running) -> None:
    body = b" " * (MAX_BODY_BYTES + 1)
    assert post(tiny, body)[0] == 413
    assert post(tiny, iter([body]))[0] == 413  # chunked
    assert complete(tiny).choices  # and the server goes on
