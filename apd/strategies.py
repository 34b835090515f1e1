"""APD's rivals behind the same step: one loop, one stopping rule, one way of counting.

Every class here says which masks of the window to commit, given one drafted token for each. All but `LeftToRight` and
`Autoregressive` commit in any order. With keyed noise a position that was postponed draws the same token again as long
as its distribution stays the same; published samplers redraw it, which `noise="step"` does too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from apd.config import check_count, check_fraction, check_number
from apd.probability import ORDER, gather_tokens
from apd.returned import check_returned, name_of
from apd.sampling import Sampling
from apd.state import DecodeState, Proposal, Window, to_device
from apd.step import Draft, Memoryless, Models, joined


class Unmasking(Memoryless):
    """A strategy that drafts the window's masks and commits those that `choose` picks, the drafter alone deciding."""

    needs_verifier = False
    left_to_right = False
    is_random = False

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal:
        drafts = models.draft(state, window, sampling)
        tokens, best, measures, probs = [], [], [], []
        for part in drafts.parts:
            draft = drafts[part]
            tokens.append(draft.tokens)
            best.append(draft.best)
            measures.append(self.measure(draft, window.part(part)))
            check_returned(measures[-1], name_of(self, "measure"), tuple(draft.tokens.shape), torch.float32)
            if models.keeps_probs:
                probs.append(confidence(draft))
        candidate = window.within(~window.of(state.decided))
        drafted, measure = joined(tokens), joined(measures)
        chosen = self.chosen(measure, candidate, state, window, sampling)
        return alone(
            "drafter",
            draft,
            models,
            sampling,
            tokens=drafted,
            chosen=chosen,
            decisive=candidate,
            drafted=drafted,
            best=joined(best),
            probs=joined(probs) if probs else None,
        )

    def chosen(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        """The candidates that `choose` picks, `b m` bool."""
        chosen = self.choose(measure, candidate, state, window, sampling)
        check_returned(chosen, name_of(self, "choose"), tuple(candidate.shape), torch.bool)
        return chosen & candidate

    def measure(self, draft: Draft, window: Window) -> Tensor:
        """What `choose` wants to know of each distribution, of a window or a part of it: `b m` float."""
        return confidence(draft)

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        """Which of the candidates (`b m` bool, at least one in each row that is not done) to commit, `b m` bool."""
        raise NotImplementedError


class _TopK(Unmasking):
    """Commits the K candidates that rank highest; all of them where fewer are left.

    Args:
        tokens_per_step: K, at least 1; or one K for each step, the last of which goes for all further ones.
    """

    tokens_per_step: int | Sequence[int]

    def __post_init__(self) -> None:
        if not self._schedule:
            raise ValueError(f"`tokens_per_step` must be at least 1, got {self.tokens_per_step}.")
        for count in self._schedule:
            check_count("tokens_per_step", count, "Use 1 for sequential decoding")

    def rank(self, measure: Tensor, state: DecodeState, window: Window, sampling: Sampling) -> Tensor:
        """What to order candidates by, highest first: `b m` float."""
        return measure

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        return _places(self.rank(measure, state, window, sampling), candidate) < self.count(state)

    def count(self, state: DecodeState) -> Tensor | int:
        """K for the next step of each row, `b 1` int64, or of all."""
        if not isinstance(self.tokens_per_step, Sequence):
            return self.tokens_per_step
        schedule = to_device(list(self.tokens_per_step), state.steps.device)
        return schedule[state.steps.clamp(max=len(schedule) - 1)][:, None]

    @property
    def _schedule(self) -> Sequence[int]:
        return self.tokens_per_step if isinstance(self.tokens_per_step, Sequence) else [self.tokens_per_step]


@dataclass(frozen=True)
class LeftToRight(_TopK):
    """The K leftmost masks. K = 1 is sequential decoding, the reference everywhere.

    Args:
        tokens_per_step: K, at least 1; or one for each step, the last of which goes for all further ones.

    Source: the left-to-right baseline of arXiv:2506.00413.
    """

    tokens_per_step: int | Sequence[int] = 1
    left_to_right = True

    def measure(self, draft: Draft, window: Window) -> Tensor:
        return draft.best  # nobody looks at it, so it is what is at hand

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        return candidate & (candidate.cumsum(1) <= self.count(state))


@dataclass(frozen=True)
class RandomOrder(_TopK):
    """K masks at random, in an order that depends on the row's seed alone.

    Args:
        tokens_per_step: K, at least 1; or one for each step, the last of which goes for all further ones.

    Source: the random strategy of arXiv:2510.04767 (ParallelBench), the forward process of masked diffusion run back.
    """

    tokens_per_step: int | Sequence[int] = 1
    is_random = True

    def measure(self, draft: Draft, window: Window) -> Tensor:
        return draft.best  # nobody looks at it, so it is what is at hand

    def rank(self, measure: Tensor, state: DecodeState, window: Window, sampling: Sampling) -> Tensor:
        return sampling.uniform(state, window, ORDER)


@dataclass(frozen=True)
class Confidence(_TopK):
    """The K masks whose drawn token has the highest probability.

    Args:
        tokens_per_step: K, at least 1; or one for each step, the last of which goes for all further ones.

    Source: low-confidence remasking of LLaDA, arXiv:2502.09992; `maskgit_plus` of Dream.
    """

    tokens_per_step: int | Sequence[int] = 1


@dataclass(frozen=True)
class Margin(_TopK):
    """The K masks where the likeliest token leads the second likeliest by most probability.

    Args:
        tokens_per_step: K, at least 1; or one for each step, the last of which goes for all further ones.

    Source: `topk_margin` of Dream; Kim et al. 2025, arXiv:2502.06768.
    """

    tokens_per_step: int | Sequence[int] = 1

    def measure(self, draft: Draft, window: Window) -> Tensor:
        first, second = draft.logprobs.topk(2, dim=-1).values.exp().unbind(-1)
        return first - second


@dataclass(frozen=True)
class Entropy(_TopK):
    """The K masks whose distribution has the lowest entropy.

    Args:
        tokens_per_step: K, at least 1; or one for each step, the last of which goes for all further ones.

    Source: `entropy` of Dream, arXiv:2508.15487.
    """

    tokens_per_step: int | Sequence[int] = 1

    def measure(self, draft: Draft, window: Window) -> Tensor:
        return -entropy(draft)


@dataclass(frozen=True)
class Threshold(Unmasking):
    """Every mask whose drawn token has at least probability γ, and always the most confident one.

    Args:
        threshold: γ in [0, 1].

    Source: confidence-aware decoding of Fast-dLLM, arXiv:2505.22618.
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, "1 is one token per step")

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        return (measure >= self.threshold) | (_places(measure, candidate) == 0)


@dataclass(frozen=True)
class Factor(Unmasking):
    """The n most confident masks for the largest n with (n + 1)·(1 − c_n) < f, c_n being the n-th confidence.

    Fast-dLLM's code also commits the last mask whenever all before it pass, whatever its confidence; its definition,
    which is what stands here, does not.

    Args:
        factor: f > 0.

    Source: factor-based decoding of Fast-dLLM, arXiv:2505.22618.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        remedy = "Small values commit one token per step"
        check_number("factor", self.factor, "above 0", lambda value: value > 0, remedy)

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        place = _places(measure, candidate)
        passes = ((place + 2) * (1 - measure) < self.factor) & candidate
        # n is the largest place that passes, counted from 1; every place before it is committed with it.
        largest = (place + 1).masked_fill(~passes, 1).amax(1, keepdim=True)
        return place < largest


@dataclass(frozen=True)
class EntropyBound(Unmasking):
    """The masks of lowest entropy, as many as keep Σ H − max H within γ: a bound on what they know of each other.

    Args:
        bound: γ ≥ 0, in nats.

    Source: EB-Sampler, arXiv:2505.24857.
    """

    bound: float = 0.1

    def __post_init__(self) -> None:
        remedy = "Use 0 for certain tokens only"
        check_number("bound", self.bound, "at least 0 nats", lambda value: value >= 0, remedy)

    def measure(self, draft: Draft, window: Window) -> Tensor:
        return entropy(draft)

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        place = _places(-measure, candidate)
        in_order = torch.zeros_like(measure).scatter(1, place, measure)
        # In rising order the largest of the first n is the n-th, so Σ − max is the sum of those before it.
        before = in_order.cumsum(1) - in_order
        return (before <= self.bound).gather(1, place)


@dataclass(frozen=True)
class OneStep(Unmasking):
    """Every mask of the window at once, as APD does at R = 1."""

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        return candidate


@dataclass(frozen=True)
class Blocks(Unmasking):
    """Semi-autoregressive: another strategy, block by block from left to right.

    Candidates are the masks of the first block that has any; the drafter still sees the whole canvas.

    Args:
        strategy: picks within a block.
        length: of a block in tokens, at least 1, counted from the end of the prompt.

    Source: arXiv:2502.09992 (LLaDA), semi-autoregressive remasking.
    """

    strategy: Unmasking
    length: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, Unmasking):
            raise TypeError(
                f"`strategy` must pick within a block by the state alone, got {self.strategy!r}. Use Confidence, "
                "Threshold or the like."
            )
        check_count("length", self.length, "Use 1 for sequential decoding")

    @property
    def is_random(self) -> bool:  # type: ignore[override]
        return self.strategy.is_random

    def measure(self, draft: Draft, window: Window) -> Tensor:
        return self.strategy.measure(draft, window)

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        block = (window.columns - state.start[:, None]) // self.length
        within = candidate & (block == block[:, :1])  # the frontier is the window's first column
        return self.strategy.chosen(measure, within, state, window, sampling)


