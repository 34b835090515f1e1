"""READ FIRST. One decode step of adaptive parallel decoding (arXiv:2506.00413).

    1. Draft.   One drafter forward over the window's masks; one token for each, from its marginals.
    2. Verify.  One verifier forward over the draft scores each drafted token given those before it.
    3. Mix.     p_T ∝ p_D^R · p_AR^(1−R) at every position.
    4. Accept.  The longest prefix on which draft and mixture agree (`acceptance.py`).
    5. Commit.  Write it, cut at the first stop token, move the frontier (`commit.py`).

`APD.propose` and `judge` are steps 1 to 4; `decode_step` adds step 5 and is the same for every strategy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from apd.config import check_first, check_fraction
from apd.decoding.acceptance import (
    AcceptanceRule,
    Accepted,
    Coupling,
    Distribution,
    Evidence,
    accepted_prefix,
    judgement_of,
    record,
)
from apd.decoding.commit import (
    EMPTY_TARGET,
    TARGET_FAULT,
    Proposal,
    StepInfo,
    Stopping,
    check_proposal,
    commit,
)
from apd.decoding.pair import Draft, Kernels, ModelPair, concatenate, draw
from apd.decoding.probability import mix, non_finite
from apd.decoding.returned import check_drawable, name_of
from apd.decoding.sampling import Sampling, Scores
from apd.decoding.state import DecodeState
from apd.decoding.strategy import Memoryless, StrategySession
from apd.decoding.window import Window, WindowPolicy, check_window

_PAPER = Coupling()


@dataclass(frozen=True)
class APD(Memoryless):
    """Adaptive parallel decoding: commit the longest prefix on which draft and mixture agree.

    Args:
        mixture_weight: R in [0, 1]; at 1 the verifier is not needed.
        rule: the acceptance rule; the paper's if not given.
        first: `"draft"`: the first token of a step is the drafter's, whatever the rule says. `"judge"`: the rule judges it,
            too, and its replacement is committed where it rejects; the rule must have one, as `Rejection` and
            `Coupling(correction=True)` do. At R = 1 the target is the draft, and nothing is rejected.

    Raises:
        ValueError: an argument is out of its range, or the rule could leave a step without a token.

    Source: Israel, Van den Broeck, Grover 2025, arXiv:2506.00413.
    """

    mixture_weight: float
    rule: AcceptanceRule = _PAPER
    first: str = "draft"
    left_to_right = True

    def __post_init__(self) -> None:
        check_fraction("mixture_weight", self.mixture_weight, "1 trusts the drafter alone, 0 the verifier alone")
        check_first("first", self.first)
        rule = self.rule
        if self.judges_first and isinstance(rule, Coupling) and (rule.threshold > 0 or not rule.correction):
            raise ValueError(
                f"`rule` must replace every first token that it rejects with first='judge', got {rule}: a step could commit "
                "nothing. Use Coupling(correction=True), Rejection(), or first='draft'."
            )

    @property
    def judges_first(self) -> bool:
        return self.first == "judge"

    @property
    def needs_verifier(self) -> bool:  # type: ignore[override]
        return self.mixture_weight < 1

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
        # 1. Draft.
        drafts = pair.draft(state, window, sampling)

        # 2. Verify.
        verify = pair.score if getattr(self.rule, "scores_only", False) else pair.verify
        verified = verify(state, window, drafts.tokens) if self.needs_verifier else None

        def judge_part(part: slice, draft: Draft, previous: Accepted | None) -> Accepted:
            seen = None if verified is None else verified[:, part]
            return pair.kernels.judge(self, draft, seen, state, window.part(part), pair, sampling, previous)

        # 3. Mix and 4. accept, part by part while some row still agrees.
        parts = drafts.fold(judge_part, is_last=lambda accepted: bool((accepted.misses[:, -1] > 0).all()))
        accepted = concatenate(parts, window.columns.shape[1])
        return Proposal(
            tokens=accepted.tokens,
            chosen=accepted.chosen,
            decisive=accepted.decisive,
            fault=accepted.fault,
            draft=drafts.tokens,
            models=("target", "drafter", "verifier") if self.needs_verifier else ("target", "drafter"),
            probs=accepted.probs,
            logits=accepted.logits,
            scores=accepted.scores,
        )


def judge(
    apd: APD,
    draft: Draft,
    verified: Tensor | None,
    state: DecodeState,
    window: Window,
    pair: ModelPair,
    sampling: Sampling,
    previous: Accepted | None,
) -> Accepted:
    """Steps 3 and 4 of a window, or of a part of it.

    Args:
        verified: the verifier's raw logits, `b c v′`; log p_AR of the drafted tokens, `b c`, for rules with
            `scores_only`; `None` at R = 1.
        previous: the part before this one, `None` for the first.
    """
    # 3. Mix raw, then warp: the other order gives empty supports. At R = 1 the target is the draft, bit for bit.
    drafter = target = Distribution(draft.logits, draft.scores)
    verifier, scores, fault = None, None, draft.fault.long()
    if verified is not None and verified.dim() == 2:
        scores = verified
        fault.add_(scores.isnan() | scores.isposinf(), alpha=TARGET_FAULT)
    elif verified is not None:
        logits = pair.support.restrict(verified, state, window, lambda _, i: draft.tokens[:, i])
        verifier = Distribution(logits, Scores(logits))
        mixture = mix(draft.logits, logits, apd.mixture_weight)
        target = Distribution(mixture, sampling.warp(mixture))
        best = target.scores.largest[0]
        fault.add_(non_finite(best), alpha=TARGET_FAULT).add_(best.isneginf(), alpha=EMPTY_TARGET)

    # 4. Accept.
    evidence = Evidence(draft.tokens, drafter, verifier, target, scores, draft.noise, sampling, state, window)
    judgement = judgement_of(apd.rule, evidence)
    given = window.gather(state.given) if pair.support.processing.has_holes else None
    accepted = accepted_prefix(judgement, draft.tokens, fault, given, window, previous, judges_first=apd.judges_first)
    if judgement.replacement is not None:
        ids = {"vocab_size": pair.support.vocab_size, "mask_token_id": pair.mask_token_id}
        check_drawable(accepted.tokens, apd.rule, "replacement", **ids)
    return record(
        accepted, evidence, probs=pair.record_probs, scores=pair.record_scores, judges_first=apd.judges_first
    )


def decode_step(
    state: DecodeState,
    *,
    strategy: StrategySession,
    pair: ModelPair,
    sampling: Sampling,
    policy: WindowPolicy,
    stopping: Stopping,
) -> tuple[DecodeState, StepInfo]:
    """One step of every row: the strategy proposes, and 5. what it chose is committed.

    Returns:
        The rows after the step, and what happened in it. The strategy's session, the pair's sessions and the pair's
        counters are updated; `state` is not.
    """
    drafted, verified, pair.extra_canvases = pair.drafter_forwards, pair.verifier_forwards, None
    window = policy.window(state)
    check_window(window, state, name_of(getattr(policy, "policy", policy)))
    proposal = strategy.propose(state, window, pair, sampling)
    window = getattr(proposal, "window", None) or window
    by = name_of(strategy, "propose")
    check_proposal(proposal, by, window, probs=pair.record_probs, scores=pair.record_scores)

    # 5. Commit.
    after, info = pair.kernels.commit(state, window, proposal, stopping=stopping, mask_token_id=pair.mask_token_id)
    info = dataclasses.replace(
        info,
        drafter_forwards=pair.drafter_forwards - drafted,
        verifier_forwards=pair.verifier_forwards - verified,
        extra_canvases=pair.extra_canvases,
    )
    return policy.update(after, info), info


#: The pure functions of a step as they are; `apd.models.graphs` has compiled ones.
PLAIN = Kernels(draw, judge, commit)
