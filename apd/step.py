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
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from apd.acceptance import AcceptanceRule
from apd.config import check_fraction
from apd.drafter import DrafterSession
from apd.probability import gather_tokens, log_normalise, mix
from apd.processing import Processing
from apd.sampling import Sampling
from apd.state import DecodeState, FollowsRows, Proposal, StepInfo, Stopping, Window, commit
from apd.verifier import VerifierSession

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Draft:
    """One token for every mask of the window.

    Attributes:
        tokens: `b m` int64.
        logprobs: `b m v` float32, log p_D before temperature and truncation.
        scores: `b m v` float32, the same after them.
        noise: `b m v` float32, what was added to the scores before the argmax.
        sound: `b m` bool, False where the drafter gave no distribution.
    """

    tokens: Tensor
    logprobs: Tensor
    scores: Tensor
    noise: Tensor
    sound: Tensor


@dataclass(frozen=True)
class Models:
    """The models of one call, open, restricted to the tokens they share and to what the caller allows.

    Attributes:
        drafter: its session.
        verifier: its session, or `None` when the strategy needs none.
        mask_token_id: never drafted.
        vocab_size: ids below it exist in both models.
        processing: the caller's logits processors, the same for both models.
    """

    drafter: DrafterSession
    verifier: VerifierSession | None
    mask_token_id: int
    vocab_size: int
    processing: Processing

    def draft(self, state: DecodeState, window: Window, sampling: Sampling) -> Draft:
        """x_i = argmax(warp(log p_D)_i + g_i) at every mask of the window."""
        return self._drawn(self.drafter.logits(state, window), state, window, sampling)

    def next_token(self, state: DecodeState, window: Window, sampling: Sampling) -> Draft:
        """The same from the verifier, for the token at the frontier; `window` is one column wide."""
        assert self.verifier is not None
        nothing = torch.zeros_like(window.columns)
        return self._drawn(self.verifier.logits(state, window, nothing), state, window, sampling)

    def _drawn(self, logits: Tensor, state: DecodeState, window: Window, sampling: Sampling) -> Draft:
        noise = sampling.gumbel(state, window, self.vocab_size)

        def pick(logits: Tensor, position: int) -> Tensor:
            scores = sampling.warp(log_normalise(logits[:, None])[0])
            return sampling.pick(scores[:, 0], noise[:, position])

        logits = self._supported(logits, state, window)
        if self.processing.needs_history:
            logits = self.processing.along(logits, state, window, pick)
        logprobs, sound = log_normalise(logits)
        scores = sampling.warp(logprobs)
        return Draft(sampling.pick(scores, noise), logprobs, scores, noise, sound)

    def verify(self, state: DecodeState, window: Window, draft: Tensor) -> tuple[Tensor, Tensor]:
        """log p_AR of every token given the draft before it, `b m v`, and where it is a distribution, `b m`."""
        assert self.verifier is not None
        logits = self._supported(self.verifier.logits(state, window, draft), state, window)
        if self.processing.needs_history:
            logits = self.processing.along(logits, state, window, lambda _, position: draft[:, position])
        return log_normalise(logits)

    def select(self, rows: Tensor) -> None:
        self.drafter.select(rows)
        if self.verifier is not None:
            self.verifier.select(rows)

    def join(self, state: DecodeState) -> None:
        self.drafter.join(state)
        if self.verifier is not None:
            self.verifier.join(state)

    def _supported(self, logits: Tensor, state: DecodeState, window: Window) -> Tensor:
        logits = logits[..., : self.vocab_size].float()  # processors expect float32, as in transformers
        if self.mask_token_id < self.vocab_size:
            mask = torch.tensor([self.mask_token_id], device=logits.device)
            logits = logits.index_fill(-1, mask, -torch.inf)
        return self.processing.at_once(logits, state, window)


class StrategySession(FollowsRows, Protocol):
    """A strategy's memory for the length of one call."""

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal:
        """Which tokens of the window to commit."""


