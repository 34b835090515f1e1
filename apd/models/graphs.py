"""Compilation: passes in a few fixed shapes, caches at fixed addresses, and compiled kernels.

`compile_pair` is the entry point. No GPU has run this module yet.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from apd.decoding.commit import StepInfo, commit
from apd.decoding.pair import Kernels, draw
from apd.decoding.state import DecodeState, to_device
from apd.decoding.step import judge
from apd.decoding.window import FixedWindow, LimitedWindow, Window, WindowPolicy
from apd.models.cache import ColumnCache, ColumnLayer, WriteTarget
from apd.models.horizon import Attention
from apd.models.span import Span
from apd.models.transformer import (
    EagerPasses,
    TransformersModel,
    check_evaluating,
    forward_inputs,
    input_device,
)

#: The width of a compiled pass, and of its window, is rounded up to a multiple of this.
COLUMN_BUCKET = 64

#: The number of cache columns of a compiled pass is rounded up to a multiple of this.
CACHE_BUCKET = 256

#: Graphs that dynamo may compile of one pass in a process (further shapes run eagerly), and free caches that are kept,
#: because graphs are bound to their addresses.
MAX_GRAPHS, MAX_FREE_CACHES = 64, 4


def compile_pair(models: dict[str, Any], **options: Any) -> Kernels:
    """Compile the forward passes of drafter and verifier, and the pure functions of a step.

    Args:
        models: the `TransformersModel` of each role.
        **options: options of `torch.compile` for the passes. The functions get the backend only, and no CUDA graphs: their
            shapes change when rows leave the batch.
    Returns:
        The compiled functions, for `DecodeLoop`.
    Raises:
        TypeError: a model is not a `TransformersModel`. In this case nothing is compiled.
    """
    for role, model in models.items():
        if not isinstance(model, TransformersModel):
            raise TypeError(f"`{role}` must be a transformers decoder to be compiled, got {type(model).__name__}.")
    for model in models.values():
        model.compiled = CompiledModel(model.model, model.attention, model.role, **options)
    backend = options.get("backend", "inductor")
    return CompiledKernels(backend)


class CompiledKernels(Kernels):
    """The compiled functions of a step. A copy or unpickled object compiles them again.

    Args:
        backend: backend of `torch.compile`.
    """

    def __init__(self, backend: Any) -> None:
        compiled: list[Any] = [torch.compile(function, backend=backend) for function in (draw, judge, commit)]
        super().__init__(*compiled)
        self.__dict__["backend"] = backend

    def __reduce__(self) -> tuple[type[CompiledKernels], tuple[Any]]:
        return CompiledKernels, (self.__dict__["backend"],)


@dataclass(frozen=True)
class BucketedWindow:
    """A window policy that rounds widths up to a multiple of 64, at most M, so that few shapes occur.

    Args:
        policy: determines where a window ends.
    """

    policy: WindowPolicy

    def window(self, state: DecodeState) -> Window:
        ends = self.policy.ends(state)
        width = max(end - start for start, end in zip(state.layout.frontier, ends, strict=True))
        policy = self.policy.policy if isinstance(self.policy, LimitedWindow) else self.policy
        most = min(policy.size, state.width) if isinstance(policy, FixedWindow) else state.width
        # Given tokens between the masks may make a window wider than M.
        return Window.of_rows(state, ends, width=max(width, min(round_up(width, COLUMN_BUCKET), most)))

    def ends(self, state: DecodeState) -> Sequence[int]:
        return self.policy.ends(state)

    def update(self, state: DecodeState, info: StepInfo) -> DecodeState:
        return self.policy.update(state, info)


def round_up(value: int, step: int) -> int:
    """The least multiple of `step` that is at least `value`."""
    return -(-value // step) * step


def forward_slots(
    model: PreTrainedModel,
    attention: Attention,
    tokens: Tensor,
    edges: Tensor,
    slots: Tensor,
    width: int,
    cache: FixedCache | None,
) -> Tensor:
    """One pass over all slots, `s q d` in the model's dtype, with its ids, mask and positions computed in the same graph.

    Empty slots duplicate row 0; with a cache their span is empty, so nothing is written.

    Args:
        model: a transformers decoder.
        attention: see `TransformersModel`.
        tokens: `s l` int64, the rows in any order, then arbitrary ids.
        edges: `3 s` or `4 s` int64, starts, ends, paddings and perhaps seeds of the rows; see `Span`.
        slots: `2 s` int64: the row of each slot, −1 if empty, and the slot of each row.
        width: q.
        cache: keys and values of the slots; `None` without a cache.
    """
    rows = slots[0].clamp(min=0)
    starts, ends, *others = edges[:, rows]
    if cache is not None:
        starts = torch.where(slots[0] < 0, ends, starts)
    span = Span.of_edges(torch.stack([starts, ends, *others]), width)
    if cache is not None:
        cache.set_target(span, num_readable=cache.target.num_columns)
    hidden = model.base_model(**forward_inputs(model, tokens[rows], span, attention, cache)).last_hidden_state
    if cache is not None:
        # Tensors that outlive the graph become its outputs and pin its memory pool.
        cache.clear_target()
    return hidden


class CompiledModel:
    """A model's forward pass, compiled for a few fixed shapes, and the caches that its graphs are bound to.

    Args:
        model: a transformers decoder.
        attention, role: see `TransformersModel`.
        **options: options of `torch.compile`.
    """

    def __init__(self, model: PreTrainedModel, attention: Attention, role: str, **options: Any) -> None:
        self.model, self.attention, self.role, self.options = model, attention, role, options
        # torch.compile removes entries from its options, and both models share them.
        options = {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}
        # Each batch size and width of each model has its own graph; dynamo's default limit is 8.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
        forward = functools.partial(forward_slots, model, attention)
        self.forward_slots = torch.compile(forward, dynamic=False, **options)
        self.loans: list[_Loan] = []
        self.lock = threading.Lock()

    def passes(self, state: DecodeState, *, is_cached: bool) -> GraphPasses:
        return GraphPasses(self, state, is_cached=is_cached)

    def __getstate__(self) -> dict[str, Any]:
        """A copy compiles again and has its own caches, because graphs belong to their model."""
        return {"model": self.model, "attention": self.attention, "role": self.role, **self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def lend(self, borrower: GraphPasses, num_rows: int, num_columns: int) -> FixedCache:
        """An empty cache, lent until the borrower returns it or is garbage-collected.

        Free caches are reused: CUDA graphs bind to addresses. Safe because all calls share one stream.

        Args:
            borrower: the passes that use the cache.
            num_rows, num_columns: size of the cache.
        """
        device = input_device(self.model)
        # These determine the dtypes of keys and of values, which may differ.
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        kind = (num_rows, num_columns, self.model.dtype, autocast, device)
        with self.lock:
            free = [loan for loan in self.loans if loan.borrower() is None]
            for loan in free:
                if loan.kind == kind:
                    loan.borrower = weakref.ref(borrower)
                    loan.cache.clear()
                    return loan.cache
            for loan in free[: max(0, len(free) - MAX_FREE_CACHES + 1)]:
                self.loans.remove(loan)
            cache = FixedCache(self.model, num_rows, num_columns)
            self.loans.append(_Loan(kind, cache, weakref.ref(borrower)))
            return cache

    def take_back(self, cache: FixedCache) -> None:
        """Mark a lent cache as free."""
        with self.lock:
            for loan in self.loans:
                if loan.cache is cache:
                    loan.borrower = lambda: None


@dataclass(eq=False)
class _Loan:
    kind: tuple[int, int, torch.dtype, torch.dtype | None, torch.device]
    cache: FixedCache
    borrower: Callable[[], object]  # returns None when the cache is free


class FixedLayer(ColumnLayer):
    """A `ColumnLayer` whose memory keeps its address, so that graphs can bind to it."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        # Not guarded: for memory at another address a CUDA graph is recorded again, but nothing is recompiled.
        torch._dynamo.mark_static_address(self.keys, guard=False)
        torch._dynamo.mark_static_address(self.values, guard=False)

    def clear(self) -> None:
        if self.keys is not None and self.values is not None:
            self.keys.zero_()
            self.values.zero_()

    def copy_from(self, smaller: FixedLayer) -> None:
        if smaller.keys is None or smaller.values is None:
            return
        if not self.is_initialized:
            self.lazy_initialization(smaller.keys, smaller.values)
        assert self.keys is not None and self.values is not None
        rows, _, slots, _ = smaller.keys.shape
        self.keys[:rows, :, : slots - 1] = smaller.keys[:, :, :-1]
        self.values[:rows, :, : slots - 1] = smaller.values[:, :, :-1]


