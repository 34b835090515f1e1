"""`Span`: the columns that one forward pass computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apd.decoding.state import to_device

#: What a pass costs beside its columns, in columns: it reads every weight, which takes a GPU as long as computing with
#: them on as many columns as its ratio of operations to bytes, 150 or so. Below that a wider pass is no slower.
PASS_OVERHEAD_COLUMNS = 128


@dataclass(frozen=True)
class Span:
    """The columns `start … end − 1` of every row; rows with fewer columns are filled up on the right.

    Shapes follow from host integers, so no pass needs a host synchronisation.

    Attributes:
        starts: per row, the first column; empty inside a graph, which knows no host integers.
        ends: per row, the column behind the last; likewise.
        paddings: per row, columns of left padding, which nothing sees; likewise. Positions count from the first real token.
        columns: `b q` int64, or `1 q` of a level span; fillers are columns behind the row's end.
        width: q, columns of the widest row.
        edges: `3 b 1` int64, starts, ends and paddings on the device; `None` of a level span: all rows have the same columns
            and no padding, so nothing needs fillers, an index or a padding mask.
    """

    starts: Sequence[int]
    ends: Sequence[int]
    paddings: Sequence[int]
    columns: Tensor
    width: int
    edges: Tensor | None

    @classmethod
    def of_rows(
        cls, starts: Sequence[int], ends: Sequence[int], paddings: Sequence[int], device: torch.device
    ) -> Span:
        """The span of these host integers, `b` each."""
        if len(set(starts)) == len(set(ends)) == 1 and not any(paddings):
            columns = torch.arange(starts[0], ends[0], device=device)[None]
            return cls(starts, ends, paddings, columns, ends[0] - starts[0], None)
        width = max(end - start for start, end in zip(starts, ends, strict=True))
        span = cls.of_edges(to_device([starts, ends, paddings], device), width)
        return dataclasses.replace(span, starts=starts, ends=ends, paddings=paddings)

    @classmethod
    def of_edges(cls, edges: Tensor, width: int) -> Span:
        """The span of starts, ends and paddings on the device, `3 b` int64."""
        edges = edges[..., None]
        return cls((), (), (), edges[0] + torch.arange(width, device=edges.device), width, edges)

    @property
    def is_level(self) -> bool:
        return self.edges is None

    @property
    def real(self) -> Tensor:
        """`b q` or `1 q` bool, False for fillers."""
        return torch.ones_like(self.columns, dtype=torch.bool) if self.edges is None else self.columns < self.edges[1]

    def ids(self, tokens: Tensor) -> Tensor:
        """The tokens of the span, `b l` → `b q`; fillers are id 0."""
        if self.is_level:
            return tokens[:, self.starts[0] : self.ends[0]]
        return tokens.gather(1, self.columns.clamp(max=tokens.shape[1] - 1)).masked_fill(~self.real, 0)

    @property
    def positions(self) -> Tensor:
        """`b q` or `1 q` int64, 0 for the row's first real token and for fillers."""
        if self.edges is None:
            return self.columns
        return (self.columns - self.edges[2]).masked_fill(~self.real, 0)

    def slots(self, num_columns: int) -> Tensor:
        """Where a cache with `num_columns` columns takes their keys, `b q` or `1 q`; those of fillers go behind the last."""
        return self.columns if self.is_level else self.columns.masked_fill(~self.real, num_columns)

    def mask(self, num_cached: int | None, block_size: int | None) -> Tensor | None:
        """Which keys a column attends to: `b 1 q k` bool; `None`: all.

        Real keys before the row's end; of these, key i with i // b ≤ j // b for the column at position j.

        Args:
            num_cached: keys are those of columns 0 … `num_cached` − 1; `None`: those of the span.
            block_size: b: 1 is causal attention, `None` attention both ways, others attend within their block and to
                earlier blocks.
        """
        if self.edges is None and block_size is None:
            return None
        if self.edges is None and block_size == 1:
            before, num_keys = (0, self.width) if num_cached is None else (self.starts[0], num_cached)
            mask = torch.ones(1, 1, self.width, num_keys, dtype=torch.bool, device=self.columns.device)
            return mask.tril_(before)
        ends, paddings = (max(self.ends), 0) if self.edges is None else (self.edges[1], self.edges[2])
        keys = self.columns if num_cached is None else torch.arange(num_cached, device=self.columns.device)[None]
        seen = ((keys >= paddings) & (keys < ends))[:, None]
        if block_size is not None:
            key, query = keys, self.columns
            if block_size > 1:
                key, query = ((columns - paddings) // block_size for columns in (key, query))
            seen = seen & (key[:, None, :] <= query[:, :, None])
        return seen.expand(-1, self.width, -1)[:, None]

    def groups(self) -> list[list[int]]:
        """Rows to compute together: all of them, or prefill and decode apart where fillers would cost more than a pass."""
        prefill, decode = self.prefill_and_decode()
        if prefill and decode:
            widest = max(self.ends[row] - self.starts[row] for row in decode)
            if (self.width - widest) * len(decode) > PASS_OVERHEAD_COLUMNS:
                return [prefill, decode]
        return [list(range(len(self.starts)))]

    def prefill_and_decode(self) -> tuple[list[int], list[int]]:
        """The rows that are computed from their first real token on, and the others."""
        prefill: list[int] = []
        decode: list[int] = []
        for row, (start, padding) in enumerate(zip(self.starts, self.paddings, strict=True)):
            (prefill if start == padding else decode).append(row)
        return prefill, decode

    def select(self, rows: list[int]) -> Span:
        """The span of these rows."""
        starts, ends, paddings = ([edge[row] for row in rows] for edge in (self.starts, self.ends, self.paddings))
        return Span.of_rows(starts, ends, paddings, self.columns.device)
