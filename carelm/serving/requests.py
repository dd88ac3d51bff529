"""What clients may ask, in OpenAI's shapes: a request is understood as a whole, or refused with the field that is not."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from carelm.data.messages import TEXT_PARTS, to_turns
from carelm.data.tools import to_tools
from carelm.errors import UserError
from carelm.models.decoding import Decoding
from carelm.recipe import Recipe

MOST_MESSAGES = 1000
MOST_STOPS, LONGEST_STOP = 16, 256  # texts; characters: each is looked for at each token
COLDEST = 0.01  # below it the likeliest token is drawn all but always, and a logit divided by it may be no number
# About the caller and its account, or about what becomes of the answer: no answer depends on them.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "keep_alive"}


class Problem(Exception):
    """Why a request has no answer: an HTTP status, and what OpenAI's clients read of an error. It holds no input."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "engine_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def only(value: Any) -> Any:
    """A field that is understood and has one value alone."""

    def check(given: Any) -> Any:
        if given != value:
            raise ValueError(f"only {value!r} can be served")
        return given

    return Annotated[Any, AfterValidator(check)]


def join_parts(content: Any) -> Any:
    """Text parts of a message, joined as in training."""
    if isinstance(content, dict):
        raise ValueError(f"it is text; a JSON object is sent as text too: {json.dumps(json.dumps({'column': '...'}))}")
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError("only text and parts of type text can be read, no images, sound or files")
    return "\n".join(part["text"] for part in content)


def without_nulls(given: Any) -> Any:
    """A field that is null is one that is not set."""
    return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    _given = model_validator(mode="before")(without_nulls)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str, BeforeValidator(join_parts)] = ""
    reasoning_content: str = ""
    tool_calls: list[dict[str, Any]] = []
    tool_call_id: str = ""
    name: str = ""
    # What clients send back of an answer of OpenAI's.
    refusal: only("") = ""
    annotations: only([]) = []

    @model_validator(mode="after")
    def says_something(self) -> Self:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError("only an assistant's message holds tool calls and reasoning")
        if self.role in ("user", "assistant") and not (self.content.strip() or self.tool_calls):
            raise ValueError("it says nothing")
        return self


def to_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Turns as training reads them.

    Raises:
        ValueError: where they are no conversation that waits for an answer.
    """
    if messages[-1].role in ("assistant", "system", "developer"):
        raise ValueError("the last message must be a user's or a tool's")
    if not any(message.role == "user" for message in messages):
        raise ValueError("there is no message of a user")
    turns = [message.model_dump(exclude_defaults=True) | {"content": message.content} for message in messages]
    try:
        return to_turns(_NO_NAMES_OF_ITS_OWN, "messages", turns)[0]
    except UserError:
        raise ValueError("a tool call is {id, type: function, function: {name, arguments: JSON text}}") from None


_NO_NAMES_OF_ITS_OWN = Recipe()  # roles and keys are OpenAI's, whatever the recipe's rows call them


def to_functions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
        return to_tools("tools", "tools", tools) or []
    except UserError:
        raise ValueError(
            "a tool is {type: function, function: {name, description, parameters: a JSON schema}}"
        ) from None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # of OpenAI's: against listeners, who are none on a loopback


class ChatRequest(Strict):
    """A body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES), AfterValidator(to_messages)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] = []
    tools: Annotated[list[dict[str, Any]], AfterValidator(to_functions)] = []
    return_token_ids: bool = False  # as vLLM calls it: the ids of the prompt and of the answer
    n: only(1) = 1
    best_of: only(1) = 1
    frequency_penalty: only(0) = 0
    presence_penalty: only(0) = 0
    logit_bias: only({}) = {}
    logprobs: only(False) = False
    top_logprobs: only(0) = 0
    response_format: only({"type": "text"}) = {"type": "text"}
    modalities: only(["text"]) = ["text"]
    tool_choice: only("auto") = "auto"
    parallel_tool_calls: only(True) = True

    @model_validator(mode="before")
    @classmethod
    def leave_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        without_effect = WITHOUT_EFFECT if given.get("tools") else WITHOUT_EFFECT | {"parallel_tool_calls"}
        return {k: v for k, v in given.items() if k not in without_effect}

    @field_validator("stop")
    @classmethod
    def listed(cls, stop: str | list[str]) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop
        if len(stops) > MOST_STOPS or not all(1 <= len(stop) <= LONGEST_STOP for stop in stops):
            raise ValueError(f"at most {MOST_STOPS} texts, each of 1 to {LONGEST_STOP} characters")
        return stops

    @field_validator("stream_options")
    @classmethod
    def streams(cls, options: StreamOptions, info: Any) -> StreamOptions:
        if not info.data.get("stream"):
            raise ValueError("it goes with stream: true")
        return options

    @field_validator("max_completion_tokens")
    @classmethod
    def once(cls, number: int, info: Any) -> int:
        if info.data.get("max_tokens") not in (None, number):
            raise ValueError("max_tokens says another number; set one of the two")
        return number

    @property
    def longest_answer(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def decoding(self, recipe: Recipe, drawn_seed: int) -> Decoding:
        """How its answer is chosen; by the recipe's keys where it says nothing. Without a seed each draw is another one."""
        temperature = recipe.temperature if self.temperature is None else self.temperature
        return Decoding(
            max_new_tokens=self.longest_answer or recipe.max_new_tokens,
            temperature=temperature if temperature >= COLDEST else 0.0,
            top_p=recipe.top_p if self.top_p is None else self.top_p,
            seed=drawn_seed if self.seed is None else self.seed,
        )


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """The request in a body.

    Raises:
        Problem: 400, which names the first field that is not as it should be.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
    except RecursionError:
        raise Problem(400, "the body is nested too deeply", code="invalid_json") from None
    if found["type"] == "json_invalid":
        reason = found["ctx"]["error"]  # the parser's own words, and where: nothing of the body
        if reason.startswith("number out of range"):
            raise Problem(
                400, f"a number has more than the 4,300 digits that can be read ({reason})", code="invalid_json"
            )
        raise Problem(400, f"the body is no JSON in UTF-8 ({reason})", code="invalid_json")
    param = _name(found["loc"])
    message = str(found["ctx"]["error"]) if found["type"] == "value_error" else found["msg"]
    if found["type"] == "too_long":
        message = f"at most {found['ctx']['max_length']} of them"
    if found["type"] == "extra_forbidden":
        message = "this field is not known here, and might change the answer; leave it out"
    raise Problem(400, f"{param}: {message}" if param else message, param=param or None, code=found["type"])


def _name(place: tuple[int | str, ...]) -> str:
    """A place in a body as `messages.0.content`, without what it is not called by in the request; no text of a client's own but
    a short plain word."""
    words = [str(part) for part in place if part != "str" and not str(part).startswith("list[")]
    plain = [word.isdecimal() or word.isidentifier() and word.isascii() and len(word) <= 64 for word in words]
    return ".".join(word if is_plain else "?" for word, is_plain in zip(words, plain))