@dataclass(frozen=True)
class Autoregressive(Memoryless):
    """The verifier alone, one token per step: a plain causal LM under the same loop. The drafter never runs."""

    needs_verifier = True
    left_to_right = True

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal:
        first = Window(window.columns[:, :1], window.inside[:, :1], window.starts, [t + 1 for t in window.starts])
        draft = models.next_token(state, first, sampling)[slice(0, 1)]
        is_first = window.columns == first.columns
        return alone(
            "verifier",
            draft,
            models,
            sampling,
            tokens=draft.tokens.expand_as(window.columns),
            chosen=is_first,
            decisive=window.within(is_first),
            drafted=draft.tokens,
            best=draft.best.expand_as(window.columns),
            probs=confidence(draft) if models.keeps_probs else None,
        )


@dataclass(frozen=True)
class KLASS:
    """Every mask that is confident and whose distribution has stopped changing; else the most confident one.

    A mask is stable when KL(p_now ‖ p_before) stayed below ε for the last h steps.

    Args:
        threshold: confidence in [0, 1] that a drawn token must exceed.
        kl_threshold: ε > 0, in nats.
        history: h, at least 1 step.

    Source: KL-adaptive stability sampling, arXiv:2511.05664.
    """

    threshold: float = 0.9
    kl_threshold: float = 0.01
    history: int = 2
    needs_verifier = False
    left_to_right = False

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, "1 is one token per step")
        remedy = "Small values commit one token per step"
        check_number("kl_threshold", self.kl_threshold, "above 0 nats", lambda value: value > 0, remedy)
        check_count("history", self.history, "It counts steps")

    def open(self, state: DecodeState) -> _KLASSSession:
        return _KLASSSession(self, state)


