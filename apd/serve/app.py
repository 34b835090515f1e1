"""The routes of the server."""

from __future__ import annotations

import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from apd.sampler import APDSampler
from apd.serve import watch
from apd.serve.answering import HungUp, answer, on_hung_up
from apd.serve.dispatch import Decoder, Dispatcher
from apd.serve.engine.errors import APIError
from apd.serve.engine.facts import Facts
from apd.serve.engine.loop import Engine
from apd.serve.engine.spelling import Spelling
from apd.serve.handlers import on_api_error, on_http_error, on_invalid_body, on_unexpected
from apd.serve.limits import Limits
from apd.serve.metrics import ServerMetrics
from apd.serve.plans import Plan, Planner
from apd.serve.schemas import ChatBody, CompletionBody
from apd.serve.settings import ServeSettings
from apd.serve.shapes import CHAT, TEXT
from apd.serve.tickets import Ticket

_LONG = 8192  # bytes of a request from which on it is tokenized in a thread of its own


async def planned(plan: Callable[[Any], Plan], body: Any, request: Request) -> Plan:
    """The plan of a request; a short one is not worth a change of threads."""
    is_long = int(request.headers.get("content-length", _LONG)) >= _LONG
    return await run_in_threadpool(plan, body) if is_long else plan(body)


def make_app(sampler: APDSampler, settings: ServeSettings | None = None) -> FastAPI:
    """The server as an ASGI application, which decodes in a thread of this process; see `app_of`."""
    settings = settings or ServeSettings()
    return app_of(Engine(sampler, max_rows=settings.max_batch_size), Facts.of(sampler), settings)


def app_of(engine: Decoder, facts: Facts, settings: ServeSettings) -> FastAPI:
    """The server of an engine as an ASGI application. The engine starts and ends with the application's lifespan.

    Args:
        engine: decodes; of `settings.max_batch_size` rows.
        facts: what is known of its sampler.
        settings: of the server.

    Attributes:
        state.engine: the engine.
        state.dispatcher: hands it jobs.
        state.planner: checks requests.
    """
    dispatcher, planner = Dispatcher(engine, max_queue=settings.max_queue), Planner(facts, settings)
    counters = ServerMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        dispatcher.start()
        yield
        await run_in_threadpool(dispatcher.stop)

    app = FastAPI(title="apd", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine, app.state.dispatcher, app.state.planner = engine, dispatcher, planner
    app.state.facts, app.state.settings, app.state.metrics = facts, settings, counters
    app.state.spelling = Spelling(facts.tokenizer)
    app.state.fingerprint = f"apd-{zlib.crc32(repr((settings, facts.config, facts.strategy)).encode()):08x}"
    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(HungUp, on_hung_up)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_unexpected)
    app.add_middleware(Limits, settings=settings, metrics=counters, dispatcher=dispatcher)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    created = int(time.time())

    def model() -> dict[str, Any]:
        return {"id": settings.model_name, "object": "model", "created": created, "owned_by": "apd"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != settings.model_name:
            raise APIError(404, f"The model {name!r} does not exist.", param="model", code="model_not_found")
        return model()

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        plan = await planned(planner.chat, body, request)
        return await answer(request, plan, body, CHAT, Ticket(dispatcher, plan))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        plan = await planned(planner.completion, body, request)
        return await answer(request, plan, body, TEXT, Ticket(dispatcher, plan))

    @app.get("/health")
    async def health() -> Response:
        status = 200 if engine.is_alive else 503
        return JSONResponse({"status": "ok" if status == 200 else "the engine has ended"}, status)

    @app.get("/ready")
    async def ready() -> Response:
        status = 200 if engine.is_alive and not dispatcher.is_draining else 503
        reason = "draining" if engine.is_alive else "the engine has ended"
        return JSONResponse({"status": "ok" if status == 200 else reason}, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = counters.text() + await run_in_threadpool(engine.metrics_text)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)

    app.include_router(watch.routes(dispatcher, planner, settings))
    return app
