"""The forward passes of drafter and verifier: the columns of a span in, their hidden states out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from apd.cache import ColumnCache, DeviceSpan, Span
from apd.state import COLUMNS, DecodeState, FollowsRows, Window, round_up, to_device

P = ParamSpec("P")
T = TypeVar("T")


class Passes(FollowsRows, Protocol):
    """A model's forward passes over some rows, for the length of one call."""

    def __call__(self, tokens: Tensor, span: Span) -> Tensor:
        """Last hidden states of the columns in `span`, each seeing real columns before the span's end.

        Args:
            tokens: `b l` int64.
            span: without a cache it starts at the first real column.
        Returns:
            `b q d`, float dtype of the model; fillers hold numbers without meaning.
        """


class PlainPasses:
    """Passes as wide as they need to be.

    Args:
        model: a transformers decoder with an output layer.
        causal: whether a column sees only columns up to itself.
        num_rows, num_columns: of a cache, columns of a row when everything is decided; `None` computes everything each
            time.
    """

    def __init__(
        self, model: PreTrainedModel, *, causal: bool, num_rows: int = 0, num_columns: int | None = None
    ) -> None:
        self.model = model
        self.device = input_device(model)
        self.causal = causal
        check_evaluating(model, model.named_modules(), causal=causal)
        self.cache: ColumnCache | None = None
        if num_columns is not None:
            self.cache = ColumnCache(model, num_rows, num_columns)

    def __call__(self, tokens: Tensor, span: Span) -> Tensor:
        check_evaluating(self.model, [("", self.model)], causal=self.causal)  # `train()` sets the flag here too
        groups = self.groups(span)
        if len(groups) == 1:
            return self.run(tokens, span, None)
        whole: Tensor | None = None
        for numbers in groups:
            rows = to_device(numbers, tokens.device)
            hidden = self.run(tokens.index_select(0, rows), span.select(numbers), numbers)
            if whole is None:
                whole = hidden.new_zeros(len(tokens), span.width, hidden.shape[-1])
            whole[rows.to(hidden.device), : hidden.shape[1]] = hidden
        assert whole is not None
        return whole

    def groups(self, span: Span) -> list[list[int]]:
        """The rows that are computed together."""
        return span.passes()

    def run(self, tokens: Tensor, span: Span, rows: list[int] | None) -> Tensor:
        """One pass over these rows, `None` for all: `n l` → `n q d`."""
        return self.run_at(tokens, span, rows)

    def run_at(self, tokens: Tensor, span: Span, places: list[int] | None) -> Tensor:
        """One pass over rows that are at these places of the cache; `None` where every place is one of them."""
        if self.cache is not None:
            self.cache.aim(span, None if places is None else to_device(places, tokens.device))
        return run(self.model, *self.inputs(tokens, span), self.cache)

    def inputs(self, tokens: Tensor, span: Span) -> tuple[Tensor, Tensor | None, Tensor]:
        """Ids, mask and positions, on the model's device."""
        mask = span.mask(None if self.cache is None else self.cache.visible, causal=self.causal)
        mask = None if mask is None else _for_attention(mask, self.model).to(self.device)
        return span.ids(tokens).to(self.device), mask, span.positions.to(self.device)

    def select(self, rows: Tensor) -> None:
        if self.cache is not None:
            self.cache.select(rows)

    def join(self, state: DecodeState) -> None:
        if self.cache is not None:
            self.cache.grow(*state.tokens.shape)


def check_evaluating(model: PreTrainedModel, modules: Iterable[tuple[str, nn.Module]], *, causal: bool) -> None:
    """Refuse a model in training mode, where dropout draws and gradient checkpointing may drop the cache.

    The mode is not switched here: it belongs to the module, which other threads share, and a suspended iterator would
    leave it switched while the caller trains.

    Args:
        modules: those of the model to look at, with their names.
        causal: whether the model is the verifier.

    Raises:
        ValueError: one of them is in training mode.
    """
    name = next((name for name, module in modules if module.training), None)
    if name is not None:
        role = "verifier" if causal else "drafter"
        what = f"its module `{name}`" if name else f"the {type(model).__name__}"
        raise ValueError(
            f"The {role} must be in evaluation mode, got {what} in training mode: dropout and gradient checkpointing "
            "change what it computes. Call `model.eval()` before decoding, and `model.train()` to go on training."
        )


def run(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: ColumnCache | None
) -> Tensor:
    """The pass itself."""
    keys = {} if cache is None else {cache.argument: cache}
    output = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **keys)
    return output.last_hidden_state


