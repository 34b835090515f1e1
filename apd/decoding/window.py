"""`Window`: the masks that one decode step drafts, and the policies that say how many."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from apd.decoding.state import DecodeState, to_device

if TYPE_CHECKING:
    from apd.decoding.commit import StepInfo


@dataclass(frozen=True)
class Window:
    """The masks that one step drafts: m consecutive columns from each row's frontier on.

    Attributes:
        columns: `b m` int64, wrapped modulo `l` so that indices behind the row stay valid (see `inside`).
        ragged: `b m` bool, False behind the row's own window; `None` where all rows have the same columns.
        starts: per row its first column, on the host.
        ends: per row the first column that the drafter does not see, on the host.
    """

    columns: Tensor
    ragged: Tensor | None
    starts: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of_rows(cls, state: DecodeState, ends: Sequence[int], *, width: int | None = None) -> Window:
        """From each row's frontier to `ends` − 1.

        Args:
            ends: per row the column behind its window.
            width: m, where it shall be more than the widest window has.
        """
        starts, device = state.layout.frontier, state.tokens.device
        if width is None and len(set(starts)) == len(set(ends)) == 1:
            columns = torch.arange(starts[0], ends[0], device=device).expand(len(starts), -1)
            return cls(columns, None, starts, ends)
        if width is None:
            width = max(end - start for start, end in zip(starts, ends, strict=True))
        first, behind = to_device([starts, ends], device)[..., None].unbind()
        columns = first + torch.arange(width, device=device)
        return cls(columns % state.width, columns < behind, starts, ends)

    def first(self) -> Window:
        """Its first column alone, as a window that ends there."""
        ragged = None if self.ragged is None else self.ragged[:, :1]
        return Window(self.columns[:, :1], ragged, self.starts, [start + 1 for start in self.starts])

    def part(self, positions: slice) -> Window:
        """Some of its positions; the drafter still sees all of them."""
        if positions == slice(0, self.columns.shape[1]):
            return self
        starts = [start + positions.start for start in self.starts]
        ragged = None if self.ragged is None else self.ragged[:, positions]
        return Window(self.columns[:, positions], ragged, starts, self.ends)

    @property
    def inside(self) -> Tensor:
        """`b m` bool, False behind the row's own window."""
        return torch.ones_like(self.columns, dtype=torch.bool) if self.ragged is None else self.ragged

    def within(self, where: Tensor) -> Tensor:
        """`where`, `b m` bool, restricted to positions inside the row's window."""
        return where if self.ragged is None else where & self.ragged

    def gather(self, row: Tensor) -> Tensor:
        """The entries of `row` (`b l`) at the window's columns: `b m`."""
        return row.gather(1, self.columns)

    def write(self, values: Tensor, where: Tensor, row: Tensor) -> Tensor:
        """A copy of `row` (`b l`) with `values` (`b m`) at the window's columns where `where` (`b m` bool) is True."""
        return row.scatter(1, self.columns, torch.where(where, values, self.gather(row)))

    def fill(self, values: Tensor, row: Tensor) -> Tensor:
        """A copy of `row` (`b l`) with `values` (`b m`) at all of the window's columns."""
        return row.scatter(1, self.columns, values) if self.ragged is None else self.write(values, self.ragged, row)


@runtime_checkable
class WindowPolicy(Protocol):
    """Says how many masks a step drafts. Subclasses define `ends`.

    A policy holds no state of a call: what it follows is in `DecodeState`.
    """

    def ends(self, state: DecodeState) -> Sequence[int]:
        """Per row the column behind its window, on the host: beyond the frontier, at most the row's end."""

    def window(self, state: DecodeState) -> Window:
        """The window of the next step, from each row's frontier to `ends`."""
        return Window.of_rows(state, self.ends(state))

    def update(self, state: DecodeState, info: StepInfo) -> DecodeState:
        """What the policy wants remembered of a step; `state` is the one after it."""
        return state


@dataclass(frozen=True)
class AllMasks(WindowPolicy):
    """Every mask that is left (`window_size=None`)."""

    def ends(self, state: DecodeState) -> Sequence[int]:
        return state.layout.end


@dataclass(frozen=True)
class FixedWindow(WindowPolicy):
    """M masks, fewer near the row's end (`window_size=M`).

    Args:
        size: M, at least 1.
    """

    size: int

    def ends(self, state: DecodeState) -> Sequence[int]:
        return [min(t + self.size, end) for t, end in zip(state.layout.frontier, state.layout.end, strict=True)]


@dataclass(frozen=True)
class AutoWindow(WindowPolicy):
    """Twice what the row's own steps committed on average (`window_size="auto"`).

    Where the k tokens that a step could commit are geometric, a window of twice their mean keeps 1 − e⁻² = 86 % of them.

    Args:
        headroom: masks per token that a step is expected to commit.
        least: masks of the narrowest window: fewer save nothing beside what a step costs anyway.
    """

    headroom: float = 2.0
    least: int = 8

    def ends(self, state: DecodeState) -> Sequence[int]:
        sizes = [max(math.ceil(self.headroom * rate), self.least) for rate in state.commit_rate.tolist()]
        return [min(t + n, end) for t, n, end in zip(state.layout.frontier, sizes, state.layout.end, strict=True)]

    def update(self, state: DecodeState, info: StepInfo) -> DecodeState:
        rate = self.next_rate(state.commit_rate, info.committed.sum(1), info.window.inside.sum(1))
        return dataclasses.replace(state, commit_rate=rate)

    def next_rate(self, rate: Tensor, committed: Tensor, drafted: Tensor) -> Tensor:
        """The running mean of tokens per step, each step weighing as much as all before it: `b` each, float32."""
        # A window that was committed as a whole says only that it was too short.
        possible = torch.where(committed == drafted, 2 * drafted, committed)
        return (rate + possible) / 2


@dataclass(frozen=True)
class BlockWindow(WindowPolicy):
    """The rest of the frontier's block, blocks of b tokens counted from the row's first real token.

    Args:
        size: b, at least 1; the block size that a block-causal drafter was trained with.
    """

    size: int

    def ends(self, state: DecodeState) -> Sequence[int]:
        rows = zip(state.layout.padding, state.layout.frontier, state.layout.end, strict=True)
        return [min(first + ((t - first) // self.size + 1) * self.size, end) for first, t, end in rows]


def window_policy(window_size: Any) -> WindowPolicy:
    """The policy that a value of `APDConfig.window_size` stands for."""
    if window_size is None:
        return AllMasks()
    if isinstance(window_size, str):
        return AutoWindow()
    return window_size if isinstance(window_size, WindowPolicy) else FixedWindow(int(window_size))
