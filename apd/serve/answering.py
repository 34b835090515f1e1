"""From the engine's events to HTTP responses, whole or streamed, and back to the engine when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from apd.generation.batch import Generated, Progress
from apd.serve.chunks import DONE, Answer, Piece, TokenLogprob, chat_logprobs, offsets_of, sse, text_logprobs
from apd.serve.engine import Ended, Engine, Event, Failed, Job, Result, Stepped
from apd.serve.errors import APIError
from apd.serve.plans import Plan
from apd.serve.schemas import Common
from apd.serve.settings import ServeSettings
from apd.serve.special import Filled, Scored
from apd.serve.spelling import Spelling

T = TypeVar("T")

_WORK = -1  # stands for a job's work among its choices


class HungUp(Exception):
    """The client has closed the connection."""


class Ticket:
    """A job in the engine, and its events as they come.

    Args:
        engine: the decoding loop; the job is submitted at once.
        plan: what is asked.
        settings: of the server.
        follow: events of every step, not only of the ends.

    Raises:
        APIError: the queue is full, or the server shuts down.
    """

    def __init__(self, engine: Engine, plan: Plan, settings: ServeSettings, *, follow: bool) -> None:
        self.engine = engine
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[list[Event]] = asyncio.Queue()
        timeout = settings.request_timeout
        self.job = Job(
            rows=plan.rows,
            settings=plan.settings,
            deliver=self._deliver,
            follow=follow or bool(plan.stops) or plan.top is not None,
            logits=plan.top is not None,
            constraints=plan.constraints,
            work=plan.work,
            deadline=None if timeout is None else time.monotonic() + timeout,
        )
        self.open: set[int] = {*range(len(plan.rows)), *([_WORK] if plan.work is not None else [])}
        if self.open:
            engine.submit(self.job)
        else:
            self.job.is_over = True

    def _deliver(self, events: list[Event]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.queue.put_nowait, events)

    async def events(self) -> AsyncIterator[list[Event]]:
        """The events, those of a step together.

        Raises:
            APIError: the job failed.
        """
        while self.open:
            events = await self.queue.get()
            for event in events:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Ended):
                    self.open.discard(event.choice)
                elif isinstance(event, Result) and event.is_last:
                    self.open.discard(_WORK)
            yield events

    def release(self, choice: int) -> None:
        """A choice needs no more tokens."""
        if choice in self.open:
            self.open.discard(choice)
            self.engine.cancel(self.job, choice)

    def cancel(self) -> None:
        """Nobody waits for the job."""
        self.engine.cancel(self.job)


@dataclass
class Counts:
    """What a choice has cost."""

    tokens: int = 0
    drafter_forwards: int = 0
    verifier_forwards: int = 0
    canvases: int = 0


class Answers:
    """The choices of a response as they grow.

    Args:
        plan: what is asked.
        tokenizer: decodes.
        ticket: is told of choices that a stop string has ended.
    """

    def __init__(self, plan: Plan, tokenizer: Any, ticket: Ticket) -> None:
        self.plan, self.ticket = plan, ticket
        self.choices = [
            Answer(
                tokenizer,
                plan.stops,
                behind=choice.prompt if plan.continues else (),
                top=plan.top or 0,
                shows_special=plan.shows_special,
            )
            for choice in plan.choices
        ]
        self.counts = [Counts() for _ in plan.choices]
        self.scored: dict[int, list[TokenLogprob | None]] = {}  # prompts
        if not plan.rows:  # nothing is generated
            for choice in self.choices:
                choice.finish = "length"
        self.shown: list[list[Piece]] = [[] for _ in plan.choices]

    def take(self, event: Event) -> tuple[int, Piece] | None:
        """The text that an event made final, with the index of its choice."""
        if isinstance(event, Result):
            return self._take_result(event.value)
        if isinstance(event, Failed) or self.plan.fills:
            return None
        answer, counts = self.choices[event.choice], self.counts[event.choice]
        if answer.finish is not None:  # a stop string was found before the engine knew
            return None
        done: Progress | Generated
        if isinstance(event, Stepped):
            done = event.progress
            piece = answer.add(done.settled, done.logits)
            if answer.finish is not None:
                self.ticket.release(event.choice)
        else:
            done = event.answer
            rest = done.tokens[len(answer.tokens) :]
            piece = answer.add(rest, last=True, finish=event.answer.finish)
        counts.tokens = len(answer.tokens)
        for name in ("drafter_forwards", "verifier_forwards", "canvases"):
            setattr(counts, name, getattr(done, name))
        return event.choice, piece

    def _take_result(self, value: Any) -> tuple[int, Piece] | None:
        if isinstance(value, Scored):
            self.scored[value.prompt] = value.entries
        elif isinstance(value, Filled):
            self.choices[0].finish = "stop"
            self.counts[0] = Counts(
                value.best.new_tokens,
                sum(answer.drafter_forwards for answer in value.tried),
                sum(answer.verifier_forwards for answer in value.tried),
                sum(answer.canvases for answer in value.tried),
            )
            return 0, Piece("".join(hole.text for hole in value.best.holes), [], [])
        return None

    def usage(self) -> dict[str, Any]:
        """Tokens and forwards of all choices."""
        tokens, drafted, verified, canvases = (
            sum(getattr(counts, name) for counts in self.counts)
            for name in ("tokens", "drafter_forwards", "verifier_forwards", "canvases")
        )
        return {
            "prompt_tokens": self.plan.num_prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.plan.num_prompt_tokens + tokens,
            "apd": {
                "drafter_forwards": drafted,
                "verifier_forwards": verified,
                "canvases": canvases,
                "tokens_per_forward": round(tokens / max(1, drafted or verified), 3),
            },
        }


class Kind:
    """The shape of chat completions.

    Args:
        spelling: of single tokens, for log-probabilities.
    """

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, plan: Plan, choice: int) -> dict[str, Any] | None:
        """The fields of a choice's first chunk; `None`: there is none before its text."""
        return {"delta": {"role": "assistant", "content": ""}}

    def chunk(self, plan: Plan, choice: int, piece: Piece, spelling: Spelling) -> dict[str, Any]:
        logprobs = chat_logprobs(piece.logprobs, spelling) if plan.top is not None else None
        return {"delta": {"content": piece.text}, "logprobs": logprobs}

    def last(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def choice(self, plan: Plan, choice: int, piece: Piece, spelling: Spelling) -> dict[str, Any]:
        logprobs = chat_logprobs(piece.logprobs, spelling) if plan.top is not None else None
        return {"message": {"role": "assistant", "content": piece.text, "refusal": None}, "logprobs": logprobs}


class TextKind(Kind):
    """The shape of text completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def first(self, plan: Plan, choice: int) -> dict[str, Any] | None:
        echo = plan.choices[choice].echo
        return {"text": echo, "logprobs": None} if echo else None

    def chunk(self, plan: Plan, choice: int, piece: Piece, spelling: Spelling) -> dict[str, Any]:
        return {"text": piece.text, "logprobs": self._logprobs(plan, choice, piece, spelling)}

    def last(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def choice(self, plan: Plan, choice: int, piece: Piece, spelling: Spelling) -> dict[str, Any]:
        logprobs = self._logprobs(plan, choice, piece, spelling)
        return {"text": plan.choices[choice].echo + piece.text, "logprobs": logprobs}

    def _logprobs(self, plan: Plan, choice: int, piece: Piece, spelling: Spelling) -> dict[str, Any] | None:
        if plan.top is None:
            return None
        start = len(plan.choices[choice].echo)
        offsets = [start + offset for offset in piece.offsets]
        return text_logprobs(piece.logprobs, [entry.token for entry in piece.logprobs], offsets, spelling)


CHAT, TEXT = Kind(), TextKind()


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
    answers, spelling = Answers(plan, state.engine.sampler.tokenizer, ticket), state.planner.spelling
    try:
        if not body.stream:
            await unless_hung_up(request, _collect(ticket, answers))
            return JSONResponse(head | _whole(answers, kind, spelling))
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        parts = _parts(ticket, answers, head, kind, spelling, include_usage=include_usage)
        first = await unless_hung_up(request, anext(parts))  # an error before it still has a status of its own
    except BaseException as error:
        ticket.cancel()
        if not isinstance(error, HungUp):
            raise
        state.engine.metrics.hang_ups.inc()
        return Response(status_code=499)  # nobody reads it
    return EventStream(request, first, parts, ticket)


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

    for choice in range(len(answers.choices) if not answers.plan.rows else 0):
        yield chunk(choice, kind.first(answers.plan, choice) or kind.last(), "length")
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
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await unless_hung_up(self.request, self._send(send))
        except HungUp:
            self.ticket.engine.metrics.hang_ups.inc()
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
