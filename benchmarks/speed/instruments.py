"""Where the time of a call goes, seen from outside: hooks on the models and a wrapper around the strategy.

    call                      `generate`, from its first line to its last
      setup                   until the strategy is asked for the first time: arguments, layout, sessions
      propose                 one per step
        drafter, verifier     forwards: the decoder and the output layer of each transformers model
        (mixing)              the rest of propose: spans, masks, noise, normalising, mixing, accepting
      (other)                 the rest of the call: committing, stopping, output

`(…)` are differences. Forwards that bypass the modules of transformers, such as a replayed graph, are not seen.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apd.cache import ColumnCache

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
    """

    models: Mapping[str, PreTrainedModel]
    clock: Clock
    forwards: list[Forward] = field(default_factory=list)
    _spans: dict[str, list[tuple[Any, Any]]] = field(default_factory=lambda: defaultdict(list))
    _setup_from: Any = None

    @contextmanager
    def attached(self) -> Iterator[Meter]:
        """Count forwards of the models until the block ends."""
        handles = []
        for role, model in self.models.items():
            handles += self._hooked(model.base_model, role, self._saw_body)
            handles += self._hooked(model.get_output_embeddings(), role, self._saw_head)
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around one `generate`."""
        with self.span("call"):
            self._setup_from = self.clock.mark()
            yield

    @contextmanager
    def propose(self) -> Iterator[None]:
        """Around the strategy's part of a step; the first of a call ends its setup."""
        if self._setup_from is not None:
            self._spans["setup"].append((self._setup_from, self.clock.mark()))
            self._setup_from = None
        with self.span("propose"):
            yield

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

    def _hooked(self, module: torch.nn.Module, role: str, saw: Callable[..., None]) -> list[Any]:
        starts: list[Any] = []

        def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            saw(role, args, kwargs)
            starts.append(self.clock.mark())

        def after(*_: Any) -> None:
            self._spans[role].append((starts.pop(), self.clock.mark()))

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

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
