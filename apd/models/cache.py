"""`ColumnCache`: keys and values of the columns that a pass does not compute.

A row of the batch is a row of columns. The cache holds one slot per column and is written in place at the columns of the
span that is recomputed, so nothing is ever appended or cropped: columns behind the frontier are hidden by the attention
mask until they are overwritten.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from apd.models.span import Span


@dataclass
class WriteTarget:
    """Where the current pass writes and what it reads. The layers of a cache share it.

    Attributes:
        num_rows, num_columns: of the cache.
        rows: `n` int64, the rows of the pass; `None` for all.
        slots: where it writes: the columns of all rows, or the rows, `n 1`, and columns of each, `n q` or `1 q` int64;
            `None` between passes.
        num_readable: columns that it reads, from the left.
    """

    num_rows: int
    num_columns: int
    rows: Tensor | None = None
    slots: slice | tuple[Tensor, Tensor] | None = None
    num_readable: int = 0


class ColumnLayer(CacheLayerMixin):
    """One attention layer's keys and values, `b heads columns+1 d`; the last slot takes the fillers' writes."""

    is_compileable = False

    def __init__(self, target: WriteTarget) -> None:
        super().__init__()
        self.target = target

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Inference tensors could not be written by a later call that runs in another mode.
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.zeros(
                    (self.target.num_rows, like.shape[1], self.target.num_columns + 1, like.shape[3]),
                    dtype=like.dtype,
                    device=like.device,
                )
                for like in (key_states, value_states)
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        target, device = self.target, key_states.device
        assert target.slots is not None
        # An iterator may be resumed inside of autocast and outside, so the memory may have another dtype than the pass.
        dtypes = key_states.dtype, value_states.dtype
        key_states, value_states = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
        if isinstance(target.slots, slice):
            self.keys[:, :, target.slots] = key_states
            self.values[:, :, target.slots] = value_states
        else:
            rows, slots = target.slots
            at = rows.to(device), slice(None), slots.to(device)
            self.keys[at] = rearrange(key_states, "n heads q d -> n q heads d")
            self.values[at] = rearrange(value_states, "n heads q d -> n q heads d")
        keys, values = self.keys[:, :, : target.num_readable], self.values[:, :, : target.num_readable]
        if target.rows is not None:
            rows = target.rows.to(device)
            keys, values = keys.index_select(0, rows), values.index_select(0, rows)
        return keys.to(dtypes[0]), values.to(dtypes[1])

    def select(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))

    def grow(self, num_rows: int, num_slots: int) -> None:
        if self.keys is not None and self.values is not None:
            more = (0, 0, 0, num_slots - self.keys.shape[2], 0, 0, 0, num_rows - self.keys.shape[0])
            self.keys, self.values = pad(self.keys, more), pad(self.values, more)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.target.num_readable, 0

    def get_seq_length(self) -> int:
        return self.target.num_readable

    def get_max_length(self) -> int:
        return self.target.num_columns

    get_max_cache_shape = get_max_length  # its name before transformers 5.23


@functools.cache
def cache_argument(model_class: type[PreTrainedModel]) -> str:
    """The argument of `forward` that takes the cache: `cache` from transformers 5.24 on, `past_key_values` before.

    Raises:
        ValueError: `forward` takes neither.
    """
    arguments = inspect.signature(model_class.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in arguments:
            return name
    raise ValueError(
        f"The model must take its keys and values as `cache` or `past_key_values`, but {model_class.__name__}.forward "
        f"takes {', '.join(f'`{name}`' for name in arguments if name != 'self')}. Choose a decoder that keeps a cache."
    )


class ColumnCache(Cache):
    """A slot for every column of every row, written where the current span says.

    Args:
        model: whose keys and values it holds.
        num_rows: of the batch.
        num_columns: columns of a row when everything is decided.

    Attributes:
        argument: the name by which the model's `forward` takes it, looked up outside of what torch.compile traces.

    Raises:
        ValueError: the model takes no cache.
    """

    layer_class = ColumnLayer

    def __init__(self, model: PreTrainedModel, num_rows: int, num_columns: int) -> None:
        self.argument = cache_argument(model.base_model.__class__)
        self.target = WriteTarget(num_rows, num_columns)
        super().__init__(layers=[self.layer_class(self.target) for _ in range(model.config.num_hidden_layers)])

    @property
    def num_readable(self) -> int:
        """Columns that the current pass reads."""
        return self.target.num_readable

    def set_target(self, span: Span, rows: Tensor | None = None, *, num_readable: int | None = None) -> None:
        """Let the next forward pass write at `span` and read every column before the furthest end.

        Args:
            rows: `n` int64, the rows that the span is of; `None` for all.
            num_readable: columns that it reads; up to the furthest end if not given.
        """
        target = self.target
        target.rows, target.num_readable = rows, max(span.ends) if num_readable is None else num_readable
        if span.is_level and rows is None:
            target.slots = slice(span.starts[0], span.ends[0])
            return
        rows = torch.arange(target.num_rows, device=span.columns.device) if rows is None else rows
        target.slots = rows[:, None], span.slots(target.num_columns)

    def clear_target(self) -> None:
        """Drop the references to tensors of the pass."""
        self.target.slots = None

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (`n` int64)."""
        self.target.num_rows = len(rows)
        for layer in self.layers:
            layer.select(rows)

    def grow(self, num_rows: int, num_columns: int) -> None:
        """Make room for more rows behind those there are; as many columns as the batch has now, more or fewer."""
        self.target.num_rows, self.target.num_columns = num_rows, num_columns
        for layer in self.layers:
            layer.grow(num_rows, num_columns + 1)
