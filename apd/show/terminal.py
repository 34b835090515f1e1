"""Decoded text with its steps made visible: colours in a terminal, bars in plain text. Pure functions, no output."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

__all__ = ["Decode", "align", "legend", "mark", "pieces", "wants_colour"]

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""

_COLOURS = ("36", "33", "35", "32", "34", "31")  # cyan, yellow, magenta, green, blue, red; neighbours differ
_DIM = "2"


def wants_colour(stream: TextIO, choice: str = "auto") -> bool:
    """Whether ANSI colours belong in `stream`: a terminal that knows them, and the user did not set `NO_COLOR`.

    Args:
        stream: where the text goes.
        choice: `"always"` and `"never"` settle it, `"auto"` looks at the stream and the environment.
    """
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb")


def pieces(tokens: Sequence[int], steps: Sequence[int], decode: Decode) -> list[tuple[int, str]]:
    """The text, cut where the committing step changes: `[(step, piece), ...]`; the pieces join to the whole text.

    A character whose bytes are spread over two steps belongs to the step that completed it.

    Example:
        >>> pieces([1, 2, 3], [0, 0, 1], lambda ids: "".join("abc"[i - 1] for i in ids))
        [(0, 'ab'), (1, 'c')]
    """
    cuts = [i for i in range(1, len(tokens)) if steps[i] != steps[i - 1]] + [len(tokens)]
    result, shown = [], ""
    for cut in cuts:
        text = decode(tokens[:cut])
        if cut < len(tokens):
            text = text.rstrip("\ufffd")  # an unfinished character
        if len(text) > len(shown):
            result.append((steps[cut - 1], text[len(shown) :]))
            shown = text
    return result


def mark(parts: Iterable[tuple[int, str]], *, colour: bool, rejected: str = "") -> str:
    """One line: every step's piece in its colour, or, without colours, a bar between the steps.

    The space before an answer's first word is left out.

    Args:
        parts: what `pieces` returns.
        colour: whether to write ANSI codes.
        rejected: text of a draft that was not accepted, shown dimmed behind the rest; only with colours.

    Example:
        >>> mark([(0, "Ada, "), (1, "Ben")], colour=False)
        'Ada, |Ben'
    """
    parts = list(parts)
    if parts:
        parts[0] = (parts[0][0], parts[0][1].lstrip())
    if not colour:
        return "|".join(text for _, text in parts)
    painted = [_paint(text, _COLOURS[step % len(_COLOURS)]) for step, text in parts]
    return "".join(painted) + (_paint(rejected, _DIM) if rejected else "")


def legend(*, colour: bool) -> str:
    """How to read what `mark` writes."""
    if not colour:
        return "A bar | stands where one step ends and the next begins."
    steps = " ".join(_paint(f"step {i + 1}", code) for i, code in enumerate(_COLOURS))
    return f"Words are coloured by the step that committed them: {steps}, then again from the start."


def align(rows: Sequence[Sequence[str]], *, header: int = 1) -> str:
    """Rows as a text table: first column to the left, the others to the right, a rule under the header rows.

    Example:
        >>> print(align([["task", "tokens"], ["sort", "9"]]))
        task  tokens
        ----  ------
        sort       9
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))
    lines.insert(header, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"
