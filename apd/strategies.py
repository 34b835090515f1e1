"""Baselines behind the same step as APD: one loop, one stopping rule, one way of counting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apd.probability import gather_tokens
from apd.sampling import Sampling
from apd.state import DecodeState, Proposal, Window
from apd.step import Models


@dataclass(frozen=True)
class LeftToRight:
    """Commit the K leftmost masks of every step from the drafter's marginals. K = 1 is sequential decoding.

    Args:
        tokens_per_step: K, at least 1.

    Source: the left-to-right baseline of arXiv:2506.00413 (K tokens per step).
    """

    tokens_per_step: int = 1
    needs_verifier = False
    left_to_right = True

    def __post_init__(self) -> None:
        _check_tokens_per_step(self.tokens_per_step)

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal:
        def leftmost(confidence: Tensor, candidate: Tensor) -> Tensor:
            return (
                torch.arange(candidate.shape[1], device=candidate.device).expand_as(candidate) < self.tokens_per_step
            )

        return _propose(state, window, models, sampling, leftmost)


@dataclass(frozen=True)
class Confidence:
    """Commit the K masks, anywhere in the window, whose drawn token has the highest probability.

    Args:
        tokens_per_step: K, at least 1; fewer where fewer are left.

    Source: low-confidence remasking of LLaDA, arXiv:2502.09992; maskgit-plus order of Dream.
    """

    tokens_per_step: int = 1
    needs_verifier = False
    left_to_right = False

    def __post_init__(self) -> None:
        _check_tokens_per_step(self.tokens_per_step)

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal:
        def most_confident(confidence: Tensor, candidate: Tensor) -> Tensor:
            best = confidence.masked_fill(~candidate, -1.0).topk(min(self.tokens_per_step, candidate.shape[1])).indices
            return torch.zeros_like(candidate).scatter(1, best, True) & candidate

        return _propose(state, window, models, sampling, most_confident)


def _propose(
    state: DecodeState,
    window: Window,
    models: Models,
    sampling: Sampling,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> Proposal:
    """Draft the window and commit what `choose(confidence [b m], candidate [b m])` says, `b m` bool."""
    draft = models.draft(state, window, sampling)
    probs = gather_tokens(draft.logprobs, draft.tokens).exp()
    undecided = ~state.decided.gather(1, window.columns.clamp(max=state.width - 1))
    candidate = window.inside & undecided
    return Proposal(
        tokens=draft.tokens,
        chosen=choose(probs, candidate) & candidate,
        draft=draft.tokens,
        target_probs=probs,
        drafter_probs=probs,
        verifier_probs=None,
        sound={"drafter": (draft.sound | ~candidate).all(1)},
        logits=draft.logprobs,
        scores=draft.scores,
        first_logits=draft.logprobs[:, 0],
        first_scores=draft.scores[:, 0],
    )


def _check_tokens_per_step(tokens_per_step: int) -> None:
    if tokens_per_step < 1:
        raise ValueError(f"`tokens_per_step` must be at least 1, got {tokens_per_step}.")
