"""Where the time of a call goes, seen from outside: hooks on the models and a wrapper around the strategy.

    call                      `generate`, from its first line to its last
      setup                   until the strategy is asked for the first time: arguments, layout, sessions
      propose                 one per step
        drafter, verifier     forwards: the decoder and the output layer of each transformers model
        (mixing)              the rest of propose: spans, masks, noise, normalising, mixing, accepting
      (other)                 the rest of the call: committing, stopping, output

`(…)` are differences. A compiled decoder is timed where apd calls its graph, which knows of no hooks. Forwards that
bypass that and the modules of transformers are not seen.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apd.cache import ColumnCache
from apd.forward import Compiled

__all__ = ["Clock", "Forward", "Meter", "Timed"]


class Clock:
    """Marks in time: of the host on a CPU, of the stream on a GPU, where the host runs ahead.

    Args:
        device: whose time it is.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.is_cuda = torch.device(device).type == "cuda"

    def mark(self) -> Any:
        """Now; opaque."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks. Waits for the second."""
        if not self.is_cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def wall(self) -> float:
        """Seconds of the host once the device is idle, for whole calls."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass
class Forward:
    """One pass of one model, in numbers of what it computed.

    Attributes:
        role: `"drafter"` or `"verifier"`.
        rows: b.
        tokens: q, tokens recomputed per row, fillers of ragged rows included.
        keys: k, columns that each of them could see, those of a cache included.
        projected: m, tokens per row that went through the output layer.
    """

    role: str
    rows: int
    tokens: int
    keys: int
    projected: int = 0


@dataclass
class Meter:
    """Time and shapes of the calls that are made while it is attached.

    Args:
        models: by role.
        clock: of the device.
        compiled: their compiled passes, of those that have any.

    Attributes:
        forwards: in their order.
        unseen: steps of a strategy in which no drafter forward was seen.
    """

    models: Mapping[str, PreTrainedModel]
    clock: Clock
    compiled: Mapping[str, Compiled] = field(default_factory=dict)
    forwards: list[Forward] = field(default_factory=list)
    unseen: int = 0
    _spans: dict[str, list[tuple[Any, Any]]] = field(default_factory=lambda: defaultdict(list))
    _setup_from: Any = None

    @contextmanager
    def attached(self) -> Iterator[Meter]:
        """Count forwards of the models until the block ends."""
        with ExitStack() as stack:
            for role, model in self.models.items():
                body = Hooks(model.base_model, *self._around(role, self._saw_body))
                stack.enter_context(body)
                stack.enter_context(Hooks(model.get_output_embeddings(), *self._around(role, self._saw_head)))
                if (passes := self.compiled.get(role)) is not None:
                    stack.callback(setattr, passes, "run", passes.run)
                    passes.run = self._seen(role, passes.run, body)
            yield self

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around one `generate`."""
        before = self.count("propose")
        with self.span("call"):
            self._setup_from = self.clock.mark()
            yield
        if len(steps := self._spans["propose"][before:]) > 1:
            self._spans["later"].append((steps[1][0], self.clock.mark()))

    @contextmanager
    def propose(self) -> Iterator[None]:
        """Around the strategy's part of a step; the first of a call ends its setup."""
        if self._setup_from is not None:
            self._spans["setup"].append((self._setup_from, self.clock.mark()))
            self._setup_from = None
        before = len(self.forwards)
        with self.span("propose"):
            yield
        self.unseen += all(forward.role != "drafter" for forward in self.forwards[before:])

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self.clock.mark()
        yield
        self._spans[name].append((start, self.clock.mark()))

    def count(self, name: str) -> int:
        """Spans of a name that have ended."""
        return len(self._spans[name])

    def seconds(self, name: str) -> float:
        """All spans of a name together."""
        return sum(self.clock.seconds(start, end) for start, end in self._spans[name])

    def starts(self, name: str) -> list[float]:
        """Seconds from the first span of a name to each of them."""
        spans = self._spans[name]
        return [self.clock.seconds(spans[0][0], start) for start, _ in spans]

    def _seen(self, role: str, run: Callable[..., Tensor], body: Hooks) -> Callable[..., Tensor]:
        """`Compiled.run` that is counted and timed."""

        def seen(tokens: Tensor, seating: Tensor, width: int, cache: ColumnCache | None) -> Tensor:
            keys = width if cache is None else cache.aimed.num_columns
            self.forwards.append(Forward(role, len(tokens), width, keys))
            # A shape that is new is compiled now, and hooks would be compiled with it.
            with body.removed(), self.span(role):
                return run(tokens, seating, width, cache)

        return seen

    def _around(self, role: str, saw: Callable[..., None]) -> tuple[Callable[..., None], Callable[..., None]]:
        """What to do before and after a module of that role."""
        starts: list[Any] = []

        def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            saw(role, args, kwargs)
            starts.append(self.clock.mark())

        def after(*_: Any) -> None:
            self._spans[role].append((starts.pop(), self.clock.mark()))

        return before, after

    def _saw_body(self, role: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if isinstance(mask, Tensor):
            keys = mask.shape[-1]
        else:
            # A cache of ours knows what the pass will see; one of transformers' has not been told of its tokens yet.
            before = 0 if cache is None else cache.get_seq_length()
            keys = before if isinstance(cache, ColumnCache) else ids.shape[1] + before
        self.forwards.append(Forward(role, ids.shape[0], ids.shape[1], max(keys, ids.shape[1])))

    def _saw_head(self, role: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["input"]
        last = next((forward for forward in reversed(self.forwards) if forward.role == role), None)
        if last is not None:
            last.projected += hidden.shape[:-1].numel() // last.rows


class Hooks:
    """On a module while the block lasts.

    Args:
        module: any.
        before: is given the module, its arguments and its keyword arguments.
        after: is given the module, its arguments and its output.
    """

    def __init__(self, module: torch.nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        self.module, self.before, self.after = module, before, after
        self.handles: list[Any] = []

    def __enter__(self) -> Hooks:
        self.handles = [
            self.module.register_forward_pre_hook(self.before, with_kwargs=True),
            self.module.register_forward_hook(self.after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Not there meanwhile."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class Timed:
    """A strategy that tells the meter how long its sessions' `propose` takes, and is the given one otherwise.

    Args:
        strategy: decides.
        meter: is told.
    """

    def __init__(self, strategy: Any, meter: Meter) -> None:
        self._strategy, self._meter = strategy, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def open(self, *args: Any, **kwargs: Any) -> TimedSession:
        return TimedSession(self._strategy.open(*args, **kwargs), self._meter)


class TimedSession:
    """See `Timed`."""

    def __init__(self, session: Any, meter: Meter) -> None:
        self._session, self._meter = session, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        with self._meter.propose():
            return self._session.propose(*args, **kwargs)
