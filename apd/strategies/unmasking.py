"""Published unmasking strategies, run by APD's decode loop and counted like APD.

Each class selects the masks of the window to commit, given one drafted token for each mask. All but `LeftToRight` and
`Autoregressive` commit in any order. With keyed noise, a position that is not committed draws the same token in the next
step if its distribution has not changed; published samplers redraw it, as `noise="step"` does.
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
from apd.strategies.base import Unmasking, entropy, next_token_proposal, ranks


@dataclass(frozen=True)
class _TopK(Unmasking):
    """Commits the K highest-ranked candidates; all of them if fewer are left."""

    tokens_per_step: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        if not self._schedule:
            raise ValueError(f"`tokens_per_step` must be at least 1, got {self.tokens_per_step}.")
        for count in self._schedule:
            check_count("tokens_per_step", count, "Use 1 for sequential decoding")

    def rank(self, measure: Tensor, state: DecodeState, window: Window, sampling: Sampling) -> Tensor:
        """The quantity that ranks candidates, highest first: `b m` float."""
        return measure

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        return ranks(self.rank(measure, state, window, sampling), candidate) < self.count(state)

    def count(self, state: DecodeState) -> Tensor | int:
        """K of the next step: `b 1` int64, or one integer for all rows."""
        if not isinstance(self.tokens_per_step, Sequence):
            return self.tokens_per_step
        schedule = to_device(list(self.tokens_per_step), state.steps.device)
        return schedule[state.steps.clamp(max=len(schedule) - 1)][:, None]

    @property
    def counts_steps(self) -> bool:  # type: ignore[override]
        return isinstance(self.tokens_per_step, Sequence)

    @property
    def _schedule(self) -> Sequence[int]:
        return self.tokens_per_step if isinstance(self.tokens_per_step, Sequence) else [self.tokens_per_step]


@dataclass(frozen=True)
class LeftToRight(_TopK):
    """Commits the K leftmost masks. K = 1 is sequential decoding, the reference of all comparisons.

    Args:
        tokens_per_step: K, at least 1; or one K per step, the last of which applies to all further steps.

    Source: the left-to-right baseline of arXiv:2506.00413.
    """

    left_to_right = True

    @property
    def reach(self) -> int:  # type: ignore[override]
        return max(self._schedule)

    def measure(self, draft: Draft, window: Window) -> Tensor:
        return draft.scores.values[..., 0]  # not used

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        return candidate & (candidate.cumsum(1) <= self.count(state))


@dataclass(frozen=True)
class RandomOrder(_TopK):
    """Commits K random masks, in an order that depends on the row's seed only.

    Args:
        tokens_per_step: K, at least 1; or one K per step, the last of which applies to all further steps.

    Source: the random strategy of arXiv:2510.04767 (ParallelBench), the forward process of masked diffusion run back.
    """

    is_random = True

    def measure(self, draft: Draft, window: Window) -> Tensor:
        return draft.scores.values[..., 0]  # not used

    def rank(self, measure: Tensor, state: DecodeState, window: Window, sampling: Sampling) -> Tensor:
        return sampling.noise(state, window, ORDER).uniform()


@dataclass(frozen=True)
class Confidence(_TopK):
    """Commits the K masks with the highest confidence.

    Args:
        tokens_per_step: K, at least 1; or one K per step, the last of which applies to all further steps.

    Source: low-confidence remasking of LLaDA, arXiv:2502.09992; `maskgit_plus` of Dream.
    """


@dataclass(frozen=True)
class Margin(_TopK):
    """Commits the K masks with the largest margin, p(likeliest token) − p(second likeliest token).

    Args:
        tokens_per_step: K, at least 1; or one K per step, the last of which applies to all further steps.

    Source: `topk_margin` of Dream; Kim et al. 2025, arXiv:2502.06768.
    """

    def measure(self, draft: Draft, window: Window) -> Tensor:
        first, second = draft.logprobs.topk(2, dim=-1).values.exp().unbind(-1)
        return first - second


@dataclass(frozen=True)
class Entropy(_TopK):
    """Commits the K masks whose distribution has the lowest entropy.

    Args:
        tokens_per_step: K, at least 1; or one K per step, the last of which applies to all further steps.

    Source: `entropy` of Dream, arXiv:2508.15487.
    """

    def measure(self, draft: Draft, window: Window) -> Tensor:
        return -entropy(draft)


@dataclass(frozen=True)
class Threshold(Unmasking):
    """Commits every mask with confidence γ or more, and always the n most confident masks.

    Args:
        threshold: γ in [0, 1].
        at_least: n, at least 1; fewer are committed only if fewer are left. With block-causal drafters this is the number of
            tokens that a step has to commit by the published schedules.

    Raises:
        TypeError, ValueError: a parameter is outside its range.

    Source: confidence-aware decoding of Fast-dLLM, arXiv:2505.22618; with n, dynamic decoding of SDAR and LLaDA2.
    """

    threshold: float = 0.9
    at_least: int = 1

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, "1 is one token per step")
        check_count("at_least", self.at_least, "Use 1 for the most confident mask only")

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        return (measure >= self.threshold) | (ranks(measure, candidate) < self.at_least)


@dataclass(frozen=True)
class ConfidentPrefix(Unmasking):
    """Commits the longest prefix of the window in which every mask has confidence γ or more, and always the first mask.

    Args:
        threshold: γ in [0, 1].

    Raises:
        TypeError, ValueError: γ is outside its range.

    Source: decoding of SDLM, arXiv:2509.24007.
    """

    threshold: float = 0.9
    left_to_right = True

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, "1 is one token per step")

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        first = torch.arange(measure.shape[1], device=measure.device) == 0
        return ((measure < self.threshold) | ~candidate).cumsum(1).eq(0) | first


@dataclass(frozen=True)
class Factor(Unmasking):
    """Commits the n most confident masks, for the largest n with (n + 1)·(1 − c_n) < f; c_n is the n-th highest confidence.

    At least one mask is committed. This is Fast-dLLM's definition; its code also commits the last mask whenever all masks
    before it pass.

    Args:
        factor: f > 0.

    Raises:
        TypeError, ValueError: f is outside its range.

    Source: factor-based decoding of Fast-dLLM, arXiv:2505.22618.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        remedy = "Small values commit one token per step"
        check_number("factor", self.factor, "above 0", lambda value: value > 0, remedy)

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        rank = ranks(measure, candidate)
        passes = ((rank + 2) * (1 - measure) < self.factor) & candidate
        n = (rank + 1).masked_fill(~passes, 1).amax(1, keepdim=True)  # ranks count from 0
        return rank < n


