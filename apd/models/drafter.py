"""The drafter: a masked-diffusion LM that predicts every mask of the window in one pass, independently of each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from apd.decoding.state import DecodeState, to_device
from apd.decoding.window import Window
from apd.models.horizon import FULL, Attention, Kind
from apd.models.leave_one_out import Shadows, shadowed_hidden_states
from apd.models.packed import packed_hidden_states
from apd.models.span import Span
from apd.models.transformer import EagerPasses, Passes, Projection, TransformersModel


class MaskedDiffusionDrafter(TransformersModel):
    """A drafter from a transformers decoder.

    Args:
        model: an instance of a causal-LM class; with `config.is_causal=False` for "full" attention. See `load_drafter`.
        mask_token_id: id of the mask token, in `[0, vocab_size)`.
        logit_shift: row i of the logits predicts token i + `logit_shift`: 1 for Dream, 0 for LLaDA.
        attention, block_size, anchored: which columns see each other, see `Attention`.
        reads_causally: True if the same weights, read with a causal mask, are a language model that predicts the next token, so
            that the model can verify its own draft.
        cache: keep keys and values where that is exact, that is with another attention than "full". False recomputes whole rows
            in every pass, for comparisons.

    Raises:
        ValueError: `mask_token_id` is not in the vocabulary, or `attention` and `block_size` do not fit.
    """

    role = "drafter"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        mask_token_id: int,
        logit_shift: int,
        attention: Kind = "full",
        block_size: int | None = None,
        anchored: bool = False,
        reads_causally: bool = False,
        cache: bool = True,
    ) -> None:
        super().__init__(model, attention=Attention(attention, block_size, anchored))
        self.mask_token_id = mask_token_id
        self.logit_shift = logit_shift
        self.reads_causally = reads_causally
        self.cache = cache
        self.generation_config = model.generation_config
        check_mask_token(mask_token_id, self.vocab_size)

    def open(self, state: DecodeState) -> NeuralDrafterSession:
        return NeuralDrafterSession(self, state, None, None)

    def open_cached(self, state: DecodeState, kv_window: int, kv_refresh: int | None) -> NeuralDrafterSession:
        return NeuralDrafterSession(self, state, kv_window, kv_refresh)

    def window_ends(self, state: DecodeState) -> Sequence[int]:
        layout, ends = state.layout, []
        for t, padding, prompt_end, end in zip(
            layout.frontier, layout.padding, layout.prompt_end, layout.end, strict=True
        ):
            limit = self.attention.window_end(t, padding, prompt_end, self.logit_shift)
            ends.append(end if limit is None else min(limit, end))
        return ends


class NeuralDrafterSession:
    """Recomputes the columns whose keys may have changed, and the masks, in each pass; other keys come from the cache.

    With "full" attention these are the last W committed tokens before the frontier of the previous step, so that tokens
    which the last step committed are always recomputed as real tokens; older keys are stale. With N, a row gets a full
    refresh after every N committed tokens. The pass is exact if W is `None` (no cache) or covers the row, or if N is 1.
    With other attention, `Attention` says which keys are final, and every pass is exact.
    """

    def __init__(
        self, drafter: MaskedDiffusionDrafter, state: DecodeState, kv_window: int | None, kv_refresh: int | None
    ) -> None:
        self.drafter = drafter
        self.attention = drafter.attention
        self.head = drafter.model.get_output_embeddings()
        self.kv_window = kv_window
        self.kv_refresh = kv_refresh
        self.starts: Sequence[int] = state.layout.padding  # per row, the first column of the next span
        self.refreshed_at: Sequence[int] = state.layout.padding  # per row, the frontier at its last full refresh
        self.is_cached = kv_window is not None or (self.attention.is_final and drafter.cache)
        self.passes = drafter.passes(state, is_cached=self.is_cached)

    def logits(self, state: DecodeState, window: Window) -> Projection:
        return self.run(self.passes, state, window, self.next_span(state, window))

    def canvas_logits(self, state: DecodeState, window: Window, rows: Tensor) -> Projection:
        """Logits of several canvases of each row, see `CanvasSession`. With a cache they share the row's frozen keys.

        Raises:
            ValueError: a compiled drafter with a cache.
        """
        shift, device = self.drafter.logit_shift, state.tokens.device
        if not self.is_cached or self._is_out_of_order(state):
            span = self.span(state.layout.padding, state, window)
            passes = EagerPasses(self.drafter.model, attention=self.attention, role=self.drafter.role)
            return self.run(passes, state, window, span)
        if not isinstance(self.passes, EagerPasses) or self.drafter.compiled is not None:
            raise ValueError(
                "Several canvases per pass need a sampler that is not compiled, or a drafter without a cache: their number "
                "changes from pass to pass. Leave out `compile()`, or `kv_window`."
            )
        of_row = rows.tolist()
        firsts = [i for i, row in enumerate(of_row) if i == 0 or row != of_row[i - 1]]
        first = dataclasses.replace(
            window, starts=[window.starts[i] for i in firsts], ends=[window.ends[i] for i in firsts]
        )
        span = self.next_span(state.select(to_device(firsts, device)), first)
        whole = self.span([span.starts[row] for row in of_row], state, window)
        tokens = self.canvas(state, whole)
        hidden = packed_hidden_states(
            self.passes, tokens, rows, whole, window.columns - shift, self.unseen(state, window, whole)
        )
        return Projection(self.head, hidden, device)

    def run(self, passes: Passes, state: DecodeState, window: Window, span: Span) -> Projection:
        """Logits of the window from one pass over the span."""
        tokens, shift, positions, columns = self.canvas(state, span), self.drafter.logit_shift, None, window.columns
        unseen = self.unseen(state, window, span)
        if self._is_out_of_order(state):
            # A mask of a causal model sees every decided token: they stand first, with positions of their own.
            column = torch.arange(tokens.shape[1], device=tokens.device)
            decided = pad(state.decided, (0, tokens.shape[1] - state.width), value=True)
            ends = to_device(span.ends, tokens.device)[:, None]
            order = torch.where(column < ends, (~decided).long(), 2).argsort(dim=1, stable=True)
            tokens = tokens.gather(1, order)
            positions = order - state.padding[:, None]
            columns = order.argsort(1).gather(1, columns)
            unseen = None if unseen is None else unseen.gather(1, order)
            return Projection.at(self.head, passes(tokens, span, positions, unseen), columns - span.columns[:, :1])
        return Projection.of_window(self.head, passes(tokens, span, None, unseen), span, window, -shift)

    def canvas(self, state: DecodeState, span: Span) -> Tensor:
        """The tokens of the rows up to the end of the span, which may be behind the last column: `b l` int64."""
        missing = max(span.ends) - state.width
        return state.tokens if missing <= 0 else pad(state.tokens, (0, missing), value=self.drafter.mask_token_id)

    def unseen(self, state: DecodeState, window: Window, span: Span) -> Tensor | None:
        """Masks behind the canvas, where the span goes on to given tokens: `b l` bool; `None`: there are none."""
        ends = self.canvas_ends(state, window)
        if all(behind <= end for behind, end in zip(span.ends, ends, strict=True)):
            return None
        columns = torch.arange(max(span.ends), device=state.tokens.device)
        decided = pad(state.decided, (0, max(0, len(columns) - state.width)))[:, : len(columns)]
        return ~decided & (columns >= to_device(ends, state.tokens.device)[:, None])

    def canvas_ends(self, state: DecodeState, window: Window) -> list[int]:
        """The column behind each row's canvas. Behind it, only given tokens are seen."""
        rows = zip(window.starts, window.ends, state.layout.padding, strict=True)
        return [self.attention.canvas_end(t, end, padding, self.drafter.logit_shift) for t, end, padding in rows]

    def _is_out_of_order(self, state: DecodeState) -> bool:
        """True if the model is causal and tokens behind the frontier of a row are decided."""
        if self.attention.kind != "causal":
            return False
        rows = zip(state.layout.decided, state.layout.frontier, state.layout.end, strict=True)
        return any(decided > t + state.width - end for decided, t, end in rows)

    def next_span(self, state: DecodeState, window: Window) -> Span:
        """The columns that this pass computes. Updates the per-row memory: call it once per pass."""
        paddings, starts = state.layout.padding, self.starts
        if (limit := self.kv_refresh) is not None:
            rows = zip(paddings, starts, window.starts, self.refreshed_at, strict=True)
            starts = [padding if t - refreshed >= limit else start for padding, start, t, refreshed in rows]
            rows = zip(paddings, starts, window.starts, self.refreshed_at, strict=True)
            self.refreshed_at = [t if start == padding else refreshed for padding, start, t, refreshed in rows]
        if self.is_cached:
            fronts = zip(window.starts, paddings, state.layout.prompt_end, strict=True)
            self.starts = [max(self._first_changing(t, padding, start), padding) for t, padding, start in fronts]
        return self.span(starts, state, window)

    def _first_changing(self, frontier: int, padding: int, prompt_end: int) -> int:
        """The first column that the pass after one at this frontier recomputes."""
        if self.kv_window is not None:
            return frontier - self.kv_window + 1
        # The row that predicts the frontier's token is read again if a step commits nothing there.
        return min(self.attention.first_changing(frontier, padding, prompt_end), frontier - self.drafter.logit_shift)

    def span(self, starts: Sequence[int], state: DecodeState, window: Window) -> Span:
        """The columns from `starts` to the end of the canvas, or of what is given behind it."""
        paddings, ends = state.layout.padding, self.canvas_ends(state, window)
        if state.has_holes:
            ends = [max(end, given) for end, given in zip(ends, state.layout.given_end, strict=True)]
        seeds = None
        if self.attention.kind == "prefix":
            rows = zip(window.starts, paddings, state.layout.prompt_end, strict=True)
            seeds = [self.attention.seed(*row) for row in rows]
        return Span.of_rows(starts, ends, paddings, state.tokens.device, seeds)

    def leave_one_out_logits(self, state: DecodeState, window: Window) -> Projection:
        """Leave-one-out logits: each decided column predicted as if it alone were masked. One uncached pass: `b m v`.

        A mask is predicted as in `logits`. A decided column is predicted from its shadow (`Shadows`), which does not attend
        to the column itself. Exact for one layer; in deeper models the other columns carry some information about the
        token.
        """
        if self.attention != FULL:
            raise ValueError(
                f"Predicting decided columns needs a drafter with attention='full', got {self.attention.kind!r}. Use a strategy that "
                "revokes nothing."
            )
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
