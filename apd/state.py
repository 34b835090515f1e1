"""What a decode step starts from and what it leaves: `DecodeState`, `Window`, `Proposal`, `Stopping`, and `commit`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from apd.config import WindowSize


class Later(Sequence[int]):
    """Integers that the host need not know yet: it finds them when it first looks at one, and may have to wait."""

    def __init__(self, find: Callable[[], Sequence[int]]) -> None:
        self.find = find

    @cached_property
    def found(self) -> Sequence[int]:
        return self.find()

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[int]:
        return iter(self.found)

    def __getitem__(self, index: Any) -> Any:
        return self.found[index]


class Layout(NamedTuple):
    """Where the rows of a state stand, `b` integers each; see `DecodeState`."""

    padding: Sequence[int]
    frontier: Sequence[int]
    end: Sequence[int]
    done: Sequence[int]
    decided: Sequence[int]  # number of columns


@dataclass(frozen=True)
class DecodeState:
    """The rows that are still being decoded. A ragged batch is the normal case: every row has its own frontier.

    Attributes:
        tokens: `b l` int64, padding, prompt and committed ids; the mask id where nothing is committed.
        decided: `b l` bool, False where a token is still to come. Padding, prompt and what is behind `end` are decided.
        frontier: `b` int64, the first column that is not committed yet, `end` where all are. What is left of it never
            changes again. Who replaces `decided` moves it too.
        done: `b` bool, nothing is left to decode: all decided, or a stop token with all before it decided, or a model
            gave no distribution where one was needed.
        padding: `b` int64, columns of left padding.
        start: `b` int64, the column behind the prompt.
        end: `b` int64, the column behind the last token that may be generated.
        seeds: `b` int64, the row seeds.
        steps: `b` int64, steps made so far.
        rows: `b` int64, which row of the call this is.
        pace: `b` float32, tokens that a step of this row commits, a running estimate (see `next_pace`).
    """

    tokens: Tensor
    decided: Tensor
    frontier: Tensor
    done: Tensor
    padding: Tensor
    start: Tensor
    end: Tensor
    seeds: Tensor
    steps: Tensor
    rows: Tensor
    pace: Tensor

    @cached_property
    def layout(self) -> Layout:
        """Where the rows stand, on the host. A step waits for the device here, and else only for what is rare."""
        numbers = [self.padding, self.frontier, self.end, self.done.long(), self.decided.sum(1)]
        return Layout(*torch.stack(numbers).tolist())

    def send_layout(self, before: Layout) -> None:
        """Have the layout sent now, so that whoever looks at it later does not wait for what the device is given since.

        Args:
            before: that of the same rows a step ago.
        """
        numbers = cache(sent(torch.stack([self.frontier, self.done.long(), self.decided.sum(1)])))
        frontier, done = Later(lambda: numbers()[0]), Later(lambda: numbers()[1])
        decided = Later(lambda: numbers()[2])
        vars(self)["layout"] = Layout(before.padding, frontier, before.end, done, decided)

    @property
    def width(self) -> int:
        """Columns of the batch, l."""
        return self.tokens.shape[1]

    def between(self, start: Tensor, end: Tensor) -> Tensor:
        """Which columns are `start … end − 1` of their row, `b` int64 each: `b l` bool."""
        column = torch.arange(self.width, device=self.tokens.device)
        return (column >= start[:, None]) & (column < end[:, None])

    @property
    def num_new_tokens(self) -> Tensor:
        """Tokens committed so far, the stop token included: `b` int64."""
        return (self.decided & self.between(self.start, self.end)).sum(1)

    def select(self, rows: Tensor) -> DecodeState:
        """Only the rows at these indices (`n` int64), in that order."""
        chosen: dict[str, Any] = {
            field.name: value.index_select(0, rows)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **chosen)

    def narrowed(self) -> DecodeState:
        """Without the columns that are behind the end of every row."""
        width = max(self.layout.end, default=0)
        tokens, decided = (of[:, :width].contiguous() for of in (self.tokens, self.decided))
        return dataclasses.replace(self, tokens=tokens, decided=decided)


def to_device(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """As a tensor; the device is not waited for."""
    # CUDA may wait for the stream before it copies what is not pinned. In a graph it is a constant.
    pins = device.type == "cuda" and not torch.compiler.is_compiling()
    return torch.tensor(values, device="cpu", pin_memory=pins).to(device, non_blocking=True)


def sent(values: Tensor) -> Callable[[], Any]:
    """Copy to the host what the device has made of `values` so far; the result waits for the copy and gives numbers."""
    if not values.is_cuda:
        return values.tolist
    copy, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))  # by default that of the current device

    def numbers() -> Any:
        arrived.synchronize()
        return copy.tolist()

    return numbers


#: Columns of a compiled pass, or of a window around it, are rounded up to a multiple of this.
COLUMNS = 64


def round_up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step


def counted(starts: Tensor, ends: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`width` columns from each start on, `b 1` → `b q` int64, and which of them are before the end, bool."""
    columns = starts + torch.arange(width, device=starts.device)
    return columns, columns < ends


