"""The drafter: a masked-diffusion LM that predicts every mask of the window at once, each on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apd.cache import PASS, Span
from apd.forward import FixedPasses, Neural, Projection, Shadows, shadowed_hidden_states
from apd.state import COLUMNS, DecodeState, FollowsRows, Later, Logits, Reach, Window, round_up, to_device


class DrafterSession(FollowsRows, Protocol):
    """A drafter's memory for the length of one `generate` call."""

    def logits(self, state: DecodeState, window: Window) -> Logits:
        """Raw logits of every column of the window given all decided columns before the window's end: `b m v`.

        Columns outside the window's `inside` may hold anything.
        """


@runtime_checkable
class LeaveOneOutSession(DrafterSession, Protocol):
    """One that also tells what it would say where it is shown a token."""

    def leave_one_out_logits(self, state: DecodeState, window: Window) -> Logits:
        """Raw logits of every column of the window given all *other* decided columns before its end: `b m v`."""


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

    def open(self, state: DecodeState, kv_window: int | None, kv_refresh: int | None) -> DrafterSession:
        """Start a session for these rows; `kv_window` is W, `kv_refresh` N (see `APDConfig`)."""


class MaskedDiffusionDrafter(Neural):
    """A transformers decoder that attends both ways, as a drafter.

    Args:
        model: a causal-LM class with `config.is_causal=False`; see `load_drafter`.
        mask_token_id: id of the mask token, below the model's vocabulary size.
        logit_shift: row i of the logits predicts token i + `logit_shift`: 1 for Dream, 0 for LLaDA.

    Raises:
        ValueError: `mask_token_id` is not in the vocabulary.
    """

    def __init__(self, model: PreTrainedModel, *, mask_token_id: int, logit_shift: int) -> None:
        super().__init__(model, causal=False)
        self.mask_token_id = mask_token_id
        self.logit_shift = logit_shift
        self.generation_config = model.generation_config
        check_mask_token(mask_token_id, self.vocab_size)

    def open(self, state: DecodeState, kv_window: int | None, kv_refresh: int | None) -> NeuralDrafterSession:
        return NeuralDrafterSession(self, state, kv_window, kv_refresh)


class NeuralDrafterSession:
    """Recomputes the last W committed tokens and the masks each step; older keys and values stay as they were.

    After the first pass the span starts at (frontier of the previous step) − W + 1, so whatever the last step
    committed is always recomputed as real tokens. A row that has got N tokens further since it was last computed as a
    whole is computed as a whole again. Exact when W is `None` (no cache) or covers the row, or when N is 1.
    """

    def __init__(
        self, drafter: MaskedDiffusionDrafter, state: DecodeState, kv_window: int | None, kv_refresh: int | None
    ) -> None:
        self.drafter = drafter
        self.head = drafter.model.get_output_embeddings()
        self.kv_window = kv_window
        self.kv_refresh = kv_refresh
        self.starts: Sequence[int] = state.layout.padding
        # Where the frontier was when the row was last computed as a whole.
        self.whole_at: Sequence[int] = state.layout.padding
        self.passes = drafter.passes(state, is_cached=kv_window is not None)

    def logits(self, state: DecodeState, window: Window) -> Projection:
        span = self.span(state, window)
        hidden = self.passes(state.tokens, span)
        return Projection.of(self.head, hidden, span, window, -self.drafter.logit_shift)

    def span(self, state: DecodeState, window: Window) -> Span:
        """The columns that this step computes; asked once per step."""
        paddings, starts, device = state.layout.padding, self.starts, state.tokens.device
        if (limit := self.kv_refresh) is not None:
            of_rows = zip(paddings, starts, window.starts, self.whole_at, strict=True)
            starts = [padding if t - whole_at >= limit else start for padding, start, t, whole_at in of_rows]
            of_rows = zip(paddings, starts, window.starts, self.whole_at, strict=True)
            self.whole_at = [t if start == padding else whole_at for padding, start, t, whole_at in of_rows]
        if (size := self.kv_window) is not None:
            self.starts = Later(lambda: [max(t - size + 1, p) for t, p in zip(window.starts, paddings, strict=True)])
        if window.reach is None:
            return Span(starts, window.ends, paddings, device)
        edges = torch.stack([to_device(starts, device), state.frontier + window.inside.sum(1), state.padding])
        return Span(starts, window.ends, paddings, device, edges, _widest(starts, window.reach.furthest))

    def fits(self, reach: Reach) -> bool:
        """Whether no row can be due to be computed anew, and the widest span that may be needed costs no more."""
        if not isinstance(self.passes, FixedPasses) or self.kv_refresh is not None:
            return False
        least, most = (
            self.passes.num_seats * round_up(_widest(self.starts, ends), COLUMNS)
            for ends in (reach.nearest, reach.furthest)
        )
        return most <= max(least, PASS)

    def leave_one_out_logits(self, state: DecodeState, window: Window) -> Projection:
        """As if each decided column of the window alone were a mask too: `b m v`, in one forward pass, without a cache.

        A mask is read as in `logits`. A decided column is read at shadows of the columns that predict it, its own a
        mask, which see the row without these. Exact for one layer; in deeper models the other columns have already seen
        the token, and some of it leaks.
        """
        assert self.kv_window is None
        decided = window.within(window.of(state.decided))
        num_shadows = int(decided.sum(1).max())
        if not num_shadows:
            return self.logits(state, window)
        shift = self.drafter.logit_shift
        span = self.span(state, window)
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
        self.starts, self.whole_at = ([of[row] for row in rows.tolist()] for of in (self.starts, self.whole_at))
        self.passes.select(rows)

    def join(self, state: DecodeState) -> None:
        new = state.layout.padding[len(self.starts) :]
        self.starts, self.whole_at = [*self.starts, *new], [*self.whole_at, *new]
        self.passes.join(state)


def check_mask_token(mask_token_id: int, vocab_size: int) -> None:
    """Refuse a mask token that the drafter has no row for.

    Raises:
        ValueError: `mask_token_id` is not in the vocabulary.
    """
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"`mask_token_id` must be an id of the drafter, 0 to {vocab_size - 1}, got {mask_token_id}. Give the id of "
            "its mask token."
        )


def _widest(starts: Sequence[int], ends: Sequence[int]) -> int:
    return max(end - start for start, end in zip(starts, ends, strict=True))