class _KLASSSession(Unmasking):
    """Remembers the last distribution of every column, and for how many steps it has hardly changed."""

    def __init__(self, klass: KLASS, state: DecodeState) -> None:
        self.klass = klass
        self.before: Tensor | None = None  # b l+1 v, probabilities; the last column takes writes past a row's end
        self.calm = torch.zeros(len(state.rows), state.width + 1, dtype=torch.int64, device=state.tokens.device)

    def measure(self, draft: Draft, window: Window) -> Tensor:
        row, column = torch.arange(len(self.calm), device=self.calm.device)[:, None], self._slot(window)
        now = draft.logprobs.exp()
        if self.before is None:
            self.before = now.new_zeros(*self.calm.shape, now.shape[-1])
        # A column that was never drafted has p_before = 0 and an infinite divergence; x log(x/0) is inf, 0 log 0 is 0.
        divergence = torch.special.xlogy(now, now / self.before[row, column]).nansum(-1)
        calm = torch.where(divergence < self.klass.kl_threshold, self.calm[row, column] + 1, 0)
        self.before[row, column] = now
        self.calm[row, column] = calm
        return confidence(draft)

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        calm = self.calm.gather(1, self._slot(window))
        stable = (measure > self.klass.threshold) & (calm >= self.klass.history) & candidate
        return torch.where(stable.any(1, keepdim=True), stable, _places(measure, candidate) == 0)

    def _slot(self, window: Window) -> Tensor:
        return window.columns.masked_fill(~window.inside, self.calm.shape[1] - 1)

    def select(self, rows: Tensor) -> None:
        self.calm = self.calm.index_select(0, rows)
        self.before = None if self.before is None else self.before.index_select(0, rows)

    def join(self, state: DecodeState) -> None:
        rows, columns = len(state.rows) - len(self.calm), state.width + 1 - self.calm.shape[1]
        self.calm = pad(self.calm, (0, columns, 0, rows))
        self.before = None if self.before is None else pad(self.before, (0, 0, 0, columns, 0, rows))


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
    needs_verifier = False
    left_to_right = False

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

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal:
        # Columns that no row needs any more are dropped.
        self.tokens, self.stands = self.tokens[:, : state.width], self.stands[:, : state.width]
        canvas = dataclasses.replace(
            state,
            tokens=torch.where(self.stands, self.tokens, state.tokens),
            decided=state.decided | self.stands,
        )
        block = (window.columns - state.start[:, None]) // self.wino.length
        inside = window.within(block == block[:, :1])  # nothing in it is committed: it starts at the frontier
        stood, standing = inside & window.of(self.stands), window.of(self.tokens)
        drafts = models.draft_again(canvas, window, sampling)
        said = []
        for part in drafts.parts:
            draft = drafts[part]
            chosen = torch.where(stood[:, part], standing[:, part], draft.tokens)
            said.append((chosen, draft.best, gather_tokens(draft.logprobs, chosen).exp()))
        tokens, best, probs = map(joined, zip(*said, strict=True))

        # 1. Wide in.
        masks = inside & ~stood
        place = _places(probs, masks)
        most = (masks.sum(1) * 7 // 10).clamp(5, 20)[:, None]
        unmasked = masks & ((place == 0) | (probs > self.wino.threshold) & (place < most))
        num_unmasked = unmasked.sum(1)

        # 2. Narrow out.
        doubted = stood & (probs < self.wino.revoke_below)
        most = torch.where(num_unmasked > 1, self.last_unmasked - 1, 0)[:, None]
        stands = (stood | unmasked) & ~(doubted & (_places(-probs, doubted) < most))
        self.last_unmasked = num_unmasked
        self.tokens = window.place(tokens, stands, self.tokens)
        self.stands = window.place(stands, inside, self.stands)

        # 3. Commit.
        stops = stands & torch.isin(tokens, models.processing.stop_token_ids)
        before_stop = stops.cumsum(1) == 0
        is_complete = ~(inside & ~stands & before_stop).any(1, keepdim=True)
        return alone(
            "drafter",
            draft,
            models,
            sampling,
            tokens=tokens,
            chosen=stands & is_complete,
            decisive=inside,
            drafted=tokens,
            best=best,
            probs=probs,
        )

    def select(self, rows: Tensor) -> None:
        self.tokens, self.stands = self.tokens.index_select(0, rows), self.stands.index_select(0, rows)
        self.last_unmasked = self.last_unmasked.index_select(0, rows)

    def join(self, state: DecodeState) -> None:
        rows, columns = len(state.rows) - len(self.stands), state.width - self.stands.shape[1]
        self.tokens, self.stands = (pad(memory, (0, columns, 0, rows)) for memory in (self.tokens, self.stands))
        self.last_unmasked = pad(self.last_unmasked, (0, rows))


def alone(
    model: str,
    draft: Draft,
    models: Models,
    sampling: Sampling,
    *,
    tokens: Tensor,
    chosen: Tensor,
    decisive: Tensor,
    drafted: Tensor,
    best: Tensor,
    probs: Tensor | None,
) -> Proposal:
    """What one model proposes that decides alone, and so is the target too.

    Args:
        model: `"drafter"` or `"verifier"`.
        draft: its draft of the window, or of the last part of it.
        best: `b m`, the best score of its draft.
        probs: of the tokens, `b m`.
        tokens, chosen, decisive, drafted: as in `Proposal`.
    """
    keeps = models.keeps_scores  # then there is one part
    return Proposal(
        tokens=tokens,
        chosen=chosen,
        decisive=decisive,
        best=(best,),
        draft=drafted,
        models=("target", model),
        probs=None if probs is None else probs[..., None].expand(-1, -1, 2),
        logits=draft.logprobs if keeps else None,
        scores=sampling.warp(draft.logprobs).of_all(models.vocab_size) if keeps else None,
    )


def confidence(draft: Draft) -> Tensor:
    """Untempered probability of each drawn token: `b m`."""
    return gather_tokens(draft.logprobs, draft.tokens).exp()


def entropy(draft: Draft) -> Tensor:
    """Of each untempered distribution, in nats: `b m`."""
    # A removed token has log-probability −∞ and contributes nothing.
    return -(draft.logprobs.exp() * draft.logprobs.clamp(min=torch.finfo(draft.logprobs.dtype).min)).sum(-1)


#: Surer than this is as good as certain, and among certain ones the leftmost comes first. Else the tail of stop tokens, a
#: little surer still, would be decided before the answer.
CERTAIN = 1 - 2.0**-19


def _places(rank: Tensor, candidate: Tensor) -> Tensor:
    """The place of each position when candidates are ordered by `rank`, highest first, ties from the left: `b m`."""
    rank = rank.clamp(max=CERTAIN).masked_fill(~candidate, -torch.inf)
    order = rank.sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
