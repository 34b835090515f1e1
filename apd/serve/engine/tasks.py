"""A job while the engine has it, and its rows' places among those that are decoded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from apd.generation.batch import Generated, Progress
from apd.serve.engine.errors import APIError
from apd.serve.engine.jobs import Ended, Job, Spent, Stepped
from apd.serve.engine.logprobs import logprobs_of
from apd.serve.engine.resolving import Prepared, Resolvers


@dataclass(eq=False)
class Task:
    """A job in the engine."""

    number: int
    job: Job
    arrived: float = field(default_factory=time.monotonic)
    prepared: Prepared | APIError | None = None  # `None`: not checked yet
    places: list[int] = field(default_factory=list)  # numbers of rows that were let in
    answers: dict[int, Generated | None] = field(default_factory=dict)  # `None` of one that a stop string has ended
    is_over: bool = False

    @property
    def is_late(self) -> bool:
        return self.job.timeout is not None and time.monotonic() > self.arrived + self.job.timeout

    @property
    def has_answers(self) -> bool:
        """True if every row is done."""
        return len(self.answers) == len(self.job.rows)

    def pieces(self, resolvers: Resolvers) -> Iterator[Any]:
        """The work of the job; nothing of it is done, and can fail, before the first piece."""
        assert self.job.work is not None
        yield from self.job.work(
            resolvers, [answer for _, answer in sorted(self.answers.items()) if answer is not None]
        )


@dataclass
class Place:
    """Where a row that is being decoded belongs."""

    task: Task
    choice: int
    last: float  # when its last tokens were committed
    num_tokens: int = 0

    def stepped(self, progress: Progress) -> Stepped:
        """What is told of a step."""
        logprobs = logprobs_of(progress.settled, progress.logits, self.task.job.top or 0)
        return Stepped(self.choice, progress.settled, logprobs, _spent(progress))

    def ended(self, answer: Generated) -> Ended:
        """What is told of the end."""
        return Ended(self.choice, answer.tokens, answer.finish, _spent(answer))


def _spent(done: Progress | Generated) -> Spent:
    return Spent(done.drafter_forwards, done.verifier_forwards, done.canvases)
