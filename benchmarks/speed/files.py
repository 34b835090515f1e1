"""CSV tables that are written row by row, and figures."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apd.extras import install

__all__ = ["Csv", "picture"]


class Csv:
    """A table on disk; each row is flushed as it is added.

    Args:
        path: overwritten; its directory is made.
        columns: the header.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(columns)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; floats get five digits."""
        cells = [row[column] for column in self.columns]
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(
                [f"{cell:.5g}" if isinstance(cell, float) else cell for cell in cells]
            )


def picture(width: float, height: float) -> Any:
    """An empty figure that needs no display.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}. The plots are an extra: {install('bench')}.") from error
    return Figure(figsize=(width, height), layout="constrained")
