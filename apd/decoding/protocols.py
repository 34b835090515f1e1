"""What decoding asks of a drafter and of a verifier."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from apd.decoding.state import DecodeState
from apd.decoding.window import Window


class RowMemory(Protocol):
    """Memory of the rows of one `generate` call: `select` drops rows, `join` appends new ones."""

    def select(self, rows: Tensor) -> None:
        """Keep the rows at these indices (`n` int64), in that order. The batch may lose columns on the right."""

    def join(self, state: DecodeState) -> None:
        """Make room: `state` has the old rows first, then new ones, and maybe more columns."""


class Logits(Protocol):
    """Raw logits of a window's positions, `b m v`, which may be computed on access: `logits[:, 3:7]`.

    The result may be written to.
    """

    def __getitem__(self, index: tuple[slice, slice], /) -> Tensor: ...


class DrafterSession(RowMemory, Protocol):
    """A drafter's memory for the length of one `generate` call."""

    def logits(self, state: DecodeState, window: Window) -> Logits:
        """Raw logits of every column of the window, given all decided columns before the window's end: `b m v`.

        Columns outside `window.inside` may hold anything.
        """


@runtime_checkable
class LeaveOneOutSession(DrafterSession, Protocol):
    """A session that also predicts columns whose token is known."""

    def leave_one_out_logits(self, state: DecodeState, window: Window) -> Logits:
        """Raw logits of every column of the window, given all *other* decided columns before its end: `b m v`."""


@runtime_checkable
class Drafter(Protocol):
    """A model of p_D: marginals of masked tokens given all decided ones.

    Attributes:
        vocab_size: v, entries of its logits.
        mask_token_id: the id that stands for an undecided token.
        max_length: tokens a row may have, or `None` for no limit.
        device: where its inputs are.
    """

    vocab_size: int
    mask_token_id: int
    max_length: int | None

    @property
    def device(self) -> torch.device: ...

    def open(self, state: DecodeState) -> DrafterSession:
        """Start a session for these rows, in which every pass computes the whole row."""


@runtime_checkable
class CachingDrafter(Drafter, Protocol):
    """A drafter that can keep keys and values of committed tokens from one pass to the next."""

    def open_cached(self, state: DecodeState, kv_window: int, kv_refresh: int | None) -> DrafterSession:
        """Start a session that recomputes `kv_window` (W) committed tokens per pass; `kv_refresh` is N (`APDConfig`)."""


class VerifierSession(RowMemory, Protocol):
    """A verifier's memory for the length of one `generate` call."""

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Logits:
        """Raw logits of every column of the window, given the tokens before it, drafted ones included: `b m v`.

        `draft` is `b m` int64. Columns outside `window.inside` may hold anything.
        """


@runtime_checkable
class ScoringSession(RowMemory, Protocol):
    """A verifier session that gives the probability of drafted tokens only, as one with another tokenizer can."""

    def score(self, state: DecodeState, window: Window, draft: Tensor) -> Tensor:
        """log p_AR of every drafted token given the tokens before it: `b m` float32; `draft` is `b m` int64."""


@runtime_checkable
class Verifier(Protocol):
    """A model of p_AR: the next token given the tokens before it.

    Attributes:
        vocab_size: v, entries of its logits.
        max_length: tokens a row may have, or `None` for no limit.
    """

    vocab_size: int
    max_length: int | None

    def open(self, state: DecodeState) -> VerifierSession:
        """Start a session for these rows."""
