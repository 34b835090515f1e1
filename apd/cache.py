"""Which columns a forward pass computes, and the keys and values of those that it does not.

A row of the batch is a row of columns. The cache holds one slot per column and is written in place at the columns of
the span that is recomputed, so nothing is ever appended or cropped: what is behind the frontier is hidden by the
attention mask until it is overwritten.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from apd.state import counted, to_device


@dataclass(frozen=True)
class Span:
    """The columns that are to be computed: `start … end − 1` of each row, ragged rows filled up on the right.

    The host knows them, so that no shape has to be asked of the device; or at least their width, where it is ahead.

    Attributes:
        starts: per row, the first column.
        ends: per row, the column behind the last.
        paddings: per row, columns of left padding, which nothing sees. Positions count from the first real token.
        device: where the tensors are.
        ahead: of a span that the host does not know yet, its `edges`.
        most: in that case, as many columns as a row may have.
    """

    starts: Sequence[int]
    ends: Sequence[int]
    paddings: Sequence[int]
    device: torch.device
    ahead: Tensor | None = None
    most: int = 0

    @property
    def widths(self) -> list[int]:
        """Per row, its columns."""
        return [end - start for start, end in zip(self.starts, self.ends, strict=True)]

    @property
    def width(self) -> int:
        """The most columns of a row, q."""
        return max(self.widths) if self.ahead is None else self.most

    @property
    def reach(self) -> int:
        """The furthest end."""
        return max(self.ends)

    @cached_property
    def is_level(self) -> bool:
        """Whether all rows have the same columns and no padding: then no column needs a mask or a filler."""
        if self.ahead is not None:
            return False
        return not any(self.paddings) and len(set(self.starts)) == len(set(self.ends)) == 1

    @cached_property
    def edges(self) -> Tensor:
        """Starts, ends and paddings where the tensors are, `3 b` int64."""
        if self.ahead is not None:
            return self.ahead
        return to_device([self.starts, self.ends, self.paddings], self.device)

    @cached_property
    def on_device(self) -> DeviceSpan:
        """The same where the tensors are."""
        return DeviceSpan.of(self.edges, self.width)

    @cached_property
    def columns(self) -> Tensor:
        """`b q` int64, or `1 q` where they are level; fillers point past the row's end."""
        if self.is_level:
            return torch.arange(self.starts[0], self.ends[0], device=self.device)[None]
        return self.on_device.columns

    @property
    def real(self) -> Tensor:
        """`b q` bool, False for fillers."""
        return self.on_device.real

    def ids(self, tokens: Tensor) -> Tensor:
        """What stands there, `b l` → `b q`; fillers are id 0, since past a row's end may be no word of the model."""
        if self.is_level:
            return tokens[:, self.starts[0] : self.ends[0]]
        return self.on_device.ids(tokens)

    @property
    def positions(self) -> Tensor:
        """`b q` int64; fillers stand at 0, since there may be no such position."""
        return self.columns if self.is_level else self.on_device.positions

    def slots(self, num_columns: int) -> Tensor:
        """Where a cache with so many columns takes their keys, `b q` or `1 q`; those of fillers go behind the last."""
        return self.columns if self.is_level else self.on_device.slots(num_columns)

    def mask(self, cached: int | None, *, causal: bool) -> Tensor | None:
        """Which keys a column sees, `b 1 q k` bool, `None` for all: real ones before the end, up to itself if causal.

        Args:
            cached: keys are those of the columns 0 … `cached` − 1; `None`: those of the span.
        """
        if not self.is_level:
            return self.on_device.mask(cached, causal=causal)
        if not causal:
            return None
        before, keys = (0, self.width) if cached is None else (self.starts[0], cached)
        return torch.ones(1, 1, self.width, keys, dtype=torch.bool, device=self.device).tril_(before)

    def passes(self) -> list[list[int]]:
        """Which rows to compute together: all, or the wide ones apart where fillers would cost more than a pass."""
        rows, widths = list(range(len(self.starts))), self.widths
        return [rows] if len(set(widths)) == 1 else _passes(sorted(rows, key=widths.__getitem__), widths)

    def select(self, rows: list[int]) -> Span:
        """Only these rows."""
        starts, ends, paddings = ([of[i] for i in rows] for of in (self.starts, self.ends, self.paddings))
        return Span(starts, ends, paddings, self.device)