class FollowsRows(Protocol):
    """What is remembered of rows for the length of one call, and follows them as they come and go."""

    def select(self, rows: Tensor) -> None:
        """Forget all rows but these (`n` int64); the next state has only them, and maybe fewer columns on the right."""

    def join(self, state: DecodeState) -> None:
        """Make room: the next state is this one, its first rows those of the last, the others new, columns maybe more."""


@dataclass(frozen=True)
class Reach:
    """What the host knows of a step's windows before it knows where the step before it has left the rows.

    Attributes:
        nearest, furthest: per row, the least and the most that the window's end can be.
        width: at least as many masks as any window has.
    """

    nearest: list[int]
    furthest: list[int]
    width: int

    @classmethod
    def of(cls, before: Layout, window_size: int | None) -> Reach:
        """A step that starts at `before`, with no row done, moves each frontier by a window at most."""
        size = max(before.end) if window_size is None else window_size
        nearest, furthest = (
            [min(t + by, end) for t, end in zip(before.frontier, before.end, strict=True)] for by in (size, 2 * size)
        )
        width = max(end - t for t, end in zip(before.frontier, nearest, strict=True))
        return cls(nearest, furthest, width)


@runtime_checkable
class GoesAhead(Protocol):
    """A model's session that takes windows whose place in the rows the host does not know yet, from `Window.ahead`."""

    def fits(self, reach: Reach) -> bool:
        """Whether such a window costs what it would if its place were known, and nothing has to be asked of the host."""


#: The first window of `window_size="auto"` has HEADROOM · FIRST_PACE masks, the narrowest LOWEST. Where the k tokens that
#: a step could commit are geometric, a window of twice their mean keeps 1 − e⁻² = 86 % of them, for at most two masks and
#: a bit per token; fewer than LOWEST masks save nothing beside what a step costs anyway.
FIRST_PACE, HEADROOM, LOWEST = 8.0, 2.0, 8


def next_pace(pace: Tensor, num_committed: Tensor, num_drafted: Tensor) -> Tensor:
    """The mean of what a row has committed per step, each step weighing as much as all before it: `b` float32."""
    # Of a window that was committed as a whole nobody knows how long it should have been.
    could = torch.where(num_committed == num_drafted, 2 * num_drafted, num_committed)
    return (pace + could) / 2


class Logits(Protocol):
    """Raw logits of a window's positions, `b m v`, that may be computed when they are asked for: `logits[:, 3:7]`.

    What it gives may be written to.
    """

    def __getitem__(self, index: tuple[slice, slice], /) -> Tensor: ...


