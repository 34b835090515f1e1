"""The protocols of drafters and verifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from apd.decoding.state import DecodeState
from apd.decoding.window import Window


class RowMemory(Protocol):
    """Per-row memory of one `generate` call: `select` drops finished rows, `join` appends new ones."""

    def select(self, rows: Tensor) -> None:
        """Keep the rows at these indices (`n` int64), in that order. The batch may lose columns on the right."""

    def join(self, state: DecodeState) -> None:
        """Make room for new rows. `state` holds the old rows, then the new ones, and may have more columns."""


class Logits(Protocol):
    """Raw logits of a window's positions, `b m v` in any float dtype: a tensor, or computed on access.

    The index is two slices, `logits[:, 3:7]`, or rows and positions as tensors, `b 1` and `b k` int64. The caller may write
    to the result.
    """

    def __getitem__(self, index: tuple[slice, slice] | tuple[Tensor, Tensor], /) -> Tensor: ...


class DrafterSession(RowMemory, Protocol):
    """A drafter's memory for the length of one `generate` call."""

    def logits(self, state: DecodeState, window: Window) -> Logits:
        """Raw logits of every column of the window, given all decided columns before the window's end: `b m v` float.

        Logits outside `window.inside` are ignored.
        """


@runtime_checkable
class LeaveOneOutSession(DrafterSession, Protocol):
    """A session that also predicts decided columns, each from all other columns."""

    def leave_one_out_logits(self, state: DecodeState, window: Window) -> Logits:
        """Raw logits of every column of the window, given all *other* decided columns before its end: `b m v` float."""


@runtime_checkable
class CanvasSession(DrafterSession, Protocol):
    """A session that also computes several canvases of each row in one pass. What it remembers of a row is unchanged."""

    def canvas_logits(self, state: DecodeState, window: Window, rows: Tensor) -> Logits:
        """Raw logits of every column of the window, as `logits` gives them for each canvas: `n m v` float.

        Args:
            state: n canvases, each a copy of one of the session's rows with further columns decided.
            window: the columns of each canvas.
            rows: `n` int64, ascending: the session's row of each canvas.
        """


@runtime_checkable
class Drafter(Protocol):
    """A model of p_D: marginals of masked tokens given all decided ones.

    Attributes:
        vocab_size: v, the size of the last dimension of its logits.
        mask_token_id: the id in undecided columns.
        max_length: most tokens of a row; `None` for no limit.
        device: device of its inputs.

    With an attribute `never_drawn`, ids, these are removed from what may be drawn, stop tokens excepted.
    """

    vocab_size: int
    mask_token_id: int
    max_length: int | None

    @property
    def device(self) -> torch.device: ...

    def open(self, state: DecodeState) -> DrafterSession:
        """Start a session for these rows. Every pass computes whole rows."""


@runtime_checkable
class CachingDrafter(Drafter, Protocol):
    """A drafter that can keep keys and values of committed tokens from one pass to the next."""

    def open_cached(self, state: DecodeState, kv_window: int, kv_refresh: int | None) -> DrafterSession:
        """Start a session that recomputes `kv_window` (W) committed tokens per pass; `kv_refresh` is N (`APDConfig`)."""


@runtime_checkable
class LimitingDrafter(Drafter, Protocol):
    """A drafter that sees only so far: a step may draft up to a certain column, such as the end of a block."""

    def window_ends(self, state: DecodeState) -> Sequence[int]:
        """The column behind the last that a step may draft, `b` host integers: beyond the frontier, at most the row's end."""


class VerifierSession(RowMemory, Protocol):
    """A verifier's memory for the length of one `generate` call."""

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Logits:
        """Raw logits of every column of the window, given the tokens before it, drafted ones included: `b m v` float.

        `draft` is `b m` int64. Logits outside `window.inside` are ignored.
        """


@runtime_checkable
class ScoringSession(RowMemory, Protocol):
    """A verifier session that gives the probabilities of drafted tokens only, for example with another tokenizer."""

    def score(self, state: DecodeState, window: Window, draft: Tensor) -> Tensor:
        """log p_AR, in nats, of every drafted token given the tokens before it: `b m` float32; `draft` is `b m` int64."""


@runtime_checkable
class Verifier(Protocol):
    """A model of p_AR: the next token given the tokens before it.

    Attributes:
        vocab_size: v, the size of the last dimension of its logits.
        max_length: most tokens of a row; `None` for no limit.
    """

    vocab_size: int
    max_length: int | None

    def open(self, state: DecodeState) -> VerifierSession:
        """Start a session for these rows."""
