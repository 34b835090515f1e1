"""Passes of causal LMs through their own forward, row by row: without padding, with a mask and a cache of their own.

For models that `ColumnCache` cannot serve, because they build their own masks or positions (ALiBi) or have recurrent or
convolutional layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.models.cache import cache_argument
from apd.models.transformer import check_evaluating, input_device

#: Tokens that a row with a recurrent state runs again rather than take one more pass to move the saved state.
MOST_TOKENS_AGAIN = 16


class OwnCacheSession:
    """One pass per row, over the columns that its cache does not hold.

    As in `NeuralVerifierSession`, a row's cache is right up to the column before the frontier.

    Args:
        model: a causal LM in evaluation mode.
        state: the rows.
        one_by_one: for models that read several tokens at once only from the row's start.
        again: see `MOST_TOKENS_AGAIN`; 0 with `one_by_one`, where every token takes a pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        state: DecodeState,
        *,
        one_by_one: bool = False,
        again: int = MOST_TOKENS_AGAIN,
    ) -> None:
        check_evaluating(model, model.named_modules(), "verifier")
        self.model, self.one_by_one, self.again = model, one_by_one, 0 if one_by_one else again
        self.rows = [RowCache(model, one_by_one) for _ in state.layout.padding]

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Tensor:
        check_evaluating(self.model, [("", self.model)], "verifier")
        canvas = window.fill(draft, state.tokens).to(input_device(self.model))
        rows = zip(self.rows, state.layout.padding, window.starts, window.ends, strict=True)
        parts: list[Tensor | None] = []
        with torch.inference_mode():
            for number, (row, padding, start, end) in enumerate(rows):
                ids = canvas[number : number + 1, padding : end - 1]  # the last drafted token scores nothing
                parts.append(row.logits(ids, end - start, self.again) if end > start else None)
        return stacked(parts, draft)

    def select(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]

    def join(self, state: DecodeState) -> None:
        self.rows += [RowCache(self.model, self.one_by_one) for _ in state.layout.padding[len(self.rows) :]]


class RowCache:
    """A cache of one row that can go back to any earlier token.

    Keys are all kept, also those behind a sliding window, so going back drops the newest. Recurrent and convolutional states
    cannot go back: copies are kept of earlier ones, and the tokens since are run again. The older, the sparser: n tokens back,
    the next copy is at most another n tokens or so away, so a row of l tokens keeps about log₂ l of them.

    Attributes:
        length: tokens that the cache holds.
        saved: lengths and copies of recurrent states, in ascending order.

    Raises:
        ValueError: the model takes no cache, or a layer's cache cannot go back.
    """

    def __init__(self, model: PreTrainedModel, one_by_one: bool = False) -> None:
        self.model, self.one_by_one = model, one_by_one
        self.argument = cache_argument(model.__class__)
        self.limits_logits = takes(model, "logits_to_keep")
        self.saved: list[tuple[int, list[dict[str, Any]]]] = []
        self.clear()

    def clear(self) -> None:
        """Hold no token."""
        self.cache, self.length = rewindable_cache(self.model), 0
        self.recurrent = [layer for layer in self.cache.layers if isinstance(layer, LinearAttentionLayer)]

    def logits(self, ids: Tensor, num_logits: int, again: int) -> Tensor:
        """Logits of the last `num_logits` tokens: `n v`.

        Args:
            ids: `1 l` int64, all tokens of the row. Cached ones are the same as in the last call, up to those that get logits.
            num_logits: n, at least 1.
            again: tokens that are run again rather than take one more pass.
        """
        first = ids.shape[1] - num_logits
        self.go_back(first)
        if self.recurrent and first - (self.saved[-1][0] if self.saved else 0) > again:
            if self.length < first:
                self.run(ids[:, :first], 1)
            self.save()
        return self.run(ids, num_logits)[0, -num_logits:]

    def run(self, ids: Tensor, num_logits: int) -> Tensor:
        """Run the tokens that the cache does not hold: `1 n v`, at least `num_logits` of them."""
        limit = {"logits_to_keep": num_logits} if self.limits_logits else {}
        new = ids[:, self.length :]
        parts: list[Tensor] = []
        for part in new.split(1 if self.one_by_one and self.length else new.shape[1], dim=1):
            inputs = {"input_ids": part, self.argument: self.cache, "use_cache": True}
            parts.append(self.model(**inputs, **limit).logits)
        self.length = ids.shape[1]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def go_back(self, length: int) -> None:
        """Hold at most `length` tokens: as many as there are with keys only, else those of the last saved state."""
        if self.length <= length:
            return
        states: list[dict[str, Any]] = []
        if self.recurrent:
            while self.saved and self.saved[-1][0] > length:
                self.saved.pop()
            if not self.saved:
                self.clear()
                return
            length, states = self.saved[-1]
        for layer in self.cache.layers:
            if isinstance(layer, DynamicLayer):
                DynamicLayer.crop(
                    layer, length - self.length
                )  # not `layer.crop`, which asks for recurrent states, too
        for layer, fields in zip(self.recurrent, states, strict=True):
            vars(layer).update(copied(fields))
        self.length = length

    def save(self) -> None:
        """Keep a copy of the recurrent states, and fewer of the older ones."""
        if self.saved and self.saved[-1][0] == self.length:
            return
        fields = [{name: each for name, each in vars(layer).items() if name not in KEYS} for layer in self.recurrent]
        self.saved.append((self.length, copied(fields)))
        for i in range(len(self.saved) - 2, 0, -1):
            older, newer = (self.length - self.saved[at][0] for at in (i - 1, i + 1))
            if older <= 2 * newer:
                del self.saved[i]


