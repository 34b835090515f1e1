"""Accepted counts for random weights: all the work of a real rule, then numbers from a schedule.

Random models agree on nothing, so that every step would commit one token. With these rules a step costs what it costs
and commits as many tokens as is claimed here; tokens per second then say what such a pair *would* do.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from apd import Threshold
from apd.acceptance import AcceptanceRule, Accepted
from apd.probability import ORDER, keyed_uniform
from apd.sampling import Sampling
from apd.state import DecodeState, Window
from apd.step import Draft

__all__ = ["PAPER_MEAN", "Schedule", "Scheduled", "ScheduledThreshold"]

PAPER_MEAN = 5.75  # tokens per iteration of Dream-7B on GSM8K at R = 0.6, W = 32 (Table 2 of arXiv:2506.00413)


@dataclass(frozen=True)
class Schedule:
    """A geometric number of tokens, at least 1, for every (row seed, frontier).

    It depends neither on the batch nor on the models.

    Args:
        mean: tokens, at least 1, before the window cuts them.
        seed: any integer.
    """

    mean: float = PAPER_MEAN
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.mean >= 1:
            raise ValueError(f"`mean` must be at least 1, got {self.mean}: a step commits one token or more.")

    def counts(self, state: DecodeState, window: Window) -> Tensor:
        """Tokens that each row's step commits, cut at the end of its window: `b` int64."""
        inside = window.inside.sum(1)
        if self.mean == 1:
            return inside.clamp(max=1)
        position = window.columns[:, :1] - state.start[:, None]
        draw = keyed_uniform(state.seeds + (self.seed << 32), position, stream=ORDER)[:, 0, 0].double()
        # P(count > k) = (1 − 1/mean)^k
        count = 1 + (draw.log() / math.log(1 - 1 / self.mean)).floor().long()
        return count.minimum(inside)


@dataclass(frozen=True)
class Scheduled:
    """An acceptance rule that asks a real one, forgets what it said, and accepts what the schedule says.

    Args:
        rule: does the work.
        schedule: the counts.
    """

    rule: AcceptanceRule
    schedule: Schedule

    def __call__(self, *, key: tuple[DecodeState, Window], **given: Tensor | Sampling) -> Accepted:
        accepted = self.rule(key=key, **given)
        # Adding nothing of the real counts keeps the schedule behind them, where a device could have skipped the work.
        count = self.schedule.counts(*key) + 0 * accepted.num_accepted
        return dataclasses.replace(accepted, num_accepted=count, num_committed=count)


@dataclass(frozen=True)
class ScheduledThreshold(Threshold):
    """`Threshold` with the schedule's number of tokens, taken from the left.

    Args:
        threshold: γ, whose work is done.
        schedule: the counts.
    """

    schedule: Schedule = dataclasses.field(default_factory=Schedule)

    def choose(
        self, draft: Draft, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        super().choose(draft, candidate, state, window, sampling)
        return candidate & (candidate.long().cumsum(1) <= self.schedule.counts(state, window)[:, None])
