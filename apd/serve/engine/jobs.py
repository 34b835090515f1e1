"""What is asked of the engine, and the events with which it answers: plain data, which may go from one process to another."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apd.generation.batch import Generated
    from apd.serve.engine.errors import APIError
    from apd.serve.engine.logprobs import TokenLogprob


@dataclass(frozen=True)
class Row:
    """One row: the ids of its prompt, how many masks follow them, and its seed. Without new tokens, it fills holes only."""

    ids: list[int]
    new_tokens: int
    seed: int


@dataclass(frozen=True)
class Decoding:
    """How rows are decoded; those of equal settings share a batch.

    Attributes:
        arguments: of `generate()`, by name.
        processors: logits processors; equal ones must be equal objects.
        has_logits: the logits that decided each position are recorded.
        has_grammar: each row has a grammar of its own.
        has_holes: the prompts have holes.
    """

    arguments: tuple[tuple[str, Any], ...] = ()
    processors: tuple[Hashable, ...] = ()
    has_logits: bool = False
    has_grammar: bool = False
    has_holes: bool = False


#: (the engine's `Resolvers`, answers of the job's rows) → what each piece gave, plain data. `works` has them.
Work = Callable[[Any, "Sequence[Generated]"], Iterator[Any]]


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks of the engine.

    Attributes:
        decoding: how its rows are decoded.
        rows: one for each choice.
        follow: tell of every step of every row, not only of the ends.
        top: likeliest tokens to tell at each position; `None` without log-probabilities.
        schema: the JSON schema that each answer must obey.
        work: what follows the rows, in pieces between two steps.
        timeout: seconds after which it fails.
    """

    decoding: Decoding
    rows: Sequence[Row] = ()
    follow: bool = False
    top: int | None = None
    schema: dict[str, Any] | None = None
    work: Work | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class Spent:
    """What a row has cost so far."""

    drafter_forwards: int = 0
    verifier_forwards: int = 0
    canvases: int = 0


@dataclass(frozen=True)
class Stepped:
    """A step of a row of a job: the tokens that became final, and their log-probabilities, if asked for."""

    choice: int  # the row's index in the job
    tokens: list[int]
    logprobs: list[TokenLogprob]
    spent: Spent


@dataclass(frozen=True)
class Ended:
    """A row of a job is done: all its tokens, and `"stop"` or `"length"`."""

    choice: int
    tokens: list[int]
    finish: str
    spent: Spent


@dataclass(frozen=True)
class Result:
    """What a piece of a job's work gave. The last event of a job with work, or without rows, has `is_last`."""

    value: Any
    is_last: bool = False


@dataclass(frozen=True)
class Failed:
    """The job ended with an error; no event follows."""

    error: APIError


Event = Stepped | Ended | Result | Failed
#: Events by the numbers of their jobs, those of a step together.
Events = list[tuple[int, list[Event]]]
