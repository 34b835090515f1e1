"""How a token is drawn from scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from apd.decoding import fast_warp
from apd.decoding.noise import DRAFT, Noise, step_seeds
from apd.decoding.probability import Scores, largest
from apd.decoding.returned import processed
from apd.decoding.state import DecodeState
from apd.decoding.window import Window

__all__ = ["Sampled", "Sampling", "Scores"]


class Sampled(NamedTuple):
    """Tokens drawn from scores.

    Attributes:
        tokens: `b m` int64.
        best: `b m` float32, the winning score, noise included. Non-finite if the distribution was invalid: NaN, +∞ or
            nothing finite.
    """

    tokens: Tensor
    best: Tensor


@dataclass(frozen=True)
class Sampling:
    """Transformers' warpers, then the argmax under keyed Gumbel noise.

    Attributes:
        warpers: temperature, top-k, top-p and the like, in transformers' order.
        greedy: temperature 0, which is zero noise.
        redraw: noise changes with the row's step (`noise="step"`).
    """

    warpers: LogitsProcessorList
    greedy: bool
    redraw: bool = False

    def warp(self, logits: Tensor) -> Scores:
        """Warped scores: `b m v`, normalised or not.

        Where top-k truncates first, only the tokens that it leaves are warped, and only they get noise.
        """
        rest = [warper for warper in self.warpers if not isinstance(warper, TemperatureLogitsWarper)]
        first: Any = rest[0] if rest else None
        # Only what is known to remove tokens and to do nothing else: a caller's own subclass may do anything.
        if type(first) is TopKLogitsWarper and first.filter_value == -torch.inf and first.top_k < logits.shape[-1]:
            # Among tokens that tie for the last place transformers' warper keeps all, this one as many as fit.
            values, ids = logits.topk(first.top_k)
            return Scores(_warped(values, self.warpers), ids)
        if type(first) is TopPLogitsWarper and first.filter_value == -torch.inf and first.min_tokens_to_keep == 1:
            before, behind = _split(self.warpers, first)
            scores = _warped(logits, before)
            nucleus = fast_warp.nucleus(scores, first.top_p) or Scores(_warped(scores, [first]))
            return Scores(_warped(nucleus.values, behind)) if behind else nucleus
        return Scores(_warped(logits, self.warpers))

    def sample(self, scores: Scores, noise: Noise) -> Sampled:
        """The argmax under noise; at temperature 0 the noise is zero."""
        if self.greedy:
            best, index = scores.largest
        elif (sampled := fast_warp.sample(scores, noise)) is not None:
            return Sampled(*sampled)
        else:
            best, index = largest(scores.values + noise.for_scores(scores))
        return Sampled(scores.tokens(index), best)

    @property
    def temperature(self) -> float:
        """What log p is divided by; 0 if greedy."""
        found = (warper.temperature for warper in self.warpers if isinstance(warper, TemperatureLogitsWarper))
        return 0.0 if self.greedy else math.prod(found)

    def margin(self, logits: Tensor, tokens: Tensor, noise: Noise) -> Tensor:
        """How far the noised score of each token is above that of the best other one; negative where another one is ahead.

        The scores are log p + T·g, with temperature T and noise g. The noise stays, so a token that is ahead is drawn until
        log p changes by more than this.

        Args:
            logits: `b m v` float32, log p up to a constant. Truncation is not applied: it may end as log p changes.
            tokens: `b m` int64.
            noise: of these positions.
        Returns:
            `b m` float32, in nats; +∞ where no other token may be drawn.
        """
        index, temperature = tokens[..., None], self.temperature
        own, others = logits.gather(-1, index), logits.scatter(-1, index, -torch.inf)
        if temperature == 0:
            return own.squeeze(-1) - largest(others)[0]
        score = own / temperature + noise.for_scores(Scores(own, index))
        return temperature * (score.squeeze(-1) - self.sample(Scores(others / temperature), noise).best)

    def probs(self, scores: Scores) -> Scores:
        """The distribution that warped scores are drawn from; at temperature 0 all of it is on the best."""
        if self.greedy:
            values = torch.zeros_like(scores.values).scatter_(-1, scores.largest[1][..., None], 1.0)
            return Scores(values, scores.ids)
        return Scores(scores.values.softmax(-1), scores.ids)

    def noise(self, state: DecodeState, window: Window, stream: int = DRAFT) -> Noise:
        """Keyed noise of the window's positions; computed when it is asked for, so greedy decoding hashes nothing."""
        seeds = step_seeds(state.seeds, state.steps) if self.redraw else state.seeds
        return Noise(seeds, window.columns, state.padding, stream)


def _warped(values: Tensor, warpers: Sequence[Any]) -> Tensor:
    if len(warpers) == 0:
        return values
    flat = processed(warpers, None, rearrange(values, "b m n -> (b m) n"))
    return rearrange(flat, "(b m) n -> b m n", m=values.shape[1])


def _split(warpers: LogitsProcessorList, at: object) -> tuple[Sequence[Any], Sequence[Any]]:
    """The warpers before `at`, and those behind it."""
    index = next(i for i, warper in enumerate(warpers) if warper is at)
    return warpers[:index], warpers[index + 1 :]
