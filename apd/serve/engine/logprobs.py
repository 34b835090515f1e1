"""Log-probabilities of tokens, small enough to be sent: not the logits they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LEAST = -9999.0  # JSON has no −∞


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability in nats and, if asked for, the likeliest tokens at its position."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


def logprobs_of(tokens: Sequence[int], logits: Sequence[Tensor], top: int) -> list[TokenLogprob]:
    """The log-probability of each token from its logits, `v`, and the `top` likeliest; waits for the device once."""
    if not logits:
        return []
    logprobs = torch.stack(list(logits)).float().log_softmax(-1)
    best = logprobs.topk(min(top, logprobs.shape[-1]))
    own = logprobs.gather(1, torch.tensor([[token] for token in tokens], device=logprobs.device))
    found = []
    for token, row in zip(
        tokens, torch.cat([own.double(), best.values.double(), best.indices.double()], 1).tolist(), strict=True
    ):
        value, values, ids = row[0], row[1 : 1 + best.values.shape[1]], row[1 + best.values.shape[1] :]
        pairs = [(int(i), _finite(each)) for i, each in zip(ids, values, strict=True)]
        found.append(TokenLogprob(token, _finite(value), pairs))
    return found


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST
