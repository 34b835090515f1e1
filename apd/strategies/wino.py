"""WINO: unmask many tokens, re-mask those that become improbable given the others, commit block by block."""

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
    """Wide in, narrow out: unmasks many tokens per step, and re-masks tokens that become improbable given the others.

    Blocks are decoded from left to right. A tentative token is unmasked but not committed. Each step makes one drafter
    forward, which gives the confidence of every mask's drafted token, and the leave-one-out probability of every
    tentative token.

    1. Wide in. Unmask the masks with confidence above τ1: at most the min(max(⌊0.7·masks⌋, 5), 20) most confident, at
       least the most confident one.
    2. Narrow out. If step 1 unmasked two or more: re-mask earlier tentative tokens with a probability below τ2, the least
       probable first, fewer than the previous step unmasked.
    3. Commit the block when it has no masks up to its first stop token. Nothing is committed before, since every tentative
       token may be re-masked; tokens unmasked by the last step are not reviewed.

    Termination: (masks left) + (tokens unmasked by the last step) equals the block length after the first step and falls
    with every further step. So a block takes at most as many forwards as it has tokens.

    The limits in 1 and 2 are from the published code. Two details differ. In the published code shadows, which are masks,
    attend to each other; here a shadow attends to the tokens of other columns only (`leave_one_out_logits`). The published
    code fills a block to its end; here a row ends with its stop token, as in all strategies. The trace records the
    leave-one-out probabilities of the committing step.

    Args:
        threshold: τ1 in [0, 1].
        revoke_below: τ2 in [0, 1]; 0 revokes nothing.
        length: block length in tokens, at least 1, counted from the end of the prompt; a window also ends its block.

    Raises:
        TypeError, ValueError: a parameter is outside its range.

    Source: Hong et al. 2025, arXiv:2507.18578, and its published code.
    """

    threshold: float = 0.6
    revoke_below: float = 0.9
    length: int = 128
    needs_drafter = True
    needs_verifier = False
    left_to_right = False
    is_random = False
    reads_decided = True

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, "1 is one token per step")
        check_fraction("revoke_below", self.revoke_below, "0 revokes nothing")
        check_count("length", self.length, "Use 1 for sequential decoding")

    def open(self, state: DecodeState) -> _WINOSession:
        return _WINOSession(self, state)


class _WINOSession:
    """Remembers the tentative tokens of each row's block."""

    def __init__(self, wino: WINO, state: DecodeState) -> None:
        self.wino = wino
        self.tokens = torch.zeros_like(state.tokens)  # b l
        self.tentative = torch.zeros_like(state.decided)  # b l
        self.last_unmasked = torch.zeros_like(state.steps)  # b

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
        # The batch may have lost columns on the right.
        self.tokens, self.tentative = self.tokens[:, : state.width], self.tentative[:, : state.width]
        canvas = dataclasses.replace(
            state,
            tokens=torch.where(self.tentative, self.tokens, state.tokens),
            decided=state.decided | self.tentative,
        )
        block = (window.columns - state.prompt_end[:, None]) // self.wino.length
        inside = window.within(block == block[:, :1])  # the rest of the frontier's block; nothing in it is committed
        earlier, earlier_tokens = inside & window.gather(self.tentative), window.gather(self.tokens)
        drafts = pair.draft_leave_one_out(canvas, window, sampling)
        found = []
        for part, draft in drafts:
            present = torch.where(earlier[:, part], earlier_tokens[:, part], draft.tokens)
            found.append((present, draft.fault, gather_tokens(draft.logprobs, present).exp()))
        tokens, fault, probs = map(concatenate, zip(*found, strict=True))

        # 1. Wide in.
        masks = inside & ~earlier
        rank = ranks(probs, masks)
        most = (masks.sum(1) * 7 // 10).clamp(5, 20)[:, None]
        unmasked = masks & ((rank == 0) | (probs > self.wino.threshold) & (rank < most))
        num_unmasked = unmasked.sum(1)

        # 2. Narrow out.
        doubted = earlier & (probs < self.wino.revoke_below)
        most = torch.where(num_unmasked > 1, self.last_unmasked - 1, 0)[:, None]
        tentative = (earlier | unmasked) & ~(doubted & (ranks(-probs, doubted) < most))
        self.last_unmasked = num_unmasked
        self.tokens = window.write(tokens, tentative, self.tokens)
        self.tentative = window.write(tentative, inside, self.tentative)

        # 3. Commit.
        stops = tentative & torch.isin(tokens, pair.support.processing.stop_token_ids)
        before_stop = stops.cumsum(1) == 0
        is_complete = ~(inside & ~tentative & before_stop).any(1, keepdim=True)
        return single_model_proposal(
            "drafter",
            draft,
            pair,
            sampling,
            tokens=tokens,
            chosen=tentative & is_complete,
            decisive=inside,
            drafted=tokens,
            fault=fault,
            probs=probs,
        )

    def select(self, rows: Tensor) -> None:
        self.tokens, self.tentative = self.tokens.index_select(0, rows), self.tentative.index_select(0, rows)
        self.last_unmasked = self.last_unmasked.index_select(0, rows)

    def join(self, state: DecodeState) -> None:
        rows, columns = len(state.rows) - len(self.tentative), state.width - self.tentative.shape[1]
        self.tokens, self.tentative = (pad(memory, (0, columns, 0, rows)) for memory in (self.tokens, self.tentative))
        self.last_unmasked = pad(self.last_unmasked, (0, rows))
