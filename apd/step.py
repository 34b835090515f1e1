"""READ FIRST. One decode step: draft, verify, mix, accept, commit.

    1. Draft.   One drafter forward over the window's masks; one token for each, from its marginals.
    2. Verify.  One verifier forward over the draft scores each drafted token given those before it.
    3. Mix.     p_T ∝ p_D^R · p_AR^(1−R) at every position.
    4. Accept.  The longest prefix on which draft and mixture agree (`acceptance.py`).
    5. Commit.  Write it, cut at the first stop token, move the frontier (`state.commit`).

`APD.propose` holds 1 to 4 under these numbers; `decode_step` adds 5 and is the same for every strategy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from apd.acceptance import AcceptanceRule
from apd.drafter import DrafterSession
from apd.probability import DRAFT, gather_tokens, keyed_gumbel, keyed_uniform, log_normalise, mix, step_seeds
from apd.state import DecodeState, Proposal, StepInfo, Window, commit
from apd.verifier import VerifierSession


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from scores: transformers' warpers, then the argmax under keyed Gumbel noise.

    Attributes:
        warpers: temperature, top-k, top-p, min-p; empty when greedy.
        greedy: temperature 0, which is zero noise.
        redraw: noise changes with the row's step (`noise="step"`).
    """

    warpers: LogitsProcessorList
    greedy: bool
    redraw: bool = False

    def warp(self, scores: Tensor) -> Tensor:
        """Warped scores, `b m v` → `b m v`."""
        return self.warpers(None, scores.flatten(0, 1)).view_as(scores)

    def probs(self, warped: Tensor) -> Tensor:
        """The distribution that is drawn from, `b m v`; at temperature 0 all of it is on the best token."""
        if self.greedy:
            return torch.zeros_like(warped).scatter_(-1, warped.argmax(-1, keepdim=True), 1.0)
        return warped.softmax(-1)

    def gumbel(self, state: DecodeState, window: Window, vocab_size: int, stream: int = DRAFT) -> Tensor:
        """Gumbel noise of every position and token of the window, `b m v`; zero at temperature 0."""
        if self.greedy:
            return torch.zeros((), device=window.columns.device)
        return keyed_gumbel(*self._key(state, window), stream, vocab_size)

    def uniform(self, state: DecodeState, window: Window, stream: int) -> Tensor:
        """A uniform draw in (0, 1) for every position of the window, `b m`."""
        return keyed_uniform(*self._key(state, window), stream).squeeze(-1)

    def _key(self, state: DecodeState, window: Window) -> tuple[Tensor, Tensor]:
        seeds = step_seeds(state.seeds, state.steps) if self.redraw else state.seeds
        return seeds, window.columns - state.padding[:, None]


@dataclass(frozen=True)
class Models:
    """The models of one call, open, and the tokens they share.

    Attributes:
        drafter: its session.
        verifier: its session, or `None` when the strategy needs none.
        mask_token_id: never drafted.
        vocab_size: ids below it exist in both models.
    """

    drafter: DrafterSession
    verifier: VerifierSession | None
    mask_token_id: int
    vocab_size: int

    def draft(self, state: DecodeState, window: Window) -> tuple[Tensor, Tensor]:
        """log p_D on the shared support, `b m v`, and where it is a distribution, `b m`."""
        return log_normalise(self._supported(self.drafter.logits(state, window)))

    def verify(self, state: DecodeState, window: Window, draft: Tensor) -> tuple[Tensor, Tensor]:
        """log p_AR on the shared support, `b m v`, and where it is a distribution, `b m`."""
        assert self.verifier is not None
        return log_normalise(self._supported(self.verifier.logits(state, window, draft)))

    def select(self, rows: Tensor) -> None:
        self.drafter.select(rows)
        if self.verifier is not None:
            self.verifier.select(rows)

    def _supported(self, logits: Tensor) -> Tensor:
        logits = logits[..., : self.vocab_size]
        if self.mask_token_id >= self.vocab_size:
            return logits
        mask_column = torch.tensor([self.mask_token_id], device=logits.device)
        return logits.index_fill(-1, mask_column, float("-inf"))


class Strategy(Protocol):
    """Which tokens a step commits. One small class each; `APD` below, its rivals in `strategies.py`.

    Attributes:
        needs_verifier: whether a verifier forward runs.
        left_to_right: whether it commits prefixes of the window only.
    """

    @property
    def needs_verifier(self) -> bool: ...

    @property
    def left_to_right(self) -> bool: ...

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal: ...


@dataclass(frozen=True)
class APD:
    """Adaptive parallel decoding: commit the longest prefix on which draft and mixture agree.

    Args:
        mixture_weight: R; at 1 the verifier is not needed.
        accept: acceptance rule.

    Source: Israel, Van den Broeck, Grover 2025, arXiv:2506.00413.
    """

    mixture_weight: float
    accept: AcceptanceRule
    left_to_right = True

    @property
    def needs_verifier(self) -> bool:
        return self.mixture_weight < 1

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal:
        # 1. Draft.
        draft_logprobs, drafter_sound = models.draft(state, window)
        draft_scores = sampling.warp(draft_logprobs)
        noise = sampling.gumbel(state, window, models.vocab_size)
        draft = (draft_scores + noise).argmax(-1)  # b m

        # 2. Verify.
        verify_logprobs, verifier_sound = None, torch.ones_like(drafter_sound)
        if self.needs_verifier:
            verify_logprobs, verifier_sound = models.verify(state, window, draft)

        # 3. Mix raw, then warp: the other order gives empty supports.
        mixture = mix(draft_logprobs, verify_logprobs, self.mixture_weight)
        target_scores = sampling.warp(mixture)
        target_logprobs, mixture_sound = log_normalise(mixture)

        # 4. Accept.
        accepted = self.accept(
            draft=draft,
            draft_scores=draft_scores,
            target_scores=target_scores,
            target_logprobs=target_logprobs,
            noise=noise,
            inside=window.inside,
            sampling=sampling,
            key=(state, window),
        )
        position = torch.arange(draft.shape[1], device=draft.device)
        decisive = window.inside & (position <= accepted.num_accepted[:, None])
        return Proposal(
            tokens=accepted.tokens,
            chosen=position < accepted.num_committed[:, None],
            draft=draft,
            target_probs=gather_tokens(target_logprobs, accepted.tokens).exp(),
            drafter_probs=gather_tokens(draft_logprobs, accepted.tokens).exp(),
            verifier_probs=None if verify_logprobs is None else gather_tokens(verify_logprobs, accepted.tokens).exp(),
            sound={
                "drafter": (drafter_sound | ~decisive).all(1),
                "verifier": (verifier_sound | ~decisive).all(1),
                "mixture": (mixture_sound | ~decisive).all(1),
            },
        )


def decode_step(
    state: DecodeState,
    *,
    strategy: Strategy,
    models: Models,
    sampling: Sampling,
    window_size: int | None,
    stop_token_ids: Tensor,
) -> tuple[DecodeState, StepInfo]:
    """One step of every row: the strategy proposes, and 5. what it chose is committed."""
    window = Window.at_frontier(state, window_size)
    proposal = strategy.propose(state, window, models, sampling)
    return commit(state, window, proposal, stop_token_ids=stop_token_ids, mask_token_id=models.mask_token_id)
