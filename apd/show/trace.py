"""The trace of a call: a sequence of rows, shown as text, HTML or plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from apd.show.rows import RowTrace

# Drawing modules are imported on use.


@dataclass(frozen=True, repr=False)
class Trace(Sequence[RowTrace]):
    """The decode of all rows of a call. A notebook shows it as a player, `print` as text with its steps marked.

    Args:
        rows: one `RowTrace` per row.
        tokenizer: decodes the tokens; `None` shows ids.

    Example:
        >>> print(output.trace[:1])
        row 0: 8 tokens in 3 steps, 2.7 per drafter forward
        ["|Uma", |"Ada"]
    """

    rows: Sequence[RowTrace]
    tokenizer: Any = field(default=None, compare=False)

    @overload
    def __getitem__(self, index: int) -> RowTrace: ...

    @overload
    def __getitem__(self, index: slice) -> Trace: ...

    def __getitem__(self, index: int | slice) -> RowTrace | Trace:
        return Trace(self.rows[index], self.tokenizer) if isinstance(index, slice) else self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[RowTrace]:
        return iter(self.rows)

    def __repr__(self) -> str:
        tokens, steps = sum(len(row.tokens) for row in self), sum(len(row.committed) for row in self)
        return f"<Trace of {len(self)} rows, {tokens} tokens in {steps} steps; print it to see it>"

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        from apd.show import html

        return html.player(self.rows, self.tokenizer, max_rows=html.NOTEBOOK_ROWS)

    def to_html(self, path: str | Path | None = None) -> str:
        """An HTML page that plays the decode of every row and loads nothing; also written to `path` if given."""
        from apd.show import html

        page = html.page(self.rows, self.tokenizer)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def to_text(self, colour: bool | None = None) -> str:
        """Every row's text, its steps marked by ANSI colours or by bars; `None`: colours if standard output has them."""
        from apd.show import text

        return text.describe(self.rows, self.tokenizer, colour=colour)

    def plot(self, ax: Any = None) -> Any:
        """Bars of tokens drafted and committed at each step, means over all rows; returns matplotlib's axes.

        Raises:
            ImportError: matplotlib is missing.
        """
        from apd.show import plot

        return plot.bars(self.rows, ax)
