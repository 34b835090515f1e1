"""The verifier: a small causal LM that scores a whole draft in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from apd.decoding.state import DecodeState, FollowsRows, Logits, Window
from apd.models.cache import Span
from apd.models.transformer import Neural, Projection


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


class CausalVerifier(Neural):
    """A transformers causal LM as a verifier.

    Args:
        model: any causal LM with full attention; see `load_verifier`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, causal=True)

    def open(self, state: DecodeState) -> NeuralVerifierSession:
        return NeuralVerifierSession(self, state)


class NeuralVerifierSession:
    """Reads each token once: the cache keeps every column whose token still is the one that was read there.

    Of what the last draft put into a row, all that is committed still stands, but for its last token, which may replace
    a drafted one. So the row is read on from the column before the frontier, whose output scores the window's first
    position anyway.
    """

    def __init__(self, verifier: CausalVerifier, state: DecodeState) -> None:
        self.head = verifier.model.get_output_embeddings()
        self.passes = verifier.passes(state, is_cached=True)
        self.read: Sequence[int] = state.layout.padding  # per row, the column behind the last that was read

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Projection:
        canvas = window.fill(draft, state.tokens)
        span = self.span(state, window)
        hidden = self.passes(canvas, span)
        self.read = span.ends
        return Projection.of(self.head, hidden, span, window, -1)

    def span(self, state: DecodeState, window: Window) -> Span:
        """The columns that this step computes."""
        starts = [min(read, t - 1) for read, t in zip(self.read, window.starts, strict=True)]
        # The last drafted token is not read: nothing behind it is scored.
        return Span(starts, [end - 1 for end in window.ends], state.layout.padding, state.tokens.device)

    def select(self, rows: Tensor) -> None:
        self.read = [self.read[row] for row in rows.tolist()]
        self.passes.select(rows)

    def join(self, state: DecodeState) -> None:
        self.read = [*self.read, *state.layout.padding[len(self.read) :]]
        self.passes.join(state)
