"""`ColumnCache`: keys and values of every column of a batch, for the columns that a pass does not compute.

The cache holds one entry per row and column. A pass overwrites the entries of its span in place; nothing is appended or
cropped. The attention mask hides entries behind the frontier until they are overwritten.
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
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from apd.models.span import WHOLE_ROW, Reach, Span


@dataclass
class WriteTarget:
    """The entries that the current pass writes and reads. All layers of a cache share it.

    Attributes:
        num_rows, num_columns: size of the cache.
        rows: `n` int64, the rows of the pass; `None` for all rows.
        slots: entries to write: a slice of columns in every row, or an index of rows, `n 1`, and columns, `n q` or `1 q`,
            both int64; `None` between passes.
        num_readable: number of columns to read, from the left.
    """

    num_rows: int
    num_columns: int
    rows: Tensor | None = None
    slots: slice | tuple[Tensor, Tensor] | None = None
    num_readable: int = 0


class ColumnLayer(CacheLayerMixin):
    """Keys and values of one attention layer, `b heads columns+1 d`; fillers are written to the last entry."""

    is_compileable = False

    def __init__(self, target: WriteTarget) -> None:
        super().__init__()
        self.target = target

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # A tensor made in inference mode cannot be written outside of it, and a later pass may run outside.
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
        # A suspended iterator may be resumed inside or outside of autocast, so the dtypes of cache and pass may differ.
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

    get_max_cache_shape = get_max_length  # the name before transformers 5.23


@functools.cache
def cache_argument(model_class: type[PreTrainedModel]) -> str:
    """Name of the `forward` argument that takes the cache: `cache` from transformers 5.24 on, before that `past_key_values`,
    or `cache_params` for models with recurrent layers only.

    Raises:
        ValueError: `forward` takes neither.
    """
    arguments = inspect.signature(model_class.forward).parameters
    for name in ("cache", "past_key_values", "cache_params"):
        if name in arguments:
            return name
    raise ValueError(
        f"The model must take its keys and values as `cache` or `past_key_values`, but {model_class.__name__}.forward "
        f"takes {', '.join(f'`{name}`' for name in arguments if name != 'self')}. Choose a decoder that keeps a cache."
    )


def layer_reach(config: PreTrainedConfig) -> Reach | dict[str, Reach]:
    """How far back the layers attend, by the rule of transformers' `create_masks_for_generate`.

    Returns:
        One `Reach` for all layers; or one per type of layer if the config names types with different ones, because such a
        model takes its masks by layer type.
    """
    config = config.get_text_config(decoder=True)
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    types = getattr(config, "layer_types", None)
    if types is None:
        return Reach(window=window) if window is not None else Reach(chunk=chunk)
    limited = {"sliding_attention": Reach(window=window), "chunked_attention": Reach(chunk=chunk)}
    if limited.keys().isdisjoint(types):
        return WHOLE_ROW
    return {kind: limited.get(kind, WHOLE_ROW) for kind in ("full_attention", *types)}


class ColumnCache(Cache):
    """Keys and values of every column of every row, written at the current span.

    Args:
        model: the decoder that computes the keys and values.
        num_rows: rows of the batch, b.
        num_columns: columns of the batch, l.

    Attributes:
        argument: name of the `forward` argument that takes the cache.
        reach: how far back the layers attend. Both are looked up here because torch.compile cannot trace it.

    Raises:
        ValueError: the model's `forward` takes no cache.
    """

    layer_class = ColumnLayer

    def __init__(self, model: PreTrainedModel, num_rows: int, num_columns: int) -> None:
        self.argument = cache_argument(model.base_model.__class__)
        self.reach = layer_reach(model.config)
        self.target = WriteTarget(num_rows, num_columns)
        text_config = model.config.get_text_config(decoder=True)
        super().__init__(layers=[self.layer_class(self.target) for _ in range(text_config.num_hidden_layers)])

    @property
    def num_readable(self) -> int:
        """Number of columns that the current pass reads."""
        return self.target.num_readable

    def set_target(self, span: Span, rows: Tensor | None = None, *, num_readable: int | None = None) -> None:
        """Make the next forward pass write at `span`.

        Args:
            span: the columns to write, of `n` rows.
            rows: `n` int64, the rows of the cache that the span covers; `None` for all rows.
            num_readable: number of columns to read; by default all before the furthest end of the span.
        """
        target = self.target
        target.rows, target.num_readable = rows, max(span.ends) if num_readable is None else num_readable
        if span.is_level and rows is None:
            target.slots = slice(span.starts[0], span.ends[0])
            return
        rows = torch.arange(target.num_rows, device=span.columns.device) if rows is None else rows
        target.slots = rows[:, None], span.slots(target.num_columns)

    def clear_target(self) -> None:
        """Drop the references to the span's tensors."""
        self.target.slots = None

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (`n` int64)."""
        self.target.num_rows = len(rows)
        for layer in self.layers:
            layer.select(rows)

    def grow(self, num_rows: int, num_columns: int) -> None:
        """Append empty rows up to `num_rows`, and add or drop columns on the right up to `num_columns`."""
        self.target.num_rows, self.target.num_columns = num_rows, num_columns
        for layer in self.layers:
            layer.grow(num_rows, num_columns + 1)