class FixedCache(ColumnCache):
    """A `ColumnCache` whose memory keeps its address."""

    layer_class = FixedLayer
    target: WriteTarget

    def clear(self) -> None:
        """Write zeros everywhere. Masked entries must be finite: 0 · NaN in attention would spread."""
        for layer in self.layers:
            layer.clear()

    def copy_from(self, smaller: FixedCache) -> None:
        """Copy the rows and columns of a smaller cache."""
        for layer, other in zip(self.layers, smaller.layers, strict=True):
            layer.copy_from(other)


class GraphPasses(EagerPasses):
    """Compiled passes in a few shapes, with a slot for every row.

    Widths are rounded up, a row keeps its slot while others join and leave, and empty slots compute fillers. With a cache,
    prefill runs eagerly; only decode passes are compiled.
    """

    def __init__(self, compiled: CompiledModel, state: DecodeState, *, is_cached: bool) -> None:
        super().__init__(compiled.model, attention=compiled.attention, role=compiled.role)
        self.compiled = compiled
        self.is_cached = is_cached
        self.slots = list(range(len(state.rows)))  # the slot of each row
        self.num_slots = len(state.rows)
        self.num_columns = round_up(state.width + self.attention.margin, CACHE_BUCKET)
        self.last_slots: tuple[list[int], Tensor] | None = None  # arguments and result of the last `slot_tensor`
        self.fixed: FixedCache | None = None

    def __call__(
        self, tokens: Tensor, span: Span, positions: Tensor | None = None, unseen: Tensor | None = None
    ) -> Tensor:
        check_evaluating(self.model, [("", self.model)], self.role)
        if not self.is_cached:
            if positions is not None or unseen is not None:
                return super().__call__(tokens, span, positions, unseen)
            return self.forward_compiled(tokens, span, self.slots)
        if self.fixed is None:
            self.cache = self.fixed = self.compiled.lend(self, self.num_slots, self.num_columns)
        prefill, decode = span.prefill_and_decode()
        if not decode or positions is not None or unseen is not None:  # no graphs of what is rare
            return self.prefill(tokens, span, self.slots, positions, unseen)
        if not prefill:
            return self.forward_compiled(tokens, span, self.slots)
        whole: Tensor | None = None
        for rows, forward in ((prefill, self.prefill), (decode, self.forward_compiled)):
            at = to_device(rows, tokens.device)
            hidden = forward(tokens.index_select(0, at), span.select(rows), [self.slots[row] for row in rows])
            if whole is None:
                whole = hidden.new_zeros(len(tokens), span.width, hidden.shape[-1])
            whole[at.to(hidden.device), : hidden.shape[1]] = hidden
        assert whole is not None
        return whole

    def prefill(
        self,
        tokens: Tensor,
        span: Span,
        slots: list[int],
        positions: Tensor | None = None,
        unseen: Tensor | None = None,
    ) -> Tensor:
        """One eager pass over the rows in these slots: `n l` int64 → `n q d` in the model's dtype."""
        inputs = self.inputs(tokens, span, to_device(slots, tokens.device), positions, unseen)
        return self.model.base_model(**inputs).last_hidden_state

    def forward_compiled(self, tokens: Tensor, span: Span, slots: list[int]) -> Tensor:
        """One compiled pass over the rows in these slots: `n l` int64 → `n q d` in the model's dtype."""
        # The device idles until the graph is launched, so the host does as little as possible before.
        canvas = torch.empty(self.num_slots, self.num_columns, dtype=tokens.dtype, device=self.device)
        canvas[: len(tokens), : tokens.shape[1]] = tokens
        seeds = [] if span.seeds is None else [span.seeds]
        edges = to_device([span.starts, span.ends, span.paddings, *seeds], self.device)
        by_slot, num_empty = self.slot_tensor(slots), self.num_slots - len(slots)
        if num_empty:
            edges = pad(edges, (0, num_empty))
        if canvas.is_cuda:  # outputs of earlier graphs are not used any more
            torch.compiler.cudagraph_mark_step_begin()
        hidden = self.compiled.forward_slots(canvas, edges, by_slot, round_up(span.width, COLUMN_BUCKET), self.fixed)
        # Copied, because the next graph, of either model, uses the same memory.
        return hidden[:, : span.width].index_select(0, by_slot[1, : len(tokens)].to(hidden.device))

    def slot_tensor(self, slots: list[int]) -> Tensor:
        """`2 s` int64: the row of each slot, −1 if empty, and the slot of each row."""
        key = [self.num_slots, *slots]
        if self.last_slots is None or self.last_slots[0] != key:
            rows = [slots.index(slot) if slot in slots else -1 for slot in range(self.num_slots)]
            table = to_device([rows, slots + [0] * (self.num_slots - len(slots))], self.device)
            self.last_slots = key, table
        return self.last_slots[1]

    def select(self, rows: Tensor) -> None:
        self.slots = [self.slots[row] for row in rows.tolist()]

    def join(self, state: DecodeState) -> None:
        free = [slot for slot in range(len(state.rows) + self.num_slots) if slot not in self.slots]
        self.slots = self.slots + free[: len(state.rows) - len(self.slots)]
        before = self.num_slots, self.num_columns
        self.num_slots = max(self.num_slots, *(slot + 1 for slot in self.slots))
        self.num_columns = max(self.num_columns, round_up(state.width + self.attention.margin, CACHE_BUCKET))
        if self.fixed is not None and before != (self.num_slots, self.num_columns):
            outgrown = self.fixed
            self.cache = self.fixed = self.compiled.lend(self, self.num_slots, self.num_columns)
            self.fixed.copy_from(outgrown)
            self.compiled.take_back(outgrown)
