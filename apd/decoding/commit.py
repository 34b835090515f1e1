"""5. Commit: write what was accepted, cut each row at its first stop token, move the frontier."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from apd.decoding.returned import check_returned
from apd.decoding.state import DecodeState
from apd.decoding.window import Window

#: What `Proposal.fault` says of a position, added up.
VALID, DRAFT_FAULT, TARGET_FAULT, EMPTY_TARGET = 0, 1, 2, 4


@dataclass(frozen=True)
class Proposal:
    """What a strategy wants committed in one step, and the evidence for it.

    Attributes:
        tokens: `b m` int64, the token of each chosen or decisive column of the window.
        chosen: `b m` bool, the columns to commit.
        decisive: `b m` bool, the positions whose distribution this step used; an invalid one there is an error.
        fault: `b m` int64: `VALID`, or the sum of `DRAFT_FAULT` and `TARGET_FAULT` where the distribution that was drafted
            from, or the mixture, is NaN or +∞ somewhere or allows no token; `EMPTY_TARGET` in the last case.
        draft: `b m` int64, the drafted tokens; fewer columns where fewer were drafted.
        models: n names: `"target"` always, `"drafter"` and `"verifier"` where they ran.
        probs: `b m n` float32, where they are recorded: the untempered probability of `tokens` by each of `models`.
        logits: `b m v` float32, where they are recorded: log p_D at position 0, which decides there, and log p_T
            behind it, before temperature and truncation.
        scores: `b m v` float32, where they are recorded: `logits` after temperature and truncation.
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


def check_proposal(proposal: object, by: str, window: Window, *, probs: bool, scores: bool) -> None:
    """Refuse a proposal that would be broadcast or cut when it is committed, or that lacks what is recorded.

    Args:
        by: what returned it, see `name_of`.
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
    """Diagnostics of one step; decoding does not need them.

    Attributes:
        before: the rows before the step.
        window: the columns that were drafted.
        proposal: the strategy's proposal.
        committed: `b m` bool, the columns that were committed: the proposal up to the first stop token.
        stopped: `b` bool, rows that a stop token or a stopping criterion ended.
        broken: `b` bool, rows with an invalid distribution at a decisive position.
        drafter_forwards: passes of the drafter that this step made; every row took part in each.
        verifier_forwards: passes of the verifier.
    """

    before: DecodeState
    window: Window
    proposal: Proposal
    committed: Tensor
    stopped: Tensor
    broken: Tensor
    drafter_forwards: int = 0
    verifier_forwards: int = 0


@dataclass(frozen=True)
class Stopping:
    """When a row is over before its masks are.

    Attributes:
        token_ids: `s` int64, the stop tokens.
        criteria: transformers' stopping criteria, called for every single token with the row's ids without padding.
    """

    token_ids: Tensor
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)

    def find(self, before: DecodeState, tokens: Tensor, settled: Tensor) -> Tensor:
        """The tokens that end their row: `b m` bool.

        Args:
            before: the rows before the step.
            tokens: `b m` int64, the row's tokens from the frontier on, after the step.
            settled: `b m` bool, which of them became final.
        """
        stops = torch.isin(tokens, self.token_ids) & settled
        if len(self.criteria) > 0:  # torch.compile takes any list subclass for true, up to torch 2.11 at least
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
    """Write the chosen tokens, cut every row behind its first stop token, and find the rows that are done.

    A stop token ends its row once everything before it is decided. Columns behind it become undecided again, so that
    they are never counted, streamed or returned.
    """
    # Decided columns right of the frontier are inside the window, since windows only move to the right.
    chosen = window.within(proposal.chosen)
    tokens = torch.where(chosen, proposal.tokens, window.gather(state.tokens))
    decided = chosen | window.gather(state.decided)
    settled = (~window.within(decided)).cumsum(1) == 0
    stops = stopping.find(state, tokens, settled)
    stopped = stops.any(1)
    kept = stops.cumsum(1) <= stops  # up to the first stop token
    frontier = state.frontier + (settled & kept).sum(1)
    broken = ((proposal.fault != VALID) & proposal.decisive).any(1)
    after = dataclasses.replace(
        state,
        tokens=window.fill(torch.where(kept, tokens, mask_token_id), state.tokens),
        decided=window.fill(decided & kept, state.decided),
        frontier=frontier,
        done=stopped | (frontier == state.end) | broken,
        steps=state.steps + 1,
    )
    return after, StepInfo(state, window, proposal, chosen & kept, stopped, broken)
