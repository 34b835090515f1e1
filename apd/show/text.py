"""Decoded text with its steps marked, by colours or by bars."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.text import Text

from apd.show.rows import RowTrace, counts, follows_given
from apd.show.terminal import console
from apd.text import decoder

_COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")  # neighbours differ
_BARS = (
    "|",
    "~",
    "^",
    *map(chr, range(0x2500, 0x2800)),
)  # ASCII first; then lines and other figures: no text has them all


def describe(rows: Sequence[RowTrace], tokenizer: Any, *, colour: bool | None) -> str:
    """Counts and marked text of every row; `colour=None`: colours if standard output has them."""
    if colour is None:
        colour = console(sys.stdout).color_system is not None
    decode = decoder(tokenizer, skip_special_tokens=True)
    parts = [pieces_of(row, decode) for row in rows]
    bar = bar_for(text for of_row in parts for _, text in of_row)
    lines = [legend(colour=colour, bar=bar)] if rows else []
    for index, (row, of_row) in enumerate(zip(rows, parts, strict=True)):
        lines += [Text(f"row {index}: {counts(row)}"), mark(of_row, colour=colour, bar=bar)]
    text = Text("\n").join(lines)
    if not colour:
        return text.plain
    written = io.StringIO()
    console(written, "always").print(text, soft_wrap=True, end="")
    return written.getvalue()


def pieces_of(row: RowTrace, decode: Callable[[Sequence[int]], str]) -> list[tuple[int, str]]:
    """The pieces of a row; ` … ` stands for given tokens between two holes."""
    starts = [0, *(i for i, follows in enumerate(follows_given(row)) if follows), len(row.tokens)]
    found: list[tuple[int, str]] = []
    for start, end in itertools.pairwise(starts):
        of_hole = pieces(row.tokens[start:end], row.steps[start:end], decode)
        if found:  # the same step goes on: no bar
            step, text = found.pop()
            found.append((step, text + " … "))
            if of_hole and of_hole[0][0] == step:
                of_hole[0] = (step, found.pop()[1] + of_hole[0][1])
        found += of_hole
    return found


def pieces(
    tokens: Sequence[int], steps: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> list[tuple[int, str]]:
    """Cut the text where the committing step changes: `[(step, piece), ...]`. The pieces join to the whole text.

    A character whose bytes are spread over two steps belongs to the step that completed it.

    Args:
        tokens: n ids.
        steps: the step that committed each of them.
        decode: ids to text, without special tokens.

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


def bar_for(texts: Iterable[str]) -> str:
    """The sign that stands between two steps in plain text: a bar, or the next of `_BARS` that no text has.

    Example:
        >>> bar_for(["a | b"]), bar_for(["a", "b"])
        ('~', '|')
    """
    used = set().union(*texts)
    return next(sign for sign in _BARS if sign not in used)


def mark(parts: Iterable[tuple[int, str]], *, colour: bool, rejected: str = "", bar: str = "|") -> Text:
    """The pieces in the colours of their steps or, without colours, with a bar between the steps.

    Leading spaces of the answer are left out.

    Args:
        parts: what `pieces` returns.
        colour: colours instead of bars.
        rejected: text of a draft that was not accepted, dimmed at the end; only with colours.
        bar: the sign between two steps in plain text, from `bar_for`.

    Example:
        >>> mark([(0, "Ada, "), (1, "Ben")], colour=False).plain
        'Ada, |Ben'
    """
    parts = list(parts)
    if parts:
        parts[0] = (parts[0][0], parts[0][1].lstrip())
    if not colour:
        return Text(bar.join(text for _, text in parts))
    painted = [(text, colour_of(step)) for step, text in parts]
    return Text.assemble(*painted, (rejected, "dim"))


def colour_of(step: int) -> str:
    """The colour of a step, counted from 0; neighbours differ."""
    return _COLOURS[step % len(_COLOURS)]


def legend(*, colour: bool, bar: str = "|") -> Text:
    """A sentence that explains the marks of `mark`."""
    if not colour:
        if bar != "|":
            return Text(f"The sign {bar} separates two steps, since the text itself has a bar |.")
        return Text("A bar | separates two steps.")
    steps = Text(" ").join(Text(f"step {i + 1}", name) for i, name in enumerate(_COLOURS))
    return Text.assemble("Words are coloured by the step that committed them: ", steps, ", then from the start again.")
