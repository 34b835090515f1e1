"""How far a run is: a bar in a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from apd.cli.report import say

#: Seconds between two lines of a log.
EVERY = 60.0


def progress(total: int, of_many: str | None, *, is_hidden: bool) -> Any:
    """A bar in a terminal, else a `Log`; both have `update()` and are closed as contexts.

    Args:
        total: prompts to answer.
        of_many: which process's share is counted; `None` if there is one process.
        is_hidden: show nothing.
    """
    if is_hidden or sys.stderr.isatty():
        return tqdm(total=total, desc=of_many, unit="prompt", disable=is_hidden, dynamic_ncols=True)
    return Log(total, of_many)


class Log:
    """Says how far a run is, at most once in `EVERY` seconds.

    Args:
        total, of_many: as in `progress`.
    """

    def __init__(self, total: int, of_many: str | None) -> None:
        self.total, self.of_many, self.done = total, of_many, 0
        self.start = self.said = time.monotonic()

    def update(self) -> None:
        """Count a prompt."""
        self.done += 1
        now = time.monotonic()
        if now - self.said < EVERY or self.done == self.total:
            return
        self.said = now
        rate = self.done / (now - self.start)
        left = _duration((self.total - self.done) / rate)
        share = f"{self.of_many}: " if self.of_many else ""
        say(f"{share}{self.done} of {self.total} done, {rate:.3g} prompts/s, about {left} left")

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
