"""`Unmasking`, the base of strategies that need the drafter only, and their measures: confidence, entropy, ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from apd.decoding.commit import Proposal
from apd.decoding.pair import Draft, ModelPair, concatenate
from apd.decoding.probability import gather_tokens
from apd.decoding.returned import check_numbers, check_returned, name_of
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.strategy import Memoryless
from apd.decoding.window import Window

#: Probabilities above this, within 32 float32 steps of 1, rank equal, the leftmost first. Otherwise the trailing stop
#: tokens, whose confidence is a little higher, would be committed before the answer.
CERTAIN = 1 - 2.0**-19


class Unmasking(Memoryless):
    """A strategy that drafts the window's masks and commits those that `choose` selects. It needs the drafter only.

    Subclasses define `choose`, and `measure` if they select by another quantity than the confidence.

    Attributes:
        reach: masks of the window that `choose` can select from, counted from the frontier; `None`: all. Only these
            are drafted.
        counts_steps: True if `choose` reads `state.steps`.
    """

    reach: int | None = None
    counts_steps: bool = False

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
        width = window.columns.shape[1]
        reach = self.reach
        if reach is not None and state.has_holes:  # given tokens stand between the masks
            ends = state.columns_behind([reach] * len(state.rows))
            reach = max(reach, *(end - start for start, end in zip(state.layout.frontier, ends, strict=True)))
        drafts = pair.draft(state, window, sampling, reach)
        measures, probs, faults = [], [], []
        for part, draft in drafts:
            measures.append(self.measure(draft, window.part(part)))
            check_returned(measures[-1], name_of(self, "measure"), tuple(draft.tokens.shape), torch.float32)
            faults.append(draft.fault)
            if pair.record_probs:
                probs.append(confidence(draft))
        candidate = window.within(~window.gather(state.decided))
        measure, fault = concatenate(measures, width), concatenate(faults, width)
        check_numbers(measure, self, "measure", where=candidate, fault=fault)
        chosen = self.chosen(measure, candidate, state, window, sampling)
        return single_model_proposal(
            "drafter",
            draft,
            pair,
            sampling,
            tokens=concatenate([drafts.tokens], width),
            chosen=chosen,
            decisive=candidate,
            drafted=drafts.tokens,
            fault=fault,
            probs=concatenate(probs, width) if probs else None,
        )

    def chosen(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        """The candidates that `choose` selects, with shape and dtype checked: `b m` bool. Arguments as in `choose`."""
        if not candidate.shape[1]:  # finished rows only
            return candidate
        chosen = self.choose(measure, candidate, state, window, sampling)
        check_returned(chosen, name_of(self, "choose"), tuple(candidate.shape), torch.bool)
        return chosen & candidate

    def measure(self, draft: Draft, window: Window) -> Tensor:
        """The quantity by which `choose` selects, from each drafted distribution.

        Args:
            draft: the draft of a window, or of a part of it.
            window: the columns of the draft.
        Returns:
            `b m` float; by default the confidence.
        """
        return confidence(draft)

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        """Select the candidates to commit. A pure function of its arguments, for any batch of rows.

        Args:
            measure: `b m` float, see `measure`.
            candidate: `b m` bool, the undecided columns of the window, at least one in each row that is not done.
            state: the rows.
            window: the columns.
            sampling: source of keyed noise, `sampling.noise(state, window, ORDER)`.
        Returns:
            `b m` bool; entries outside `candidate` are ignored.
        """
        raise NotImplementedError(
            f"`{type(self).__name__}` must have the method `choose(measure, candidate, state, window, sampling)`, which says what "
            "to commit. Define it, or override `propose`."
        )


def single_model_proposal(
    model: str,
    draft: Draft,
    pair: ModelPair,
    sampling: Sampling,
    *,
    tokens: Tensor,
    chosen: Tensor,
    decisive: Tensor,
    drafted: Tensor,
    fault: Tensor,
    probs: Tensor | None,
) -> Proposal:
    """The proposal of a strategy that uses one model only. The model's distribution is also the target.

    Args:
        model: `"drafter"` or `"verifier"`.
        draft: the model's draft of the window; of the last part, if the window is drafted in several.
        pair: says what is recorded.
        sampling: warps the recorded scores.
        tokens, chosen, decisive: as in `Proposal`.
        drafted: `Proposal.draft`.
        fault: `b m` bool, as in `Draft`.
        probs: `b m` float32, untempered probabilities of `tokens`, or `b 1` if all are one token; `None`: not recorded.
    """
    logits, scores = None, None
    if pair.record_scores:  # the window is one part then
        warped = sampling.warp(draft.logprobs).dense(pair.support.vocab_size)
        logits, scores = (
            each.expand(*tokens.shape, -1) if each.shape[1] == 1 else concatenate([each], tokens.shape[1])
            for each in (draft.logprobs, warped)
        )
    return Proposal(
        tokens=tokens,
        chosen=chosen,
        decisive=decisive,
        fault=fault.long(),
        draft=drafted,
        models=("target", model),
        probs=None if probs is None else probs[..., None].expand(*tokens.shape, 2),
        logits=logits,
        scores=scores,
    )


def next_token_proposal(state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
    """The proposal of each row's next token, as the verifier alone decides it."""
    first = window.first()
    [(_, draft)] = pair.draft_next_token(state, first, sampling)
    is_first = window.columns == first.columns
    return single_model_proposal(
        "verifier",
        draft,
        pair,
        sampling,
        tokens=draft.tokens.expand_as(window.columns),
        chosen=is_first,
        decisive=window.within(is_first),
        drafted=draft.tokens,
        fault=draft.fault.expand_as(window.columns),
        probs=confidence(draft) if pair.record_probs else None,
    )


def confidence(draft: Draft) -> Tensor:
    """Untempered probability of each drafted token: `b m` float32, in [0, 1]."""
    return gather_tokens(draft.logprobs, draft.tokens).exp()


def entropy(draft: Draft) -> Tensor:
    """Entropy of each untempered distribution, in nats: `b m` float32."""
    # A removed token has log-probability −∞ and contributes nothing.
    return -(draft.logprobs.exp() * draft.logprobs.clamp(min=torch.finfo(draft.logprobs.dtype).min)).sum(-1)


def ranks(measure: Tensor, candidate: Tensor) -> Tensor:
    """Rank of each position among the candidates by descending `measure`: 0 is the highest; ties rank from the left.

    Args:
        measure: `b m` float; values above `CERTAIN` are equal.
        candidate: `b m` bool; other positions rank behind all candidates.
    Returns:
        `b m` int64.
    """
    measure = measure.clamp(max=CERTAIN).masked_fill(~candidate, -torch.inf)
    order = measure.sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
