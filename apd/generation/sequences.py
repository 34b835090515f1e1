"""Several answers to each of many prompts (`num_return_sequences`): copies of a prompt under numbers of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from apd.generation.many import Generated, Prompt


def several(
    numbered: Iterable[tuple[int, Prompt]], copies: int, on_error: Callable[[int, Exception], None] | None
) -> tuple[Iterable[tuple[int, Prompt]], Callable[[int, Exception], None] | None]:
    """Each prompt `copies` times, copy j of prompt i under the number i · copies + j; and an `on_error` that is told once."""
    if copies == 1:
        return numbered, on_error

    def told_once(number: int, error: Exception) -> None:
        index, sequence = divmod(number, copies)
        if on_error is None:
            raise ValueError(f"Prompt {index}: {error}") from error
        if not sequence:
            on_error(index, error)

    return ((index * copies + copy, prompt) for index, prompt in numbered for copy in range(copies)), told_once


def with_sequences(found: Iterator[Generated], copies: int) -> Iterator[Generated]:
    """The answers to the prompts of `several`, under the numbers of their prompts."""
    for answer in found:
        index, sequence = divmod(answer.index, copies)
        yield answer if copies == 1 else dataclasses.replace(answer, index=index, sequence=sequence)