@dataclass(frozen=True)
class DeviceSpan:
    """A span as the device knows it, for rows of any widths; also made in a graph, where numbers cannot be the host's.

    Attributes:
        columns, real: `b q`, as those of the span.
        ends, paddings: the same, `b 1` int64.
    """

    columns: Tensor
    real: Tensor
    ends: Tensor
    paddings: Tensor

    @classmethod
    def of(cls, edges: Tensor, width: int) -> DeviceSpan:
        """Of starts, ends and paddings, `3 b` int64."""
        starts, ends, paddings = edges[..., None].unbind()
        return cls(*counted(starts, ends, width), ends, paddings)

    def ids(self, tokens: Tensor) -> Tensor:
        return tokens.gather(1, self.columns.clamp(max=tokens.shape[1] - 1)).masked_fill(~self.real, 0)

    @property
    def positions(self) -> Tensor:
        return (self.columns - self.paddings).masked_fill(~self.real, 0)

    def slots(self, num_columns: int) -> Tensor:
        return self.columns.masked_fill(~self.real, num_columns)

    def mask(self, cached: int | None, *, causal: bool) -> Tensor:
        keys = self.columns if cached is None else torch.arange(cached, device=self.columns.device)[None]
        seen = ((keys >= self.paddings) & (keys < self.ends))[:, None]
        if causal:
            seen = seen & (keys[:, None, :] <= self.columns[:, :, None])
        return seen.expand(-1, self.columns.shape[1], -1)[:, None]


#: What a pass costs beside its columns, in columns. It reads every weight, which takes a GPU as long as computing with
#: them on its ratio of operations to bytes, 150 columns or so; below that a wider pass is no slower.
PASS = 128


def _passes(rows: list[int], widths: list[int]) -> list[list[int]]:
    """`Span.passes` of rows in the order of their widths."""
    total, widest = len(rows), widths[rows[-1]]
    columns, cut = min((n * widths[rows[n - 1]] + (total - n) * widest, n) for n in range(1, total + 1))
    if columns + PASS >= total * widest:
        return [rows]
    return _passes(rows[:cut], widths) + _passes(rows[cut:], widths)


@dataclass
class Aim:
    """Where the current pass writes and what it reads. The layers of a cache share it.

    Attributes:
        num_rows, num_columns: of the cache.
        rows: `n` int64, the rows of the pass; `None` for all.
        slots: where it writes: the columns of all rows, or the rows, `n 1`, and columns of each, `n q` or `1 q` int64;
            `None` between passes.
        visible: columns that it reads, from the left.
    """

    num_rows: int
    num_columns: int
    rows: Tensor | None = None
    slots: slice | tuple[Tensor, Tensor] | None = None
    visible: int = 0


