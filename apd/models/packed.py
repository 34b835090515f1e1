"""Several canvases of each row behind one another in one cached pass: they share the frozen keys, and none are copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apd.decoding.state import to_device
from apd.models.horizon import FULL
from apd.models.span import Span
from apd.models.transformer import EagerPasses, attention_mask


def packed_hidden_states(
    passes: EagerPasses, tokens: Tensor, rows: Tensor, span: Span, columns: Tensor, unseen: Tensor | None = None
) -> Tensor:
    """Last hidden states of several canvases per row, from one pass over all of them.

    The first canvas of each row is computed as in a plain pass: its keys stay in the cache. Those of the others are written
    behind the last column and forgotten. A column attends to the row's frozen keys and to its own canvas.

    Args:
        passes: cached passes over the rows, b of them.
        tokens: `n l` int64, n canvases.
        rows: `n` int64, ascending, the row of each canvas; every row has one.
        span: the columns of each canvas, which the pass computes; those before them are frozen, the same of all canvases of a row.
        unseen: `n l` bool, columns of each canvas that no column attends to; `None`: none.
        columns: `n m` int64, the columns whose hidden states are wanted; those outside the span are clamped.
    Returns:
        `n m d`, float dtype of the model.
    """
    cache, device = passes.cache, tokens.device
    assert cache is not None
    of_row = rows.tolist()
    num_rows = len(set(of_row))
    widths = [end - start for start, end in zip(span.starts, span.ends, strict=True)]
    offsets, filled, spare = [], [0] * num_rows, [0] * num_rows
    for row, width in zip(of_row, widths, strict=True):
        offsets.append(filled[row])
        spare[row] += width if filled[row] else 0
        filled[row] += width
    size, first_spare = max(filled), tokens.shape[1]
    if cache.target.num_columns < first_spare + max(spare):
        cache.grow(num_rows, first_spare + max(spare))
    num_slots = cache.target.num_columns

    # Every computed column of every canvas, one after the other.
    start, width, offset = to_device([span.starts, widths, offsets], device)
    total = sum(widths)
    canvas = torch.repeat_interleave(torch.arange(len(rows), device=device), width, output_size=total)
    within = torch.arange(total, device=device) - (width.cumsum(0) - width)[canvas]
    column, row, place = start[canvas] + within, rows[canvas], offset[canvas] + within
    is_first = offset[canvas] == 0
    firsts = [of_row.index(each) for each in range(num_rows)]
    first_width = to_device([widths[first] for first in firsts], device)
    slot = torch.where(is_first, column, first_spare + place - first_width[row])

    # Row by row; fillers repeat the row's first canvas, and are written behind the last slot.
    def packed(values: Tensor, filler: Any) -> Tensor:
        return torch.full((num_rows, size), filler, device=device).index_put_((row, place), values)

    asks = packed(canvas, -1)
    asks = torch.where(asks < 0, to_device(firsts, device)[:, None], asks)
    padding, first = to_device([[each[i] for i in firsts] for each in (span.paddings, span.starts)], device)[..., None]
    position = packed(column, 0) - padding
    keys = torch.arange(num_slots, device=device)
    frozen = (keys >= padding) & (keys < first)
    answers = torch.full((num_rows, num_slots), -1, device=device).index_put_((row, slot), canvas)
    mask = frozen[:, None] | (answers[:, None] == asks[..., None])
    if passes.attention != FULL:
        key = keys.expand(num_rows, -1).index_put((row, slot), column)
        end, seed = (None if each is None else to_device(each, device)[asks] for each in (span.ends, span.seeds))
        assert end is not None
        horizon = passes.attention.horizon(position + padding, padding, end, seed)
        mask = mask & (key[:, None] <= horizon[..., None])

    if unseen is not None:
        off = torch.zeros(num_rows, num_slots, dtype=torch.bool, device=device)
        mask = mask & ~off.index_put((row, slot), unseen[canvas, column])[:, None]
    target = cache.target
    target.rows, target.num_readable = None, num_slots
    target.slots = torch.arange(num_rows, device=device)[:, None], packed(slot, num_slots)
    inputs = {
        "input_ids": packed(tokens[canvas, column], 0),
        "attention_mask": attention_mask(mask[:, None], passes.model),
        "position_ids": position.clamp(min=0),
        "use_cache": False,
        cache.argument: cache,
    }
    inputs = {name: each.to(passes.device) if isinstance(each, Tensor) else each for name, each in inputs.items()}
    with torch.inference_mode():
        hidden: Tensor = passes.model.base_model(**inputs).last_hidden_state
    index = (columns - start[:, None]).clamp(min=0).minimum(width[:, None] - 1) + (rows * size + offset)[:, None]
    return hidden.flatten(0, 1)[index.to(hidden.device)]
