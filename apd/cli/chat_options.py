"""Declares the options of `apd chat`."""

from __future__ import annotations

import argparse
from typing import Any

from apd.cli.options import add_colour, add_knobs, add_models, add_sampling

_DESCRIPTION = """\
A conversation: type a line, watch the answer grow, type the next. A line that ends in a backslash goes on in
the next one. Ctrl-C stops an answer and keeps the conversation, Ctrl-D or /quit ends it. Lines may come through
a pipe, too: answers go to standard output, everything else to standard error.

Lines that begin with / are commands: /R 0.5, /tau, /window and every other knob by letter or name, /strategy,
/temperature, /max-new-tokens, /seed, /system, /reset, /save, /help. Without a value a command says what is set.

Without a chat template, as with the included pair, every line is a prompt of its own."""


def add_chat(commands: Any, formatter: Any) -> argparse.ArgumentParser:
    """Add the command `chat` and return its parser."""
    chat: argparse.ArgumentParser = commands.add_parser(
        "chat",
        usage="apd chat [--drafter PATH --verifier PATH] [options]",
        help="a conversation that streams, with the knobs at hand",
        description=_DESCRIPTION,
        formatter_class=formatter,
    )
    how = chat.add_argument_group("conversation")
    how.add_argument("--system", metavar="TEXT", help="the system message; needs a chat template")
    how.add_argument("--show-steps", action="store_true", help="colour the words by the step that committed them")
    add_colour(how)
    add_models(chat)
    add_knobs(chat)
    add_sampling(
        chat,
        new_tokens=None,
        told="limit per answer (default: as the drafter's generation_config.json says, 32 of the included pair; else 256)",
    )
    chat.set_defaults(prompt=None, input=None, output=None, batch_size=1)
    return chat
