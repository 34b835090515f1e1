"""`Dispatcher`: between HTTP and the engine. It bounds the queue, and brings each event to whoever waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from typing import Protocol

from apd.serve.engine.errors import APIError
from apd.serve.engine.jobs import Event, Events, Failed, Job


class Decoder(Protocol):
    """An engine, in this process (`Engine`) or in one of its own (`EngineProcess`).

    Attributes:
        max_rows: rows that are decoded together.
        has_failed: it has ended by a fault.
    """

    max_rows: int
    has_failed: bool

    @property
    def is_alive(self) -> bool: ...

    def start(self, deliver: Callable[[Events], None], on_end: Callable[[], None]) -> None: ...

    def submit(self, number: int, job: Job) -> None: ...

    def cancel(self, number: int, choice: int | None = None) -> None: ...

    def metrics_text(self) -> bytes: ...

    def stop(self) -> None: ...


class Waiter(Protocol):
    """Waits for the events of a job.

    Attributes:
        num_places: rows that the job still takes; 1 for its work, where there is no row.
    """

    @property
    def num_places(self) -> int: ...

    def take(self, events: list[Event]) -> None: ...


class Dispatcher:
    """Hands jobs to an engine and its events to those who wait. All but `start` and `stop` is called by the event loop.

    Args:
        engine: decodes; it starts and ends with this.
        max_queue: rows that may wait.

    Attributes:
        num_jobs: jobs that were taken.
        num_cut_off: those that were cut off.
        is_draining: no more are taken.
    """

    def __init__(self, engine: Decoder, *, max_queue: int) -> None:
        self.engine = engine
        self.most = engine.max_rows + max_queue
        self.waiters: dict[int, Waiter] = {}  # by number of the job
        self.numbers = itertools.count()
        self.num_jobs = self.num_cut_off = 0
        self.is_draining = False

    def start(self) -> None:
        """Start the engine; called in the event loop."""
        self.loop = asyncio.get_running_loop()
        self.engine.start(self._deliver, self._on_end)

    def stop(self) -> None:
        """End the engine; jobs that are not done fail. It takes as long as a step, so it is called in another thread."""
        self.is_draining = True
        self.engine.stop()

    @property
    def is_idle(self) -> bool:
        """True if every job is done."""
        return not self.waiters

    def drain(self) -> None:
        """Take no more jobs; those that were submitted go on."""
        self.is_draining = True

    def submit(self, job: Job, waiter: Waiter) -> int:
        """Hand a job to the engine; returns its number.

        Raises:
            APIError: the queue is full (429), the server shuts down (503), or its decoding has failed (500).
        """
        if self.engine.has_failed:
            raise _ended()
        if self.is_draining:
            raise APIError(503, "The server is shutting down. Ask another one.", code="draining", retry_after=5)
        present, new = sum(each.num_places for each in self.waiters.values()), max(1, len(job.rows))
        if new > self.most:
            raise APIError(400, f"A request may have {self.most} choices here, got {new}.", param="n")
        if present + new > self.most:
            decoded = min(present, self.engine.max_rows)
            raise APIError(
                429,
                f"The queue is full: {present - decoded} rows wait, {decoded} are being decoded. Try again later.",
                code="queue_full",
                retry_after=1,
            )
        number = next(self.numbers)
        self.engine.submit(number, job)  # first, since it may fail; the events come through the event loop, later
        self.num_jobs += 1
        self.waiters[number] = waiter
        return number

    def cancel(self, number: int, choice: int | None = None) -> None:
        """Nobody waits for a job, or for one of its choices."""
        waiter = self.waiters.get(number)
        if waiter is None:
            return
        if choice is None or not waiter.num_places:
            del self.waiters[number]
        self.engine.cancel(number, choice)

    def cut_off(self) -> None:
        """End all jobs that are not done; those who wait are told."""
        cut_off, self.waiters = self.waiters, {}
        self.num_cut_off += len(cut_off)
        for number, waiter in cut_off.items():
            self.engine.cancel(number)
            waiter.take([Failed(_ended() if self.engine.has_failed else _cut_off())])

    def _deliver(self, events: Events) -> None:
        self._soon(self._route, events)

    def _on_end(self) -> None:
        self._soon(self.cut_off)

    def _soon(self, call: Callable[..., None], *arguments: object) -> None:
        """Let the event loop call it: the engine has a thread of its own."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            self.loop.call_soon_threadsafe(call, *arguments)

    def _route(self, events: Events) -> None:
        for number, of_job in events:
            if (waiter := self.waiters.get(number)) is not None:
                waiter.take(of_job)
                if not waiter.num_places:
                    del self.waiters[number]


def _ended() -> APIError:
    return APIError(
        500, "Decoding has ended by a fault; the server's log has it. Restart the server.", code="engine_failed"
    )


def _cut_off() -> APIError:
    return APIError(503, "The server has shut down before the answer was done.", code="draining")
