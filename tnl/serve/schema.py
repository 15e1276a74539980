"""What requests may hold, exactly, and what replies hold: by the names of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tnl.generate.sampling import Settings
from tnl.serve.errors import ApiError, shown

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, False, True),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields of OpenAI's API that this server does not have: taken only with a value that asks for nothing."""

KEYS = 64
"""Keys that one object of a request may have."""
Model = TypeVar("Model", bound=BaseModel)
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(max_length=1 << 26)]
"""As long as the limits on bodies and prompts let it be."""
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=16)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True, min_length=1)]


class Strict(BaseModel):
    """No field but these, no value of another type, no number that is not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Strict):
    """What replies hold besides may come back with a conversation, as long as it says nothing."""

    role: Literal["system", "user", "assistant"]
    content: Text
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(Strict):
    include_usage: bool = False


class Sampling(Strict):
    """What chat and plain completions share. What is not given, or null, is as the model was taught."""

    goes_on: ClassVar[bool] = False
    """Whether an answer's text goes on with the prompt's."""
    model: Annotated[str, Field(max_length=200)]
    """A name that GET /v1/models lists."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=4)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True, max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    """Written to the log."""

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_tokens

    @property
    def told(self) -> int | None:
        """How many tokens are told beside each; None: no logprobs."""
        return None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def settings(self, taught: Settings, most: int) -> Settings:
        """How the answer is drawn; most: tokens that this server gives at most."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        wanted = self.wanted_tokens or min(taught.max_new_tokens, most)
        return taught.changed(**{name: getattr(self, name) for name in names}, max_new_tokens=wanted)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """POST /v1/completions: text goes on as it stands, no template; ids are read as they are."""

    goes_on: ClassVar[bool] = True
    prompt: Text | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=16)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def told(self) -> int | None:
        return self.logprobs


class PlainRequest(Strict):
    """POST /, as the tutorials' api.py takes it."""

    prompt: Text


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    """Tokens drawn, end tokens left out."""
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    """cached_tokens: those whose state was kept from an earlier request."""


class Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: dict[str, Any] | None
    message: dict[str, Any] | None = None
    """Of a chat completion."""
    text: str | None = None
    """Of a plain one."""


class Completion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tnl"
    root: str
    """The base."""
    loaded: bool
    """Whether it is in memory."""
    system: str | None
    """The system prompt that stands where a conversation brings none."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class PlainReply(BaseModel):
    response: str
    status: int
    time: str


class Health(BaseModel):
    status: str
    """ok, draining or dead."""


class Run(BaseModel):
    id: str
    object: Literal["run"] = "run"
    status: Literal["new", "unfinished", "interrupted", "finished"]
    changed: int
    """When its metrics were last written, in seconds since 1970."""
    last: dict[str, Any]
    """The newest line of its metrics."""
    metrics: list[dict[str, Any]] | None = None
    samples: list[dict[str, Any]] | None = None


class RunList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Run]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorBody


UNIONS = {
    "stop": "needs to be a text of 1 to 256 characters, or a list of at most 4 of them",
    "prompt": "needs to be a text, a list of ids, or a list of 1 to 16 texts or lists of ids",
}
"""Fields that may have several forms, and what is said where a value has none of them."""


def parse(model: type[Model], body: bytes) -> Model:
    """A request from the bytes of its body. Raises ApiError 400, naming the field."""
    values = read_json(body)
    if not isinstance(values, dict):
        raise ApiError(400, f"the body is a JSON {kind_of(values)} (an object is needed)")
    for name in NEUTRAL.keys() & values.keys() - model.model_fields.keys():
        value = values.pop(name)
        if not any(value == one and type(value) is type(one) for one in NEUTRAL[name]):
            raise ApiError(400, f"{name} is not supported by this server: leave it out", param=name, code="unsupported_parameter")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = path_of(first["loc"])
        what = UNIONS.get(param or "") or lowered(first["msg"])
        if first["type"] == "extra_forbidden":
            what = "is not a field of this request"
        elif first["type"] == "none_required":
            what = "is not supported by this server: leave it out"
        raise ApiError(400, f"{param or 'the body'}: {what}", param=param) from None


def read_json(body: bytes) -> Any:
    """JSON with every key once. Raises ApiError 400."""
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON (line {error.lineno}, column {error.colno}: {lowered(error.msg)})") from None
    except ValueError:
        raise ApiError(400, "the body holds a number with too many digits") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different, and not too many to say what is wrong with each."""
    if len(pairs) > KEYS:
        raise ApiError(400, f"the body has an object of {len(pairs):,} keys (at most {KEYS} are sensible)")
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ApiError(400, f"{shown(name)} stands twice in one object", param=shown(name))
    return found


def kind_of(value: Any) -> str:
    """JSON's word for a value's type."""
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def path_of(location: tuple[int | str, ...]) -> str | None:
    """messages[0].role from pydantic's location; of a field that may have several forms, the field."""
    path = "" if not location else shown(location[0])
    for part in [] if path in UNIONS else location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{shown(part)}"
    return path or None


def lowered(text: str) -> str:
    """A sentence as the second part of one."""
    return text[:1].lower() + text[1:]