@dataclass(frozen=True)
class Window:
    """The masks that one step drafts: m columns from each row's frontier on.

    Attributes:
        columns: `b m` int64, one after another; behind the last of a row comes its first.
        ragged: `b m` bool, False past the row's window (rows near their end have fewer masks than others); `None` where
            all rows have the same columns.
        starts: per row its first column, on the host.
        ends: per row the first column that the drafter does not see, on the host.
        reach: of a window that is made before the host knows where the rows stand, what it knows instead.
    """

    columns: Tensor
    ragged: Tensor | None
    starts: Sequence[int]
    ends: Sequence[int]
    reach: Reach | None = None

    @classmethod
    def at_frontier(cls, state: DecodeState, window_size: WindowSize, *, is_fixed: bool = False) -> Window:
        """m columns from the frontier of each row: M, all that are left, or with "auto" as its own pace suggests.

        Args:
            is_fixed: fill up to a multiple of 64 or to M, whichever is less, so that shapes are few.
        """
        starts, ends, device = state.layout.frontier, state.layout.end, state.tokens.device
        if window_size is not None:
            if window_size == "auto":
                sizes = [max(math.ceil(HEADROOM * pace), LOWEST) for pace in state.pace.tolist()]
            else:
                sizes = [window_size] * len(starts)
            ends = [min(start + size, end) for start, size, end in zip(starts, sizes, ends, strict=True)]
        if not is_fixed and len(set(starts)) == len(set(ends)) == 1:
            columns = torch.arange(starts[0], ends[0], device=device).expand(len(starts), -1)
            return cls(columns, None, starts, ends)
        width = max(end - start for start, end in zip(starts, ends, strict=True))
        if is_fixed:
            most = state.width if window_size is None or window_size == "auto" else min(window_size, state.width)
            width = min(round_up(width, COLUMNS), most)
        first, behind = to_device([starts, ends], device)[..., None].unbind()
        columns, inside = counted(first, behind, width)
        return cls(columns % state.width, inside, starts, ends)

    @classmethod
    def ahead(cls, state: DecodeState, window_size: int | None, reach: Reach) -> Window:
        """The same, filled up, before the host knows where the rows stand; empty in those that are done."""
        size = state.width if window_size is None else window_size
        behind = torch.where(state.done, state.frontier, torch.minimum(state.frontier + size, state.end))
        width = min(round_up(reach.width, COLUMNS), size, state.width)
        columns, inside = counted(state.frontier[:, None], behind[:, None], width)

        def ends() -> list[int]:
            of_rows = zip(*state.layout, strict=True)
            return [t if is_done else min(t + size, end) for _, t, end, is_done, _ in of_rows]

        return cls(columns % state.width, inside, state.layout.frontier, Later(ends), reach)

    def part(self, positions: slice) -> Window:
        """Only some of its masks; what the drafter sees stays the same."""
        if positions == slice(0, self.columns.shape[1]):
            return self
        starts = Later(lambda: [start + positions.start for start in self.starts])
        ragged = None if self.ragged is None else self.ragged[:, positions]
        return Window(self.columns[:, positions], ragged, starts, self.ends)

    @property
    def inside(self) -> Tensor:
        """`b m` bool, False past the row's window."""
        return torch.ones_like(self.columns, dtype=torch.bool) if self.ragged is None else self.ragged

    def within(self, where: Tensor) -> Tensor:
        """Which of these positions, `b m` bool, are inside."""
        return where if self.ragged is None else where & self.ragged

    def of(self, row: Tensor) -> Tensor:
        """What `row` (`b l`) holds at the window's columns: `b m`."""
        return row.gather(1, self.columns)

    def place(self, values: Tensor, where: Tensor, row: Tensor) -> Tensor:
        """`row` (`b l`) with `values` (`b m`) written at the window's columns where `where` (`b m` bool) is True."""
        return row.scatter(1, self.columns, torch.where(where, values, self.of(row)))

    def fill(self, values: Tensor, row: Tensor) -> Tensor:
        """`row` (`b l`) with `values` (`b m`) written at all of the window's columns."""
        return row.scatter(1, self.columns, values) if self.ragged is None else self.place(values, self.ragged, row)


