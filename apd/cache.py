"""Keys and values with a frontier per row, and the one forward pass that drafter and verifier share.

A row of the batch is a row of columns. The cache holds one slot per column and is written in place at the columns of
the span that is recomputed, so nothing is ever appended or cropped: what is behind the frontier is hidden by the
attention mask until it is overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from apd.state import Window


@dataclass(frozen=True)
class Span:
    """The columns that are to be computed: `start … end − 1` of each row, ragged rows filled up on the right.

    The host knows them, so that no shape has to be asked of the device.

    Attributes:
        starts: per row, the first column.
        ends: per row, the column behind the last.
        paddings: per row, columns of left padding, which nothing sees. Positions count from the first real token.
        device: where the tensors are.
    """

    starts: list[int]
    ends: list[int]
    paddings: list[int]
    device: torch.device

    @property
    def width(self) -> int:
        """The most columns of a row, q."""
        return max(end - start for start, end in zip(self.starts, self.ends, strict=True))

    @property
    def reach(self) -> int:
        """The furthest end."""
        return max(self.ends)

    @cached_property
    def is_level(self) -> bool:
        """Whether all rows have the same columns and no padding: then no column needs a mask or a filler."""
        return not any(self.paddings) and len(set(self.starts)) == len(set(self.ends)) == 1

    @cached_property
    def columns(self) -> Tensor:
        """`b q` int64, or `1 q` where they are level; fillers point past the row's end."""
        if self.is_level:
            return torch.arange(self.starts[0], self.ends[0], device=self.device)[None]
        return self._tensor(self.starts) + torch.arange(self.width, device=self.device)

    @cached_property
    def real(self) -> Tensor:
        """`b q` bool, False for fillers."""
        return (self.columns < self._tensor(self.ends)).expand(len(self.ends), -1)

    def ids(self, tokens: Tensor) -> Tensor:
        """What stands there, `b l` → `b q`; fillers are id 0, since past a row's end may be no word of the model."""
        if self.is_level:
            return tokens[:, self.starts[0] : self.ends[0]]
        return tokens.gather(1, self.columns.clamp(max=tokens.shape[1] - 1)).masked_fill(~self.real, 0)

    @property
    def positions(self) -> Tensor:
        """`b q` int64; fillers stand at 0, since there may be no such position."""
        if self.is_level:
            return self.columns
        return (self.columns - self._tensor(self.paddings)).masked_fill(~self.real, 0)

    def mask(self, keys: Tensor, *, causal: bool) -> Tensor | None:
        """Which keys a column sees, `b 1 q k` bool, `None` for all: real ones before the end, up to itself if causal.

        Args:
            keys: `b k` or `1 k` int64, their columns.
        """
        up_to = keys[:, None, :] <= self.columns[:, :, None] if causal else None
        if not self.is_level:
            seen = ((keys >= self._tensor(self.paddings)) & (keys < self._tensor(self.ends)))[:, None]
            up_to = seen.expand(-1, self.width, -1) if up_to is None else seen & up_to
        return None if up_to is None else up_to[:, None]

    def passes(self) -> list[list[int]]:
        """Which rows to compute together: all, or the wide ones apart where fillers would cost more than a pass."""
        widths = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        return _passes(sorted(range(len(widths)), key=widths.__getitem__), widths)

    def select(self, rows: list[int]) -> Span:
        """Only these rows."""
        starts, ends, paddings = ([of[i] for i in rows] for of in (self.starts, self.ends, self.paddings))
        return Span(starts, ends, paddings, self.device)

    def _tensor(self, values: list[int]) -> Tensor:
        """`b 1` int64. The device is not waited for."""
        return torch.tensor(values)[:, None].to(self.device, non_blocking=True)


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


