"""WINO: unmask in haste, mask again what the other tokens speak against, commit block by block."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from apd.config import check_count, check_fraction
from apd.decoding.commit import Proposal
from apd.decoding.pair import ModelPair, concatenate
from apd.decoding.probability import gather_tokens
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.strategies.base import ranks, single_model_proposal


@dataclass(frozen=True)
class WINO:
    """Wide in, narrow out: tokens are unmasked in haste, and masked again when the others speak against them.

    Block by block from left to right. Each step makes one drafter forward, which gives for every mask the probability of
    the token drafted there, and for every token that stands its probability given all others ("leave one out").

    1. Wide in. Unmask every mask above τ1, the most confident min(max(⌊0.7·masks⌋, 5), 20) of them at most and the most
       confident one at least.
    2. Narrow out. If that were two or more: mask again what stood before and is below τ2, the least probable first,
       fewer tokens than the step before unmasked.
    3. Commit the block when it has no masks left up to its first stop token. Until then nothing is committed, since all
       may still be revoked; what came in last is never reviewed.

    Ends: masks left + tokens unmasked by the last step are the block's length after its first step, and fewer after
    every further one. So a block takes no more forwards than it has tokens.

    The limits in 1 and 2 are those of the published code. Two things are done otherwise. There all shadows, which are
    masks, see each other; here a shadow sees only the tokens of the others (`leave_one_out_logits`). And there a block is
    filled to its end; here, as with all strategies, a row is over with its stop token. Probabilities in the trace are
    those of the step that committed, given all others.

    Args:
        threshold: τ1 in [0, 1].
        revoke_below: τ2 in [0, 1]; 0 revokes nothing.
        length: of a block in tokens, at least 1, counted from the end of the prompt; a window is a block's end too.

    Source: Hong et al. 2025, arXiv:2507.18578, and its published code.
    """

    threshold: float = 0.6
    revoke_below: float = 0.9
    length: int = 128
    needs_drafter = True
    needs_verifier = False
    left_to_right = False
    is_random = False

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, "1 is one token per step")
        check_fraction("revoke_below", self.revoke_below, "0 revokes nothing")
        check_count("length", self.length, "Use 1 for sequential decoding")

    def open(self, state: DecodeState) -> _WINOSession:
        return _WINOSession(self, state)


class _WINOSession:
    """Remembers the tokens that stand in each row's block but are not committed."""

    def __init__(self, wino: WINO, state: DecodeState) -> None:
        self.wino = wino
        self.tokens = torch.zeros_like(state.tokens)  # b l
        self.stands = torch.zeros_like(state.decided)  # b l
        self.last_unmasked = torch.zeros_like(state.steps)  # b

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
        # Columns that no row needs any more are dropped.
        self.tokens, self.stands = self.tokens[:, : state.width], self.stands[:, : state.width]
        canvas = dataclasses.replace(
            state,
            tokens=torch.where(self.stands, self.tokens, state.tokens),
            decided=state.decided | self.stands,
        )
        block = (window.columns - state.prompt_end[:, None]) // self.wino.length
        inside = window.within(block == block[:, :1])  # nothing in it is committed: it starts at the frontier
        stood, standing = inside & window.gather(self.stands), window.gather(self.tokens)
        drafts = pair.draft_leave_one_out(canvas, window, sampling)
        found = []
        for part, draft in drafts:
            present = torch.where(stood[:, part], standing[:, part], draft.tokens)
            found.append((present, draft.fault, gather_tokens(draft.logprobs, present).exp()))
        tokens, fault, probs = map(concatenate, zip(*found, strict=True))

        # 1. Wide in.
        masks = inside & ~stood
        rank = ranks(probs, masks)
        most = (masks.sum(1) * 7 // 10).clamp(5, 20)[:, None]
        unmasked = masks & ((rank == 0) | (probs > self.wino.threshold) & (rank < most))
        num_unmasked = unmasked.sum(1)

        # 2. Narrow out.
        doubted = stood & (probs < self.wino.revoke_below)
        most = torch.where(num_unmasked > 1, self.last_unmasked - 1, 0)[:, None]
        stands = (stood | unmasked) & ~(doubted & (ranks(-probs, doubted) < most))
        self.last_unmasked = num_unmasked
        self.tokens = window.write(tokens, stands, self.tokens)
        self.stands = window.write(stands, inside, self.stands)

        # 3. Commit.
        stops = stands & torch.isin(tokens, pair.support.processing.stop_token_ids)
        before_stop = stops.cumsum(1) == 0
        is_complete = ~(inside & ~stands & before_stop).any(1, keepdim=True)
        return single_model_proposal(
            "drafter",
            draft,
            pair,
            sampling,
            tokens=tokens,
            chosen=stands & is_complete,
            decisive=inside,
            drafted=tokens,
            fault=fault,
            probs=probs,
        )

    def select(self, rows: Tensor) -> None:
        self.tokens, self.stands = self.tokens.index_select(0, rows), self.stands.index_select(0, rows)
        self.last_unmasked = self.last_unmasked.index_select(0, rows)

    def join(self, state: DecodeState) -> None:
        rows, columns = len(state.rows) - len(self.stands), state.width - self.stands.shape[1]
        self.tokens, self.stands = (pad(memory, (0, columns, 0, rows)) for memory in (self.tokens, self.stands))
        self.last_unmasked = pad(self.last_unmasked, (0, rows))
