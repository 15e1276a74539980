"""The routes: OpenAI's chat and plain completions and models, health, metrics, runs, and the tutorials' POST /."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from tnl.data.template import stop_ids
from tnl.generate.conversation import stop_texts
from tnl.generate.engine import Engine
from tnl.generate.request import Request
from tnl.serve import schema
from tnl.serve.answers import ChatWriter, TextWriter, Writer
from tnl.serve.catalog import Catalog, Served
from tnl.serve.errors import ApiError
from tnl.serve.gate import Gate, Limits
from tnl.serve.metrics import Metrics
from tnl.serve.prompts import chat_ids, prompt_ids
from tnl.serve.runs import Runs
from tnl.serve.stream import Asked, EventStream

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorReply, "description": text}
    for status, text in {
        400: "A field is wrong; param names it",
        401: "The API key is missing or wrong",
        403: "Asked under a foreign host name",
        404: "No such model or run",
        405: "No such method",
        408: "The body did not come in time",
        409: "In use",
        413: "The body is too large",
        429: "The queue is full; see Retry-After",
        500: "The answer failed",
        503: "The server is stopping",
    }.items()
}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What else a completion may be."""
BODIES: list[type[BaseModel]] = [schema.ChatRequest, schema.CompletionRequest, schema.PlainRequest]
Name = Annotated[str, Path(max_length=200)]


@dataclass(frozen=True)
class Service:
    """All that the routes need."""

    engine: Engine
    catalog: Catalog
    runs: Runs
    metrics: Metrics
    limits: Limits


def create_app(service: Service, *, api_key: str | None = None, local: bool = False) -> Gate:
    """The ASGI application. local: answer only to those who call it by a loopback name."""
    app = FastAPI(title="tnl", summary="TransNormerLLM, served", docs_url=None, redoc_url=None, responses=ERRORS)
    app.add_exception_handler(ApiError, lambda _, error: error.response())  # type: ignore[attr-defined]
    app.add_exception_handler(RequestValidationError, refuse_parameter)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(Exception, unforeseen)
    add_completions(app, service)
    add_models(app, service)
    add_watching(app, service)
    document(app)
    return Gate(app, service.limits, service.metrics, api_key=api_key, local=local)


def add_completions(app: FastAPI, service: Service) -> None:
    """What draws answers."""
    bounds = service.engine.tokenizer, service.limits.prompt

    @app.post("/v1/chat/completions", response_model=schema.Completion, responses=STREAM, openapi_extra=body_of(schema.ChatRequest))
    async def chat(http: HttpRequest) -> Response:
        wanted = schema.parse(schema.ChatRequest, await http.body())
        if wanted.top_logprobs is not None and not wanted.logprobs:
            raise ApiError(400, "top_logprobs: logprobs needs to be true with it", param="top_logprobs")
        served = await service.catalog.take(wanted.model)
        try:
            ids = [await asyncio.to_thread(chat_ids, wanted, served, *bounds)]
            asked = ask(service, wanted, served, ids, stop_texts(served.template))
        finally:
            service.catalog.release(served)
        return await reply(http, wanted, asked, ChatWriter(service.engine, wanted, asked))

    @app.post("/v1/completions", response_model=schema.Completion, responses=STREAM, openapi_extra=body_of(schema.CompletionRequest))
    async def completions(http: HttpRequest) -> Response:
        wanted = schema.parse(schema.CompletionRequest, await http.body())
        served = await service.catalog.take(wanted.model)
        try:
            ids = await asyncio.to_thread(prompt_ids, wanted, *bounds)
            asked = ask(service, wanted, served, ids)
        finally:
            service.catalog.release(served)
        return await reply(http, wanted, asked, TextWriter(service.engine, wanted, asked))

    @app.post("/", response_model=schema.PlainReply, openapi_extra=body_of(schema.PlainRequest))
    async def plain(http: HttpRequest) -> Response:
        prompt = schema.parse(schema.PlainRequest, await http.body()).prompt
        base = service.catalog.base
        message = schema.Message(role="user", content=prompt)
        wanted = schema.ChatRequest(model=base.name, messages=[message])
        ids = [await asyncio.to_thread(chat_ids, wanted, base, *bounds, "prompt")]
        answers = await ask(service, wanted, base, ids, stop_texts(base.template)).answers(http.receive)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return JSONResponse(schema.PlainReply(response=answers[0].text, status=200, time=now).model_dump())


