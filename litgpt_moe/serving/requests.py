"""Requests to /v1/completions: their JSON is read, checked, and completed by the server's defaults."""

import asyncio
import json
import secrets
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from litgpt_moe.generation.settings import MAX_CHOICES, GenerateSettings, Sampling
from litgpt_moe.generation.text import encode_prompt
from litgpt_moe.serving.errors import ApiError

MAX_BODY_BYTES = 1 << 18  # of a request; a context of 1,024 tokens is about 5,000
ARRIVAL_S = 30  # for a request to arrive
SAMPLING = {field.name for field in fields(Sampling)}


@dataclass(frozen=True)
class Served:
    """The model that a server has, and the values that a request may leave out."""

    model: GPT
    tokenizer: Tokenizer
    settings: GenerateSettings
    sampling: Sampling

    @property
    def name(self) -> str:
        """Return the model's name."""
        return self.model.config.name or "model"

    @property
    def context(self) -> int:
        """Return how many tokens the model takes, prompt and continuation together."""
        return self.model.max_seq_length


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request: the samples of prompt p are the choices p*n to p*n + n - 1."""

    prompts: list[list[int]]
    sampling: Sampling
    max_tokens: int
    n: int
    seed: int
    """Of each prompt's first sample; the next ones have the next seeds."""
    stop: list[str]
    stream: bool
    include_usage: bool
    echo: bool
    routing: bool


# --- what a client may send ---------------------------------------------------------------------------------


def _as_list(value: Any) -> Any:
    """Return a single text as a list of one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("texts", "input should be a text or a list of texts")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("texts", "half a surrogate pair is no character; leave it out") from None
    return texts


class _Body(BaseModel, strict=True, extra="forbid"):
    """A JSON object in which null stands for a parameter that is left out."""

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class StreamOptions(_Body):
    """What a stream ends with."""

    include_usage: bool = False


class CompletionBody(_Body):
    """OpenAI's parameters, and those that other servers of open models have; None is the server's default."""

    prompt: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1, max_length=MAX_CHOICES)] = (
        Field(None, validate_default=True)
    )
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=100)]],
        BeforeValidator(_as_list),
        Field(max_length=4),
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    echo: bool = False
    routing: bool = False
    """Ask for the experts and the router's probabilities of each token that the model reads."""

    # the sampling, whose ranges `Sampling` checks
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    # OpenAI's, accepted only with the value that changes nothing; `user` only names the one who asks
    best_of: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    logit_bias: dict[str, float] = Field({}, max_length=0)
    logprobs: None = None
    presence_penalty: Literal[0] = 0
    suffix: Literal[""] = ""
    user: str = ""


# --- the checks ---------------------------------------------------------------------------------------------


def read_request(body: Any, served: Served) -> CompletionRequest:
    """Return the checked request; what it leaves out is as on the server's command line. Raises ApiError."""
    asked, settings = parse_body(body), served.settings
    if asked.model not in (None, served.name):
        message = f"no model {asked.model!r:.80} is here; this server has {served.name!r}"
        raise ApiError(404, message, "model", "model_not_found")
    n = asked.n or settings.num_samples
    if len(asked.prompt) * n > MAX_CHOICES:
        problem = f"{len(asked.prompt)} prompts times n {n} is over {MAX_CHOICES}; ask for fewer at once"
        raise ApiError(400, problem, "n")
    seeds = (asked.seed, settings.seed, secrets.randbits(32))
    max_tokens = _max_tokens(asked.max_tokens, served)
    return CompletionRequest(
        prompts=[_encode(text, max_tokens, served) for text in asked.prompt],
        sampling=_sampling(asked, served.sampling),
        max_tokens=max_tokens,
        n=n,
        seed=next(seed for seed in seeds if seed is not None),
        stop=asked.stop,
        stream=asked.stream,
        include_usage=asked.stream_options.include_usage,
        echo=asked.echo,
        routing=asked.routing,
    )


def parse_body(body: Any) -> CompletionBody:
    """Return the parameters, each of the right type. Raises ApiError about the first that is not."""
    if not isinstance(body, dict):
        raise ApiError(400, "the request must be a JSON object")
    try:
        return CompletionBody.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # the name of an unknown parameter may hold half a surrogate pair, which JSON cannot carry back
        names = [ascii(part).strip("'")[:80] for part in first["loc"] or (first["input"],)]
        if first["type"] in ("extra_forbidden", "string_unicode"):
            raise ApiError(400, f"unknown parameter {'.'.join(names)}; leave it out", names[-1]) from None
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise ApiError(400, f"{'.'.join(names)} is {first['input']!r:.80}; {reason}", names[0]) from None


def _max_tokens(asked: int | None, served: Served) -> int:
    """Return the most new tokens. ApiError, as from OpenAI, if the context holds fewer.

    Up to there it is an upper bound: clients send 256 or so unasked, and a story may end before. One that
    fills the context ends with finish_reason `length`, and `ending` says so.
    """
    if asked is None:
        return min(served.settings.max_tokens, served.context)
    if asked > served.context:
        holds = f"the model's context holds {served.context} tokens with the prompt"
        message = f"max_tokens is {asked!r:.80}, but {holds}; ask for {served.context} or fewer"
        raise ApiError(400, message, "max_tokens", "invalid_value")
    return asked


def _sampling(asked: CompletionBody, default: Sampling) -> Sampling:
    try:
        return replace(default, **asked.model_dump(include=SAMPLING, exclude_none=True))
    except ValueError as error:
        raise ApiError(400, str(error), str(error).split()[0]) from None


def _encode(prompt: str, max_tokens: int, served: Served) -> list[int]:
    try:
        return encode_prompt(served.model, served.tokenizer, prompt, max_tokens)
    except ValueError as error:
        raise ApiError(400, str(error), "prompt", "context_length_exceeded") from None


async def read_body(request: Request) -> Any:
    """Return the request's JSON. Raises ApiError when it is none, too large or does not arrive."""
    # any page may send text or a form to any address; for JSON a browser asks the server first, which refuses
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the request as Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(ARRIVAL_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the request has over {MAX_BODY_BYTES:,} bytes; send less")
        return json.loads(body)
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {ARRIVAL_S} s") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not readable JSON ({error})") from None
