"""The verifier: a small causal LM that scores every token of a draft in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apd.decoding.protocols import Logits, VerifierSession
from apd.decoding.state import DecodeState, to_device
from apd.decoding.window import Window
from apd.models.horizon import CAUSAL
from apd.models.own_cache import OwnCacheSession, WholeRowSession
from apd.models.span import Span
from apd.models.transformer import EagerPasses, PassFactory, Projection, TransformersModel

#: How the passes of a verifier are made; `apd.models.ways.find_way` finds the fastest that is right for a model.
#:
#: - "columns": ragged rows in one pass, keys of every column kept, output layer applied on access.
#: - "own head": the same, but the model's own forward gives the logits (it scales or caps them).
#: - "own cache": the model's own forward and masks, with a cache of transformers for each row, one row at a time.
#: - "own cache, one by one": the same, one token at a time.
#: - "no cache": the model's own forward over whole rows, in every pass.
Way = Literal["columns", "own head", "own cache", "own cache, one by one", "no cache"]


class CausalVerifier(TransformersModel):
    """A verifier from a transformers decoder. Bidirectional decoders, too, are run with a causal mask.

    Args:
        model: a causal LM; see `load_verifier`.
        way: how its passes are made, see `Way`. The default is right for decoders with rotary or learned positions and plain
            logits.
    """

    role = "verifier"

    def __init__(self, model: PreTrainedModel, way: Way = "columns") -> None:
        self.way = way
        super().__init__(model, attention=CAUSAL)

    @property
    def compiled(self) -> PassFactory | None:
        """The compiled model, which makes its own passes.

        Raises:
            ValueError: on assignment, if `way` is not "columns".
        """
        return self._compiled

    @compiled.setter
    def compiled(self, compiled: PassFactory | None) -> None:
        if compiled is not None and self.way != "columns":
            raise ValueError(
                f"A verifier that is compiled must have plain logits and a cache of columns, but {type(self.model).__name__} "
                f"is run with {self.way!r}. Do not compile, or choose another verifier, such as a Qwen or Llama."
            )
        self._compiled = compiled

    def open(self, state: DecodeState) -> VerifierSession:
        if self.way == "columns":
            return NeuralVerifierSession(self, state)
        if self.way == "own head":
            return OwnHeadSession(self, state)
        if self.way == "no cache":
            return WholeRowSession(self.model)
        return OwnCacheSession(self.model, state, one_by_one=self.way == "own cache, one by one")


class NeuralVerifierSession:
    """Computes each token once: the cache keeps the keys and values of every column whose token has not changed.

    Cached keys of the last draft stay valid for every committed token except the last, which may be a correction. So a
    pass starts at the column before the frontier, whose output scores the window's first position anyway.
    """

    def __init__(self, verifier: CausalVerifier, state: DecodeState) -> None:
        self.head = verifier.model.get_output_embeddings()
        self.passes = verifier.passes(state, is_cached=True)
        self.read: Sequence[int] = state.layout.padding  # per row, the column behind the last that was computed

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Logits:
        canvas = window.fill(draft, state.tokens)
        span = self.next_span(state, window)
        return Projection.of_window(self.head, self.passes(canvas, span), span, window, -1)

    def next_span(self, state: DecodeState, window: Window) -> Span:
        """The columns that this pass computes. Updates the per-row memory: call it once per pass."""
        last = state.last_new_columns(window.starts, self.read)
        starts = [min(read, column) for read, column in zip(self.read, last, strict=True)]
        self.read = [end - 1 for end in window.ends]  # the last drafted token scores nothing
        return Span.of_rows(starts, self.read, state.layout.padding, state.tokens.device)

    def select(self, rows: Tensor) -> None:
        self.read = [self.read[row] for row in rows.tolist()]
        self.passes.select(rows)

    def join(self, state: DecodeState) -> None:
        self.read = [*self.read, *state.layout.padding[len(self.read) :]]
        self.passes.join(state)


class OwnHeadSession(NeuralVerifierSession):
    """The same for a model whose own forward gives the logits, which may scale or cap them.

    Logits are wide, so a pass computes those of the window only: what comes before it (a prompt) takes a pass of its own,
    without logits.
    """

    def __init__(self, verifier: CausalVerifier, state: DecodeState) -> None:
        self.passes: WholeModelPasses = WholeModelPasses(
            verifier.model, attention=CAUSAL, cache_shape=(len(state.tokens), state.width), role=verifier.role
        )
        self.read = state.layout.padding

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Tensor:
        canvas = window.fill(draft, state.tokens)
        span = self.next_span(state, window)
        before = [t - 1 for t in window.starts]
        paddings, device = state.layout.padding, canvas.device
        if rows := [row for row, (start, t) in enumerate(zip(span.starts, before, strict=True)) if start < t]:
            self.passes.read(canvas, Span.of_rows(span.starts, before, paddings, device).select(rows), rows)
        span = Span.of_rows(before, span.ends, paddings, device)
        logits = self.passes(canvas, span)[:, : window.columns.shape[1]]
        return logits.to(device, copy=True)  # an ordinary tensor, unlike those made in inference mode


class WholeModelPasses(EagerPasses):
    """Passes that give the logits of the model's own forward in place of hidden states: `b q v`."""

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        return self.model(**inputs).logits

    def read(self, tokens: Tensor, span: Span, rows: list[int]) -> None:
        """Write the keys and values of a span of these rows.

        Args:
            tokens: `b l` int64.
            span: the columns, of `n` rows.
            rows: `n` row numbers.
        """
        at = None if len(rows) == len(tokens) else to_device(rows, tokens.device)
        inputs = self.inputs(tokens if at is None else tokens.index_select(0, at), span, at)
        with torch.inference_mode():
            super().forward(inputs)
