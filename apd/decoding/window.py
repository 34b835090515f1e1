"""`Window`: the masks that one decode step drafts, and the policies that determine their number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
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
        ragged: `b m` bool, False behind the row's own window; `None` if all rows have equal columns.
        starts: the first column of each row's window, host integers.
        ends: the column behind each row's window, host integers; the drafter reads no column from there on.
    """

    columns: Tensor
    ragged: Tensor | None
    starts: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of_rows(cls, state: DecodeState, ends: Sequence[int], *, width: int | None = None) -> Window:
        """The window from each row's frontier to `ends` − 1.

        Args:
            state: the rows.
            ends: the column behind each row's window, `b` host integers; up to the frontier the window is empty.
            width: m; by default the width of the widest row's window.
        """
        starts, device = state.layout.frontier, state.tokens.device
        if width is None and len(set(starts)) == len(set(ends)) == 1:
            columns = torch.arange(starts[0], max(starts[0], ends[0]), device=device).expand(len(starts), -1)
            return cls(columns, None, starts, ends)
        if width is None:
            width = max([0, *(end - start for start, end in zip(starts, ends, strict=True))])
        first, behind = to_device([starts, ends], device)[..., None].unbind()
        columns = first + torch.arange(width, device=device)
        return cls(columns % state.width, columns < behind, starts, ends)

    def first(self) -> Window:
        """The window of the first column only, `b 1`. It also ends there."""
        ragged = None if self.ragged is None else self.ragged[:, :1]
        return Window(self.columns[:, :1], ragged, self.starts, [start + 1 for start in self.starts])

    def part(self, positions: slice) -> Window:
        """The window at these positions. `ends` is unchanged, so the drafter still reads all columns."""
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
        """`where` (`b m` bool), False outside the row's window."""
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
    """Determines how many masks a step drafts. Subclasses define `ends`.

    A policy keeps no state: values that change during a call are in `DecodeState`.
    """

    def ends(self, state: DecodeState) -> Sequence[int]:
        """The column behind each row's window, `b` host integers: beyond the frontier, at most the row's end."""

    def window(self, state: DecodeState) -> Window:
        """The window of the next step, from each row's frontier to `ends`."""
        return Window.of_rows(state, self.ends(state))

    def update(self, state: DecodeState, info: StepInfo) -> DecodeState:
        """The state after a step, updated for the next window.

        Args:
            state: the rows after the step.
            info: the step.
        """
        return state


@dataclass(frozen=True)
class AllMasks(WindowPolicy):
    """A window of all remaining masks (`window_size=None`)."""

    def ends(self, state: DecodeState) -> Sequence[int]:
        return state.layout.end


@dataclass(frozen=True)
class FixedWindow(WindowPolicy):
    """A window of M masks, fewer near the row's end (`window_size=M`). Given tokens between them do not count.

    Args:
        size: M, at least 1.
    """

    size: int

    def ends(self, state: DecodeState) -> Sequence[int]:
        return state.columns_behind([self.size] * len(state.layout.frontier))


@dataclass(frozen=True)
class AutoWindow(WindowPolicy):
    """A window of twice the tokens that the row's steps commit on average (`window_size="auto"`).

    If the number of tokens that a step could commit is geometric, a window of twice its mean keeps 1 − e⁻² = 86 % of it.

    Args:
        headroom: masks per token that a step is expected to commit.
        least: masks of the narrowest window. Narrower ones save no time: the fixed cost of a step dominates.
    """

    headroom: float = 2.0
    least: int = 8

    def ends(self, state: DecodeState) -> Sequence[int]:
        return state.columns_behind(
            [max(math.ceil(self.headroom * rate), self.least) for rate in state.commit_rate.tolist()]
        )

    def update(self, state: DecodeState, info: StepInfo) -> DecodeState:
        rate = self.next_rate(state.commit_rate, info.committed.sum(1), info.window.inside.sum(1))
        return dataclasses.replace(state, commit_rate=rate)

    def next_rate(self, rate: Tensor, committed: Tensor, drafted: Tensor) -> Tensor:
        """The running mean of tokens per step, in which the last step has weight 1/2.

        Args:
            rate: `b` float32, the mean before the step.
            committed: `b` int64, tokens that the step committed.
            drafted: `b` int64, masks of its window.
        Returns:
            `b` float32.
        """
        # A fully committed window was too short: the step could have committed more, here estimated as twice as many.
        possible = torch.where(committed == drafted, 2 * drafted, committed)
        return (rate + possible) / 2


@dataclass(frozen=True)
class BlockWindow(WindowPolicy):
    """A window to the end of the frontier's block. Blocks of b tokens count from the row's first real token.

    Args:
        size: b, at least 1: the block size with which a block-causal drafter was trained.
    """

    size: int

    def ends(self, state: DecodeState) -> Sequence[int]:
        rows = zip(state.layout.padding, state.layout.frontier, state.layout.end, strict=True)
        return [min(first + ((t - first) // self.size + 1) * self.size, end) for first, t, end in rows]


@dataclass(frozen=True)
class LimitedWindow(WindowPolicy):
    """A window of another policy that ends where the drafter's attention allows at most.

    Args:
        policy: the other policy.
        most: the column behind the last that a step may draft, of each row.
    """

    policy: WindowPolicy
    most: Callable[[DecodeState], Sequence[int]]

    def ends(self, state: DecodeState) -> Sequence[int]:
        return [min(ends) for ends in zip(self.policy.ends(state), self.most(state), strict=True)]

    def update(self, state: DecodeState, info: StepInfo) -> DecodeState:
        return self.policy.update(state, info)


def check_window(window: Window, state: DecodeState, by: str) -> None:
    """Refuse a window without a mask, or one that is longer than its row: the first would never end, the second would be cut.

    Args:
        by: name of the policy, for the message.

    Raises:
        ValueError: the message names the row.
    """
    rows = zip(window.ends, state.layout.frontier, state.layout.end, state.layout.done, strict=True)
    for row, (end, frontier, last, is_done) in enumerate(rows):
        if not is_done and not frontier < end <= last:
            raise ValueError(
                f"`{by}.ends` must end each row's window behind its frontier and at most at the row's end, {frontier + 1} to {last} "
                f"in row {int(state.rows[row])}, got {end}. Use min(max(end, frontier + 1), end of the row)."
            )


def window_policy(window_size: Any) -> WindowPolicy:
    """The policy for a value of `APDConfig.window_size`: `None`, an integer, "auto" or a policy."""
    if window_size is None:
        return AllMasks()
    if isinstance(window_size, str):
        return AutoWindow()
    return window_size if hasattr(window_size, "window") else FixedWindow(int(window_size))
