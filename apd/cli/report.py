"""What the command line says on standard error: one sentence a line, wrapped at words in a terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Any


def say(message: object) -> None:
    """Print a message on standard error; in a terminal it is wrapped at words, in a file it is one line."""
    text = str(message)
    if sys.stderr.isatty():
        width = max(shutil.get_terminal_size().columns, 20)
        lines = text.splitlines() or [""]
        text = "\n".join(
            textwrap.fill(line, width, break_on_hyphens=False, subsequent_indent="  ") if len(line) > width else line
            for line in lines
        )
    print(text, file=sys.stderr, flush=True)


def complain(error: object, code: int) -> int:
    """Report an error as one sentence; returns the exit code."""
    say(f"apd: error: {' '.join(str(error).split())}")
    return code


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one sentence, without file and line number."""
    say(f"apd: warning: {message}")
