"""`DecodeState`: the rows of a batch between two decode steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

#: Kinds of columns, see `DecodeState.kinds`.
PADDING, GIVEN, DECIDED, UNDECIDED = range(4)

#: Initial `commit_rate` of a row, in tokens per step.
FIRST_COMMIT_RATE = 8.0


class Layout(NamedTuple):
    """Host copies of per-row fields of a `DecodeState`, `b` integers each; `decided` is a number of columns."""

    padding: Sequence[int]
    frontier: Sequence[int]
    end: Sequence[int]
    done: Sequence[int]
    decided: Sequence[int]
    prompt_end: Sequence[int]
    given_end: Sequence[int]


@dataclass(frozen=True)
class DecodeState:
    """The rows of a batch between two decode steps. Each row has its own frontier; batches are ragged in general.

    Invariant: `frontier` is the first undecided column. Code that changes `decided` must update it (`with_decided`).

    A prompt may have masks of its own, its holes; the tokens behind them are given, too.

    Attributes:
        tokens: `b l` int64: padding, prompt and committed ids; the mask id in undecided columns.
        decided: `b l` bool: True for columns whose token is known: padding, given and committed columns, and columns
            behind `end`.
        given: `b l` bool: columns whose token comes from the caller and never changes.
        frontier: `b` int64: the first undecided column, or `end` if there is none. Columns left of it are final.
        done: `b` bool: the row is finished: all columns, or all up to a stop token, are decided, or a model gave an
            invalid distribution at a decisive position.
        padding: `b` int64: columns of left padding.
        prompt_end: `b` int64: the column behind the prompt.
        given_end: `b` int64: the column behind the last given one; masks before it are holes.
        end: `b` int64: the column behind the last that may be generated.
        seeds: `b` int64: the row seeds.
        steps: `b` int64: decode steps made so far.
        rows: `b` int64: the number of each row within the call.
        commit_rate: `b` float32: running estimate of the tokens that a step of this row commits (`AutoWindow`).
    """

    tokens: Tensor
    decided: Tensor
    given: Tensor
    frontier: Tensor
    done: Tensor
    padding: Tensor
    prompt_end: Tensor
    given_end: Tensor
    end: Tensor
    seeds: Tensor
    steps: Tensor
    rows: Tensor
    commit_rate: Tensor

    @classmethod
    def start(
        cls,
        prompt: Tensor,
        *,
        max_new_tokens: int,
        mask_token_id: int,
        padding: Tensor | None = None,
        seeds: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> DecodeState:
        """Rows before their first step: the prompt, then `max_new_tokens` masks.

        Args:
            prompt: `b l` int64, padded on the left; masks in it are holes.
            max_new_tokens: number of masks behind each prompt.
            mask_token_id: the drafter's mask token.
            padding: `b` int64; no padding if not given.
            seeds: `b` int64; zeros if not given.
            rows: `b` int64, numbers of the rows; 0, 1, … if not given.
        """
        zeros = torch.zeros(len(prompt), dtype=torch.int64, device=prompt.device)
        padding = zeros.clone() if padding is None else padding
        tokens = pad(prompt, (0, max_new_tokens), value=mask_token_id)
        prompt_end = torch.full_like(zeros, prompt.shape[1])
        columns = torch.arange(tokens.shape[1], device=prompt.device)
        is_real = columns >= padding[:, None]
        decided = (columns < prompt.shape[1]) & ~(is_real & (tokens == mask_token_id))
        given = decided & is_real
        frontier = (~pad(decided, (0, 1))).long().argmax(1)
        return cls(
            tokens=tokens,
            decided=decided,
            given=given,
            frontier=frontier,
            done=frontier == tokens.shape[1],
            padding=padding,
            prompt_end=prompt_end,
            given_end=((columns + 1) * given).amax(1) if tokens.shape[1] else prompt_end.clone(),
            end=torch.full_like(zeros, tokens.shape[1]),
            seeds=zeros if seeds is None else seeds,
            steps=zeros.clone(),
            rows=torch.arange(len(prompt), device=prompt.device) if rows is None else rows,
            commit_rate=torch.full_like(zeros, FIRST_COMMIT_RATE, dtype=torch.float32),
        )

    @cached_property
    def layout(self) -> Layout:
        """Host copies of per-row fields. The first access makes the one host sync of a decode step."""
        numbers = [self.padding, self.frontier, self.end, self.done.long(), self.decided.sum(1)]
        return Layout(*torch.stack([*numbers, self.prompt_end, self.given_end]).tolist())

    @property
    def has_holes(self) -> bool:
        """True if a row has a given token behind its frontier."""
        return any(given > t for given, t in zip(self.layout.given_end, self.layout.frontier, strict=True))

    @cached_property
    def given_columns(self) -> Sequence[Sequence[bool]]:
        """Host copy of `given`. The first access makes a host sync, so only rows with holes are asked."""
        return self.given.tolist()

    def columns_behind(self, counts: Sequence[int]) -> Sequence[int]:
        """The column behind the next `counts` (`b`) columns of each row from the frontier on that are not given.

        At most the row's end.
        """
        ends = [min(t + n, end) for t, n, end in zip(self.layout.frontier, counts, self.layout.end, strict=True)]
        if not self.has_holes:
            return ends
        for row, (t, n, end) in enumerate(zip(self.layout.frontier, counts, self.layout.end, strict=True)):
            open_columns = [column for column in range(t, end) if not self.given_columns[row][column]]
            ends[row] = open_columns[:n][-1] + 1 if open_columns else t
        return ends

    @property
    def width(self) -> int:
        """Columns of the batch, l."""
        return self.tokens.shape[1]

    @property
    def kinds(self) -> Tensor:
        """The kind of each column: `PADDING` (also behind the row's end), `GIVEN`, `DECIDED` or `UNDECIDED`: `b l` int64."""
        kinds = torch.where(self.decided, DECIDED, UNDECIDED)
        kinds = torch.where(self.between(self.padding, self.end), kinds, PADDING)
        return torch.where(self.given, GIVEN, kinds)

    def between(self, start: Tensor, end: Tensor) -> Tensor:
        """True for the columns `start … end − 1` of each row, `b` int64 each: `b l` bool."""
        column = torch.arange(self.width, device=self.tokens.device)
        return (column >= start[:, None]) & (column < end[:, None])

    def last_new_columns(self, frontier: Sequence[int], read: Sequence[int]) -> Sequence[int]:
        """The last column of each row before `frontier` whose token was not given: a model may have read another token there.

        Args:
            frontier: `b` columns.
            read: the column behind the last that the model has read, `b`; for a row of which it has read nothing, the column
                before `frontier` is returned.
        """
        last = [t - 1 for t in frontier]
        rows = zip(frontier, self.layout.given_end, self.layout.padding, read, strict=True)
        for row, (t, given_end, padding, behind) in enumerate(rows):
            if given_end >= t and behind > padding:  # t is behind a given token
                open_columns = [c for c in range(padding, t) if not self.given_columns[row][c]]
                last[row] = open_columns[-1] if open_columns else t - 1
        return last

    @property
    def num_new_tokens(self) -> Tensor:
        """Number of tokens committed so far, in holes and behind the prompt, the stop token included: `b` int64."""
        return (self.decided & self.is_new).sum(1)

    @property
    def is_new(self) -> Tensor:
        """True for columns that are or will be generated: `b l` bool."""
        return self.between(self.padding, self.end) & ~self.given

    @property
    def places(self) -> Tensor:
        """The number of generated columns before each column, decided or not: `b l` int64."""
        is_new = self.is_new.long()
        return is_new.cumsum(1) - is_new

    def with_decided(self, tokens: Tensor, decided: Tensor) -> DecodeState:
        """A copy with these tokens (`b l` int64) and decided columns (`b l` bool), and the frontier that follows."""
        undecided = ~decided & self.between(self.padding, self.end)
        frontier = torch.where(undecided.any(1), undecided.long().argmax(1), self.end)
        return dataclasses.replace(self, tokens=tokens, decided=decided, frontier=frontier)

    def select(self, rows: Tensor) -> DecodeState:
        """The rows at these indices (`n` int64), in that order."""
        fields: dict[str, Any] = {
            f.name: getattr(self, f.name).index_select(0, rows) for f in dataclasses.fields(self)
        }
        return dataclasses.replace(self, **fields)

    def narrowed(self) -> DecodeState:
        """A copy without the columns that are behind the end of every row."""
        width = max(self.layout.end, default=0)
        return dataclasses.replace(
            self, **{name: getattr(self, name)[:, :width].contiguous() for name in ("tokens", "decided", "given")}
        )

    def stack(self, below: DecodeState, mask_token_id: int) -> DecodeState:
        """One batch of these rows and the rows `below`; the narrower batch gets columns behind the end of its rows."""
        width = max(self.width, below.width)
        above, below = (state._widened(width, mask_token_id) for state in (self, below))
        fields = [field.name for field in dataclasses.fields(self)]
        return DecodeState(**{name: torch.cat([getattr(above, name), getattr(below, name)]) for name in fields})

    def _widened(self, width: int, mask_token_id: int) -> DecodeState:
        more = (0, width - self.width)
        return dataclasses.replace(
            self,
            tokens=pad(self.tokens, more, value=mask_token_id),
            decided=pad(self.decided, more, value=True),
            given=pad(self.given, more, value=False),
        )


def to_device(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers as an int64 tensor on `device`, without a host sync."""
    # CUDA may synchronise before it copies memory that is not pinned. Inside a graph the tensor is a constant.
    pins = device.type == "cuda" and not torch.compiler.is_compiling()
    return torch.tensor(values, device="cpu", pin_memory=pins).to(device, non_blocking=True)
