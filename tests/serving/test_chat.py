"""/v1/chat/completions by OpenAI's own client: the text of the messages is continued; limits and errors."""

import json
from typing import Any

import openai
import pytest
from helpers.server import Running, complete, post, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from litgpt_moe.serving.chat import ALLOWED_IN_CHAT, ChatBody, Message, ResponseFormat, read_chat_request
from litgpt_moe.serving.requests import ApiError, error_response

pytestmark = pytest.mark.usefixtures("eager")
USER = {"role": "user", "content": "Tom"}


def chat(server: Running, *messages: dict[str, Any], **options: Any) -> Any:
    """Return the answer to a chat; a message is given as OpenAI's client takes it."""
    return server.client.chat.completions.create(model=server.name, messages=messages or (USER,), **options)


def test_an_answer_is_the_completion_of_the_messages_text(tiny: Running) -> None:
    answer = chat(tiny, n=2, seed=5)
    expected = complete(tiny, n=2, seed=5)
    assert [choice.message.content for choice in answer.choices] == [c.text for c in expected.choices]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage == expected.usage and answer.object == "chat.completion"


def test_the_template_is_the_text_of_user_and_assistant_in_order(tiny: Running) -> None:
    parts = [{"type": "text", "text": "He saw"}, {"type": "text", "text": " a dog."}]
    messages = (
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Tom had a ball."},
        {"role": "assistant", "content": " It was red."},
        {"role": "user", "content": parts, "name": "me"},
    )
    expected = complete(tiny, "Tom had a ball. It was red.\nHe saw a dog.", seed=5).choices[0].text
    assert chat(tiny, *messages, seed=5).choices[0].message.content == expected


def test_an_answer_that_is_sent_back_by_openais_client_is_taken(tiny: Running) -> None:
    answer = chat(tiny, seed=5).choices[0].message
    again = chat(tiny, USER, answer.model_dump(), {"role": "user", "content": "Lily"}, seed=1, max_tokens=5)
    expected = complete(tiny, f"Tom{answer.content}\nLily", seed=1, max_tokens=5)
    assert again.choices[0].message.content == expected.choices[0].text


def test_a_stream_says_the_role_first_and_the_end_last(tiny: Running) -> None:
    whole = [choice.message.content for choice in chat(tiny, n=2, seed=5).choices]
    events, usage = [[], []], None
    for chunk in chat(tiny, n=2, seed=5, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            events[choice.index].append((choice.delta.role, choice.delta.content, choice.finish_reason))
    for found, text in zip(events, whole, strict=True):
        assert found[0] == ("assistant", "", None) and found[-1] == (None, None, "length")
        assert "".join(content for _, content, _ in found[:-1]) == text
        assert {(role, reason) for role, _, reason in found[1:-1]} == {(None, None)}
    assert usage.completion_tokens == 40


def test_values_without_effect_are_taken(tiny: Running) -> None:
    none = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "user": "me", "logprobs": False}
    none |= {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    answer = chat(tiny, **none, stop=None, max_completion_tokens=5)
    assert answer.choices[0].message.content == complete(tiny, max_tokens=5).choices[0].text


def test_a_stop_sequence_and_the_end_of_the_story_are_told(storyteller: Any) -> None:
    with serving(storyteller, "--temperature=0") as server:
        user = {"role": "user", "content": "Lily"}
        assert chat(server, user, stop="kite").choices[0].message.content == " had a blue "
        (choice,) = chat(server, user).choices
    assert choice.finish_reason == "stop" and choice.ending == "the story ended"


BAD = [
    ({"messages": None}, "messages", "messages is missing; it must be a list of 1 to 1,000 messages"),
    ({"messages": []}, "messages", "messages is []; it must be a list of"),
    ({"messages": "Tom"}, "messages", 'messages is "Tom"; it must be a list of'),
    ({"messages": ["Tom"]}, "messages", 'messages.0 is "Tom"; it must be a list of'),
    (
        {"messages": [{"content": "x"}]},
        "messages",
        "messages.0.role is missing; it must be system, developer",
    ),
    ({"messages": [{"role": "user"}]}, "messages", "messages.0.content is missing; it must be a text or"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", 'messages.0.role is "tool"; it must be'),
    ({"messages": [{**USER, "tool_calls": [1]}]}, "tool_calls", "unknown parameter messages.0.tool_calls"),
    ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "messages", "of parts of type text"),
    ({"messages": [{**USER, "content": "\ud800"}]}, "messages", "half a surrogate pair"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", "messages has no text of a user"),
    ({"messages": [{**USER, "content": "Tom went " * 40}]}, "messages", "block_size is 64"),
    ({"max_tokens": 65}, "max_tokens", "ask for 64 or fewer"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "it must be a whole number, 1 or more"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "leave one out"),
    ({"logprobs": True}, "logprobs", "logprobs is true; it must be false or left out"),
    ({"tools": [{}]}, "tools", "tools is [{}]; it must be [] or left out"),
    ({"response_format": {"type": "json_object"}}, "response_format", 'is "json_object"; it must be'),
    ({"prompt": "Tom"}, "prompt", "unknown parameter prompt; leave it out, or use /v1/completions"),
    ({"routing": True}, "routing", "unknown parameter routing"),
    ({"temperature": -1}, "temperature", "choose 0 (greedy) or 0.001 or more"),
    ({"tempratur": 1}, "tempratur", "unknown parameter tempratur; leave it out"),
]


@pytest.mark.parametrize(("change", "param", "message"), BAD)
def test_a_bad_parameter_is_told_in_openais_form(
    change: dict[str, Any], param: str, message: str, tiny: Running
) -> None:
    body = {"model": "MoE-tiny", "messages": [USER], **change}
    status, answer = post(tiny, json.dumps(body).encode(), path="/v1/chat/completions")
    error = answer["error"]
    assert status == 400 and message in error["message"] and len(error["message"]) < 300, error
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda parts: (
        st.lists(parts, max_size=3) | st.dictionaries(st.text() | st.just("type"), parts, max_size=3)
    ),
    max_leaves=5,
)
MESSAGE = st.fixed_dictionaries({"role": JSON | st.just("user"), "content": JSON | st.just("Tom")})


@given(
    changes=st.dictionaries(
        st.sampled_from([*ChatBody.model_fields, "seed", "prompt"]) | st.text(), JSON, max_size=3
    ),
    message=MESSAGE | JSON,
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_parameters_are_checked_or_told(changes: dict[str, Any], message: Any, tiny: Running) -> None:
    try:
        request = read_chat_request({"messages": [USER, message], **changes}, tiny.engine.served)
    except ApiError as error:
        assert error.status in (400, 404) and error_response(error).body
    else:
        assert request.prompts and request.sampling


def test_a_model_that_is_not_here_is_not_found(tiny: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' is here"):
        tiny.client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "Tom"}])


def test_the_words_for_each_parameter_are_ours() -> None:
    fields = ChatBody.model_fields | Message.model_fields | ResponseFormat.model_fields
    assert ALLOWED_IN_CHAT.keys() == fields.keys()
