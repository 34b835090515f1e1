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

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from apd.included.tasks import EXAMPLES
from apd.serve.answering import streamed
from apd.serve.chunks import DONE, sse
from apd.serve.dispatch import Dispatcher
from apd.serve.engine.errors import APIError, refused
from apd.serve.engine.jobs import Result
from apd.serve.engine.works import Watching
from apd.serve.plans import Plan, Planner
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
    window_size: int | str | None = None


def routes(dispatcher: Dispatcher, planner: Planner, settings: ServeSettings) -> APIRouter:
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
        """One decode, an event per step: see `apd.serve.engine.steps.events`."""
        plan = await run_in_threadpool(plan_of, planner, body)
        num_watched = sum(_is_watched(each) for each in dispatcher.waiters.values())
        if num_watched >= MOST_WATCHED:  # no `await` up to the ticket
            raise APIError(
                429, f"{MOST_WATCHED} decodes are being watched. Try again later.", code="queue_full", retry_after=2
            )
        ticket = Ticket(dispatcher, plan)
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
    row, decoding = plan.job.rows[0], plan.job.decoding
    if body.window_size is not None:
        own = planner.facts.config.window_size
        if isinstance(own, int) and not (isinstance(body.window_size, int) and body.window_size <= own):
            raise refused(f"`window_size` must be a number up to {own} here, got {body.window_size!r}.", "window_size")
        arguments = (*decoding.arguments, ("window_size", body.window_size))
        decoding = dataclasses.replace(decoding, arguments=tuple(sorted(arguments)))
    job = dataclasses.replace(plan.job, decoding=decoding, rows=(), work=Watching(row, decoding))
    return dataclasses.replace(plan, choices=[], job=job)


def _is_watched(waiter: Any) -> bool:
    return isinstance(getattr(waiter, "work", None), Watching)


async def _parts(ticket: Ticket) -> AsyncIterator[bytes]:
    async for events in ticket.events():
        for event in events:
            if isinstance(event, Result) and not event.is_last:
                yield sse(event.value)
    yield DONE


def about(planner: Planner, settings: ServeSettings) -> dict[str, Any]:
    """What the page has to know."""
    facts = planner.facts
    config, is_included = facts.config, facts.is_included
    window = config.window_size
    return {
        "model": "the included pair" if is_included else settings.model_name,
        "strategy": "apd" if facts.strategy is None else "",
        "strategies": STRATEGIES,
        "mixture_weight": config.mixture_weight,
        "acceptance_threshold": config.acceptance_threshold,
        "window_size": window if isinstance(window, (int, str)) else None,
        "max_tokens": settings.max_new_tokens,
        "max_length": planner.max_length,
        "chat": bool(getattr(facts.tokenizer, "chat_template", None)),
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
