"""Strategies that commit drafted tokens by a rule of their own, each under the loop and the count of APD.

Every class says which masks of the window to commit, given one drafted token for each. All but `LeftToRight` and
`Autoregressive` commit in any order. With keyed noise a postponed position draws the same token again as long as its
distribution stays the same; published samplers redraw it, as `noise="step"` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apd.config import check_count, check_fraction, check_number
from apd.decoding.commit import Proposal
from apd.decoding.noise import ORDER
from apd.decoding.pair import Draft, ModelPair
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState, to_device
from apd.decoding.strategy import Memoryless
from apd.decoding.window import Window
from apd.strategies.base import Unmasking, confidence, entropy, ranks, single_model_proposal


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
        return ranks(self.rank(measure, state, window, sampling), candidate) < self.count(state)

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
        return draft.scores.values[..., 0]  # not used

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
        return draft.scores.values[..., 0]  # not used

    def rank(self, measure: Tensor, state: DecodeState, window: Window, sampling: Sampling) -> Tensor:
        return sampling.noise(state, window, ORDER).uniform()


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
        return (measure >= self.threshold) | (ranks(measure, candidate) == 0)


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
        place = ranks(measure, candidate)
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
        place = ranks(-measure, candidate)
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
        block = (window.columns - state.prompt_end[:, None]) // self.length
        within = candidate & (block == block[:, :1])  # the frontier is the window's first column
        return self.strategy.chosen(measure, within, state, window, sampling)


@dataclass(frozen=True)
class Autoregressive(Memoryless):
    """The verifier alone, one token per step: a plain causal LM under the same loop. The drafter never runs."""

    needs_drafter = False
    needs_verifier = True
    left_to_right = True

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
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
