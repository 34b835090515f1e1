"""Log-probabilities of tokens, small enough to be sent: not the logits they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

_LEAST = -9999.0  # JSON has no −∞


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability in nats and, if asked for, the likeliest tokens at its position."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


def logprob_of(token: int, logits: Tensor, top: int) -> TokenLogprob:
    """The log-probability of a token from logits, `v`, and the `top` likeliest."""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs))) if top else None
    pairs = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, _finite(float(logprobs[token])), [(i, _finite(value)) for i, value in pairs])


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST
