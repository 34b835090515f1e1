"""Accepted counts for random weights: a real rule does its work, then a schedule replaces its counts.

Random models never agree, so every step would commit one token. With these rules a step has its real cost and commits
the scheduled number of tokens; tokens per second are those of a trained pair with these counts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from apd import Threshold
from apd.decoding.acceptance import AcceptanceRule, Evidence, Judgement
from apd.decoding.noise import ORDER, keyed_uniform
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.window import Window

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

    def counts(self, state: DecodeState) -> Tensor:
        """Tokens that each row's step commits, before its window cuts them: `b` int64."""
        if self.mean == 1:
            return torch.ones_like(state.seeds)
        position, one = (state.frontier - state.prompt_end)[:, None], torch.zeros_like(state.seeds[:1])
        draw = keyed_uniform(state.seeds + (self.seed << 32), position, ORDER, one)[:, 0, 0].double()
        # P(count > k) = (1 − 1/mean)^k
        return 1 + (draw.log() / math.log(1 - 1 / self.mean)).floor().long()

    def commits(self, state: DecodeState, window: Window) -> Tensor:
        """The columns of the window, or of a part of it, that each row's step commits: `b m` bool."""
        return window.inside & (window.columns < (state.frontier + self.counts(state))[:, None])


@dataclass(frozen=True)
class Scheduled:
    """An acceptance rule that evaluates a real one, discards its result, and accepts by the schedule.

    Args:
        rule: does the work.
        schedule: the counts.
    """

    rule: AcceptanceRule
    schedule: Schedule

    def __call__(self, evidence: Evidence, /) -> Judgement:
        judgement = self.rule(evidence)
        commits = self.schedule.commits(evidence.state, evidence.window)
        # The rule's result enters with no effect, so that no compiler can skip its work.
        return Judgement(commits & (judgement.accept | commits))


@dataclass(frozen=True)
class ScheduledThreshold(Threshold):
    """`Threshold` with the schedule's number of tokens, taken from the left.

    Args:
        threshold: γ of the rule that is evaluated.
        schedule: the counts.
    """

    schedule: Schedule = dataclasses.field(default_factory=Schedule, kw_only=True)

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        super().choose(measure, candidate, state, window, sampling)
        return candidate & (candidate.long().cumsum(1) <= self.schedule.counts(state)[:, None])
