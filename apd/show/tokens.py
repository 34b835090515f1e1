"""The texts of single tokens, in their context and out of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from apd.show.rows import RowTrace
from apd.text import TextPieces, decoder


def speller(tokenizer: Any, anchor: int | None) -> Callable[[int], str]:
    """Spells one token out of context, with the space before it; `anchor` is any token that may precede it."""
    decode = decoder(tokenizer, skip_special_tokens=False)
    before = [] if anchor is None else [anchor]
    num_before = len(decode(before))
    return lru_cache(maxsize=None)(lambda token: decode([*before, token])[num_before:])


def token_texts(row: RowTrace, tokenizer: Any) -> list[str]:
    """The text of each token; empty if the token only begins a character."""
    if tokenizer is None:
        return [f" {token}" for token in row.tokens]
    pieces = TextPieces(tokenizer, clean_up_tokenization_spaces=False)
    pieces.add(row.prompt, last=False)
    return [pieces.add([token], last=False) for token in row.tokens]