def run_seated(
    model: PreTrainedModel,
    causal: bool,
    tokens: Tensor,
    edges: Tensor,
    seating: Tensor,
    width: int,
    cache: ColumnCache | None,
) -> Tensor:
    """The pass of every seat, `s q d`, and in the same graph all that it needs.

    Args:
        tokens: `s l` int64, the rows in any order; anything where none is.
        edges: `3 s` int64, those of the rows; see `Span`.
        seating: see `FixedPasses.seating`.
        width: q.
    """
    # An empty seat computes what the first row does, or no columns if they would go to a cache.
    rows = seating[0].clamp(min=0)
    starts, ends, paddings = edges[:, rows]
    if cache is not None:
        starts = torch.where(seating[0] < 0, ends, starts)
    span = DeviceSpan.of(torch.stack([starts, ends, paddings]), width)
    if cache is not None:
        cache.aim_at_all(span)
    mask = _for_attention(span.mask(None if cache is None else cache.visible, causal=causal), model)
    hidden = run(model, span.ids(tokens[rows]), mask, span.positions, cache)
    if cache is not None:
        cache.lower()
    return hidden


@dataclass(frozen=True)
class Shadows:
    """Inputs beside those of a row, which nothing sees but they themselves.

    They come in groups of g neighbours. A group sees itself, and the row without the columns that it stands for.

    Attributes:
        tokens: `b k g` int64, what stands there instead.
        columns: `b k g` int64, whom they stand for, whose positions they have.
    """

    tokens: Tensor
    columns: Tensor


def shadowed_hidden_states(model: PreTrainedModel, tokens: Tensor, span: Span, shadows: Shadows) -> Tensor:
    """As a pass without a cache, both ways, and behind it the hidden states of the shadows: `b q+k·g d`."""
    check_evaluating(model, [("", model)], causal=False)
    device = input_device(model)
    padding = to_device(span.paddings, tokens.device)[:, None]
    visible = (span.columns >= padding) & span.real  # b q
    seen = visible[:, None] & (span.columns[:, None, None] != shadows.columns[..., None]).all(2)  # b k q
    num_groups, group = shadows.columns.shape[1:]
    own = torch.eye(num_groups, device=tokens.device).bool()[None].expand(len(tokens), -1, -1)
    of_row = pad(visible[:, None].expand(-1, visible.shape[1], -1), (0, num_groups * group))
    of_shadows = torch.cat([seen, own.repeat_interleave(group, 2)], 2).repeat_interleave(group, 1)
    mask = torch.cat([of_row, of_shadows], 1)[:, None]
    positions = torch.cat([span.positions.expand_as(visible), shadows.columns.flatten(1) - padding], 1)
    ids = torch.cat([span.ids(tokens), shadows.tokens.flatten(1)], 1)
    return run(model, ids.to(device), _for_attention(mask, model).to(device), positions.to(device), None)


#: Columns of the cache of a compiled pass are rounded up to a multiple of this.
CACHED_COLUMNS = 256

#: Graphs that dynamo may make of a pass, in one process, beyond which a pass is not compiled; caches that nobody uses
#: but which are kept for the graphs that know them.
MOST_GRAPHS, MOST_FREE = 64, 4