@dataclass(frozen=True)
class Proposal:
    """What a strategy wants committed in one step, and the evidence for it.

    Attributes:
        tokens: `b m` int64, the token for each column of the window that is chosen or decisive.
        chosen: `b m` bool, which of them to commit.
        decisive: `b m` bool, the positions that decided this step; there must have been a distribution there.
        best: `b m` float32 each, the best score of the draft, and of the target where that is another; see `Picked`.
        draft: `b m` int64, what was drafted; fewer columns where fewer were.
        models: n names: `"target"` always, `"drafter"` and `"verifier"` where they ran.
        probs: `b m n` float32, where the caller keeps them: by each of `models` the untempered probability of `tokens`.
        logits: `b m v` float32, likewise: log p_D at position 0, which decides there, and log p_T
            behind it, before temperature and truncation.
        scores: `b m v` float32, the same after them.
    """

    tokens: Tensor
    chosen: Tensor
    decisive: Tensor
    best: tuple[Tensor, ...]
    draft: Tensor
    models: tuple[str, ...]
    probs: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class StepInfo:
    """Diagnostics of one step; nothing in it is needed to go on.

    Attributes:
        before: the rows that made this step, as they were.
        window: what was drafted where.
        proposal: the strategy's proposal.
        committed: `b m` bool, what was committed: the proposal up to the first stop token.
        stopped: `b` bool, the rows that a stop token or a stopping criterion ended.
        broken: `b` bool, the rows where there was no distribution where one was needed.
    """

    before: DecodeState
    window: Window
    proposal: Proposal
    committed: Tensor
    stopped: Tensor
    broken: Tensor


@dataclass(frozen=True)
class Stopping:
    """When a row is over before its masks are.

    Attributes:
        token_ids: `s` int64, the stop tokens.
        criteria: transformers' stopping criteria, asked at every single token; they see the row without padding.
    """

    token_ids: Tensor
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)

    def of(self, before: DecodeState, tokens: Tensor, settled: Tensor) -> Tensor:
        """Which tokens end their row: `b m` bool.

        Args:
            before: the rows as they were.
            tokens: `b m` int64, what stands now from the frontier on.
            settled: `b m` bool, what of it became settled.
        """
        stops = torch.isin(tokens, self.token_ids) & settled
        if len(self.criteria) > 0:  # torch.compile took any list of transformers' for true, up to torch 2.11 at least
            for row, position in settled.nonzero().tolist():
                ids = before.tokens[row, before.padding[row] : before.frontier[row]]
                ids = torch.cat([ids, tokens[row, : position + 1]])
                # Once it has stopped a row asks no more: a criterion may count its calls.
                if not stops[row, : position + 1].any() and bool(self.criteria(ids[None], None)):
                    stops[row, position] = True
        return stops


def commit(
    state: DecodeState, window: Window, proposal: Proposal, *, stopping: Stopping, mask_token_id: int
) -> tuple[DecodeState, StepInfo]:
    """Write the chosen tokens, cut every row behind its first stop token, and see which rows are done.

    A stop token ends its row once everything before it is decided; whatever stands behind it is taken back, so that
    it is never counted, streamed or returned.
    """
    # Whatever is decided right of the frontier is in the window, since windows only move to the right.
    chosen = window.within(proposal.chosen)
    tokens = torch.where(chosen, proposal.tokens, window.of(state.tokens))
    decided = chosen | window.of(state.decided)
    settled = (~window.within(decided)).cumsum(1) == 0
    stops = stopping.of(state, tokens, settled)
    stopped = stops.any(1)
    stands = stops.cumsum(1) <= stops  # up to the first stop token
    frontier = state.frontier + (settled & stands).sum(1)
    first, *others = (of - of for of in proposal.best)  # ∞ − ∞ is not 0, nor is NaN − NaN
    broken = ((sum(others, first) != 0) & proposal.decisive).any(1)
    after = dataclasses.replace(
        state,
        tokens=window.fill(torch.where(stands, tokens, mask_token_id), state.tokens),
        decided=window.fill(decided & stands, state.decided),
        frontier=frontier,
        done=stopped | (frontier == state.end) | broken,
        steps=state.steps + 1,
    )
    return after, StepInfo(state, window, proposal, chosen & stands, stopped, broken)
