"""How a token is drawn from scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from transformers import LogitsProcessorList

from apd.probability import DRAFT, keyed_gumbel, keyed_uniform, step_seeds
from apd.state import DecodeState, Window


@dataclass(frozen=True)
class Sampling:
    """Transformers' warpers, then the argmax under keyed Gumbel noise.

    Attributes:
        warpers: temperature, top-k, top-p and the like; the reference, which faster paths must equal.
        greedy: temperature 0, which is zero noise.
        redraw: noise changes with the row's step (`noise="step"`).
    """

    warpers: LogitsProcessorList
    greedy: bool
    redraw: bool = False

    def warp(self, logprobs: Tensor) -> Tensor:
        """Warped scores: `b m v` → `b m v`."""
        flat = self.warpers(None, rearrange(logprobs, "b m v -> (b m) v"))
        return rearrange(flat, "(b m) v -> b m v", m=logprobs.shape[1])

    def pick(self, scores: Tensor, noise: Tensor) -> Tensor:
        """The argmax under noise: `… v` → `…` int64. Zero noise need not be added."""
        return (scores if self.greedy else scores + noise).argmax(-1)

    def probs(self, scores: Tensor) -> Tensor:
        """The distribution that warped scores are drawn from, `b m v`; at temperature 0 all of it is on the best."""
        if self.greedy:
            return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        return scores.softmax(-1)

    def gumbel(self, state: DecodeState, window: Window, vocab_size: int, stream: int = DRAFT) -> Tensor:
        """Gumbel noise of every position and token of the window, `b m v`; zero at temperature 0."""
        if self.greedy:
            return torch.zeros((), device=window.columns.device).expand(*window.columns.shape, vocab_size)
        return keyed_gumbel(*self._key(state, window), stream, vocab_size)

    def uniform(self, state: DecodeState, window: Window, stream: int) -> Tensor:
        """A uniform draw in (0, 1) for every position of the window, `b m`."""
        return keyed_uniform(*self._key(state, window), stream).squeeze(-1)

    def _key(self, state: DecodeState, window: Window) -> tuple[Tensor, Tensor]:
        seeds = step_seeds(state.seeds, state.steps) if self.redraw else state.seeds
        return seeds, window.columns - state.padding[:, None]
