"""`Attention`: how far a column sees, which columns a pass recomputes, and where a canvas and a window end.

Everything follows from one number per column, its *horizon*: the last key that it sees. Notation: p is a row's left
padding, t its frontier, B the block length; a canvas ends before column e.

| kind | horizon of column c | first column to recompute, t′ being the last frontier | a window ends at most at |
|---|---|---|---|
| full | e − 1 | p, or t′ − W + 1 with stale keys (`kv_window`) | the row's end |
| causal | c | t′ | t + B, if B is given |
| prefix | c before the seed s; e − 1 from it on | the seed of t′ | s + B |
| block | the end of its block | the start of the block of t′ | the end of the block of t |

Only in a full model do keys of committed tokens depend on what comes later. In the others they are final once their
block is decided, so a cache is exact. Blocks of a block-causal model count from the row's first real token, prompt included.

The seed of a prefix model is its last decided token, t − 1: the canvas slides with the frontier. If the model is anchored, it
is the first column of the block that t is in, counted from the end of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, where

from apd.config import check_count

Kind = Literal["full", "causal", "prefix", "block"]


@dataclass(frozen=True)
class Attention:
    """Which keys a column sees.

    Args:
        kind: "full": all of the canvas. "causal": those up to its own. "block": its block and earlier ones. "prefix": columns
            before the seed see those up to their own, the seed and the columns behind it see all.
        block_size: B, in tokens. Needed for "block". For "causal" and "prefix" the number of tokens that the model was trained
            to draft at once, `None` for no limit.
        anchored: "prefix" only: the seed stays at the start of a block, which needs a block size, until the block is decided.

    Raises:
        ValueError: an unknown kind; a block size with "full", or none with "block" or `anchored`; `anchored` without "prefix".
        TypeError: the block size is not a whole number.
    """

    kind: Kind = "full"
    block_size: int | None = None
    anchored: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"`attention` must be one of {', '.join(map(repr, get_args(Kind)))}, got {self.kind!r}.")
        remedy = "Give the length of the blocks that the model was trained with"
        if self.anchored and self.kind != "prefix":
            raise ValueError(
                f"`anchored` must be False with attention={self.kind!r}, got True: only a prefix has a seed."
            )
        if (self.kind == "block" or self.anchored) and self.block_size is None:
            raise ValueError(f"`block_size` must be given with attention={self.kind!r}, got None. {remedy}.")
        if self.kind == "full" and self.block_size is not None:
            raise ValueError(
                f"`block_size` must be None with attention='full', got {self.block_size!r}: every column sees all others. "
                "Use attention='block', or the strategy `Blocks` to decode block by block."
            )
        check_count("block_size", self.block_size, remedy, or_none=True)

    @property
    def is_final(self) -> bool:
        """True if the keys of committed tokens do not depend on what comes later, so that a cache is exact."""
        return self.kind != "full"

    @property
    def margin(self) -> int:
        """Columns that a canvas may have behind the row's end: the last block is always whole."""
        return (self.block_size or 1) - 1 if self.kind == "block" else 0

    def horizon(self, columns: Tensor, paddings: Tensor | int, ends: Tensor | int, seeds: Tensor | None) -> Tensor:
        """The last key that each column sees: int64, of the shape of `columns`.

        Args:
            columns: `… q` int64.
            paddings, ends: of the rows, broadcast against `columns`.
            seeds: "prefix" only: the first column that sees all of the canvas; `None`: no column does.
        """
        if self.kind == "block":
            assert self.block_size is not None
            return paddings + ((columns - paddings) // self.block_size + 1) * self.block_size - 1
        if self.kind == "prefix" and seeds is not None:
            return where(columns < seeds, columns, ends - 1)
        return columns if self.kind != "full" else columns * 0 + ends - 1

    def seed(self, frontier: int, padding: int, prompt_end: int) -> int:
        """The first column that sees all of the canvas, in a "prefix" model."""
        if not self.anchored:
            return max(frontier - 1, padding)
        return self._block_start(frontier, prompt_end)

    def first_changing(self, frontier: int, padding: int, prompt_end: int) -> int:
        """The first column whose keys may change after a pass at this frontier. Not for "full"."""
        if self.kind == "block":
            return self._block_start(frontier, padding)
        return self.seed(frontier, padding, prompt_end) if self.kind == "prefix" else frontier

    def canvas_end(self, frontier: int, window_end: int, padding: int, shift: int) -> int:
        """The column behind the canvas of a window.

        Args:
            shift: the model's logit shift. At 1 nobody reads the last mask of a causal or prefix canvas, and training showed none
                there.
        """
        if self.kind == "block":
            return max(window_end, self._block_start(frontier, padding) + (self.block_size or 0))
        return window_end if self.kind == "full" else max(window_end - shift, frontier)

    def window_end(self, frontier: int, padding: int, prompt_end: int, shift: int) -> int | None:
        """The column behind the last that a step may draft; `None` for no limit."""
        if self.block_size is None:
            return None
        if self.kind == "block":
            return self._block_start(frontier, padding) + self.block_size
        if self.anchored:
            return self._block_start(frontier, prompt_end) + self.block_size
        return frontier + self.block_size - (1 - shift if self.kind == "prefix" else 0)

    def _block_start(self, frontier: int, origin: int) -> int:
        assert self.block_size is not None
        return origin + (frontier - origin) // self.block_size * self.block_size


FULL, CAUSAL = Attention("full"), Attention("causal")