class ColumnLayer(CacheLayerMixin):
    """One attention layer's keys and values, `b heads columns+1 d`; the last slot takes the fillers' writes."""

    is_compileable = False

    def __init__(self, aim: Aim, *, is_fixed: bool) -> None:
        super().__init__()
        self.aim = aim
        self.is_fixed = is_fixed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Later calls may write into memory that is used again, whatever mode this one runs in.
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.zeros(
                    (self.aim.num_rows, like.shape[1], self.aim.num_columns + 1, like.shape[3]),
                    dtype=like.dtype,
                    device=like.device,
                )
                for like in (key_states, value_states)
            )
        self.is_initialized = True
        if self.is_fixed:
            # Not guarded: with memory elsewhere a CUDA graph is recorded again, but nothing compiled.
            torch._dynamo.mark_static_address(self.keys, guard=False)
            torch._dynamo.mark_static_address(self.values, guard=False)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        aim, device = self.aim, key_states.device
        assert aim.slots is not None
        # An iterator may be resumed inside of autocast and outside, so the memory may have another dtype than the pass.
        dtypes = key_states.dtype, value_states.dtype
        key_states, value_states = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
        if isinstance(aim.slots, slice):
            self.keys[:, :, aim.slots] = key_states
            self.values[:, :, aim.slots] = value_states
        else:
            rows, slots = aim.slots
            at = rows.to(device), slice(None), slots.to(device)
            self.keys[at] = rearrange(key_states, "n heads q d -> n q heads d")
            self.values[at] = rearrange(value_states, "n heads q d -> n q heads d")
        keys, values = self.keys[:, :, : aim.visible], self.values[:, :, : aim.visible]
        if aim.rows is not None:
            keys, values = (of.index_select(0, aim.rows.to(device)) for of in (keys, values))
        return keys.to(dtypes[0]), values.to(dtypes[1])

    def select(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))

    def grow(self, num_rows: int, num_slots: int) -> None:
        if self.keys is not None and self.values is not None:
            more = (0, 0, 0, num_slots - self.keys.shape[2], 0, 0, 0, num_rows - self.keys.shape[0])
            self.keys, self.values = pad(self.keys, more), pad(self.values, more)

    def clear(self) -> None:
        if self.keys is not None and self.values is not None:
            self.keys.zero_()
            self.values.zero_()

    def copy_from(self, smaller: ColumnLayer) -> None:
        if smaller.keys is None or smaller.values is None:
            return
        if not self.is_initialized:
            self.lazy_initialization(smaller.keys, smaller.values)
        assert self.keys is not None and self.values is not None
        rows, _, slots, _ = smaller.keys.shape
        self.keys[:rows, :, : slots - 1] = smaller.keys[:, :, :-1]
        self.values[:rows, :, : slots - 1] = smaller.values[:, :, :-1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.aim.visible, 0

    def get_seq_length(self) -> int:
        return self.aim.visible

    def get_max_length(self) -> int:
        return self.aim.num_columns

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
        is_fixed: its memory stays where it is, so that a graph may hold on to it.

    Attributes:
        argument: the name by which the model's `forward` takes it. It is looked up here, outside of what torch.compile
            traces.

    Raises:
        ValueError: the model takes no cache.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, num_columns: int, *, is_fixed: bool = False) -> None:
        self.argument = cache_argument(model.base_model.__class__)
        self.aimed = Aim(num_rows, num_columns)
        layers = range(model.config.num_hidden_layers)
        super().__init__(layers=[ColumnLayer(self.aimed, is_fixed=is_fixed) for _ in layers])

    @property
    def visible(self) -> int:
        """Columns that the current pass reads."""
        return self.aimed.visible

    def aim(self, span: Span, rows: Tensor | None) -> None:
        """Let the next forward pass write at `span` and read every column before the furthest end.

        Args:
            rows: `n` int64, the rows whose span it is; `None` for all.
        """
        aim = self.aimed
        aim.rows, aim.visible = rows, span.reach
        if span.is_level and rows is None:
            aim.slots = slice(span.starts[0], span.reach)
            return
        rows = torch.arange(aim.num_rows, device=span.device) if rows is None else rows
        aim.slots = rows[:, None], span.slots(aim.num_columns)

    def aim_at_all(self, span: DeviceSpan) -> None:
        """Let the next forward pass, of all rows, write at `span` and read every column there is."""
        aim = self.aimed
        aim.rows, aim.visible = None, aim.num_columns
        rows = torch.arange(aim.num_rows, device=span.columns.device)
        aim.slots = rows[:, None], span.slots(aim.num_columns)

    def lower(self) -> None:
        """Forget where the pass wrote: what is made in a graph and outlives it is an output, whose memory it keeps."""
        self.aimed.slots = None

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (`n` int64)."""
        self.aimed.num_rows = len(rows)
        for layer in self.layers:
            layer.select(rows)

    def grow(self, num_rows: int, num_columns: int) -> None:
        """Make room for more rows behind those there are; as many columns as the batch has now, more or fewer."""
        self.aimed.num_rows, self.aimed.num_columns = num_rows, num_columns
        for layer in self.layers:
            layer.grow(num_rows, num_columns + 1)

    def clear(self) -> None:
        """Forget everything: what is masked must be finite too, or it spoils what is not."""
        for layer in self.layers:
            layer.clear()

    def copy_from(self, smaller: ColumnCache) -> None:
        """Take over the rows and columns of a smaller cache."""
        for layer, of in zip(self.layers, smaller.layers, strict=True):
            layer.copy_from(of)