#: Fields of a cache layer that hold keys and values. They are replaced, never written in place.
KEYS = ("keys", "values")


def copied(fields: Any) -> Any:
    """The same nested lists and dictionaries with copies of all tensors."""
    if isinstance(fields, Tensor):
        return fields.clone()
    if isinstance(fields, dict):
        return {name: copied(each) for name, each in fields.items()}
    return [copied(each) for each in fields] if isinstance(fields, list) else fields


def rewindable_cache(model: PreTrainedModel) -> Cache:
    """transformers' cache for this model, with layers that keep all keys in place of those that keep a sliding window.

    Raises:
        ValueError: a layer of another kind.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [_rewindable(layer) for layer in cache.layers]
    return cache


def _rewindable(layer: Any) -> Any:
    kind = type(layer)
    if kind is DynamicSlidingWindowLayer:
        layer = DynamicLayer()
        layer.is_sliding = True  # the model asks the first such layer for the size of its sliding mask
    elif kind is LinearAttentionAndSlidingWindowAttentionLayer:
        layer = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
        layer.is_sliding = True
    elif kind.__name__ not in _REWINDABLE:
        raise ValueError(f"layers cached as {kind.__name__} cannot go back")
    return layer


# By name: not every supported release of transformers has all of them.
_REWINDABLE = {
    "DynamicLayer",
    "DummyLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
}


class WholeRowSession:
    """No memory: each pass computes all rows from their first tokens, rows of one length at a time and without padding.

    Args:
        model: a causal LM in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_evaluating(model, model.named_modules(), "verifier")
        self.model = model
        self.limits_logits = takes(model, "logits_to_keep")

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Tensor:
        check_evaluating(self.model, [("", self.model)], "verifier")
        canvas = window.fill(draft, state.tokens).to(input_device(self.model))
        by_length: dict[tuple[int, int], list[int]] = {}
        edges = zip(state.layout.padding, window.starts, window.ends, strict=True)
        for row, (padding, start, end) in enumerate(edges):
            if end > start:
                by_length.setdefault((end - 1 - padding, end - start), []).append(row)
        parts: list[Tensor | None] = [None] * len(canvas)
        with torch.inference_mode():
            for (length, num_logits), rows in by_length.items():
                ids = torch.stack([canvas[row, window.ends[row] - 1 - length : window.ends[row] - 1] for row in rows])
                limit = {"logits_to_keep": num_logits} if self.limits_logits else {}
                logits = self.model(input_ids=ids, use_cache=False, **limit).logits[:, -num_logits:]
                for row, part in zip(rows, logits, strict=True):
                    parts[row] = part
        return stacked(parts, draft)

    def select(self, rows: Tensor) -> None:
        pass

    def join(self, state: DecodeState) -> None:
        pass


def stacked(parts: Sequence[Tensor | None], draft: Tensor) -> Tensor:
    """Logits of rows, `n v` each or `None`, in one tensor `b m v`. Not made in inference mode: the caller may write to it."""
    like = next(part for part in parts if part is not None)
    whole = torch.zeros(*draft.shape, like.shape[-1], dtype=like.dtype, device=like.device)
    for row, part in enumerate(parts):
        if part is not None:
            whole[row, : len(part)] = part
    return whole.to(draft.device)


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward has this argument."""
    return argument in inspect.signature(type(model).forward).parameters
