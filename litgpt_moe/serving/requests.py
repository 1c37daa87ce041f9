"""Requests to /v1/completions: read the JSON, check it, and add the server's defaults; OpenAI's errors."""

import asyncio
import json
import secrets
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import JSONResponse

from litgpt_moe.balance import layers_of
from litgpt_moe.cli import printable
from litgpt_moe.generation.decode import room_for
from litgpt_moe.generation.settings import MAX_CHOICES, GenerateSettings, Sampling
from litgpt_moe.generation.text import encode_prompt

MAX_BODY_BYTES = 1 << 18  # the text of 1,024 tokens has about 5,000 bytes
MAX_ROUTING = 1 << 20  # numbers in an answer with `"routing": true`, about 5 MB of JSON
ARRIVAL_S = 30  # timeout for the body of a request


class ApiError(Exception):
    """An HTTP status, one sentence, and the parameter that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


UNKNOWN = ApiError(500, "an error in the server; its log says more")


def error_response(error: ApiError) -> JSONResponse:
    """Return the error as OpenAI's clients read it."""
    headers = {"retry-after": "5"} if error.status == 503 else None
    return JSONResponse(error.body, error.status, headers)


@dataclass(frozen=True)
class Served:
    """A server's model, and the defaults of its requests."""

    model: GPT
    tokenizer: Tokenizer
    settings: GenerateSettings
    sampling: Sampling

    @property
    def name(self) -> str:
        """Return the model's name."""
        return printable(self.model.config.name) or "model"


def _as_list(value: Any) -> Any:
    """Return a single text as a list of one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("texts", "no texts")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogates", "half a surrogate pair") from None
    return texts


Stop = Annotated[str, Field(min_length=1, max_length=100)]


class StreamOptions(BaseModel, strict=True, extra="forbid"):
    """OpenAI's options of a stream."""

    include_usage: bool | None = False


class CompletionBody(BaseModel, strict=True, extra="forbid"):
    """The parameters of OpenAI and of other servers of open models; `read_request` adds the defaults."""

    prompt: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1, max_length=MAX_CHOICES)]
    model: str
    max_tokens: int = Field(ge=1)
    n: int = Field(ge=1, le=MAX_CHOICES)
    seed: int = Field(ge=0, le=2**63 - 1)
    """Seed of each prompt's first sample; sample i has seed + i."""
    stop: Annotated[list[Stop], BeforeValidator(_as_list), Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    echo: bool = False
    routing: bool = False
    """Ask for the experts and the router's probabilities of each token that the model reads."""

    # `Sampling` checks their ranges
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float

    # OpenAI's, accepted only with the value that is a no-op; `user` is ignored
    best_of: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    logit_bias: dict[str, float] = Field({}, max_length=0)
    logprobs: None = None
    presence_penalty: Literal[0] = 0
    suffix: Literal[""] = ""
    user: str = ""


SWITCH, NUMBER = "true or false", "a number"
ALLOWED = {  # what messages say of each parameter
    "prompt": f"a text or a list of 1 to {MAX_CHOICES} texts",
    "model": "the name of this server's model, a text",
    "max_tokens": "a whole number, 1 or more",
    "n": f"a whole number from 1 to {MAX_CHOICES}",
    "seed": f"a whole number from 0 to {2**63 - 1}",
    "stop": "a text of 1 to 100 characters or a list of up to 4 of them",
    "stream_options": 'an object, as {"include_usage": true}',
    "include_usage": SWITCH,
    **dict.fromkeys(("stream", "echo", "routing"), SWITCH),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), NUMBER),
    "top_k": "a whole number",
    "best_of": "1 or left out",
    "logprobs": "null or left out",
    "logit_bias": "{} or left out",
    "suffix": "'' or left out",
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), "0 or left out"),
    "user": "a text",
}


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request: the samples of prompt p are the choices p*n to p*n + n - 1."""

    body: CompletionBody
    prompts: list[list[int]]
    """Token ids."""
    sampling: Sampling

    @property
    def n_samples(self) -> int:
        """The number of texts that it asks for."""
        return len(self.prompts) * self.body.n


def read_request(body: Any, served: Served) -> CompletionRequest:
    """Return the checked request, with the server's flags as defaults. Raises ApiError."""
    if not isinstance(body, dict):
        raise ApiError(400, "the request must be a JSON object")
    settings, context = served.settings, served.model.max_seq_length
    seed = secrets.randbits(32) if settings.seed is None else settings.seed
    defaults = {"prompt": None, "model": served.name, "max_tokens": min(settings.max_tokens, context)}
    defaults |= {"n": settings.num_samples, "seed": seed, **asdict(served.sampling)}
    # null means that a parameter is left out
    given = {name: value for name, value in body.items() if value is not None}
    asked = check_types(defaults | given, CompletionBody, ALLOWED)
    if asked.model != served.name:
        message = f"no model {asked.model!r:.80} is here; this server has {served.name!r}"
        raise ApiError(404, message, "model", "model_not_found")
    if (n_prompts := len(asked.prompt)) * asked.n > MAX_CHOICES:
        message = f"{n_prompts} prompts times n {asked.n} is over {MAX_CHOICES}; ask for fewer at once"
        raise ApiError(400, message, "n")
    # OpenAI refuses this too. Up to the context max_tokens is an upper bound, since clients send about 256 by
    # default and a story may end earlier; one that fills the context has the finish_reason `length`.
    if asked.max_tokens > context:
        holds = f"the model's context holds {context} tokens with the prompt"
        message = f"max_tokens is {asked.max_tokens!r:.80}, but {holds}; ask for {context} or fewer"
        raise ApiError(400, message, "max_tokens", "invalid_value")
    try:
        prompts = [encode_prompt(served.model, served.tokenizer, p, asked.max_tokens) for p in asked.prompt]
    except ValueError as error:
        raise ApiError(400, str(error), "prompt", "context_length_exceeded") from None
    if asked.routing:
        check_routing(asked, prompts, served)
    try:
        sampling = Sampling(**asked.model_dump(include=set(asdict(served.sampling))))
    except ValueError as error:
        raise ApiError(400, str(error), str(error).split()[0]) from None
    return CompletionRequest(asked, prompts, sampling)


