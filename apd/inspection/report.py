"""`Report`: what `apd.check` found, printed as a table of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "problem", "not known"]

_WIDTHS = (19, 23, 23, 9)  # of the columns check, found, expected, verdict; two spaces between them: 80


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        check: its name, such as "mask token".
        found: what is used, or was measured.
        expected: what the files, the family's table or a law say.
        verdict: "ok", "problem", or "not known" where nothing can say.
        advice: a sentence or two: what is wrong, or not known, and what to do about it; "" where there is nothing to say.
    """

    check: str
    found: str
    expected: str
    verdict: Verdict
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.check}: found {self.found}, expected {self.expected}. {self.advice}".rstrip()


@dataclass(frozen=True)
class Report:
    """The findings of a check; `print` shows them.

    Attributes:
        subject: what was checked and with which versions, by name.
        parts: the findings, by the part of the check that made them.
        seconds: seconds that each part took.
    """

    subject: Mapping[str, str]
    parts: Mapping[str, Sequence[Finding]]
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Finding]:
        return (finding for findings in self.parts.values() for finding in findings)

    @property
    def problems(self) -> list[Finding]:
        """The findings whose verdict is "problem"."""
        return [finding for finding in self if finding.verdict == "problem"]

    def __str__(self) -> str:
        width = max(map(len, self.subject), default=0) + 2
        lines = [line for name, value in self.subject.items() for line in _wrapped(value, name.ljust(width))]
        lines += ["", *_row(("check", "found", "expected", "verdict"))]
        for part, findings in self.parts.items():
            took = f" ({self.seconds[part]:.1f} s)" if part in self.seconds else ""
            lines += ["", f"{part}{took}", *(line for each in findings for line in _row(_cells(each)))]
        lines += ["", *self._advice()]
        return "\n".join(line.rstrip() for line in lines)

    def _advice(self) -> list[str]:
        total, problems = sum(self.seconds.values()), self.problems
        counted = {0: "no problem", 1: "1 problem"}.get(len(problems), f"{len(problems)} problems")
        lines = [f"{counted} in {sum(1 for _ in self)} checks, {total:.1f} s"]
        for verdict, heading in (("problem", "What to do"), ("not known", "Not known"), ("ok", "Notes")):
            said = [each for each in self if each.verdict == verdict and each.advice]
            if said:
                lines += ["", f"{heading}:"]
                lines += [line for each in said for line in _wrapped(f"{each.check}: {each.advice}", "- ")]
        return lines

    def __repr__(self) -> str:
        return f"<Report of {sum(1 for _ in self)} checks, {len(self.problems)} problems; print it to see it>"


def _cells(finding: Finding) -> tuple[str, str, str, str]:
    return finding.check, finding.found, finding.expected, finding.verdict


def _row(cells: Sequence[str]) -> list[str]:
    """The lines of a row of the table; long cells are wrapped."""
    columns = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, _WIDTHS, strict=True)]
    height = max(map(len, columns))
    filled = [column + [""] * (height - len(column)) for column in columns]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, _WIDTHS, strict=True))
        for line in zip(*filled, strict=True)
    ]


def _wrapped(text: str, first: str) -> list[str]:
    """Text in lines of 80 columns, behind `first`."""
    return textwrap.wrap(text, 80, initial_indent=first, subsequent_indent=" " * len(first)) or [first]
