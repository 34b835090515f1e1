"""The verifier: a small causal LM that scores a whole draft in one pass."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from apd.cache import ColumnCache, Projection, Span, input_device, span_hidden_states
from apd.state import DecodeState, FollowsRows, Logits, Window


class VerifierSession(FollowsRows, Protocol):
    """A verifier's memory for the length of one `generate` call."""

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Logits:
        """Raw logits of every column of the window given the tokens before it, drafted ones included: `b m v`.

        `draft` is `b m` int64. Columns outside the window's `inside` may hold anything.
        """


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


class CausalVerifier:
    """A transformers causal LM as a verifier.

    Args:
        model: any causal LM with full attention; see `load_verifier`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.vocab_size: int = model.config.vocab_size
        self.max_length: int | None = getattr(model.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    def open(self, state: DecodeState) -> NeuralVerifierSession:
        return NeuralVerifierSession(self, state)


class NeuralVerifierSession:
    """Reads each token once: the cache keeps every column whose token still is the one that was read there.

    Column t − 1 is always read again, since its output scores the first position of the window.
    """

    def __init__(self, verifier: CausalVerifier, state: DecodeState) -> None:
        self.verifier = verifier
        self.cache = ColumnCache(verifier.model.config.num_hidden_layers, state.width)
        self.read = torch.full_like(state.tokens, -1)

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Projection:
        canvas = window.place(draft, window.inside, state.tokens)
        column = torch.arange(state.width, device=canvas.device)
        real = column >= state.padding[:, None]
        unread = real & ((self.read[:, : state.width] != canvas) | (column >= window.columns[:, :1] - 1))
        # The last drafted token is not read: nothing behind it is scored.
        span = Span.between(unread.long().argmax(1), window.end - 1)
        hidden = span_hidden_states(self.verifier.model, canvas, state.padding, span, self.cache, causal=True)
        self.read = torch.where(column < span.end[:, None], canvas, -1)
        index = window.columns - 1 - span.start[:, None]
        return Projection.of(self.verifier.model, hidden, index)

    def select(self, rows: Tensor) -> None:
        self.read = self.read.index_select(0, rows)
        self.cache.select(rows)

    def join(self, state: DecodeState) -> None:
        rows, width = state.tokens.shape
        self.read = pad(self.read, (0, width - self.read.shape[1], 0, rows - len(self.read)), value=-1)
        self.cache.grow(rows, width)
