"""Acceptance rules: how long a prefix of the draft is kept, and what replaces the first token that is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from apd.config import check_fraction
from apd.probability import ACCEPT, RESIDUAL, gather_tokens, prefix_length
from apd.sampling import Sampling
from apd.state import DecodeState, Window


@dataclass(frozen=True)
class Accepted:
    """The decision on one draft.

    Attributes:
        tokens: `b m` int64, the draft with the replacement at position `num_accepted` where there is one.
        num_accepted: `b` int64, tokens of the draft that are kept, at least 1.
        num_committed: `b` int64, the same or one more.
    """

    tokens: Tensor
    num_accepted: Tensor
    num_committed: Tensor


class AcceptanceRule(Protocol):
    """Decides on a draft.

    Position 0 is always accepted: there p_D is the drafter's exact conditional.

    Args:
        draft: `b m` int64.
        draft_scores: `b m v`, warped log p_D.
        target_scores: `b m v`, warped log p_T.
        target_logprobs: `b m v`, normalised log p_T before temperature and truncation.
        noise: `b m v`, the Gumbel noise that the draft was drawn with.
        inside: `b m` bool, False past a row's end.
        sampling: draws further keyed noise, for `key`.
    """

    def __call__(
        self,
        *,
        draft: Tensor,
        draft_scores: Tensor,
        target_scores: Tensor,
        target_logprobs: Tensor,
        noise: Tensor,
        inside: Tensor,
        sampling: Sampling,
        key: tuple[DecodeState, Window],
    ) -> Accepted: ...


@dataclass(frozen=True)
class Coupling:
    """The paper's rule: keep the prefix on which draft and target, drawn with the same noise, are the same token.

    Args:
        threshold: τ; beyond position 0 every committed token has p_T ≥ τ, before temperature and truncation.
        correction: also commit the target's token at the first mismatch, a draw from p_T given the accepted prefix.

    Source: arXiv:2506.00413, universal coupling of draft and target.
    """

    threshold: float = 0.0
    correction: bool = False

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, "0 is the paper, 1 one token per step")

    def __call__(
        self,
        *,
        draft: Tensor,
        target_scores: Tensor,
        target_logprobs: Tensor,
        noise: Tensor,
        inside: Tensor,
        sampling: Sampling,
        **_: object,
    ) -> Accepted:
        target = sampling.pick(target_scores, noise)
        sure = gather_tokens(target_logprobs, target).exp() >= self.threshold
        num_accepted = _accepted((draft == target) & sure, inside)
        if not self.correction:
            return Accepted(draft, num_accepted, num_accepted)
        return _replace(draft, target, num_accepted, allowed=sure & inside)


@dataclass(frozen=True)
class Rejection:
    """Speculative sampling toward p_T: keep x with probability min(1, p_T(x) / p_D(x)), else draw from the residual.

    At the first rejection a draw from the residual ∝ max(p_T − p_D, 0) is always committed; without it the rule does
    not follow p_T. Accepting and the residual have keyed noise of their own: the draft's would tie them to the draft.

    Source: PoE-Bridge, arXiv:2606.08048; Leviathan et al. 2023, arXiv:2211.17192.
    """

    def __call__(
        self,
        *,
        draft: Tensor,
        draft_scores: Tensor,
        target_scores: Tensor,
        inside: Tensor,
        sampling: Sampling,
        key: tuple[DecodeState, Window],
        **_: object,
    ) -> Accepted:
        p_draft, p_target = sampling.probs(draft_scores), sampling.probs(target_scores)
        ratio = gather_tokens(p_target, draft) / gather_tokens(p_draft, draft)
        num_accepted = _accepted(sampling.uniform(*key, stream=ACCEPT) < ratio, inside)

        residual = (p_target - p_draft).clamp(min=0)
        # Rounding can leave nothing of a residual that is almost zero; p_T is its limit then.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_target)
        noise = sampling.gumbel(*key, residual.shape[-1], stream=RESIDUAL)
        replacement = sampling.pick(residual.log(), noise)
        return _replace(draft, replacement, num_accepted, allowed=inside)


def _accepted(agrees: Tensor, inside: Tensor) -> Tensor:
    """Length of the accepted prefix, `b`; position 0 is always in it."""
    agrees = agrees.clone()
    agrees[:, 0] = True
    return prefix_length(agrees & inside)


def _replace(draft: Tensor, replacement: Tensor, num_accepted: Tensor, *, allowed: Tensor) -> Accepted:
    """The draft with the replacement behind its accepted prefix, committed too where it is allowed."""
    first = torch.arange(draft.shape[1], device=draft.device) == num_accepted[:, None]
    tokens = torch.where(first, replacement, draft)
    return Accepted(tokens, num_accepted, num_accepted + (first & allowed).sum(1))
