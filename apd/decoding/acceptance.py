"""4. Accept: the rules that judge a draft, and the prefix that is accepted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from apd.config import check_fraction
from apd.decoding.commit import NOT_REPLACED
from apd.decoding.noise import ACCEPT, DRAFT, RESIDUAL, Noise
from apd.decoding.probability import gather_tokens, log_normalise
from apd.decoding.returned import check_returned, name_of
from apd.decoding.sampling import Sampling, Scores
from apd.decoding.state import DecodeState
from apd.decoding.window import Window


@dataclass(frozen=True)
class Distribution:
    """A model's distribution at every position of a window, or of a part of it.

    Attributes:
        logits: `b m v` float32, log p up to a constant, before temperature and truncation; −∞ removes a token.
        scores: log p after temperature and truncation, which tokens are drawn from; the verifier's are its logits.
    """

    logits: Tensor
    scores: Scores

    @property
    def logprobs(self) -> Tensor:
        """log p, `b m v` float32, before temperature and truncation."""
        return log_normalise(self.logits)

    def logprob(self, tokens: Tensor) -> Tensor:
        """log p of one token per position: `b m` int64 → `b m` float32."""
        return gather_tokens(self.logprobs, tokens)


@dataclass(frozen=True)
class Evidence:
    """What a rule may base its judgement on.

    Attributes:
        draft: `b m` int64, x.
        drafter: p_D.
        verifier: p_AR given the drafted tokens before each position; `None` at R = 1 and for rules with `scores_only`.
        target: p_T, the mixture; for rules with `scores_only` it is p_D.
        verifier_logprobs: `b m` float32, log p_AR of the drafted tokens; for rules with `scores_only`.
        draft_noise: the keyed noise that the draft was drawn with.
        sampling: draws tokens: `sampling.sample(scores, evidence.noise(RESIDUAL)).tokens`.
        state, window: the rows and their columns; a part of them for a part of a window.
    """

    draft: Tensor
    drafter: Distribution
    verifier: Distribution | None
    target: Distribution
    verifier_logprobs: Tensor | None
    draft_noise: Noise
    sampling: Sampling
    state: DecodeState
    window: Window

    def noise(self, stream: int) -> Noise:
        """Keyed noise of the positions: `DRAFT` is the draft's, every other stream is independent of it."""
        return self.draft_noise if stream == DRAFT else self.sampling.noise(self.state, self.window, stream)


@dataclass(frozen=True)
class Judgement:
    """What a rule decides about each drafted token, given that all before it were accepted.

    Attributes:
        accept: `b m` bool, whether the token is accepted.
        replacement: `b m` int64, the token to commit at the first position that is not accepted; `None`: none.
        use_replacement: `b m` bool, where the replacement may be committed; `None`: everywhere.
    """

    accept: Tensor
    replacement: Tensor | None = None
    use_replacement: Tensor | None = None


@runtime_checkable
class AcceptanceRule(Protocol):
    """Judges a draft, or a part of one, position by position.

    The very first position of a draft is accepted whatever a rule says, since p_D is the drafter's exact conditional
    there; with `APD(..., first="judge")` the rule decides there, too, and must replace what it rejects. A rule with a true
    attribute `scores_only` needs p_AR of the drafted tokens alone.
    """

    def __call__(self, evidence: Evidence, /) -> Judgement: ...


def judgement_of(rule: AcceptanceRule, evidence: Evidence) -> Judgement:
    """The rule's judgement, refused where a wrong shape would be broadcast.

    Raises:
        TypeError, ValueError: see `check_returned`.
    """
    judgement, by, shape = rule(evidence), name_of(rule), tuple(evidence.draft.shape)
    if not isinstance(judgement, Judgement):
        raise TypeError(f"`{by}` must return a `Judgement`, got {type(judgement).__name__}.")
    check_returned(judgement.accept, f"{by}().accept", shape, torch.bool)
    if judgement.replacement is not None:
        check_returned(judgement.replacement, f"{by}().replacement", shape, torch.int64)
    if judgement.use_replacement is not None:
        check_returned(judgement.use_replacement, f"{by}().use_replacement", shape, torch.bool)
    return judgement


@dataclass(frozen=True)
class Accepted:
    """The prefix of a window, or of a part of it, that is committed.

    Attributes:
        tokens, chosen, decisive, fault, probs, logits, scores: as in `Proposal`, of this part.
        misses: `b c` int64, drafted tokens up to here, earlier parts included, that were not accepted.
    """

    tokens: Tensor
    chosen: Tensor
    decisive: Tensor
    fault: Tensor
    misses: Tensor
    probs: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None