class Compiled:
    """A model's forward pass, compiled for a few fixed shapes, and the caches that its graphs are tied to.

    Args:
        model: a transformers decoder.
        causal: whether a column sees only columns up to itself.
        **options: of `torch.compile`.
    """

    def __init__(self, model: PreTrainedModel, *, causal: bool, **options: Any) -> None:
        self.model, self.causal, self.options = model, causal, options
        # torch.compile takes entries out of its options, and the other model is given the same ones.
        options = {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}
        # Every batch size and width has a graph of its own, and there are two models; dynamo gives up at 8.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
        self.run = torch.compile(partial(run_seated, model, causal), dynamic=False, **options)
        self.caches: list[_Lent] = []
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made from. It compiles anew and has caches of its own, since graphs belong to their model."""
        return {"model": self.model, "causal": self.causal, **self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def lend(self, borrower: FixedPasses, num_rows: int, num_columns: int) -> ColumnCache:
        """An empty cache until the borrower is gone or gives it back.

        The memory of one that is free is used again, since graphs know it by its address. Its last pass may still be
        running, so all calls use the same stream.
        """
        device = input_device(self.model)
        # The dtypes of keys and values, which need not be the same, follow from these.
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        kind = (num_rows, num_columns, self.model.dtype, autocast, device)
        with self.lock:
            free = [lent for lent in self.caches if lent.borrower() is None]
            for lent in free:
                if lent.kind == kind:
                    lent.borrower = weakref.ref(borrower)
                    lent.cache.clear()
                    return lent.cache
            for lent in free[: max(0, len(free) - MOST_FREE + 1)]:
                self.caches.remove(lent)
            cache = ColumnCache(self.model, num_rows, num_columns, is_fixed=True)
            self.caches.append(_Lent(kind, cache, weakref.ref(borrower)))
            return cache

    def take_back(self, cache: ColumnCache) -> None:
        """The borrower needs it no more."""
        with self.lock:
            for lent in self.caches:
                if lent.cache is cache:
                    lent.borrower = _nobody


class Compiling:
    """Compiles functions, each once; see `Fused`.

    Args:
        backend: of `torch.compile`.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, function: Callable[P, T], /) -> Callable[P, T]:
        if function not in self.compiled:
            self.compiled[function] = torch.compile(function, backend=self.backend)
        return self.compiled[function]

    def __reduce__(self) -> tuple[type[Compiling], tuple[Any]]:
        return Compiling, (self.backend,)  # a copy compiles anew


@dataclass(eq=False)
class _Lent:
    kind: tuple[int, int, torch.dtype, torch.dtype | None, torch.device]
    cache: ColumnCache
    borrower: Callable[[], object]  # None when the memory is free


def _nobody() -> None:
    return None


class FixedPasses(PlainPasses):
    """Passes in a few shapes only, compiled, with every row in a seat of its own.

    Widths are rounded up, a row keeps its seat as others come and go, and an empty seat computes fillers. With a cache
    whole rows, as wide as their prompts, are not compiled.
    """

    def __init__(self, compiled: Compiled, state: DecodeState, *, is_cached: bool, causal: bool) -> None:
        super().__init__(compiled.model, causal=causal)
        self.compiled = compiled
        self.is_cached = is_cached
        self.seats = list(range(len(state.rows)))  # of each row
        self.num_seats = len(state.rows)
        self.num_columns = round_up(state.width, CACHED_COLUMNS)
        self.seated: tuple[list[int], Tensor] | None = None  # the last seating, and what it was made of

    def __call__(self, tokens: Tensor, span: Span) -> Tensor:
        if self.is_cached and self.cache is None:
            self.cache = self.compiled.lend(self, self.num_seats, self.num_columns)
        return super().__call__(tokens, span)

    def groups(self, span: Span) -> list[list[int]]:
        """Whole rows, which are not compiled, and the others; a compiled pass computes every seat anyway."""
        if not self.is_cached or span.ahead is not None:
            return [list(range(len(self.seats)))]
        groups: dict[bool, list[int]] = {}
        for row, (start, padding) in enumerate(zip(span.starts, span.paddings, strict=True)):
            groups.setdefault(start == padding, []).append(row)
        return list(groups.values())

    def run(self, tokens: Tensor, span: Span, rows: list[int] | None) -> Tensor:
        seats = self.seats if rows is None else [self.seats[row] for row in rows]
        if self.is_cached and span.ahead is None and span.starts[0] == span.paddings[0]:
            return self.run_at(tokens, span, seats)
        # Until the graph is launched the device has nothing to do.
        canvas = torch.empty(self.num_seats, self.num_columns, dtype=tokens.dtype, device=self.device)
        canvas[: len(tokens), : tokens.shape[1]] = tokens
        edges, seating, num_empty = span.edges.to(self.device), self.seating(seats), self.num_seats - len(seats)
        if num_empty:
            edges = pad(edges, (0, num_empty))
        if canvas.is_cuda:  # nothing is left of what earlier graphs gave
            torch.compiler.cudagraph_mark_step_begin()
        hidden = self.compiled.run(canvas, edges, seating, round_up(span.width, COLUMNS), self.cache)
        # A copy, since the next graph, of this model or the other, uses the same memory.
        return hidden[:, : span.width].index_select(0, seating[1, : len(tokens)].to(hidden.device))

    def seating(self, seats: list[int]) -> Tensor:
        """Who sits where, `2 s` int64: of each seat its row, −1 where it is empty, and of each row its seat."""
        of_what = [self.num_seats, *seats]
        if self.seated is None or self.seated[0] != of_what:
            rows = [seats.index(seat) if seat in seats else -1 for seat in range(self.num_seats)]
            self.seated = of_what, to_device([rows, seats + [0] * (self.num_seats - len(seats))], self.device)
        return self.seated[1]

    def select(self, rows: Tensor) -> None:
        self.seats = [self.seats[row] for row in rows.tolist()]

    def join(self, state: DecodeState) -> None:
        free = [seat for seat in range(len(state.rows) + self.num_seats) if seat not in self.seats]
        self.seats = self.seats + free[: len(state.rows) - len(self.seats)]
        before = self.num_seats, self.num_columns
        self.num_seats = max(self.num_seats, *(seat + 1 for seat in self.seats))
        self.num_columns = max(self.num_columns, round_up(state.width, CACHED_COLUMNS))
        if self.cache is not None and before != (self.num_seats, self.num_columns):
            outgrown, self.cache = self.cache, self.compiled.lend(self, self.num_seats, self.num_columns)
            self.cache.copy_from(outgrown)
            self.compiled.take_back(outgrown)


