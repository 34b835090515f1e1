"""The verifier: a small causal LM that scores every token of a draft in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.models.span import Span
from apd.models.transformer import Projection, TransformersModel


class CausalVerifier(TransformersModel):
    """A verifier from a transformers decoder. Each pass gets a causal mask, so a bidirectional model can be used too.

    Args:
        model: a decoder whose layers all attend to the whole sequence; see `load_verifier`.
    """

    role = "verifier"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, block_size=1)

    def open(self, state: DecodeState) -> NeuralVerifierSession:
        return NeuralVerifierSession(self, state)


class NeuralVerifierSession:
    """Computes each token once: the cache keeps the keys and values of every column whose token has not changed.

    Cached keys of the last draft stay valid for every committed token except the last, which may be a correction. So a
    pass starts at the column before the frontier, whose output scores the window's first position anyway.
    """

    def __init__(self, verifier: CausalVerifier, state: DecodeState) -> None:
        self.head = verifier.model.get_output_embeddings()
        self.passes = verifier.passes(state, is_cached=True)
        self.read: Sequence[int] = state.layout.padding  # per row, the column behind the last that was computed

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Projection:
        canvas = window.fill(draft, state.tokens)
        starts = [min(read, t - 1) for read, t in zip(self.read, window.starts, strict=True)]
        self.read = [end - 1 for end in window.ends]  # the last drafted token scores nothing
        span = Span.of_rows(starts, self.read, state.layout.padding, state.tokens.device)
        return Projection.of_window(self.head, self.passes(canvas, span), span, window, -1)

    def select(self, rows: Tensor) -> None:
        self.read = [self.read[row] for row in rows.tolist()]
        self.passes.select(rows)

    def join(self, state: DecodeState) -> None:
        self.read = [*self.read, *state.layout.padding[len(self.read) :]]
        self.passes.join(state)
