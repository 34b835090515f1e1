"""A job as the event loop sees it: its events as they come, and the choices that grow from them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from apd.serve.chunks import Answer, Piece
from apd.serve.dispatch import Dispatcher
from apd.serve.engine.jobs import Ended, Event, Failed, Result, Spent, Stepped
from apd.serve.engine.logprobs import TokenLogprob
from apd.serve.engine.works import Filled, Scored
from apd.serve.plans import Plan

_WORK = -1  # stands for a job's work among its choices


class Ticket:
    """A job in the engine, and its events as they come; made in the event loop.

    Args:
        dispatcher: hands the job to the engine, at once.
        plan: what is asked.

    Attributes:
        work: of the job.

    Raises:
        APIError: the queue is full, or the server shuts down.
    """

    def __init__(self, dispatcher: Dispatcher, plan: Plan) -> None:
        self.dispatcher = dispatcher
        self.queue: asyncio.Queue[list[Event]] = asyncio.Queue()
        job, self.work = plan.job, plan.job.work
        self.open: set[int] = {*range(len(job.rows)), *([_WORK] if job.work is not None or not job.rows else [])}
        self.number = dispatcher.submit(job, self)

    @property
    def num_places(self) -> int:
        """Rows that are not done; 1 for the work that follows them."""
        return len(self.open - {_WORK}) or len(self.open)

    def take(self, events: list[Event]) -> None:
        """Called with the events of a step."""
        for event in events:
            if isinstance(event, Failed):
                self.open.clear()
            elif isinstance(event, Ended):
                self.open.discard(event.choice)
            elif isinstance(event, Result) and event.is_last:
                self.open.discard(_WORK)
        self.queue.put_nowait(events)

    async def events(self) -> AsyncIterator[list[Event]]:
        """The events, those of a step together.

        Raises:
            APIError: the job failed.
        """
        while self.open or not self.queue.empty():
            events = await self.queue.get()
            for event in events:
                if isinstance(event, Failed):
                    raise event.error
            yield events

    def release(self, choice: int) -> None:
        """A choice needs no more tokens."""
        if choice in self.open:
            self.open.discard(choice)
            self.dispatcher.cancel(self.number, choice)

    def cancel(self) -> None:
        """Nobody waits for the job."""
        self.dispatcher.cancel(self.number)


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
                shows_special=plan.shows_special,
            )
            for choice in plan.choices
        ]
        self.tokens = [0] * len(plan.choices)
        self.spent = [Spent()] * len(plan.choices)
        self.scored: dict[int, list[TokenLogprob | None]] = {}  # prompts
        if not plan.job.rows:  # nothing is generated
            for choice in self.choices:
                choice.finish = "length"
        self.shown: list[list[Piece]] = [[] for _ in plan.choices]

    def take(self, event: Event) -> tuple[int, Piece] | None:
        """The text that an event made final, with the index of its choice."""
        if isinstance(event, Result):
            return self._take_result(event.value)
        if isinstance(event, Failed) or self.plan.fills:
            return None
        answer = self.choices[event.choice]
        if answer.finish is not None:  # a stop string was found before the engine knew
            return None
        if isinstance(event, Stepped):
            piece = answer.add(event.tokens, event.logprobs)
            if answer.finish is not None:
                self.ticket.release(event.choice)
        else:
            piece = answer.add(event.tokens[len(answer.tokens) :], last=True, finish=event.finish)
        self.tokens[event.choice], self.spent[event.choice] = len(answer.tokens), event.spent
        return event.choice, piece

    def _take_result(self, value: Any) -> tuple[int, Piece] | None:
        if isinstance(value, Scored):
            self.scored[value.prompt] = value.entries
        elif isinstance(value, Filled):
            self.choices[0].finish = "stop"
            self.tokens[0], self.spent[0] = value.new_tokens, value.spent
            return 0, Piece(value.text, [], [])
        return None

    def usage(self) -> dict[str, Any]:
        """Tokens and forwards of all choices."""
        tokens = sum(self.tokens)
        drafted = sum(spent.drafter_forwards for spent in self.spent)
        verified = sum(spent.verifier_forwards for spent in self.spent)
        return {
            "prompt_tokens": self.plan.num_prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.plan.num_prompt_tokens + tokens,
            "apd": {
                "drafter_forwards": drafted,
                "verifier_forwards": verified,
                "canvases": sum(spent.canvases for spent in self.spent),
                "tokens_per_forward": round(tokens / max(1, drafted or verified), 3),
            },
        }
