"""A trace as a bar chart of matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from apd.show.rows import RowTrace, drafted_per_step


def bars(rows: Sequence[RowTrace], ax: Any = None) -> Any:
    """Tokens committed at each step in front of those drafted, as means over all rows: a row that has ended counts 0.

    So bars never rise because a row ends, and those of the committed tokens add up to the tokens of a row.

    Args:
        ax: matplotlib axes to draw on; new ones by default.
    Returns:
        The axes.
    Raises:
        ImportError: matplotlib is missing.
    """
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("`Trace.plot()` needs matplotlib: pip install matplotlib.") from error
        ax = plt.subplots(figsize=(7, 3), layout="constrained")[1]
    drafted, committed = _means(list(map(drafted_per_step, rows))), _means([row.committed for row in rows])
    step = range(1, len(committed) + 1)
    ax.bar(step, drafted, width=0.9, color="0.85", label="drafted")
    ax.bar(step, committed, width=0.9, color="#1f77b4", label="committed")
    of_rows = "" if len(rows) == 1 else f", mean of {len(rows)} rows"
    ax.set(xlabel="step", ylabel=f"tokens{of_rows}")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))  # above, where no bar is
    return ax


def _means(rows: Sequence[Sequence[int]]) -> list[float]:
    """Per step, the mean over all rows; 0 for those that have ended."""
    return [sum(of_step) / len(rows) for of_step in zip_longest(*rows, fillvalue=0)]
