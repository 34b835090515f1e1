"""`Shown`: a streamer that writes an answer on standard output as it grows, wrapped at words in a terminal."""

from __future__ import annotations

import re
import shutil
import sys
from typing import Any

from rich.text import Text
from torch import Tensor

from apd.show.terminal import console
from apd.show.text import colour_of
from apd.text import TextPieces


class Shown:
    """Writes the text of committed tokens, step by step. In a terminal a word is written once it is whole.

    Args:
        tokenizer: decodes the tokens.
        colour: colours of the steps: `"auto"`, `"always"` or `"never"`; `None` writes plain text.

    Attributes:
        text: what has been written.
    """

    def __init__(self, tokenizer: Any, colour: str | None = None) -> None:
        self.pieces = TextPieces(tokenizer, skip_special_tokens=True)
        self.console = console(sys.stdout, colour or "never")
        self.colours = colour is not None and self.console.color_system is not None
        self.width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        self.text, self.word, self.column, self.step = "", Text(), 0, -1

    def put(self, ids: Tensor) -> None:
        """Take the tokens that a step committed; the first call brings the prompt."""
        if self.step >= 0:
            self._add(self.pieces.add(ids.flatten().tolist(), last=False))
        self.step += 1

    def end(self) -> None:
        """Write what is still held back, and end the line."""
        self._add(self.pieces.add([], last=True))
        self._write(self.word)
        self.word = Text()
        self.console.print()
        self.console.file.flush()

    def _add(self, piece: str) -> None:
        if not self.text:
            piece = piece.lstrip()
        self.text += piece
        style = colour_of(self.step - 1) if self.colours else ""
        if self.width is None:
            self._write(Text(piece, style))
        else:
            for part in re.split(r"(\s)", piece):
                if part.isspace():
                    self._write(self.word)
                    self._space(part)
                    self.word = Text()
                else:
                    self.word.append(part, style)
        self.console.file.flush()

    def _write(self, text: Text) -> None:
        if not text.plain:
            return
        if self.width is not None and self.column + text.cell_len > self.width and self.column:
            self.console.print()
            self.column = 0
        self.console.print(text, end="", soft_wrap=True)
        self.column += text.cell_len

    def _space(self, space: str) -> None:
        assert self.width is not None
        if space == "\n":
            self.console.print()
            self.column = 0
        elif self.column < self.width - 1:
            self.console.print(Text(space), end="", soft_wrap=True)
            self.column += 1