@dataclass(frozen=True)
class EntropyBound(Unmasking):
    """Commits the most masks of lowest entropy H with Σ H − max H ≤ γ, a bound on their joint dependence.

    Args:
        bound: γ ≥ 0, in nats.

    Raises:
        TypeError, ValueError: γ is outside its range.

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
        rank = ranks(-measure, candidate)
        in_order = torch.zeros_like(measure).scatter(1, rank, measure)
        # In ascending order the n-th entropy is the maximum of the first n, so Σ − max is the sum of the first n − 1.
        before = in_order.cumsum(1) - in_order
        return (before <= self.bound).gather(1, rank)


@dataclass(frozen=True)
class EntropyThreshold(Unmasking):
    """Commits every mask whose entropy, plus a penalty for its distance from the left, is below γ; always the lowest.

    Args:
        threshold: γ ≥ 0, in nats.
        penalty: what each column between the window's first mask and the position adds, in nats, at least 0.

    Raises:
        TypeError, ValueError: a parameter is outside its range.

    Source: decoding of WeDLM's engine, arXiv:2512.22737.
    """

    threshold: float = 0.4
    penalty: float = 0.02

    def __post_init__(self) -> None:
        check_number(
            "threshold", self.threshold, "at least 0 nats", lambda value: value >= 0, "0 is one token per step"
        )
        check_number("penalty", self.penalty, "at least 0 nats", lambda value: value >= 0, "0 is none")

    def measure(self, draft: Draft, window: Window) -> Tensor:
        return entropy(draft)

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        distance = torch.arange(measure.shape[1], device=measure.device)
        adjusted = measure + self.penalty * distance
        return (adjusted < self.threshold) | (ranks(-adjusted, candidate) == 0)


@dataclass(frozen=True)
class OneStep(Unmasking):
    """Commits every mask of the window in each step, as APD does at R = 1."""

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        return candidate


@dataclass(frozen=True)
class Autoregressive(Memoryless):
    """Decodes one token per step with the verifier only, as a causal LM does. The drafter never runs."""

    needs_drafter = False
    needs_verifier = True
    left_to_right = True

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
        return next_token_proposal(state, window, pair, sampling)
