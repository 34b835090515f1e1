"""What is asked of the engine, and the events with which it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from apd.decoding.request import Request
from apd.generation.batch import Generated, Progress
from apd.serve.errors import APIError


@dataclass(frozen=True)
class Stepped:
    """A step of a row of a job: `choice` is the row's index in the job."""

    choice: int
    progress: Progress


@dataclass(frozen=True)
class Ended:
    """A row of a job is done."""

    choice: int
    answer: Generated


@dataclass(frozen=True)
class Result:
    """What a job's `work` gave; its last event has `is_last`."""

    value: Any
    is_last: bool = False


@dataclass(frozen=True)
class Failed:
    """The job ended with an error; no event follows."""

    error: APIError


Event = Stepped | Ended | Result | Failed


@dataclass(eq=False)
class Job:
    """What one HTTP request asks of the engine.

    Args:
        rows: a request of one row for each choice.
        settings: equal for jobs that may share a batch.
        deliver: called in the engine's thread with the events of a step, which it must not keep waiting.
        follow: deliver every step of every row, not only the ends.
        logits: record the logits that decided each position.
        constraints: of each row, what decides which ids it may have; see `Constraint`.
        work: what is to be done in the engine's thread without a batch, in pieces between two steps. It is given the answers of
            the rows.
        deadline: when the job fails, by `time.monotonic`.
    """

    rows: Sequence[Request]
    settings: Hashable
    deliver: Callable[[list[Event]], None]
    follow: bool = False
    logits: bool = False
    constraints: Sequence[Any] = ()
    work: Callable[[list[Generated]], Iterator[Any]] | None = None
    deadline: float | None = None
    arrived: float = field(default_factory=time.monotonic)
    answers: dict[int, Generated | None] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)  # of rows in a batch
    is_over: bool = False
