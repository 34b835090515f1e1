"""A drafter that fails for some rows."""

from __future__ import annotations

from typing import Any

import torch


class Poisoned:
    """The drafter, whose logits are NaN in rows that hold one token."""

    def __init__(self, drafter: Any, poison: int) -> None:
        self.drafter, self.poison = drafter, poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def open(self, state: Any) -> Any:
        return _PoisonedSession(self.drafter.open(state), self.poison)


class _PoisonedSession:
    def __init__(self, session: Any, poison: int) -> None:
        self.session, self.poison = session, poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def logits(self, state: Any, window: Any) -> torch.Tensor:
        is_ill = (state.tokens == self.poison).any(1)
        return self.session.logits(state, window)[:, :].masked_fill(is_ill[:, None, None], torch.nan)
