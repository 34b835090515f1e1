"""From the engine's events to HTTP responses, whole or streamed, and back to the engine when the client goes away."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from apd.serve.chunks import DONE, Piece, offsets_of, sse, text_logprobs
from apd.serve.engine.errors import APIError
from apd.serve.engine.logprobs import TokenLogprob
from apd.serve.engine.spelling import Spelling
from apd.serve.metrics import ServerMetrics
from apd.serve.plans import Plan
from apd.serve.schemas import Common
from apd.serve.shapes import Kind
from apd.serve.tickets import Answers, Ticket

T = TypeVar("T")


class HungUp(Exception):
    """The client has closed the connection."""


async def answer(request: Request, plan: Plan, body: Common, kind: Kind, ticket: Ticket) -> Response:
    """The response to a request whose job is in the engine."""
    state = request.app.state
    head = {
        "id": f"{kind.prefix}-{uuid.uuid4().hex}",
        "object": kind.part if body.stream else kind.whole,
        "created": int(time.time()),
        "model": state.settings.model_name,
        "system_fingerprint": state.fingerprint,
    }
    answers, spelling = Answers(plan, state.facts.tokenizer, ticket), state.spelling
    if not body.stream:
        await _waited(request, ticket, _collect(ticket, answers))
        return JSONResponse(head | _whole(answers, kind, spelling))
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return await streamed(request, ticket, _parts(ticket, answers, head, kind, spelling, include_usage=include_usage))


async def streamed(request: Request, ticket: Ticket, parts: AsyncIterator[bytes]) -> Response:
    """The response that sends these parts; an error before the first still has a status of its own."""
    first = await _waited(request, ticket, anext(parts))
    return EventStream(request, first, parts, ticket)


async def _waited(request: Request, ticket: Ticket, work: Awaitable[T]) -> T:
    """As `unless_hung_up`; if it fails, nobody waits for the job."""
    try:
        return await unless_hung_up(request, work)
    except BaseException as error:
        ticket.cancel()
        if isinstance(error, HungUp):
            metrics_of(request).hang_ups.inc()
        raise


def metrics_of(request: Request) -> ServerMetrics:
    """The counters of the server that a request is for."""
    return request.app.state.metrics


async def on_hung_up(request: Request, error: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=499)


async def _collect(ticket: Ticket, answers: Answers) -> None:
    async for events in ticket.events():
        for event in events:
            if (found := answers.take(event)) is not None:
                answers.shown[found[0]].append(found[1])


def _whole(answers: Answers, kind: Kind, spelling: Spelling) -> dict[str, Any]:
    choices = []
    for i, pieces in enumerate(answers.shown):
        piece = Piece(
            "".join(piece.text for piece in pieces),
            [entry for piece in pieces for entry in piece.logprobs],
            [offset for piece in pieces for offset in piece.offsets],
        )
        finish = answers.choices[i].finish
        fields = kind.choice(answers.plan, i, piece, spelling)
        if i in answers.scored:
            fields["logprobs"] = _with_prompt(fields["logprobs"], answers.scored[i], answers.plan, i, spelling)
        choices.append({"index": i, **fields, "finish_reason": finish})
    return {"choices": choices, "usage": answers.usage()}


def _with_prompt(
    of_answer: dict[str, Any], entries: list[TokenLogprob | None], plan: Plan, choice: int, spelling: Spelling
) -> dict[str, Any]:
    """The log-probabilities of the prompt, then those of the answer."""
    ids = plan.choices[choice].prompt
    of_prompt = text_logprobs(entries, ids, offsets_of(ids, spelling.tokenizer), spelling)
    return {name: of_prompt[name] + of_answer[name] for name in of_prompt}


async def _parts(
    ticket: Ticket, answers: Answers, head: dict[str, Any], kind: Kind, spelling: Spelling, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """The chunks of a stream: of each choice a first one, its text, and one with the reason of its end."""
    usage: dict[str, Any] = {"usage": None} if include_usage else {}
    begun: set[int] = set()

    def chunk(choice: int, fields: dict[str, Any], finish: str | None = None) -> bytes:
        return sse(head | {"choices": [{"index": choice, **fields, "finish_reason": finish}]} | usage)

    async for events in ticket.events():
        for event in events:
            if (found := answers.take(event)) is None:
                continue
            choice, piece = found
            if choice not in begun:
                begun.add(choice)
                if (first := kind.first(answers.plan, choice)) is not None:
                    yield chunk(choice, first)
            if piece.text or piece.logprobs:
                yield chunk(choice, kind.chunk(answers.plan, choice, piece, spelling))
            if (finish := answers.choices[choice].finish) is not None:
                yield chunk(choice, kind.last(), finish)
    for choice in range(len(answers.choices) if not answers.plan.job.rows else 0):  # nothing was generated
        yield chunk(choice, kind.first(answers.plan, choice) or kind.last(), "length")
    if include_usage:
        yield sse(head | {"choices": [], "usage": answers.usage()})
    yield DONE


async def unless_hung_up(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client goes away before.

    Raises:
        HungUp: it went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUp
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. The job is cancelled as soon as the client goes away.

    Args:
        request: the client's.
        first: the first part.
        rest: the others.
        ticket: the job.
    """

    def __init__(self, request: Request, first: bytes, rest: AsyncIterator[bytes], ticket: Ticket) -> None:
        self.status_code, self.background = 200, None
        self.request, self.first, self.rest, self.ticket = request, first, rest, ticket
        self.body = b""
        self.init_headers(
            {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_hung_up(self.request, self._send(send))
        except HungUp:
            metrics_of(self.request).hang_ups.inc()
        finally:
            self.ticket.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self.first, "more_body": True})
        try:
            async for part in self.rest:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except APIError as error:  # the status is sent: the error is an event
            await send({"type": "http.response.body", "body": sse(error.body) + DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
