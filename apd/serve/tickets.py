"""A job as the event loop sees it: its events as they come, and the choices that grow from them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from apd.generation.batch import Generated, Progress
from apd.serve.chunks import Answer, Piece, TokenLogprob
from apd.serve.engine import Engine
from apd.serve.jobs import Ended, Event, Failed, Job, Result, Stepped
from apd.serve.plans import Plan
from apd.serve.settings import ServeSettings
from apd.serve.special import Filled, Scored

_WORK = -1  # stands for a job's work among its choices


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