def add_models(app: FastAPI, service: Service) -> None:
    """What is served."""
    catalog = service.catalog

    @app.get("/v1/models")
    def models() -> schema.ModelList:
        return schema.ModelList(data=catalog.cards())

    @app.get("/v1/models/{name}")
    def model(name: Name) -> schema.ModelCard:
        return catalog.card(name)

    @app.post("/v1/models/{name}/load")
    async def load(name: Name) -> schema.ModelCard:
        """Read an adapter now, or anew where its folder has changed; running answers keep the one they have."""
        catalog.release(await catalog.take(name, anew=True))
        return catalog.card(name)

    @app.post("/v1/models/{name}/unload")
    async def unload(name: Name) -> schema.ModelCard:
        """Forget an adapter until it is asked for again."""
        catalog.unload(name)
        return catalog.card(name)


def add_watching(app: FastAPI, service: Service) -> None:
    """What tells how it goes."""
    engine = service.engine

    @app.get("/health", responses={503: {"model": schema.Health}})
    async def health() -> Response:
        status = "dead" if not engine.alive else "draining" if engine.closed else "ok"
        return JSONResponse(schema.Health(status=status).model_dump(), 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/runs", response_model_exclude_none=True)
    def runs() -> schema.RunList:
        return schema.RunList(data=service.runs.all())

    @app.get("/v1/runs/{name}")
    def run(name: Name, after: Annotated[int, Query(ge=-1)] = -1, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000) -> schema.Run:
        """after: only metrics of later steps; limit: the last so many."""
        return service.runs.one(name, after, limit)


def ask(service: Service, wanted: schema.Sampling, served: Served, prompts: list[tuple[int, ...]], ends: tuple[str, ...] = ()) -> Asked:
    """Hand prompts to the engine. Raises ApiError: 400 where they are too much, 429, 503."""
    engine, limits, n = service.engine, service.limits, wanted.n or 1
    if len(prompts) > limits.answers:
        raise ApiError(400, f"prompt: at most {limits.answers} are answered in one request here", param="prompt")
    if n * len(prompts) > limits.answers or n > len(engine.slots):
        most = min(limits.answers // len(prompts), len(engine.slots))
        raise ApiError(400, f"n: at most {most} answers are given here to {len(prompts)} prompts", param="n")
    if (wanted.wanted_tokens or 0) > limits.max_tokens:
        name = "max_tokens" if wanted.max_tokens == wanted.wanted_tokens else "max_completion_tokens"
        raise ApiError(400, f"{name}: at most {limits.max_tokens:,} tokens are given here", param=name)
    if wanted.stream_options is not None and not wanted.stream:
        raise ApiError(400, "stream_options: only a stream has them", param="stream_options")
    requests = [
        Request(
            ids,
            wanted.settings(served.settings, limits.max_tokens),
            stop_ids=(*stop_ids(engine.tokenizer), *(wanted.stop_token_ids or ())),
            stop=(*ends, *wanted.stop_texts),
            goes_on=wanted.goes_on,
            seed=wanted.seed,
            n=n,
            logprobs=wanted.told,
            adapter=served.adapter,
        )
        for ids in prompts
    ]
    return Asked(engine, requests, service.metrics)


async def reply(http: HttpRequest, wanted: schema.Sampling, asked: Asked, writer: Writer) -> Response:
    """The answers as a stream or whole."""
    http.state.user = wanted.user
    if wanted.stream:
        return EventStream(asked, writer.events, writer.last)
    return JSONResponse(writer.whole(await asked.answers(http.receive)))


def refuse_parameter(_: HttpRequest, error: Exception) -> Response:
    """A parameter of the path or the query that is wrong."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return ApiError(400, f"{name}: {schema.lowered(str(first['msg']))}", param=name).response()


def refuse_route(_: HttpRequest, error: Exception) -> Response:
    """No such route or method."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, error.detail, headers=error.headers).response()


def unforeseen(_: HttpRequest, _error: Exception) -> Response:
    """A mistake of ours, which uvicorn writes to the log; it then closes the connection."""
    return ApiError(500, "something went wrong here; see the server's log", headers={"Connection": "close"}).response()


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """A route's body for the OpenAPI document: the routes read theirs themselves, more strictly than FastAPI does."""
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}}
    }


def document(app: FastAPI) -> None:
    """Complete the OpenAPI document: the bodies' schemas, and no 422, which no route gives."""
    made: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = made()
            _, schemas = models_json_schema([(one, "validation") for one in BODIES], ref_template="#/components/schemas/{model}")
            found["components"]["schemas"] |= schemas["$defs"]
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
