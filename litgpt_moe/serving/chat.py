"""Requests to /v1/chat/completions: the messages become one text, which the model continues.

The models are not trained to chat, so the template is the plainest one: the texts of user and assistant in
their order. An answer stands directly behind what it continued, as the model wrote it; what a user adds later
begins a new line. What `system` and `developer` say is left out, because the model would take an instruction
(many clients send one by themselves) for the beginning of the text.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from litgpt_moe.serving.requests import ApiError, CompletionRequest, Served, check_types, read_request

MAX_MESSAGES = 1000


def _without_null(value: Any) -> Any:
    """Return a message without the keys that are null, with which OpenAI's client sends answers back."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _as_text(value: Any) -> Any:
    """Return a content that is a list of parts of type text as one text."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    forms = isinstance(parts, list) and all(
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
        for part in parts
    )
    if not forms:
        raise PydanticCustomError("texts", "no text")
    text = "".join(part["text"] for part in parts)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogates", "half a surrogate pair") from None
    return text


class Message(BaseModel, strict=True, extra="forbid"):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str = ""


class ResponseFormat(BaseModel, strict=True, extra="forbid"):
    """OpenAI's format of an answer; the model writes whatever it writes."""

    type: Literal["text"]


class ChatBody(BaseModel, strict=True, extra="forbid"):
    """The parameters that /v1/completions does not have; `requests.CompletionBody` has the others."""

    messages: Annotated[
        list[Annotated[Message, BeforeValidator(_without_null)]], Field(min_length=1, max_length=MAX_MESSAGES)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    # accepted only with a value that is a no-op, which clients send
    logprobs: Literal[False] = False
    response_format: ResponseFormat | None = None
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True
    store: Literal[False] = False


NOT_IN_CHAT = ("prompt", "echo", "best_of", "suffix", "routing")
ALLOWED_IN_CHAT = {  # what messages say of each parameter
    "messages": f"a list of 1 to {MAX_MESSAGES:,} messages, each an object with role and content",
    "role": "system, developer, user or assistant",
    "content": "a text or a list of parts of type text",
    "name": "a text",
    "max_completion_tokens": "a whole number, 1 or more",
    "logprobs": "false or left out",
    "response_format": '{"type": "text"} or left out',
    "type": "text",
    "tools": "[] or left out",
    "tool_choice": "none or left out",
    "parallel_tool_calls": "true or false",
    "store": "false or left out",
}


def read_chat_request(body: Any, served: Served) -> CompletionRequest:
    """Return the checked request to continue the text of the messages. Raises ApiError."""
    if not isinstance(body, dict):
        raise ApiError(400, "the request must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    own = {name: given.pop(name) for name in ChatBody.model_fields.keys() & given.keys()}
    asked = check_types({"messages": None, **own}, ChatBody, ALLOWED_IN_CHAT)
    for name in NOT_IN_CHAT:
        if name in given:
            raise ApiError(400, f"unknown parameter {name}; leave it out, or use /v1/completions", name)
    n_new = asked.max_completion_tokens  # OpenAI's newer name of max_tokens
    if n_new is not None and given.setdefault("max_tokens", n_new) != n_new:
        message = "max_tokens and max_completion_tokens are two numbers; leave one out"
        raise ApiError(400, message, "max_completion_tokens")
    if not (text := as_text(asked.messages)):
        message = "messages has no text of a user; write one with the beginning of a text"
        raise ApiError(400, message, "messages")
    try:
        return read_request({**given, "prompt": text}, served)
    except ApiError as error:
        told = error.body["error"]
        if told["param"] != "prompt":
            raise
        raise ApiError(error.status, str(error), "messages", told["code"]) from None


def as_text(messages: list[Message]) -> str:
    """Return the text that the model continues."""
    text = ""
    for message in messages:
        if message.role == "user":
            text += "\n" * bool(text) + message.content
        elif message.role == "assistant":
            text += message.content
    return text