class ColumnLayer(CacheLayerMixin):
    """One attention layer's keys and values, `b heads columns+1 d`; the last slot takes the fillers' writes."""

    is_compileable = False

    def __init__(self, cache: ColumnCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, slots = self.cache.num_rows, self.cache.num_columns + 1
        self.keys = key_states.new_zeros((rows, key_states.shape[1], slots, key_states.shape[3]))
        self.values = value_states.new_zeros((rows, value_states.shape[1], slots, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        span, visible = self.cache.span, self.cache.span.reach
        if span.is_level and self.cache.rows is None:
            self.keys[:, :, span.starts[0] : visible] = key_states
            self.values[:, :, span.starts[0] : visible] = value_states
            return self.keys[:, :, :visible], self.values[:, :, :visible]
        if self.cache.rows is not None:
            rows, slots = self.cache.rows.to(key_states.device), self.cache.slots.to(key_states.device)
            self.keys[rows[:, None], :, slots] = rearrange(key_states, "n heads q d -> n q heads d")
            self.values[rows[:, None], :, slots] = rearrange(value_states, "n heads q d -> n q heads d")
            return self.keys[:, :, :visible].index_select(0, rows), self.values[:, :, :visible].index_select(0, rows)
        slots = self.cache.slots[:, None, :, None].to(key_states.device)
        self.keys.scatter_(2, slots.expand_as(key_states), key_states)
        self.values.scatter_(2, slots.expand_as(value_states), value_states)
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def select(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))

    def grow(self, num_rows: int, num_slots: int) -> None:
        if self.keys is not None and self.values is not None:
            more = (0, 0, 0, num_slots - self.keys.shape[2], 0, 0, 0, num_rows - self.keys.shape[0])
            self.keys, self.values = pad(self.keys, more), pad(self.values, more)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.span.reach, 0

    def get_seq_length(self) -> int:
        return self.cache.span.reach

    def get_max_length(self) -> int:
        return self.cache.num_columns

    get_max_cache_shape = get_max_length  # its name before transformers 5.23


class ColumnCache(Cache):
    """A slot for every column of every row, written where the current span says.

    Args:
        num_layers: attention layers of the model.
        num_columns: columns of a row when everything is decided.
    """

    def __init__(self, num_layers: int, num_columns: int) -> None:
        self.num_columns = num_columns
        self.num_rows = 0
        self.rows: Tensor | None = None
        self.span = Span([], [], [], torch.device("cpu"))
        self.slots = torch.empty(0, 0, dtype=torch.int64)
        super().__init__(layers=[ColumnLayer(self) for _ in range(num_layers)])

    def aim(self, span: Span, rows: Tensor | None, num_rows: int) -> None:
        """Let the next forward pass write at `span` and read every column before the furthest end.

        Args:
            rows: `n` int64, the rows whose span it is; `None` for all.
            num_rows: of the batch.
        """
        self.slots = span.columns if span.is_level else torch.where(span.real, span.columns, self.num_columns)
        self.span = span
        self.rows, self.num_rows = rows, num_rows

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (`n` int64)."""
        for layer in self.layers:
            layer.select(rows)

    def grow(self, num_rows: int, num_columns: int) -> None:
        """Make room for more rows behind those there are; as many columns as the batch has now, more or fewer."""
        self.num_columns = num_columns
        for layer in self.layers:
            layer.grow(num_rows, num_columns + 1)


def span_hidden_states(
    model: PreTrainedModel, tokens: Tensor, span: Span, cache: ColumnCache | None, *, causal: bool
) -> Tensor:
    """Last hidden states of the columns in `span`, each seeing real columns before the span's end.

    Args:
        model: a transformers decoder with an output layer.
        tokens: `b l` int64.
        span: without a cache it starts at the first real column.
        cache: where the columns before the span are; `None` computes everything.
        causal: whether a column sees only columns up to itself.
    Returns:
        `b q d`, float dtype of the model; fillers hold numbers without meaning.
    """
    passes = span.passes()
    if len(passes) == 1:
        return _one_pass(model, tokens, span, cache, None, causal=causal)
    whole: Tensor | None = None
    for numbers in passes:
        rows = torch.tensor(numbers).to(tokens.device, non_blocking=True)  # the device is not waited for
        part = (tokens.index_select(0, rows), span.select(numbers), cache, (rows, len(tokens)))
        hidden = _one_pass(model, *part, causal=causal)
        if whole is None:
            whole = hidden.new_zeros(len(tokens), span.width, hidden.shape[-1])
        whole[rows.to(hidden.device), : hidden.shape[1]] = hidden
    assert whole is not None
    return whole


def _one_pass(
    model: PreTrainedModel,
    tokens: Tensor,
    span: Span,
    cache: ColumnCache | None,
    of: tuple[Tensor, int] | None,
    *,
    causal: bool,
) -> Tensor:
    """`span_hidden_states` in one forward pass; `of` says which rows of how many these are."""
    device = input_device(model)
    keys = span.columns if cache is None else torch.arange(span.reach, device=tokens.device)[None]
    mask = span.mask(keys, causal=causal)
    if cache is not None:
        cache.aim(span, *(of or (None, len(tokens))))
    output = model.base_model(
        input_ids=span.ids(tokens).to(device),
        attention_mask=None if mask is None else _for_attention(mask, model).to(device),
        position_ids=span.positions.to(device),
        past_key_values=cache,
        use_cache=False,
    )
    return output.last_hidden_state


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs. Weights that accelerate keeps elsewhere until they are needed are on "meta"."""
    embeddings = model.get_input_embeddings()
    elsewhere = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if elsewhere is None else torch.device(elsewhere)


@dataclass(frozen=True)
class Projection:
    """Logits of a window's positions, `b m v`, computed when they are asked for: `projection[:, 3:7]`.

    The output layer is the widest product of a small step, so it sees only the positions that are asked for.

    Attributes:
        model: with the output layer.
        hidden: `b m d`, last hidden states.
        device: where the logits are wanted.
    """

    model: PreTrainedModel
    hidden: Tensor
    device: torch.device

    @classmethod
    def of(cls, model: PreTrainedModel, hidden: Tensor, span: Span, window: Window, shift: int) -> Projection:
        """Of a window's columns, each from the column that is `shift` further; `hidden` is `b q d`, of the span."""
        places = {t + shift - start for t, start in zip(window.starts, span.starts, strict=True)}
        width = window.columns.shape[1]
        if len(places) == 1 and (first := min(places)) >= 0 and first + width <= hidden.shape[1]:
            return cls(model, hidden[:, first : first + width], span.device)
        index = window.columns + shift - span.columns[:, :1]
        # Outside the window there may be no such column.
        index = index.clamp(0, hidden.shape[1] - 1).to(hidden.device)
        return cls(model, hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])), span.device)

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        return self.model.get_output_embeddings()(self.hidden[index]).to(self.device)


def _for_attention(mask: Tensor, model: PreTrainedModel) -> Tensor:
    """Eager attention adds its mask to the scores, where a boolean one would silently add 0 and 1."""
    if model.config._attn_implementation != "eager":
        return mask
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
