"""Decodes token ids, of which several may spell one character, and checks text before it is tokenized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

__all__ = ["BYTES_BEHIND", "REPLACEMENT", "TextPieces", "check_text", "decoder", "whole_text"]

#: Decoders write it for bytes that form no character, or only the beginning of one.
REPLACEMENT = "\ufffd"

#: Most tokens behind the first byte of an unfinished character, which is at most three bytes.
BYTES_BEHIND = 3


def whole_text(tokenizer: Any, ids: Sequence[int], **decode_kwargs: Any) -> str:
    """Decode tokens without an unfinished character at the end.

    Byte-level decoders write U+FFFD for that character, byte-fallback decoders for the whole run of bytes that contains
    it. So the tokens before the character are decoded.

    Args:
        tokenizer: has `decode`.
        ids: n token ids.
        **decode_kwargs: for `tokenizer.decode`.
    """
    longest = ""
    for left_out in range(min(BYTES_BEHIND + 2, len(ids) + 1)):  # the bytes, and a stop token behind them
        text: str = tokenizer.decode(list(ids[: len(ids) - left_out]), **decode_kwargs)
        longest = max(longest, text.rstrip(REPLACEMENT), key=len)
        if not text.endswith(REPLACEMENT):
            break
    return longest


def decoder(tokenizer: Any, *, skip_special_tokens: bool) -> Callable[[Sequence[int]], str]:
    """A function from ids to `whole_text`, without clean-up of spaces; without a tokenizer, it writes the ids."""
    if tokenizer is None:
        return lambda ids: "".join(f" {token}" for token in ids)
    return partial(whole_text, tokenizer, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


class TextPieces:
    """Decodes a growing row piece by piece; the pieces join to `whole_text` of all its tokens.

    A piece costs the same at any length of the row: it is decoded behind the tokens of the piece before it, because
    decoders treat the first token specially.

    Args:
        tokenizer: has `decode`.
        **decode_kwargs: for `tokenizer.decode`.
    """

    def __init__(self, tokenizer: Any, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.decode_kwargs = decode_kwargs
        is_cleaned = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self.is_cleaned = bool(decode_kwargs.get("clean_up_tokenization_spaces", is_cleaned))
        self.context: list[int] = []
        self.pending: list[int] = []
        self.num_returned = 0  # characters of the text of context and pending

    def add(self, ids: Sequence[int], *, last: bool) -> str:
        """Append token ids and return the text that became final; with `last`, no more ids follow."""
        self.pending += ids
        text = whole_text(self.tokenizer, [*self.context, *self.pending], **self.decode_kwargs)
        certain = len(text)
        if self.is_cleaned and not last and not text.endswith("\n"):
            certain = max(text.rfind(" "), 0)  # the space goes if what follows it turns out to be "n't" or the like
        piece = text[self.num_returned : certain]
        self.num_returned = max(self.num_returned, certain)
        if not last and piece.strip() and certain == len(self._decode([*self.context, *self.pending])):
            self.context, self.pending = self.pending, []
            self.num_returned = len(self._decode(self.context))
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, **self.decode_kwargs)


def check_text(text: str, what: str) -> None:
    """Check that text can be encoded in UTF-8; tokenizers raise an unrelated error otherwise.

    Args:
        what: name of the argument, for the message.
    Raises:
        ValueError: half a surrogate pair in `text`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be text that UTF-8 can write, got {text[error.start]!r} at character {error.start + 1}: half a "
            "surrogate pair, from text that was cut or read in another encoding. Read it in its own encoding, or "
            'replace such characters: text.encode("utf-8", "replace").decode().'
        ) from None
