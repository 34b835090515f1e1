"""Streams committed tokens step by step; a streamed token never changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from apd.decoding.commit import StepInfo
from apd.decoding.state import DecodeState
from apd.text import TextPieces


@dataclass(frozen=True)
class Chunk:
    """Tokens of one row that one step made final.

    Attributes:
        row: index of the row in the call.
        step: index of the row's step, from 0.
        tokens: ids in the order of their positions; everything to the left of them is final, too.
        columns: column of each token, counted from the row's first one. With holes, given tokens may stand between them.
        text: text that became final. Half a character is held back and, where the tokenizer cleans up spaces, the last
            word. Empty without a tokenizer.
        done: whether the row is finished.
    """

    row: int
    step: int
    tokens: list[int]
    columns: list[int]
    text: str
    done: bool


def settled_columns(info: StepInfo, after: DecodeState) -> list[Tensor]:
    """Per row of the step, the columns of generated tokens that became final, `n` int64: left of the new frontier."""
    new = after.between(info.before.frontier, after.frontier) & ~after.given
    return [is_new.nonzero().flatten() for is_new in new]


def chunks(steps: Iterator[tuple[StepInfo, DecodeState]], tokenizer: Any, **decode_kwargs: Any) -> Iterator[Chunk]:
    """Turn the steps of a decode into chunks, rows in order within each step."""
    texts: dict[int, TextPieces] = {}
    for info, after in steps:
        rows, counts, done = info.before.rows.tolist(), info.before.steps.tolist(), after.done.tolist()
        settled, padding = settled_columns(info, after), after.layout.padding
        for i, (row, step, columns, is_last) in enumerate(zip(rows, counts, settled, done, strict=True)):
            ids, text = after.tokens[i, columns].tolist(), ""
            if tokenizer is not None:
                text = texts.setdefault(row, TextPieces(tokenizer, **decode_kwargs)).add(ids, last=is_last)
            yield Chunk(row, step, ids, [column - padding[i] for column in columns.tolist()], text, is_last)


def feed(streamer: Any, prompt: Tensor, steps: Iterator[tuple[StepInfo, DecodeState]]) -> Iterator:
    """Yield the steps, and put their committed tokens into a streamer of transformers, which takes one row.

    A streamer with `put_draft` gets each step's draft before the tokens that the step committed.

    Args:
        streamer: has `put(ids)`, `end()` and perhaps `put_draft(ids)`.
        prompt: `1 l` int64, put first.
    """
    streamer.put(prompt.cpu())
    for info, after in steps:
        if hasattr(streamer, "put_draft"):
            draft = info.proposal.draft[0]
            streamer.put_draft(draft[info.window.inside[0, : len(draft)]].cpu())
        tokens = after.tokens[0, settled_columns(info, after)[0]]
        if len(tokens):
            streamer.put(tokens.cpu())
        yield info, after
    streamer.end()
