"""Consoles of `rich` that write no escape codes at all where colours are off."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console

_UNLIMITED = 100_000  # columns


def console(stream: TextIO, colour: str = "auto") -> Console:
    """A console that writes to `stream`; its `color_system` is `None` if it writes plain text.

    Lines are wrapped at words in a terminal only.

    Args:
        stream: text stream.
        colour: `"always"`, `"never"`, or `"auto"`: in a terminal with colours, unless `NO_COLOR` is set.
    """
    forced = {"always": "standard", "never": None}
    made = Console(
        file=stream,
        color_system=forced.get(colour, "auto"),  # type: ignore[arg-type]
        force_terminal=True if colour == "always" else None,
        force_jupyter=False,
        no_color=None if colour == "auto" else False,
        width=None if stream.isatty() else _UNLIMITED,
        markup=False,
        emoji=False,
        highlight=False,
    )
    return console(stream, "never") if made.no_color else made
