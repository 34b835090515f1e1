"""Acceptance: which drafted tokens a rule keeps, and the prefix that is accepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from apd.config import check_fraction
from apd.probability import ACCEPT, RESIDUAL, gather_tokens, log_normalise
from apd.returned import check_returned, name_of
from apd.sampling import Noise, Sampling, Scores
from apd.state import DecodeState, Window


@dataclass(frozen=True)
class Judgement:
    """What a rule says of each drafted token, given that all before it were kept.

    Attributes:
        kept: `b m` bool, whether it is kept too.
        instead: `b m` int64, what stands there if it is not.
        replaced: `b m` bool, whether that is committed; `None`: nowhere.
        best: `b m` float32, the best score of the target; see `Picked`.
    """

    kept: Tensor
    instead: Tensor
    replaced: Tensor | None
    best: Tensor


class AcceptanceRule(Protocol):
    """Judges a draft, or a part of one, position by position.

    The very first position of a draft is accepted whatever a rule says: there p_D is the drafter's exact conditional.

    Args:
        draft: `b m` int64.
        draft_scores: warped log p_D.
        target_scores: warped log p_T.
        target_logits: `b m v`, log p_T up to a constant, before temperature and truncation.
        noise: the Gumbel noise that the draft was drawn with.
        sampling: draws further keyed noise, for `key`.
    """

    def __call__(
        self,
        *,
        draft: Tensor,
        draft_scores: Scores,
        target_scores: Scores,
        target_logits: Tensor,
        noise: Noise,
        sampling: Sampling,
        key: tuple[DecodeState, Window],
    ) -> Judgement: ...


def check_judgement(judgement: object, rule: AcceptanceRule, draft: Tensor) -> None:
    """Refuse what would be broadcast when the prefix is accepted; `draft` is `b c`.

    Raises:
        TypeError, ValueError: see `check_returned`.
    """
    by, shape = name_of(rule), tuple(draft.shape)
    if not isinstance(judgement, Judgement):
        raise TypeError(f"`{by}` must return a `Judgement`, got {type(judgement).__name__}.")
    check_returned(judgement.kept, f"{by}().kept", shape, torch.bool)
    check_returned(judgement.instead, f"{by}().instead", shape, torch.int64)
    check_returned(judgement.best, f"{by}().best", shape, torch.float32)
    if judgement.replaced is not None:
        check_returned(judgement.replaced, f"{by}().replaced", shape, torch.bool)


class Accepted(NamedTuple):
    """What became of a part of the window.

    Attributes:
        tokens, chosen, decisive, probs, logits, scores: as in `Proposal`, of this part.
        draft_best, target_best: `b c`, the best scores.
        misses: `b c` int64, how many drafted tokens up to here, in the parts before too, were not kept.
    """

    tokens: Tensor
    chosen: Tensor
    decisive: Tensor
    draft_best: Tensor
    target_best: Tensor
    misses: Tensor
    probs: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None

    @classmethod
    def of(
        cls,
        judgement: Judgement,
        draft: Tensor,
        draft_best: Tensor,
        window: Window,
        logits: list[Tensor],
        before: list[Accepted],
        *,
        keeps_probs: bool,
    ) -> Accepted:
        """The prefix that is kept, and what stands instead of the token behind it, if the rule replaces that.

        Args:
            draft: `b c` int64.
            draft_best: `b c`, its best scores.
            logits: of each model, `b c v`.
            before: the part before this one, none for the first.
            keeps_probs: see `Models`.
        """
        missed = ~window.within(judgement.kept)
        misses = missed.cumsum(1)
        # The very first position is no miss: there p_D is the drafter's exact conditional.
        misses = misses + before[0].misses[:, -1:] if before else misses - misses[:, :1]
        tokens, chosen = draft, misses == 0
        decisive = window.within(misses <= missed)  # none before it
        if judgement.replaced is not None:
            replaced = judgement.replaced & decisive & ~chosen
            tokens, chosen = torch.where(replaced, judgement.instead, draft), chosen | replaced
        probs = None
        if keeps_probs:
            probs = torch.stack([gather_tokens(log_normalise(of_model), tokens) for of_model in logits], -1).exp()
        return cls(tokens, chosen, decisive, draft_best, judgement.best, misses, probs)


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
        target_scores: Scores,
        target_logits: Tensor,
        noise: Noise,
        sampling: Sampling,
        **_: object,
    ) -> Judgement:
        target, best = sampling.pick(target_scores, noise)
        kept = draft == target
        if self.threshold > 0:
            sure = gather_tokens(log_normalise(target_logits), target).exp() >= self.threshold
            return Judgement(kept & sure, target, sure if self.correction else None, best)
        return Judgement(kept, target, torch.ones_like(kept) if self.correction else None, best)


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
        draft_scores: Scores,
        target_scores: Scores,
        target_logits: Tensor,
        sampling: Sampling,
        key: tuple[DecodeState, Window],
        **_: object,
    ) -> Judgement:
        vocab_size = target_logits.shape[-1]
        p_target = sampling.probs(target_scores)
        all_draft, all_target = (p.of_all(vocab_size, missing=0.0) for p in (sampling.probs(draft_scores), p_target))
        ratio = gather_tokens(all_target, draft) / gather_tokens(all_draft, draft)
        kept = sampling.uniform(*key, stream=ACCEPT) < ratio

        # The residual is positive only where p_T is, so it is over p_T's tokens.
        residual = (all_target - all_draft).clamp(min=0)
        # Rounding can leave nothing of a residual that is almost zero; p_T is its limit then.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, all_target)
        over_target = residual if p_target.ids is None else residual.gather(-1, p_target.ids)
        residual_scores = Scores(over_target.log(), p_target.ids)
        instead = sampling.pick(residual_scores, sampling.noise(*key, stream=RESIDUAL)).tokens
        return Judgement(kept, instead, torch.ones_like(kept), target_scores.values.amax(-1))
