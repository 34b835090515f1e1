"""What a decode step starts from and what it leaves: `DecodeState`, `Window`, `Proposal`, `StepInfo`, and `commit`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodeState:
    """The rows that are still being decoded. A ragged batch is the normal case: every row has its own frontier.

    Attributes:
        tokens: `b l` int64, padding, prompt and committed ids; the mask id where nothing is committed.
        decided: `b l` bool, False where nothing is committed yet. Padding and prompt are decided.
        done: `b` bool, nothing is left to decode: all decided, or a stop token with all before it decided.
        padding: `b` int64, columns of left padding.
        prompt_width: columns taken by the prompts, padding included; the same for all rows.
        seeds: `b` int64, the row seeds.
        steps: `b` int64, steps made so far.
        rows: `b` int64, which row of the call this is.
    """

    tokens: Tensor
    decided: Tensor
    done: Tensor
    padding: Tensor
    prompt_width: int
    seeds: Tensor
    steps: Tensor
    rows: Tensor

    @property
    def frontier(self) -> Tensor:
        """First column of each row that is not committed yet: `b` int64. Defined for rows that are not done."""
        return (~self.decided).long().argmax(1)

    @property
    def length(self) -> int:
        """Columns of a row when everything is decided."""
        return self.tokens.shape[1]

    @property
    def num_new_tokens(self) -> Tensor:
        """Tokens committed so far, the stop token included: `b` int64."""
        return self.decided[:, self.prompt_width :].sum(1)

    def select(self, rows: Tensor) -> DecodeState:
        """Only the rows at these indices (`n` int64), in that order."""
        chosen: dict[str, Any] = {
            field.name: value.index_select(0, rows)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **chosen)


@dataclass(frozen=True)
class Window:
    """The masks that one step drafts: m columns from each row's frontier on.

    Attributes:
        columns: `b m` int64, one after another.
        inside: `b m` bool, False past the row's end (rows near their end have fewer masks than others).
        end: `b` int64, first column the drafter does not see.
    """

    columns: Tensor
    inside: Tensor
    end: Tensor

    @classmethod
    def at_frontier(cls, state: DecodeState, window_size: int | None) -> Window:
        """m = min(M, what is left) columns from the frontier of each row; all that are left when M is None."""
        frontier = state.frontier
        left = state.length - int(frontier.min())
        width = left if window_size is None else min(window_size, left)
        columns = frontier[:, None] + torch.arange(width, device=frontier.device)
        return cls(columns, columns < state.length, (frontier + width).clamp(max=state.length))

    def place(self, values: Tensor, where: Tensor, row: Tensor) -> Tensor:
        """`row` (`b l`) with `values` (`b m`) written at the window's columns where `where` (`b m` bool) is True."""
        offset = torch.arange(row.shape[1], device=row.device) - self.columns[:, :1]
        width = self.columns.shape[1]
        index = offset.clamp(0, width - 1)
        written = (offset >= 0) & (offset < width) & where.gather(1, index)
        return torch.where(written, values.gather(1, index), row)


@dataclass(frozen=True)
class Proposal:
    """What a strategy wants committed in one step, and the evidence for it.

    Attributes:
        tokens: `b m` int64, the token for each column of the window.
        chosen: `b m` bool, which of them to commit.
        draft: `b m` int64, what was drafted.
        target_probs: `b m` float32, untempered p_T of `tokens`.
        drafter_probs: `b m` float32, untempered p_D of `tokens`.
        verifier_probs: `b m` float32, untempered p_AR of `tokens`; `None` when no verifier ran.
        sound: per model, `b` bool: False where it gave NaN, +∞ or nothing finite at a position that decides this step.
    """

    tokens: Tensor
    chosen: Tensor
    draft: Tensor
    target_probs: Tensor
    drafter_probs: Tensor
    verifier_probs: Tensor | None
    sound: dict[str, Tensor]


@dataclass(frozen=True)
class StepInfo:
    """Diagnostics of one step; nothing in it is needed to go on.

    Attributes:
        rows: `b` int64, which rows of the call made this step.
        window: what was drafted where.
        proposal: the strategy's proposal.
        committed: `b m` bool, what was committed: the proposal up to the first stop token.
    """

    rows: Tensor
    window: Window
    proposal: Proposal
    committed: Tensor


def commit(
    state: DecodeState, window: Window, proposal: Proposal, *, stop_token_ids: Tensor, mask_token_id: int
) -> tuple[DecodeState, StepInfo]:
    """Write the chosen tokens, cut every row behind its first stop token, and see which rows are done.

    A stop token ends its row once everything before it is decided; whatever stands behind it is taken back, so that
    it is never counted, streamed or returned.
    """
    chosen = proposal.chosen & window.inside
    tokens = window.place(proposal.tokens, chosen, state.tokens)
    decided = window.place(chosen, chosen, state.decided)

    column = torch.arange(state.length, device=tokens.device)
    settled = decided.long().cumprod(1).bool()
    stops = settled & torch.isin(tokens, stop_token_ids) & (column >= state.prompt_width)
    stopped = stops.any(1)
    end = torch.where(stopped, stops.long().argmax(1), state.length)
    decided = decided & (column <= end[:, None])

    after = dataclasses.replace(
        state,
        tokens=torch.where(decided, tokens, mask_token_id),
        decided=decided,
        done=stopped | decided.all(1),
        steps=state.steps + 1,
    )
    committed = chosen & (window.columns <= end[:, None])
    return after, StepInfo(state.rows, window, proposal, committed)