def check_routing(asked: CompletionBody, prompts: list[list[int]], served: Served) -> None:
    """Raise ApiError if the routing of all tokens, which are in each sample's answer, would be too large."""
    config, context = served.model.config, served.model.max_seq_length
    n_layers = len(layers_of(served.model))
    n_tokens = asked.n * sum(len(ids) + room_for(ids, asked.max_tokens, context) for ids in prompts)
    limit = MAX_ROUTING // max(1, n_layers * (config.n_expert + config.n_expert_per_token))
    if n_tokens > limit:
        model = f"{n_layers} layers of {config.n_expert} experts"
        asks = f"with {model} it is given for up to {limit:,} tokens, and this request may have {n_tokens:,}"
        message = f"routing is true, but {asks}; shorten the prompt, or lower n or max_tokens"
        raise ApiError(400, message, "routing", "invalid_value")


def check_types[Body: BaseModel](body: dict[str, Any], kind: type[Body], allowed: dict[str, str]) -> Body:
    """Return the parameters, each of the right type. Raises ApiError about the first one that is not."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # the name of an unknown parameter may hold half a surrogate pair, which JSON cannot represent
        names = [ascii(part).strip("'")[:80] for part in first["loc"] or (first["input"],)]
        key, place = names[-1] if names[-1] in allowed else names[0], ".".join(names)
        if first["type"] == "extra_forbidden" or key not in allowed:
            raise ApiError(400, f"unknown parameter {place}; leave it out", names[-1]) from None
        if first["type"] in ("surrogates", "string_unicode"):
            reason = "half a surrogate pair is no character; leave it out"
            raise ApiError(400, f"{place} is {first['input']!a:.80}; {reason}", names[0]) from None
        if first["input"] is None or first["type"] == "missing":
            raise ApiError(400, f"{place} is missing; it must be {allowed[key]}", names[0]) from None
        shown = json.dumps(first["input"], ensure_ascii=True)
        raise ApiError(400, f"{place} is {shown:.80}; it must be {allowed[key]}", names[0]) from None


async def read_body(request: Request) -> Any:
    """Return the request's JSON. Raises ApiError if it is not JSON, too large or does not arrive in time."""
    # any page may send text or forms to any address; JSON needs a preflight request first, which is refused
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the request as Content-Type: application/json")
    if {"content-length", "transfer-encoding"} <= set(request.headers):  # RFC 9112, section 6.1
        raise ApiError(400, "send Content-Length or Transfer-Encoding, not both")
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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the request is not readable JSON ({error})") from None
    except RecursionError:
        raise ApiError(400, "the request is not readable JSON (its lists or objects are too deep)") from None
    except ValueError:  # Python's limit for int()
        raise ApiError(400, "the request is not readable JSON (a number has thousands of digits)") from None
