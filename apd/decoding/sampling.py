"""How a token is drawn from scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from apd.decoding.noise import DRAFT, Noise, step_seeds
from apd.decoding.probability import gather_tokens, largest
from apd.decoding.returned import processed
from apd.decoding.state import DecodeState
from apd.decoding.window import Window


@dataclass(frozen=True)
class Scores:
    """Warped log scores of the tokens that may be drawn, by position.

    Attributes:
        values: `b m n` float32; −∞ for a token that is removed.
        ids: `b m n` int64, the tokens that `values` belong to; `None`: every token in order, n = v.
    """

    values: Tensor
    ids: Tensor | None = None

    def tokens(self, index: Tensor) -> Tensor:
        """The tokens at these indices of `values`: `b m` → `b m` int64."""
        return index if self.ids is None else gather_tokens(self.ids, index)

    def dense(self, vocab_size: int, missing: float = -torch.inf) -> Tensor:
        """The scores of every token, `missing` where there is none: `b m v` float32."""
        if self.ids is None:
            return self.values
        everything = self.values.new_full((*self.values.shape[:2], vocab_size), missing)
        return everything.scatter_(-1, self.ids, self.values)


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

        Where top-k or top-p truncates first, only the tokens that they can leave are warped, and only they get noise.
        """
        rest = [warper for warper in self.warpers if not isinstance(warper, TemperatureLogitsWarper)]
        first: Any = rest[0] if rest else None
        # Only what is known to remove tokens and to do nothing else: a caller's own subclass may do anything.
        if type(first) is TopKLogitsWarper and first.filter_value == -torch.inf and first.top_k < logits.shape[-1]:
            # Among tokens that tie for the last place transformers' warper keeps all, this one as many as fit.
            values, ids = logits.topk(first.top_k)
            return Scores(_warped(values, self.warpers), ids)
        if (
            type(first) is TopPLogitsWarper
            and first.filter_value == -torch.inf
            and (nucleus := self._nucleus(logits, first)) is not None
        ):
            return nucleus
        return Scores(_warped(logits, self.warpers))

    def _nucleus(self, logits: Tensor, top_p: TopPLogitsWarper) -> Scores | None:
        """The same without sorting the vocabulary, `None` where too much of it is needed."""
        before, behind = _split(self.warpers, top_p)
        scores = _warped(logits, before)
        total = scores.logsumexp(-1, keepdim=True)
        width = max(_FIRST_NUCLEUS, top_p.min_tokens_to_keep)
        while width <= scores.shape[-1] // 4:
            values, ids = scores.topk(width)
            probs = (values - total).exp()
            above = probs.cumsum(-1) - probs  # the mass of everything likelier
            # A row that is no distribution counts as held: it may stand where nothing is decided.
            if not (above[..., -1] + probs[..., -1] < top_p.top_p).any():
                kept = above < top_p.top_p
                kept[..., : top_p.min_tokens_to_keep] = True
                return Scores(_warped(values.masked_fill(~kept, top_p.filter_value), behind), ids)
            width *= 4
        return None

    def sample(self, scores: Scores, noise: Noise) -> Sampled:
        """The argmax under noise; at temperature 0 the noise is zero."""
        best, index = largest(scores.values if self.greedy else scores.values + noise.for_scores(scores))
        return Sampled(scores.tokens(index), best)

    def probs(self, scores: Scores) -> Scores:
        """The distribution that warped scores are drawn from; at temperature 0 all of it is on the best."""
        if self.greedy:
            values = torch.zeros_like(scores.values).scatter_(-1, largest(scores.values)[1][..., None], 1.0)
            return Scores(values, scores.ids)
        return Scores(scores.values.softmax(-1), scores.ids)

    def noise(self, state: DecodeState, window: Window, stream: int = DRAFT) -> Noise:
        """Keyed noise of the window's positions; computed when it is asked for, so greedy decoding hashes nothing."""
        seeds = step_seeds(state.seeds, state.steps) if self.redraw else state.seeds
        return Noise(seeds, window.columns, state.padding, stream)


_FIRST_NUCLEUS = 64  # tokens; four times as many each time that they do not hold the mass


def _warped(values: Tensor, warpers: LogitsProcessorList) -> Tensor:
    if len(warpers) == 0:
        return values
    flat = processed(warpers, None, rearrange(values, "b m n -> (b m) n"))
    return rearrange(flat, "(b m) n -> b m n", m=values.shape[1])


def _split(warpers: LogitsProcessorList, at: object) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """The warpers before `at`, and those behind it."""
    index = next(i for i, warper in enumerate(warpers) if warper is at)
    return LogitsProcessorList(warpers[:index]), LogitsProcessorList(warpers[index + 1 :])