def accepted_prefix(
    judgement: Judgement,
    draft: Tensor,
    fault: Tensor,
    given: Tensor | None,
    window: Window,
    previous: Accepted | None,
    *,
    judges_first: bool = False,
) -> Accepted:
    """The longest accepted prefix, and the rule's replacement behind it.

    Args:
        draft: `b c` int64.
        fault: `b c` int64, see `Proposal.fault`.
        given: `b c` bool, given tokens between two holes, which are never a miss; `None`: there are none.
        previous: the part before this one, `None` for the first.
        judges_first: whether the very first position may be a miss. If not, it is accepted: p_D is the drafter's exact
            conditional there.
    """
    missed = ~window.within(judgement.accept if given is None else judgement.accept | given)
    misses = missed.cumsum(1)
    if previous is not None:
        misses = misses + previous.misses[:, -1:]
    elif not judges_first:
        misses = misses - misses[:, :1]
    tokens, chosen = draft, misses == 0
    decisive = window.within(misses <= missed)  # up to and including the first miss
    if judgement.replacement is not None:
        replaced = decisive & ~chosen
        if judgement.use_replacement is not None:
            replaced = replaced & judgement.use_replacement
        tokens, chosen = torch.where(replaced, judgement.replacement, draft), chosen | replaced
    if judges_first and previous is None:
        is_first = torch.arange(draft.shape[1], device=draft.device) == 0
        fault = fault + NOT_REPLACED * (is_first & decisive & ~chosen)
    return Accepted(tokens, chosen, decisive, fault, misses)


def record(
    accepted: Accepted, evidence: Evidence, *, probs: bool, scores: bool, judges_first: bool = False
) -> Accepted:
    """`accepted` with the untempered probabilities of its tokens, and with the scores that decided each position."""
    if probs:
        models = [evidence.target, evidence.drafter, evidence.verifier]
        logprobs = [model.logprob(accepted.tokens) for model in models if model is not None]
        if evidence.verifier_logprobs is not None:
            logprobs.append(evidence.verifier_logprobs)
        accepted = dataclasses.replace(accepted, probs=torch.stack(logprobs, -1).exp())
    if scores:
        logits = evidence.target.logits
        if not judges_first:  # the drafter alone decides the first position, the mixture the others
            logits = torch.cat([evidence.drafter.logits[:, :1], logits[:, 1:]], 1)
        logits = log_normalise(logits)
        warped = evidence.sampling.warp(logits).dense(logits.shape[-1])
        accepted = dataclasses.replace(accepted, logits=logits, scores=warped)
    return accepted


@dataclass(frozen=True)
class Coupling:
    """The paper's rule: accept the prefix on which draft and target, drawn with the same noise, are the same token.

    Args:
        threshold: τ in [0, 1]; beyond position 0 every committed token has p_T ≥ τ, before temperature and truncation.
        correction: at the first mismatch commit the target's token, a draw from p_T given the accepted prefix.

    Source: arXiv:2506.00413, universal coupling of draft and target.
    """

    threshold: float = 0.0
    correction: bool = False

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, "0 is the paper, 1 one token per step")

    def __call__(self, evidence: Evidence, /) -> Judgement:
        target = evidence.sampling.sample(evidence.target.scores, evidence.noise(DRAFT)).tokens
        accept, replacement = evidence.draft == target, target if self.correction else None
        if self.threshold == 0:
            return Judgement(accept, replacement)
        is_sure = evidence.target.logprob(target).exp() >= self.threshold
        return Judgement(accept & is_sure, replacement, is_sure)


@dataclass(frozen=True)
class Rejection:
    """Speculative sampling toward p_T: accept x with probability min(1, p_T(x) / p_D(x)), else draw from the residual.

    At the first rejection a draw from the residual ∝ max(p_T − p_D, 0) is always committed; without it the rule does
    not follow p_T. Accepting and the residual have noise streams of their own: the draft's would bias them.

    Source: PoE-Bridge, arXiv:2606.08048; Leviathan et al. 2023, arXiv:2211.17192.
    """

    def __call__(self, evidence: Evidence, /) -> Judgement:
        sampling, target, drafter = evidence.sampling, evidence.target.scores, evidence.drafter.scores
        vocab_size = evidence.target.logits.shape[-1]
        p_target = sampling.probs(target)
        dense_draft, dense_target = (p.dense(vocab_size, missing=0.0) for p in (sampling.probs(drafter), p_target))
        ratio = gather_tokens(dense_target, evidence.draft) / gather_tokens(dense_draft, evidence.draft)
        accept = evidence.noise(ACCEPT).uniform() < ratio

        # The residual is positive only where p_T is, so it has p_T's tokens.
        residual = (dense_target - dense_draft).clamp(min=0)
        # Rounding can leave nothing of a residual that is almost zero; p_T is its limit then.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, dense_target)
        over_target = residual if p_target.ids is None else residual.gather(-1, p_target.ids)
        scores = Scores(over_target.log(), p_target.ids)
        return Judgement(accept, sampling.sample(scores, evidence.noise(RESIDUAL)).tokens)
