"""`Span`: the columns that one forward pass computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apd.decoding.state import to_device
from apd.models.horizon import FULL, Attention

#: Fixed cost of a pass in columns. Reading every weight takes a GPU as long as computing about 150 columns, its ratio of
#: operations to bytes (arithmetic intensity); below that, a wider pass is no slower.
PASS_OVERHEAD_COLUMNS = 128


@dataclass(frozen=True)
class Reach:
    """How far back a layer attends. Positions count from the row's first real token.

    Attributes:
        window: w: the token at position j attends to positions i > j − w; `None` for no sliding window.
        chunk: c: to positions i with i // c = j // c; `None` for no chunks.
    """

    window: int | None = None
    chunk: int | None = None


WHOLE_ROW = Reach()


@dataclass(frozen=True)
class Span:
    """The columns `start … end − 1` of every row. Fillers on the right make all rows as wide as the widest.

    Shapes follow from host integers, so no pass needs a host sync. A span is level if all rows have equal columns and no
    padding: it needs no fillers, no index and no padding mask.

    Attributes:
        starts: the first column of each row, host integers; empty inside a graph.
        ends: the column behind the last of each row, host integers; empty inside a graph.
        paddings: columns of left padding of each row, host integers; empty inside a graph. Positions count from the first
            real token.
        columns: `b q` int64, or `1 q` if level; fillers are columns behind the row's end.
        width: q, columns of the widest row.
        edges: `3 b 1` int64: starts, ends and paddings on the device; `None` if level. In a prefix model a fourth row has the
            seeds, see `Attention`.
        seeds: the seed of each row, host integers; `None` outside of prefix models and inside a graph.
    """

    starts: Sequence[int]
    ends: Sequence[int]
    paddings: Sequence[int]
    columns: Tensor
    width: int
    edges: Tensor | None
    seeds: Sequence[int] | None = None

    @classmethod
    def of_rows(
        cls,
        starts: Sequence[int],
        ends: Sequence[int],
        paddings: Sequence[int],
        device: torch.device,
        seeds: Sequence[int] | None = None,
    ) -> Span:
        """A span from host integers, `b` each; `seeds` for a prefix model."""
        if len(set(starts)) == len(set(ends)) == 1 and not any(paddings) and seeds is None:
            columns = torch.arange(starts[0], ends[0], device=device)[None]
            return cls(starts, ends, paddings, columns, ends[0] - starts[0], None)
        width = max(end - start for start, end in zip(starts, ends, strict=True))
        edges = [starts, ends, paddings] if seeds is None else [starts, ends, paddings, seeds]
        span = cls.of_edges(to_device(edges, device), width)
        return dataclasses.replace(span, starts=starts, ends=ends, paddings=paddings, seeds=seeds)

    @classmethod
    def of_edges(cls, edges: Tensor, width: int) -> Span:
        """A span from starts, ends, paddings and perhaps seeds on the device, `3 b` or `4 b` int64; `width` is q. For use
        inside a graph."""
        edges = edges[..., None]
        return cls((), (), (), edges[0] + torch.arange(width, device=edges.device), width, edges)

    @property
    def is_level(self) -> bool:
        return self.edges is None

    @property
    def real(self) -> Tensor:
        """`b q`, or `1 q` if level, bool: False for fillers."""
        return torch.ones_like(self.columns, dtype=torch.bool) if self.edges is None else self.columns < self.edges[1]

    def ids(self, tokens: Tensor) -> Tensor:
        """The token ids of the span, `b l` → `b q` int64; fillers are id 0."""
        if self.is_level:
            return tokens[:, self.starts[0] : self.ends[0]]
        return tokens.gather(1, self.columns.clamp(max=tokens.shape[1] - 1)).masked_fill(~self.real, 0)

    @property
    def positions(self) -> Tensor:
        """Position ids, `b q`, or `1 q` if level, int64: 0 for the row's first real token and for fillers."""
        if self.edges is None:
            return self.columns
        return (self.columns - self.edges[2]).masked_fill(~self.real, 0)

    def slots(self, num_columns: int) -> Tensor:
        """Cache entries of the columns, `b q`, or `1 q` if level, int64; fillers go to entry `num_columns`, behind the last."""
        return self.columns if self.is_level else self.columns.masked_fill(~self.real, num_columns)

    def mask(
        self, num_cached: int | None, attention: Attention, reach: Reach = WHOLE_ROW, unseen: Tensor | None = None
    ) -> Tensor | None:
        """The attention mask, `b 1 q k` bool (True attends); `None` if every column attends to every key.

        A column attends to real keys before the row's end, up to its horizon, and within `reach`.

        Args:
            num_cached: number of cached columns: keys are columns 0 … `num_cached` − 1; `None`: keys are the span's columns.
            attention: gives the horizons.
            reach: how far back a layer attends.
            unseen: `b l` bool, columns that no column attends to; `None`: none.
        """
        if self.edges is None and attention == FULL and reach == WHOLE_ROW and unseen is None:
            return None
        if self.edges is None and attention.kind == "causal" and reach.chunk is None and unseen is None:
            before, num_keys = (0, self.width) if num_cached is None else (self.starts[0], num_cached)
            mask = torch.ones(1, 1, self.width, num_keys, dtype=torch.bool, device=self.columns.device)
            return mask.tril_(before) if reach.window is None else mask.tril_(before).triu_(before - reach.window + 1)
        ends, paddings = (max(self.ends), 0) if self.edges is None else (self.edges[1], self.edges[2])
        seeds = self.edges[3] if self.edges is not None and len(self.edges) == 4 else None
        keys = self.columns if num_cached is None else torch.arange(num_cached, device=self.columns.device)[None]
        seen = (keys >= paddings) & (keys < ends)
        if unseen is not None:
            seen = seen & ~unseen.gather(1, keys.clamp(max=unseen.shape[1] - 1).expand(len(unseen), -1))
        seen = seen[:, None]
        if attention != FULL:
            seen = seen & (keys[:, None, :] <= attention.horizon(self.columns, paddings, ends, seeds)[:, :, None])
        if reach != WHOLE_ROW:
            # A filler far behind the row's end would reach no key at all, and its output would be NaN.
            query = self.columns if self.edges is None else torch.minimum(self.columns, self.edges[1] - 1)
            if reach.window is not None:
                seen = seen & (keys[:, None, :] > query[:, :, None] - reach.window)
            if reach.chunk is not None:
                key, query = ((columns - paddings) // reach.chunk for columns in (keys, query))
                seen = seen & (key[:, None, :] == query[:, :, None])
        return seen.expand(-1, self.width, -1)[:, None]

    def groups(self) -> list[list[int]]:
        """Groups of rows, one pass each. Prefill and decode rows are separated if their fillers would cost more than a pass."""
        prefill, decode = self.prefill_and_decode()
        if prefill and decode:
            widest = max(self.ends[row] - self.starts[row] for row in decode)
            if (self.width - widest) * len(decode) > PASS_OVERHEAD_COLUMNS:
                return [prefill, decode]
        return [list(range(len(self.starts)))]

    def prefill_and_decode(self) -> tuple[list[int], list[int]]:
        """The rows whose span starts at their first real token (prefill or full refresh), and the others."""
        prefill: list[int] = []
        decode: list[int] = []
        for row, (start, padding) in enumerate(zip(self.starts, self.paddings, strict=True)):
            (prefill if start == padding else decode).append(row)
        return prefill, decode

    def select(self, rows: list[int]) -> Span:
        """The span restricted to these rows."""
        edges = (self.starts, self.ends, self.paddings)
        starts, ends, paddings = ([edge[row] for row in rows] for edge in edges)
        seeds = None if self.seeds is None else [self.seeds[row] for row in rows]
        return Span.of_rows(starts, ends, paddings, self.columns.device, seeds)
