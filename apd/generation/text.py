"""Tokens and text: characters that several tokens spell, and text that no tokenizer takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: What decoders write for bytes that are no character, or not yet one.
REPLACEMENT = "\ufffd"

#: Tokens that can stand behind the first byte of a character that is not whole: at most three bytes are.
BYTES_BEHIND = 3


def whole_text(tokenizer: Any, ids: Sequence[int], **decode_kwargs: Any) -> str:
    """The text of tokens, without a character at its end that lacks bytes.

    Byte-level decoders write U+FFFD for such a character alone, byte-fallback decoders for all bytes of the run in which
    it stands, whole characters included. So the text is that of the tokens before the character.

    Args:
        tokenizer: asked to `decode`.
        ids: n token ids.
        **decode_kwargs: of `tokenizer.decode`.
    """
    longest = ""
    for left_out in range(min(BYTES_BEHIND + 2, len(ids) + 1)):  # the bytes, and a stop token behind them
        text: str = tokenizer.decode(list(ids[: len(ids) - left_out]), **decode_kwargs)
        longest = max(longest, text.rstrip(REPLACEMENT), key=len)
        if not text.endswith(REPLACEMENT):
            break
    return longest


def check_text(text: str, what: str) -> None:
    """Refuse text that cannot be written in UTF-8, which tokenizers answer with an error about something else.

    Args:
        what: the argument, as the message names it.
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