class Strategy(Protocol):
    """Which tokens a step commits. One small class each; `APD` below, its rivals in `strategies.py`."""

    @property
    def needs_verifier(self) -> bool:
        """Whether a verifier forward runs."""

    @property
    def left_to_right(self) -> bool:
        """Whether it commits prefixes of the window only."""

    def open(self, state: DecodeState) -> StrategySession:
        """Start a session for these rows."""


class Memoryless:
    """A strategy that is its own session: what it commits depends on the state alone. Subclasses `propose`."""

    def open(self, state: DecodeState) -> Self:
        return self

    def select(self, rows: Tensor) -> None:
        pass

    def join(self, state: DecodeState) -> None:
        pass


@dataclass(frozen=True)
class APD(Memoryless):
    """Adaptive parallel decoding: commit the longest prefix on which draft and mixture agree.

    Args:
        mixture_weight: R; at 1 the verifier is not needed.
        accept: acceptance rule.

    Source: Israel, Van den Broeck, Grover 2025, arXiv:2506.00413.
    """

    mixture_weight: float
    accept: AcceptanceRule
    left_to_right = True

    def __post_init__(self) -> None:
        check_fraction("mixture_weight", self.mixture_weight, "1 trusts the drafter alone, 0 the verifier alone")

    @property
    def needs_verifier(self) -> bool:
        return self.mixture_weight < 1

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal:
        # 1. Draft.
        draft = models.draft(state, window, sampling)

        # 2. Verify.
        verify_logprobs, verifier_sound = None, torch.ones_like(draft.sound)
        if self.needs_verifier:
            verify_logprobs, verifier_sound = models.verify(state, window, draft.tokens)

        # 3. Mix raw, then warp: the other order gives empty supports. At R = 1 the target is the draft, bit for bit.
        target_logprobs, target_scores, mixture_sound = draft.logprobs, draft.scores, draft.sound
        if verify_logprobs is not None:
            mixture = mix(draft.logprobs, verify_logprobs, self.mixture_weight)
            target_logprobs, mixture_sound = log_normalise(mixture)
            target_scores = sampling.warp(mixture)

        # 4. Accept.
        accepted = self.accept(
            draft=draft.tokens,
            draft_scores=draft.scores,
            target_scores=target_scores,
            target_logprobs=target_logprobs,
            noise=draft.noise,
            inside=window.inside,
            sampling=sampling,
            key=(state, window),
        )
        tokens = accepted.tokens
        position = torch.arange(tokens.shape[1], device=tokens.device)
        decisive = window.inside & (position <= accepted.num_accepted[:, None])
        return Proposal(
            tokens=tokens,
            chosen=position < accepted.num_committed[:, None],
            draft=draft.tokens,
            target_probs=gather_tokens(target_logprobs, tokens).exp(),
            drafter_probs=gather_tokens(draft.logprobs, tokens).exp(),
            verifier_probs=None if verify_logprobs is None else gather_tokens(verify_logprobs, tokens).exp(),
            sound={
                "drafter": (draft.sound | ~decisive).all(1),
                "verifier": (verifier_sound | ~decisive).all(1),
                "mixture": (mixture_sound | ~decisive).all(1),
            },
            logits=target_logprobs,
            scores=target_scores,
            first_logits=draft.logprobs[:, 0],
            first_scores=draft.scores[:, 0],
        )


def decode_step(
    state: DecodeState,
    *,
    strategy: StrategySession,
    models: Models,
    sampling: Sampling,
    window_size: int | None,
    stopping: Stopping,
) -> tuple[DecodeState, StepInfo]:
    """One step of every row: the strategy proposes, and 5. what it chose is committed."""
    window = Window.at_frontier(state, window_size)
    proposal = strategy.propose(state, window, models, sampling)
    return commit(state, window, proposal, stopping=stopping, mask_token_id=models.mask_token_id)
