"""Time of a call by part, measured from outside: callables before the models and a wrapper around the strategy.

    call                      `generate`, from its first line to its last
      setup                   until the strategy's first call: arguments, layout, sessions
      propose                 one per step
        drafter, verifier     forwards: the decoder and the output layer of each transformers model
        (mixing)              the rest of propose: spans, masks, noise, normalising, mixing, accepting
      (other)                 the rest of the call: committing, stopping, output
      later                   from its second step on
      followed                steps with a successor, from proposal to proposal
        followed forwards     the forwards in them

`(…)` are differences. While the clock runs, marks and shapes are appended to a list; they are evaluated when a result is
read. A module is timed as a whole call, with what torch does around its `forward`; a compiled decoder where apd
calls its graph. Forwards that bypass both are not seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apd.models.cache import ColumnCache
from apd.models.graphs import CompiledModel

__all__ = ["Clock", "Forward", "Meter", "Timed"]


class Clock:
    """Time stamps: of the host on a CPU, of the stream on a GPU, because the host runs ahead.

    Args:
        device: whose time is measured.

    Attributes:
        mark: a function that returns the present time as an opaque value.
    """

    mark: Callable[[], Any]

    def __init__(self, device: torch.device | str) -> None:
        self.is_cuda = torch.device(device).type == "cuda"
        self.mark = _event if self.is_cuda else time.perf_counter

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks; waits for the second."""
        if not self.is_cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def wall(self) -> float:
        """Host time in seconds after waiting for the device, for whole calls."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class Forward:
    """One pass of one model: its role and sizes.

    Attributes:
        role: `"drafter"` or `"verifier"`.
        rows: b.
        tokens: q, tokens recomputed per row, fillers of ragged rows included.
        keys: k, columns that each token can attend to, cached ones included.
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
        compiled: the compiled passes of the models that have any.
    """

    models: Mapping[str, PreTrainedModel]
    clock: Clock
    compiled: Mapping[str, CompiledModel] = field(default_factory=dict)
    # Finished spans: name, start, end, how many spans had finished at its start, note.
    # Plain tuples are the cheapest record, and they keep no tensor alive.
    _log: list[tuple[str, Any, Any, int, Any]] = field(default_factory=list)

    @contextmanager
    def attached(self) -> Iterator[Meter]:
        """Count forwards of the models until the block ends."""
        with ExitStack() as stack:
            for role, model in self.models.items():
                for module, note in ((model.base_model, _of_decoder), (model.get_output_embeddings(), _of_head)):
                    # What a module's call tests first, as in `Module.compile`. It affects neither the fast path nor
                    # dynamo, which traces `forward`; forward hooks or a replaced `forward` would affect both.
                    call = self.timed(role, module._compiled_call_impl or module._call_impl, note)
                    stack.enter_context(_replaced(module, "_compiled_call_impl", call))
                if (passes := self.compiled.get(role)) is not None:
                    stack.enter_context(
                        _replaced(
                            passes, "forward_slots", self._alone(self.timed(role, passes.forward_slots, _of_pass))
                        )
                    )
            yield self

    @contextmanager
    def call(self) -> Iterator[None]:
        """A context for one `generate` call."""
        first, start = len(self._log), self.clock.mark()
        yield
        end = self.clock.mark()
        steps = [(at, *entry[1:4]) for at, entry in enumerate(self._log) if at >= first and entry[0] == "propose"]
        self._log.append(("call", start, end, first, None))
        self._log += [("setup", start, began, first, None) for _, began, *_ in steps[:1]]
        self._log += [("later", began, end, first, None) for _, began, *_ in steps[1:2]]
        for (at, began, _, inner), (_, next_began, *_) in pairwise(steps):
            self._log.append(("followed", began, next_began, first, None))
            self._log += [("followed forwards", *e[1:4], None) for e in self._log[inner:at] if e[0] in self.models]

    def timed(
        self, name: str, function: Callable[..., Any], note: Callable[..., Any] = lambda *_, **__: None
    ) -> Callable[..., Any]:
        """Wrap a function so that the meter records every call.

        Args:
            note: (arguments of the call) → shapes to record, called after the clock has stopped.
        """
        mark, log = self.clock.mark, self._log

        def timed(*args: Any, **kwargs: Any) -> Any:
            first, start = len(log), mark()
            output = function(*args, **kwargs)
            log.append((name, start, mark(), first, note(*args, **kwargs)))
            return output

        return timed

    def _alone(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Drop what modules record inside a compiled pass, which calls them where it runs eagerly."""

        def alone(*args: Any) -> Tensor:
            first = len(self._log)
            hidden = run(*args)
            del self._log[first:-1]
            return hidden

        return alone

    @property
    def forwards(self) -> list[Forward]:
        """All forwards, in order."""
        found: list[Forward] = []
        last: dict[str, Forward] = {}
        for role, _, _, _, seen in self._log:
            if seen is None:
                continue
            shape, keys = seen
            if keys is not None:
                last[role] = Forward(role, shape[0], shape[1], max(keys, shape[1]))
                found.append(last[role])
            elif role in last:
                last[role].projected += shape[:-1].numel() // last[role].rows
        return found

    @property
    def unseen(self) -> int:
        """Steps of a strategy in which no drafter forward was seen."""
        drafted = [name == "drafter" and seen[1] is not None for name, *_, seen in self._log]
        steps = ((first, end) for end, (name, _, _, first, _) in enumerate(self._log) if name == "propose")
        return sum(not any(drafted[first:end]) for first, end in steps)

    def count(self, name: str) -> int:
        """Number of finished spans with this name."""
        return len(self._spans(name))

    def seconds(self, name: str) -> float:
        """Total seconds of the spans with this name."""
        return sum(self.clock.seconds(start, end) for start, end in self._spans(name))

    def starts(self, name: str) -> list[float]:
        """Seconds from the start of the first span with this name to the start of each."""
        spans = self._spans(name)
        return [self.clock.seconds(spans[0][0], start) for start, _ in spans]

    def _spans(self, name: str) -> list[tuple[Any, Any]]:
        return [(start, end) for other, start, end, *_ in self._log if other == name]


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of this object until the block ends."""
    own, before = vars(owner), vars(owner).get(name)
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        if before is not None:
            own[name] = before


def _of_decoder(
    input_ids: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Any, int]:
    """Shape and keys of a pass; called after the pass, when a transformers cache includes its tokens."""
    if isinstance(attention_mask, Tensor):
        return input_ids.shape, attention_mask.shape[-1]
    cache = past_key_values if cache is None else cache  # the name of the argument depends on the model
    return input_ids.shape, 0 if cache is None else cache.get_seq_length()


def _of_head(input: Tensor) -> tuple[Any, None]:
    return input.shape, None


def _of_pass(tokens: Tensor, edges: Tensor, slots: Tensor, width: int, cache: ColumnCache | None) -> tuple[Any, int]:
    return (len(tokens), width), width if cache is None else cache.target.num_columns


class Timed:
    """Wraps a strategy so that the meter records the time of its sessions' `propose`.

    Args:
        strategy: the wrapped strategy.
        meter: records the times.
    """

    def __init__(self, strategy: Any, meter: Meter) -> None:
        self._strategy, self._meter = strategy, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def open(self, *args: Any, **kwargs: Any) -> TimedSession:
        return TimedSession(self._strategy.open(*args, **kwargs), self._meter)


class TimedSession:
    """The session of `Timed`."""

    def __init__(self, session: Any, meter: Meter) -> None:
        self._session = session
        self.propose = meter.timed("propose", session.propose)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)
