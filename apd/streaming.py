"""Committed tokens as they are committed: never one that is taken back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TextStreamer

from apd.state import DecodeState, StepInfo


@dataclass(frozen=True)
class Chunk:
    """What one step added to one row for good.

    Attributes:
        row: which row of the call.
        step: which of its steps, from 0.
        tokens: the ids, in order; all that stands left of them is final too.
        text: the text that became certain; a word may be held back until its end is seen. Empty without a tokenizer.
        done: whether the row is finished.
    """

    row: int
    step: int
    tokens: list[int]
    text: str
    done: bool


def settled_tokens(info: StepInfo, after: DecodeState) -> list[Tensor]:
    """Per row of the step, the tokens that became final: decided now, with everything left of them."""
    new = after.between(info.before.frontier, after.frontier)
    return [tokens[is_new] for tokens, is_new in zip(after.tokens, new, strict=True)]


class TextPieces(TextStreamer):
    """Transformers' streamer, giving its pieces back instead of printing them."""

    def __init__(self, tokenizer: Any, **decode_kwargs: Any) -> None:
        super().__init__(tokenizer, **decode_kwargs)
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)

    def add(self, tokens: Tensor, *, last: bool) -> str:
        """Text that became certain with these tokens (`n` int64)."""
        if len(tokens):
            self.put(tokens)
        if last:
            self.end()
        text, self.pieces = "".join(self.pieces), []
        return text


def chunks(steps: Iterator[tuple[StepInfo, DecodeState]], tokenizer: Any, **decode_kwargs: Any) -> Iterator[Chunk]:
    """The steps of a decoding as chunks, rows in order within each step."""
    texts: dict[int, TextPieces] = {}
    for info, after in steps:
        rows, counts, done = info.before.rows.tolist(), info.before.steps.tolist(), after.done.tolist()
        for row, step, tokens, is_last in zip(rows, counts, settled_tokens(info, after), done, strict=True):
            text = ""
            if tokenizer is not None:
                pieces = texts.setdefault(row, TextPieces(tokenizer, **decode_kwargs))
                text = pieces.add(tokens.cpu(), last=is_last)
            yield Chunk(row, step, tokens.tolist(), text, is_last)


def feed(streamer: Any, prompt: Tensor, steps: Iterator[tuple[StepInfo, DecodeState]]) -> Iterator:
    """Pass the steps on, and their committed tokens to a streamer of transformers; it takes one row.

    A streamer with `put_draft` sees each draft before what was committed of it.
    """
    streamer.put(prompt.cpu())
    for info, after in steps:
        if hasattr(streamer, "put_draft"):
            draft = info.proposal.draft[0]
            streamer.put_draft(draft[info.window.inside[0, : len(draft)]].cpu())
        tokens = settled_tokens(info, after)[0]
        if len(tokens):
            streamer.put(tokens.cpu())
        yield info, after
    streamer.end()
