"""The drafter: a masked-diffusion LM that predicts every mask of the window in one pass, independently of each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apd.decoding.state import DecodeState, to_device
from apd.decoding.window import Window
from apd.models.leave_one_out import Shadows, shadowed_hidden_states
from apd.models.packed import packed_hidden_states
from apd.models.span import Span
from apd.models.transformer import EagerPasses, Projection, TransformersModel


class MaskedDiffusionDrafter(TransformersModel):
    """A drafter from a transformers decoder with bidirectional attention.

    Args:
        model: an instance of a causal-LM class with `config.is_causal=False`; see `load_drafter`.
        mask_token_id: id of the mask token, in `[0, vocab_size)`.
        logit_shift: row i of the logits predicts token i + `logit_shift`: 1 for Dream, 0 for LLaDA.
        block_size: block length b of a block-causal model, whose tokens attend within their block and to earlier blocks;
            `None` for bidirectional attention.

    Raises:
        ValueError: `mask_token_id` is not in the vocabulary.
    """

    role = "drafter"

    def __init__(
        self, model: PreTrainedModel, *, mask_token_id: int, logit_shift: int, block_size: int | None = None
    ) -> None:
        super().__init__(model, block_size=block_size)
        self.mask_token_id = mask_token_id
        self.logit_shift = logit_shift
        self.generation_config = model.generation_config
        check_mask_token(mask_token_id, self.vocab_size)

    def open(self, state: DecodeState) -> NeuralDrafterSession:
        return NeuralDrafterSession(self, state, None, None)

    def open_cached(self, state: DecodeState, kv_window: int, kv_refresh: int | None) -> NeuralDrafterSession:
        return NeuralDrafterSession(self, state, kv_window, kv_refresh)


class NeuralDrafterSession:
    """Recomputes the last W committed tokens and the masks each step; keys and values of older tokens come from the cache.

    After the first pass, the span starts at (frontier of the previous step) − W + 1, so tokens that the last step
    committed are always recomputed as real tokens. With N, a row gets a full refresh after every N committed tokens. The
    pass is exact if W is `None` (no cache) or covers the row, or if N is 1.
    """

    def __init__(
        self, drafter: MaskedDiffusionDrafter, state: DecodeState, kv_window: int | None, kv_refresh: int | None
    ) -> None:
        self.drafter = drafter
        self.head = drafter.model.get_output_embeddings()
        self.kv_window = kv_window
        self.kv_refresh = kv_refresh
        self.starts: Sequence[int] = state.layout.padding  # per row, the first column of the next span
        self.refreshed_at: Sequence[int] = state.layout.padding  # per row, the frontier at its last full refresh
        self.passes = drafter.passes(state, is_cached=kv_window is not None)

    def logits(self, state: DecodeState, window: Window) -> Projection:
        span = self.next_span(state, window)
        hidden = self.passes(state.tokens, span)
        return Projection.of_window(self.head, hidden, span, window, -self.drafter.logit_shift)

    def canvas_logits(self, state: DecodeState, window: Window, rows: Tensor) -> Projection:
        """Logits of several canvases of each row, see `CanvasSession`. With a cache they share the row's frozen keys.

        Raises:
            ValueError: a compiled drafter with `kv_window`.
        """
        shift, device = self.drafter.logit_shift, state.tokens.device
        if self.kv_window is None:
            padding = state.layout.padding
            span = Span.of_rows(padding, window.ends, padding, device)
            passes = EagerPasses(self.drafter.model, block_size=self.drafter.block_size, role=self.drafter.role)
            return Projection.of_window(self.head, passes(state.tokens, span), span, window, -shift)
        if not isinstance(self.passes, EagerPasses):
            raise ValueError(
                "`kv_window` must be None with a compiled sampler and several canvases per pass, got "
                f"{self.kv_window}: their number changes from pass to pass. Leave out `compile()` or `kv_window`."
            )
        of_row = rows.tolist()
        firsts = [i for i, row in enumerate(of_row) if i == 0 or row != of_row[i - 1]]
        first = dataclasses.replace(
            window, starts=[window.starts[i] for i in firsts], ends=[window.ends[i] for i in firsts]
        )
        span = self.next_span(state.select(to_device(firsts, device)), first)
        hidden = packed_hidden_states(self.passes, state, rows, span, window.ends, window.columns - shift)
        return Projection(self.head, hidden, device)

    def next_span(self, state: DecodeState, window: Window) -> Span:
        """The columns that this pass computes. Updates the per-row memory: call it once per pass."""
        paddings, starts = state.layout.padding, self.starts
        if (limit := self.kv_refresh) is not None:
            rows = zip(paddings, starts, window.starts, self.refreshed_at, strict=True)
            starts = [padding if t - refreshed >= limit else start for padding, start, t, refreshed in rows]
            rows = zip(paddings, starts, window.starts, self.refreshed_at, strict=True)
            self.refreshed_at = [t if start == padding else refreshed for padding, start, t, refreshed in rows]
        if (size := self.kv_window) is not None:
            self.starts = [max(t - size + 1, padding) for t, padding in zip(window.starts, paddings, strict=True)]
        return Span.of_rows(starts, window.ends, paddings, state.tokens.device)

    def leave_one_out_logits(self, state: DecodeState, window: Window) -> Projection:
        """Leave-one-out logits: each decided column predicted as if it alone were masked. One uncached pass: `b m v`.

        A mask is predicted as in `logits`. A decided column is predicted from its shadow (`Shadows`), which does not attend
        to the column itself. Exact for one layer; in deeper models the other columns carry some information about the
        token.
        """
        assert self.kv_window is None
        decided = window.within(window.gather(state.decided))
        num_shadows = int(decided.sum(1).max())
        if not num_shadows:
            return self.logits(state, window)
        shift = self.drafter.logit_shift
        span = self.next_span(state, window)
        decided_first = decided.long().argsort(dim=1, descending=True, stable=True)[:, :num_shadows]
        last = to_device(window.ends, decided.device)[:, None] - 1
        shadowed = torch.where(window.inside, window.columns, last).gather(1, decided_first)
        columns = shadowed[..., None] + torch.arange(-shift, 1, device=shadowed.device)  # b k g
        tokens = state.tokens.gather(1, columns.flatten(1)).view_as(columns)
        tokens[..., -1] = self.drafter.mask_token_id
        hidden = shadowed_hidden_states(self.drafter.model, state.tokens, span, Shadows(tokens, columns))
        at_shadow = span.width + (decided.cumsum(1) - 1) * (shift + 1)
        index = torch.where(decided, at_shadow, window.columns - shift - span.columns[:, :1])
        return Projection.at(self.head, hidden, index)

    def select(self, rows: Tensor) -> None:
        kept = rows.tolist()
        self.starts, self.refreshed_at = ([of_row[row] for row in kept] for of_row in (self.starts, self.refreshed_at))
        self.passes.select(rows)

    def join(self, state: DecodeState) -> None:
        new = state.layout.padding[len(self.starts) :]
        self.starts, self.refreshed_at = [*self.starts, *new], [*self.refreshed_at, *new]
        self.passes.join(state)


def check_mask_token(mask_token_id: int, vocab_size: int) -> None:
    """Refuse a mask token outside the drafter's vocabulary.

    Raises:
        ValueError: `mask_token_id` is not in the vocabulary.
    """
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"`mask_token_id` must be an id of the drafter, 0 to {vocab_size - 1}, got {mask_token_id}. Give the id of "
            "its mask token."
        )
