"""The bytes of single tokens: for log-probabilities, and for grammars."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Spelling:
    """What each token of a tokenizer adds to a text.

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, bytes] = {}

    @cached_property
    def is_byte_level(self) -> bool:
        """True if every token is written in the alphabet that stands for bytes."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend is not None and "ByteLevel" in repr(backend.decoder)

    @cached_property
    def joins(self) -> bool:
        """True if a text is its tokens' strings, one behind the other."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend is not None and (backend.decoder is None or repr(backend.decoder).startswith("Fuse"))

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return {letter: byte for byte, letter in bytes_to_unicode().items()}

    @cached_property
    def _added(self) -> set[int]:
        return set(getattr(self.tokenizer, "added_tokens_decoder", {}))

    def spelled(self, token: int) -> bytes:
        """The bytes of a token; those of a special token's name, if it is one."""
        if token not in self.known:
            self.known[token] = self._bytes(token)
        return self.known[token]

    def _bytes(self, token: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._added:
            return str(piece).encode()
        if match := _BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if self.is_byte_level and all(letter in self._alphabet for letter in piece):
            return bytes(self._alphabet[letter] for letter in piece)
        if piece.startswith("▁"):
            return str(piece).replace("▁", " ").encode()
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()

    def text(self, token: int) -> str:
        r"""The token as text; bytes that are no whole character are written \x…, as OpenAI's server does."""
        spelled = self.spelled(token)
        try:
            text = spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
        return text
