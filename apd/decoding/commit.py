"""5. Commit: write the chosen tokens, cut each row at its first stop token, move the frontier."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from apd.decoding.returned import check_returned
from apd.decoding.state import DecodeState
from apd.decoding.window import Window

#: Flags of `Proposal.fault`, which are added.
VALID, DRAFT_FAULT, TARGET_FAULT, EMPTY_TARGET, NOT_REPLACED = 0, 1, 2, 4, 8


@dataclass(frozen=True)
class Proposal:
    """The tokens that a strategy proposes to commit in one step, with their probabilities and scores.

    Attributes:
        tokens: `b m` int64, the token of each chosen or decisive column of the window.
        chosen: `b m` bool, the columns to commit.
        decisive: `b m` bool, the positions whose distribution this step used; an invalid one there is an error.
        fault: `b m` int64, `VALID` or a sum of flags: `DRAFT_FAULT` and `TARGET_FAULT` if the drafted distribution or the
            mixture holds NaN or +∞ or allows no token, `EMPTY_TARGET` if the mixture allows no token, and `NOT_REPLACED`
            if a rule rejected the first token and gave no other.
        draft: int64, the drafted tokens: `b m`, or fewer columns if fewer were drafted.
        models: n names: `"target"`, and `"drafter"` and `"verifier"` if they ran.
        probs: `b m n` float32 if recorded: the untempered probability of `tokens` under each of `models`.
        logits: `b m v` float32 if recorded: the log-probabilities that decided each position, before temperature and
            truncation. Of APD: log p_D at position 0, unless the rule judges it, and log p_T elsewhere.
        scores: `b m v` float32 if recorded: `logits` after temperature and truncation.
        window: the columns of the proposal, where they are not those that `propose` was given.
        steps: `b` int64, the decode steps that the proposal stands for; `None`: one.
    """

    tokens: Tensor
    chosen: Tensor
    decisive: Tensor
    fault: Tensor
    draft: Tensor
    models: tuple[str, ...]
    probs: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None
    window: Window | None = None
    steps: Tensor | None = None


def check_proposal(proposal: object, by: str, window: Window, *, probs: bool, scores: bool) -> None:
    """Refuse a proposal with wrong shapes or dtypes, which `commit` would broadcast or cut, or without what is recorded.

    Args:
        proposal: the object that `by` returned.
        by: name of the method, for the message.
        window: the columns of the proposal.
        probs, scores: see `ModelPair.record_probs` and `record_scores`.
    Raises:
        TypeError, ValueError: see `check_returned`.
    """
    if not isinstance(proposal, Proposal):
        raise TypeError(f"`{by}` must return a `Proposal`, got {type(proposal).__name__}.")
    rows, width = window.columns.shape
    check_returned(proposal.tokens, f"{by}().tokens", (rows, width), torch.int64)
    check_returned(proposal.chosen, f"{by}().chosen", (rows, width), torch.bool)
    check_returned(proposal.decisive, f"{by}().decisive", (rows, width), torch.bool)
    check_returned(proposal.fault, f"{by}().fault", (rows, width), torch.int64)
    check_returned(proposal.draft, f"{by}().draft", (rows, None), torch.int64)
    if probs:
        check_returned(proposal.probs, f"{by}().probs", (rows, width, len(proposal.models)), torch.float32)
    if scores:
        check_returned(proposal.logits, f"{by}().logits", (rows, width, None), torch.float32)
        check_returned(proposal.scores, f"{by}().scores", (rows, width, None), torch.float32)


@dataclass(frozen=True)
class StepInfo:
    """Diagnostics of one step. Decoding does not depend on them.

    Attributes:
        before: the rows before the step.
        window: the columns that were drafted.
        proposal: the strategy's proposal.
        committed: `b m` bool, the committed columns: `proposal.chosen` up to the first stop token.
        stopped: `b` bool, rows that a stop token or a stopping criterion ended.
        broken: `b` bool, rows with an invalid distribution at a decisive position.
        drafter_forwards: number of drafter passes in this step; every row took part in each.
        verifier_forwards: number of verifier passes in this step.
        extra_canvases: `b` int64, canvases of each row beyond the first in the step's drafter passes; `None`: none.
    """

    before: DecodeState
    window: Window
    proposal: Proposal
    committed: Tensor
    stopped: Tensor
    broken: Tensor
    drafter_forwards: int = 0
    verifier_forwards: int = 0
    extra_canvases: Tensor | None = None


@dataclass(frozen=True)
class Stopping:
    """The conditions that end a row before all its masks are committed.

    Attributes:
        token_ids: `s` int64, the stop tokens.
        criteria: transformers' stopping criteria, called once per token with the row's ids without padding.
        has_holes: True if a prompt may have holes.

    In a hole, and at given tokens, nothing ends a row.
    """

    token_ids: Tensor
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    has_holes: bool = False

    def find(self, before: DecodeState, tokens: Tensor, settled: Tensor) -> Tensor:
        """The tokens that end their row: `b m` bool.

        Args:
            before: the rows before the step.
            tokens: `b m` int64, the row's tokens from the frontier on, after the step.
            settled: `b m` bool, True for tokens that became final: those left of the new frontier.
        """
        if self.has_holes:
            columns = before.frontier[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
            settled = settled & (columns >= before.given_end[:, None])
        stops = torch.isin(tokens, self.token_ids) & settled
        if (
            len(self.criteria) > 0
        ):  # not the list's truth value: torch.compile takes every list subclass for true (2.11)
            for row, position in settled.nonzero().tolist():
                ids = before.tokens[row, before.padding[row] : before.frontier[row]]
                ids = torch.cat([ids, tokens[row, : position + 1]])
                # Not called again once the row has stopped: a criterion may count its calls.
                if not stops[row, : position + 1].any() and bool(self.criteria(ids[None], None)):
                    stops[row, position] = True
        return stops


def commit(
    state: DecodeState, window: Window, proposal: Proposal, *, stopping: Stopping, mask_token_id: int
) -> tuple[DecodeState, StepInfo]:
    """Write the chosen tokens, cut each row behind its first stop token, and mark finished rows as done.

    A stop token ends its row once all columns before it are decided. Columns behind it become undecided again, so they are
    never counted, streamed or returned.

    Args:
        state: the rows before the step.
        window: the columns of the proposal.
        proposal: the tokens to commit.
        stopping: stop tokens and stopping criteria.
        mask_token_id: the id that is written behind a stop token.
    Returns:
        The rows after the step, and diagnostics without forward counts.
    """
    # Windows only move to the right, so decided columns right of the frontier are inside the window.
    known = window.gather(state.decided)
    chosen, decisive = window.within(proposal.chosen), proposal.decisive
    if stopping.has_holes:  # given tokens between holes are neither chosen nor decided by a step
        chosen, decisive = chosen & ~known, decisive & ~known
    tokens = torch.where(chosen, proposal.tokens, window.gather(state.tokens))
    decided = chosen | known
    settled = (~window.within(decided)).cumsum(1) == 0
    stops = stopping.find(state, tokens, settled)
    stopped = stops.any(1)
    kept = stops.cumsum(1) <= stops  # up to the first stop token
    is_decided = window.fill(decided & kept, state.decided)
    if stopping.has_holes:  # behind the window there may be given columns
        undecided = ~is_decided & state.between(state.padding, state.end)
        frontier = torch.where(undecided.any(1), undecided.long().argmax(1), state.end)
    else:
        frontier = state.frontier + (settled & kept).sum(1)
    broken = ((proposal.fault != VALID) & decisive).any(1)
    after = dataclasses.replace(
        state,
        tokens=window.fill(torch.where(kept, tokens, mask_token_id), state.tokens),
        decided=is_decided,
        frontier=frontier,
        done=stopped | (frontier == state.end) | broken,
        steps=state.steps + (1 if proposal.steps is None else proposal.steps),
    )
    return after, StepInfo(state, window, proposal, chosen & kept, stopped, broken)
