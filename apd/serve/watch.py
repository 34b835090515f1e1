"""The page at `/`, and `POST /watch`, which streams one decode to it step by step."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from apd.decoding import request as decoding
from apd.included import DRAFTER_DIR
from apd.included.tasks import EXAMPLES
from apd.serve import steps
from apd.serve.answering import streamed
from apd.serve.chunks import DONE, sse
from apd.serve.engine import Engine, Result
from apd.serve.errors import APIError, refused
from apd.serve.plans import Plan, Planner
from apd.serve.sampling import arguments_of
from apd.serve.schemas import Body, ChatBody, CompletionBody, Message
from apd.serve.settings import ServeSettings
from apd.serve.tickets import Ticket

MOST_WATCHED = 12  # decodes at a time: four pages with three answers each

#: Short names that the page proposes; it takes any.
STRATEGIES = ("apd", "apd:correction", "checked", "checked:c=0.9", "left-to-right:1", "threshold:0.9", "confidence:2")

_HERE = Path(__file__).parent / "page"
_SHOW = Path(__file__).parent.parent / "show"


class WatchBody(Body):
    """The body of `POST /watch`. `None` is the default of every field but `prompt`, and may be sent for it."""

    prompt: str
    chat: bool | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    strategy: str | None = None
    mixture_weight: float | None = None
    acceptance_threshold: float | None = None
    window_size: Any = None


def routes(engine: Engine, planner: Planner, settings: ServeSettings) -> APIRouter:
    """The page and its stream; nothing where no request may name a strategy, since the page compares them."""
    router = APIRouter()
    if settings.fixed_decoding:
        return router
    html, policy = page(about(planner, settings))

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return HTMLResponse(html, headers=headers)

    @router.post("/watch")
    async def watch(body: WatchBody, request: Request) -> Response:
        """One decode, an event per step: see `apd.serve.steps.events`."""
        plan = await run_in_threadpool(plan_of, planner, body)
        if len(engine.working) + len(engine.new_work) >= MOST_WATCHED:  # no `await` up to the ticket
            raise APIError(
                429, f"{MOST_WATCHED} decodes are being watched. Try again later.", code="queue_full", retry_after=2
            )
        ticket = Ticket(engine, plan, settings, follow=False)
        return await streamed(request, ticket, _parts(ticket))

    return router


def plan_of(planner: Planner, body: WatchBody) -> Plan:
    """A plan without rows: the decode is work of its own, so that its steps are those of one row, and timed as such.

    Raises:
        APIError: what is wrong with the request.
    """
    given = body.model_dump(exclude={"prompt", "chat", "window_size"}, exclude_none=True)
    if body.chat:
        common: Any = ChatBody(messages=[Message(role="user", content=body.prompt)], **given)
        plan = planner.chat(common)
    else:
        common = CompletionBody(prompt=body.prompt, **given)
        plan = planner.completion(common)
    row = plan.rows[0]
    if body.window_size is not None:
        row = _with_window(planner, row, body.window_size, arguments_of(common, planner.settings))
    sampler = planner.sampler

    def work(answers: Any) -> Any:
        return map(sse, steps.events(sampler.loop(row), sampler.tokenizer))

    return dataclasses.replace(plan, choices=[], rows=[], work=work)


def _with_window(
    planner: Planner, row: decoding.Request, window_size: Any, arguments: dict[str, Any]
) -> decoding.Request:
    """The row with a window of its own. No other row shares its steps, so it may have any that is not wider."""
    own = planner.sampler.config.window_size
    if isinstance(own, int) and not (isinstance(window_size, int) and window_size <= own):
        raise refused(f"`window_size` must be a number up to {own} here, got {window_size!r}.", "window_size")
    try:
        resolve = planner.sampler.resolver(max_new_tokens=row.max_new_tokens, window_size=window_size, **arguments)
        return resolve(row.prompt, torch.ones_like(row.prompt), row.seeds.tolist())
    except (ValueError, TypeError) as error:
        raise refused(str(error), "window_size", "invalid_value") from None


async def _parts(ticket: Ticket) -> AsyncIterator[bytes]:
    async for events in ticket.events():
        for event in events:
            if isinstance(event, Result) and not event.is_last:
                yield event.value
    yield DONE


def about(planner: Planner, settings: ServeSettings) -> dict[str, Any]:
    """What the page has to know."""
    sampler = planner.sampler
    config, model = sampler.config, getattr(sampler.drafter, "model", None)
    is_included = getattr(getattr(model, "config", None), "name_or_path", None) == str(DRAFTER_DIR)
    window = config.window_size
    return {
        "model": "the included pair" if is_included else settings.model_name,
        "strategy": "apd" if sampler.strategy is None else "",
        "strategies": STRATEGIES,
        "mixture_weight": config.mixture_weight,
        "acceptance_threshold": config.acceptance_threshold,
        "window_size": window if isinstance(window, (int, str)) else None,
        "max_tokens": settings.max_new_tokens,
        "max_length": planner.max_length,
        "chat": bool(getattr(sampler.tokenizer, "chat_template", None)),
        "needs_key": settings.api_key is not None,
        "examples": [example.prompt for example in EXAMPLES] if is_included else [],
        "example": next(i for i, example in enumerate(EXAMPLES) if example.task == "shuffle"),  # takes several steps
    }


def page(known: dict[str, Any]) -> tuple[str, str]:
    """The page, which loads nothing, and the policy by which a browser runs its script and no other."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(_HERE), undefined=StrictUndefined, autoescape=True)
    read = partial(Path.read_text, encoding="utf-8")
    style, script = (
        read(_SHOW / "player.css") + read(_HERE / "page.css"),
        read(_HERE / "pane.js") + read(_HERE / "page.js"),
    )
    data = json.dumps(known).replace("<", "\\u003c")  # no element ends or begins in it
    html = environment.get_template("index.html").render(
        style=Markup(style), script=Markup(script), about=Markup(data)
    )
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
