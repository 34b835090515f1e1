"""Scores, log-probabilities and the mixture. Shapes: `b` rows, `m` positions of the window, `v` vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Warped log scores of the tokens that may be drawn, by position.

    Attributes:
        values: `b m n` float32; −∞ for a token that is removed.
        ids: `b m n` int64, the tokens that `values` belong to; `None`: every token in order, n = v.
    """

    values: Tensor
    ids: Tensor | None = None

    @property
    def largest(self) -> tuple[Tensor, Tensor]:
        """The largest score and its index, `b m` float32 and int64. The score of an invalid distribution is not finite."""
        # Dynamo cannot trace the lock of `cached_property` (Python 3.11 and before), and needs no cache.
        return largest(self.values) if torch.compiler.is_compiling() else self._largest

    @cached_property
    def _largest(self) -> tuple[Tensor, Tensor]:
        return largest(self.values)

    def tokens(self, index: Tensor) -> Tensor:
        """The tokens at these indices of `values`: `b m` → `b m` int64."""
        return index if self.ids is None else gather_tokens(self.ids, index)

    def dense(self, vocab_size: int, missing: float = -torch.inf) -> Tensor:
        """The scores of every token, `missing` where there is none: `b m v` float32."""
        if self.ids is None:
            return self.values
        everything = self.values.new_full((*self.values.shape[:2], vocab_size), missing)
        return everything.scatter_(-1, self.ids, self.values)


def log_normalise(logits: Tensor) -> Tensor:
    """Log-probabilities of raw logits.

    Args:
        logits: `… v`, any float dtype; −∞ removes a token.
    Returns:
        `… v` float32 natural logarithms; in a row that is no distribution, one that holds NaN or +∞ or nothing finite,
        all of it is NaN.
    """
    return logits.log_softmax(-1, dtype=torch.float32)


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value (NaN where there is one) and its first index: `… v` → `…` float and `…` int64.

    Two stages, block and index within it: on a CPU `Tensor.max(dim)` takes ten times the time of `amax`.
    """
    size = values.shape[-1]
    block = min(size & -size, 64)  # the largest power of two that divides the row
    if block < 16:
        value, index = values.max(-1)
        return value, index
    blocks = values.unflatten(-1, (size // block, block))
    best = blocks.amax(-1).argmax(-1)
    within = blocks.gather(-2, best[..., None, None].expand(*best.shape, 1, block)).squeeze(-2)
    value, index = within.max(-1)
    return value, best * block + index


def non_finite(values: Tensor) -> Tensor:
    """NaN or infinite: `…` float → `…` bool."""
    return values - values != 0  # two kernels, where `isfinite` takes four


def mix(draft_logits: Tensor, verify_logits: Tensor | None, mixture_weight: float) -> Tensor:
    """The product p_D^R · p_AR^(1−R) in log space, not normalised; nor need its factors be.

    A weight of 0 leaves its model out altogether, so that 0 · −∞ counts as 0 (a naive product is NaN there) and so that
    R = 1 is the draft bit for bit.

    Args:
        draft_logits: `b m v` float32.
        verify_logits: `b m v` float32, same vocabulary; may be `None` at R = 1.
        mixture_weight: R in [0, 1].
    Returns:
        `b m v` float32.

    Source: arXiv:2506.00413, the target distribution of its algorithm.
    """
    if verify_logits is None or mixture_weight == 1:
        return draft_logits
    if mixture_weight == 0:
        return verify_logits
    return (mixture_weight * draft_logits).add_(verify_logits, alpha=1 - mixture_weight)


def gather_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    """The entry of each token: `b m v`, `b m` → `b m`."""
    return values.gather(-1, tokens[..., None]).squeeze(-1)
