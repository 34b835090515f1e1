"""Committed tokens as they are committed: never one that is taken back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from apd.decoding.commit import StepInfo
from apd.decoding.state import DecodeState
from apd.generation.text import whole_text


@dataclass(frozen=True)
class Chunk:
    """What one step added to one row for good.

    Attributes:
        row: which row of the call.
        step: which of its steps, from 0.
        tokens: the ids, in order; all that stands left of them is final too.
        text: the text that became certain. Held back are half a character and, where the tokenizer cleans up spaces, the
            last word. Empty without a tokenizer.
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


class TextPieces:
    """The text of a growing row, piece by piece: the pieces join to `whole_text` of all its tokens.

    What a piece takes does not grow with the row: each is decoded behind the tokens of the piece before it, since decoders
    treat the first token specially.

    Args:
        tokenizer: decodes the row.
        **decode_kwargs: of `tokenizer.decode`.
    """

    def __init__(self, tokenizer: Any, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.decode_kwargs = decode_kwargs
        is_cleaned = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self.is_cleaned = bool(decode_kwargs.get("clean_up_tokenization_spaces", is_cleaned))
        self.context: list[int] = []
        self.pending: list[int] = []
        self.num_told = 0  # characters of the text of both

    def add(self, tokens: Tensor, *, last: bool) -> str:
        """Text that became certain with these tokens (`n` int64)."""
        self.pending += tokens.tolist()
        text = whole_text(self.tokenizer, [*self.context, *self.pending], **self.decode_kwargs)
        certain = len(text)
        if self.is_cleaned and not last and not text.endswith("\n"):
            certain = max(text.rfind(" "), 0)  # the space goes if what follows it turns out to be "n't" or the like
        piece = text[self.num_told : certain]
        self.num_told = max(self.num_told, certain)
        if piece.strip() and certain == len(self._decode([*self.context, *self.pending])):
            self.context, self.pending = self.pending, []
            self.num_told = len(self._decode(self.context))
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, **self.decode_kwargs)


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