class Neural:
    """A transformers decoder, plain or compiled: what drafter and verifier have in common.

    Args:
        model: with an output layer.
        causal: whether a column sees only columns up to itself.
    """

    def __init__(self, model: PreTrainedModel, *, causal: bool) -> None:
        self.model = model
        self.causal = causal
        self.compiled: Compiled | None = None
        self.vocab_size: int = model.config.vocab_size
        self.max_length = most_positions(model.config)

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    def compile(self, **options: Any) -> None:
        """Compile the forward pass for a few fixed shapes, see `APDSampler.compile`; `options` are `torch.compile`'s."""
        self.compiled = Compiled(self.model, causal=self.causal, **options)

    def passes(self, state: DecodeState, *, is_cached: bool) -> Passes:
        """The model's forward passes over these rows."""
        if self.compiled is not None:
            return FixedPasses(self.compiled, state, is_cached=is_cached, causal=self.causal)
        num_rows, num_columns = state.tokens.shape
        columns = num_columns if is_cached else None
        return PlainPasses(self.model, causal=self.causal, num_rows=num_rows, num_columns=columns)


def most_positions(config: PreTrainedConfig) -> int | None:
    """Positions that a row may have without changing what the model computes for others, `None` for no limit.

    Rope types whose angles depend on the longest row of a batch change them beyond some position, for all rows of the
    batch and not for keys that are cached: "longrope" beyond `original_max_position_embeddings`, "dynamic" beyond
    `max_position_embeddings`.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    of_layers = [each for each in parameters.values() if isinstance(each, Mapping)]  # by the type of layer
    originals = [
        each.get("original_max_position_embeddings")
        for each in (parameters, *of_layers)
        if each.get("rope_type") == "longrope"
    ]
    return min(filter(None, [limit, *originals]), default=None)


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
        head: the output layer.
        hidden: `b m d`, last hidden states.
        device: where the logits are wanted.
    """

    head: nn.Module
    hidden: Tensor
    device: torch.device

    @classmethod
    def of(cls, head: nn.Module, hidden: Tensor, span: Span, window: Window, shift: int) -> Projection:
        """Of a window's columns, each from the column that is `shift` further; `hidden` is `b q d`, of the span."""
        if span.ahead is not None:
            return cls.at(head, hidden, window.columns + shift - span.edges[0][:, None])
        places = {t + shift - start for t, start in zip(window.starts, span.starts, strict=True)}
        width = window.columns.shape[1]
        if len(places) == 1 and (first := min(places)) >= 0 and first + width <= hidden.shape[1]:
            return cls(head, hidden[:, first : first + width], span.device)
        return cls.at(head, hidden, window.columns + shift - span.columns[:, :1])

    @classmethod
    def at(cls, head: nn.Module, hidden: Tensor, index: Tensor) -> Projection:
        """Of the hidden states at `index`, `b m`."""
        # Outside the window there may be no such column.
        place = index.clamp(0, hidden.shape[1] - 1).to(hidden.device)
        return cls(head, hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1])), index.device)

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        hidden = self.hidden[index].contiguous()
        # With gaps between the rows, even behind the only one, it would be a batch of products, up to twenty times slower
        # on a CPU. The view has none.
        return self.head(hidden.view(hidden.shape)).to(self.device)


def _for_attention(mask: Tensor, model: PreTrainedModel) -> Tensor:
    """Eager attention adds its mask to the scores, where a boolean one would silently add 0 and 1."""
    if model.config._attn_implementation != "eager":
        return mask
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
