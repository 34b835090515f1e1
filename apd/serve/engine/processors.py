"""Logits processors of OpenAI's API: plain data, so that equal ones are equal and may come from another process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bias:
    """Adds to the logits of single tokens.

    Args:
        bias: pairs of id and what is added.
    """

    bias: tuple[tuple[int, float], ...]
    history_free = True

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        ids = torch.tensor([token for token, _ in self.bias], device=scores.device)
        more = torch.tensor([value for _, value in self.bias], device=scores.device, dtype=scores.dtype)
        return scores.index_add(-1, ids, more.expand(*scores.shape[:-1], -1))


@dataclass(frozen=True)
class Penalties:
    """Lowers the logits of tokens that the answer already has, as OpenAI's API defines it.

    Args:
        frequency: for each time that the token was written.
        presence: once, if it was written at all.
        prompt_length: tokens that do not count.
    """

    frequency: float
    presence: float
    prompt_length: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(input_ids[0, self.prompt_length :], minlength=scores.shape[-1])[: scores.shape[-1]]
        return scores - self.frequency * counts - self.presence * (counts > 0)
