"""Keys and values with a frontier per row, and the one forward pass that drafter and verifier share.

A row of the batch is a row of columns. The cache holds one slot per column and is written in place at the columns of
the span that is recomputed, so nothing is ever appended or cropped: what is behind the frontier is hidden by the
attention mask until it is overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class Span:
    """The columns that one forward pass computes: `start … end − 1` of each row, ragged rows filled up on the right.

    Attributes:
        start: `b` int64.
        end: `b` int64.
        columns: `b q` int64; fillers point past the row's end.
        real: `b q` bool, False for fillers.
        reach: the furthest `end`, known to the host.
    """

    start: Tensor
    end: Tensor
    columns: Tensor
    real: Tensor
    reach: int

    @classmethod
    def between(cls, start: Tensor, end: Tensor) -> Span:
        width, reach = torch.stack([end - start, end]).amax(1).tolist()
        columns = start[:, None] + torch.arange(width, device=start.device)
        return cls(start, end, columns, columns < end[:, None], reach)


class ColumnLayer(CacheLayerMixin):
    """One attention layer's keys and values, `b heads columns+1 d`; the last slot takes the fillers' writes."""

    is_compileable = False

    def __init__(self, cache: ColumnCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots = self.cache.num_columns + 1
        self.keys = key_states.new_zeros((*key_states.shape[:2], slots, key_states.shape[3]))
        self.values = value_states.new_zeros((*value_states.shape[:2], slots, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        slots = self.cache.slots[:, None, :, None].to(key_states.device)
        self.keys.scatter_(2, slots.expand_as(key_states), key_states)
        self.values.scatter_(2, slots.expand_as(value_states), value_states)
        return self.keys[:, :, : self.cache.visible], self.values[:, :, : self.cache.visible]

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
        self.visible = 0
        self.slots = torch.empty(0, 0, dtype=torch.int64)
        super().__init__(layers=[ColumnLayer(self) for _ in range(num_layers)])

    def aim(self, span: Span) -> None:
        """Let the next forward pass write at `span` and read every column before the furthest end."""
        self.slots = torch.where(span.real, span.columns, self.num_columns)
        self.visible = span.reach

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (`n` int64)."""
        for layer in self.layers:
            layer.select(rows)

    def grow(self, num_rows: int, num_columns: int) -> None:
        """Make room for more rows behind those there are, and for wider ones."""
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
    device = input_device(model)
    keys = span.columns if cache is None else torch.arange(span.reach, device=tokens.device)[None]
    visible = (keys >= padding[:, None]) & (keys < span.end[:, None])
    mask = visible[:, None, None, :].expand(-1, 1, span.columns.shape[1], -1)
    if causal:
        mask = mask & (keys[:, None, None, :] <= span.columns[:, None, :, None])
    if cache is not None:
        cache.aim(span)
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
