"""Keys and values with a frontier per row, and the one forward pass that drafter and verifier share.

A row of the batch is a row of columns. The cache holds one slot per column and is written in place at the columns of
the span that is recomputed, so nothing is ever appended or cropped: what is behind the frontier is hidden by the
attention mask until it is overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class Span:
    """The columns that are to be computed: `start … end − 1` of each row, ragged rows filled up on the right.

    Attributes:
        start: `b` int64.
        end: `b` int64.
        columns: `b q` int64; fillers point past the row's end.
        real: `b q` bool, False for fillers.
        widths: per row, `end − start`, known to the host.
        ends: per row, `end`, known to the host.
    """

    start: Tensor
    end: Tensor
    columns: Tensor
    real: Tensor
    widths: list[int]
    ends: list[int]

    @classmethod
    def between(cls, start: Tensor, end: Tensor) -> Span:
        widths, ends = torch.stack([end - start, end]).tolist()
        columns = start[:, None] + torch.arange(max(widths), device=start.device)
        return cls(start, end, columns, columns < end[:, None], widths, ends)

    @property
    def reach(self) -> int:
        """The furthest `end`."""
        return max(self.ends)

    def passes(self) -> list[list[int]]:
        """Which rows to compute together: all, or the wide ones apart where fillers would cost more than a pass."""
        return _passes(sorted(range(len(self.widths)), key=self.widths.__getitem__), self.widths)

    def select(self, rows: Tensor, numbers: list[int]) -> Span:
        """Only these rows (`n` int64, and the same for the host), no wider than they need."""
        widths, ends = [self.widths[i] for i in numbers], [self.ends[i] for i in numbers]
        columns, real = (values.index_select(0, rows)[:, : max(widths)] for values in (self.columns, self.real))
        return Span(self.start.index_select(0, rows), self.end.index_select(0, rows), columns, real, widths, ends)


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
        visible = self.cache.visible
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
        return self.cache.visible, 0

    def get_seq_length(self) -> int:
        return self.cache.visible

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
        self.visible = 0
        self.slots = torch.empty(0, 0, dtype=torch.int64)
        super().__init__(layers=[ColumnLayer(self) for _ in range(num_layers)])

    def aim(self, span: Span, rows: Tensor | None, num_rows: int) -> None:
        """Let the next forward pass write at `span` and read every column before the furthest end.

        Args:
            rows: `n` int64, the rows whose span it is; `None` for all.
            num_rows: of the batch.
        """
        self.slots = torch.where(span.real, span.columns, self.num_columns)
        self.visible = span.reach
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
    model: PreTrainedModel, tokens: Tensor, padding: Tensor, span: Span, cache: ColumnCache | None, *, causal: bool
) -> Tensor:
    """Last hidden states of the columns in `span`, each seeing real columns before the span's end.

    Args:
        model: a transformers decoder with an output layer.
        tokens: `b l` int64.
        padding: `b` int64, columns of left padding, which nothing sees. Positions count from the first real token.
        span: without a cache it starts at the first real column.
        cache: where the columns before the span are; `None` computes everything.
        causal: whether a column sees only columns up to itself.
    Returns:
        `b q d`, float dtype of the model; fillers hold numbers without meaning.
    """
    passes = span.passes()
    if len(passes) == 1:
        return _one_pass(model, tokens, padding, span, cache, None, causal=causal)
    parts = []
    for numbers in passes:
        rows = torch.tensor(numbers).to(tokens.device, non_blocking=True)  # the device is not waited for
        part = (tokens.index_select(0, rows), padding.index_select(0, rows), span.select(rows, numbers))
        hidden = _one_pass(model, *part, cache, (rows, len(tokens)), causal=causal)
        parts.append((rows.to(hidden.device), hidden))
    whole = hidden.new_zeros(*span.columns.shape, hidden.shape[-1])
    for rows, hidden in parts:
        whole[rows, : hidden.shape[1]] = hidden
    return whole


def _one_pass(
    model: PreTrainedModel,
    tokens: Tensor,
    padding: Tensor,
    span: Span,
    cache: ColumnCache | None,
    of: tuple[Tensor, int] | None,
    *,
    causal: bool,
) -> Tensor:
    """`span_hidden_states` in one forward pass; `of` says which rows of how many these are."""
    device = input_device(model)
    keys = span.columns if cache is None else torch.arange(span.reach, device=tokens.device)[None]
    visible = (keys >= padding[:, None]) & (keys < span.end[:, None])
    mask = visible[:, None, None, :].expand(-1, 1, span.columns.shape[1], -1)
    if causal:
        mask = mask & (keys[:, None, None, :] <= span.columns[:, None, :, None])
    if cache is not None:
        cache.aim(span, *(of or (None, len(tokens))))
    # Fillers are id 0 at position 0: what stands at a row's end may be outside the vocabulary, and its place
    # outside the positions.
    ids = tokens.gather(1, span.columns.clamp(max=tokens.shape[1] - 1)).masked_fill(~span.real, 0)
    output = model.base_model(
        input_ids=ids.to(device),
        attention_mask=_for_attention(mask, model).to(device),
        position_ids=(span.columns - padding[:, None]).masked_fill(~span.real, 0).to(device),
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
    def of(cls, model: PreTrainedModel, hidden: Tensor, index: Tensor) -> Projection:
        """Of the hidden states (`b q d`) at `index` (`b m`), on its device."""
        place = index.clamp(0, hidden.shape[1] - 1).to(hidden.device)
        return cls(model, hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1])), index.device)

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        return self.model.get_output_embeddings()(self.hidden[index]).to(self.device)


def _for_attention(mask: Tensor, model: PreTrainedModel) -> Tensor:
    """Eager attention adds its mask to the scores, where a boolean one would silently add 0 and 1."""
    if model.config._attn_implementation != "eager":
        return mask
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
