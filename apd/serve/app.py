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
from apd.serve.engine import Engine
from apd.serve.errors import APIError, on_api_error, on_http_error, on_invalid_body, on_unexpected
from apd.serve.limits import Limits
from apd.serve.plans import Plan, Planner
from apd.serve.schemas import ChatBody, CompletionBody
from apd.serve.settings import ServeSettings
from apd.serve.shapes import CHAT, TEXT
from apd.serve.tickets import Ticket

_LONG = 8192  # bytes of a request from which on it is tokenized in a thread of its own


async def planned(plan: Callable[[Any], Plan], body: Any, request: Request) -> Plan:
    """The plan of a request; a short one is not worth a change of threads."""
    is_long = int(request.headers.get("content-length", _LONG)) >= _LONG or getattr(body, "response_format", None)
    return await run_in_threadpool(plan, body) if is_long else plan(body)


def make_app(sampler: APDSampler, settings: ServeSettings | None = None) -> FastAPI:
    """The server as an ASGI application. Its decoding loop starts and ends with the application's lifespan.

    Attributes:
        state.engine: the decoding loop.
        state.planner: what checks requests.
    """
    settings = settings or ServeSettings()
    engine = Engine(sampler, max_rows=settings.max_batch_size, max_queue=settings.max_queue)
    planner = Planner(sampler, settings, engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.stop)

    app = FastAPI(title="apd", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine, app.state.planner, app.state.settings = engine, planner, settings
    app.state.fingerprint = f"apd-{zlib.crc32(repr((settings, sampler.config, sampler.strategy)).encode()):08x}"
    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(HungUp, on_hung_up)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_unexpected)
    app.add_middleware(Limits, settings=settings, engine=engine)
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
        return await answer(request, plan, body, CHAT, Ticket(engine, plan, settings, follow=bool(body.stream)))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        plan = await planned(planner.completion, body, request)
        return await answer(request, plan, body, TEXT, Ticket(engine, plan, settings, follow=bool(body.stream)))

    @app.get("/health")
    async def health() -> Response:
        status = 200 if engine.is_alive else 503
        return JSONResponse({"status": "ok" if status == 200 else "the decoding loop has ended"}, status)

    @app.get("/ready")
    async def ready() -> Response:
        status = 200 if engine.is_alive and not engine.is_draining else 503
        reason = "draining" if engine.is_alive else "the decoding loop has ended"
        return JSONResponse({"status": "ok" if status == 200 else reason}, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.include_router(watch.routes(engine, planner, settings))
    return app
