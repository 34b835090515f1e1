"""KLASS: commit confident masks whose distribution has stopped changing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from apd.config import check_count, check_fraction, check_number
from apd.decoding.pair import Draft
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.strategies.base import Unmasking, confidence, ranks


@dataclass(frozen=True)
class KLASS:
    """Commits every mask that is confident and stable; if there is none, the most confident mask.

    A mask is stable if KL(p_now ‖ p_before) was below ε in each of the last h steps.

    Args:
        threshold: confidence in [0, 1] that a drafted token must exceed.
        kl_threshold: ε > 0, in nats.
        history: h ≥ 1, in steps.

    Raises:
        TypeError, ValueError: a parameter is outside its range.

    Source: KL-adaptive stability sampling, arXiv:2511.05664.
    """

    threshold: float = 0.9
    kl_threshold: float = 0.01
    history: int = 2
    needs_drafter = True
    needs_verifier = False
    left_to_right = False
    is_random = False

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, "1 is one token per step")
        remedy = "Small values commit one token per step"
        check_number("kl_threshold", self.kl_threshold, "above 0 nats", lambda value: value > 0, remedy)
        check_count("history", self.history, "It counts steps")

    def open(self, state: DecodeState) -> _KLASSSession:
        return _KLASSSession(self, state)


class _KLASSSession(Unmasking):
    """Remembers the last distribution of every column, and the number of steps for which it has been stable."""

    def __init__(self, klass: KLASS, state: DecodeState) -> None:
        self.klass = klass
        self.before: Tensor | None = None  # b l+1 v, probabilities; the last column takes writes behind a row's end
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
        return torch.where(stable.any(1, keepdim=True), stable, ranks(measure, candidate) == 0)

    def _slot(self, window: Window) -> Tensor:
        return window.columns.masked_fill(~window.inside, self.calm.shape[1] - 1)

    def select(self, rows: Tensor) -> None:
        self.calm = self.calm.index_select(0, rows)
        self.before = None if self.before is None else self.before.index_select(0, rows)

    def join(self, state: DecodeState) -> None:
        rows, columns = len(state.rows) - len(self.calm), state.width + 1 - self.calm.shape[1]
        self.calm = pad(self.calm, (0, columns, 0, rows))
        self.before = None if self.before is None else pad(self.before, (0, 0, 0, columns, 0, rows))
