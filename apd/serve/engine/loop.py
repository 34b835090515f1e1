"""`Engine`: the one decoding loop, in one thread. Rows join between steps, and leave when they end or nobody waits for them."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from apd.generation.batch import Batch, Generated
from apd.sampler import APDSampler
from apd.serve.engine.errors import APIError, of_row
from apd.serve.engine.grammars import Constraint
from apd.serve.engine.jobs import Decoding, Event, Events, Failed, Job, Result
from apd.serve.engine.metrics import Metrics
from apd.serve.engine.resolving import Prepared, Resolvers
from apd.serve.engine.tasks import Place, Task

log = logging.getLogger("apd.serve")

_LOOK = 0.05  # seconds between two looks for jobs that are late


class Engine:
    """Decodes the rows of all jobs together: one thread, one step after the other.

    Rows of equal settings share a batch; each turn makes one step of every batch. No answer depends on the other rows.

    Args:
        sampler: decodes.
        max_rows: rows that are decoded together; the others wait.
        metrics: counts; new ones if not given.

    Attributes:
        has_failed: the thread has ended by a fault.
    """

    def __init__(self, sampler: APDSampler, *, max_rows: int, metrics: Metrics | None = None) -> None:
        self.sampler, self.max_rows = sampler, max_rows
        self.metrics = metrics or Metrics()
        self.resolvers = Resolvers(sampler, self.allowed)
        self.has_failed = self.is_stopping = False
        self.changed = threading.Condition()  # of what other threads write: these three
        self.tasks: dict[int, Task] = {}
        self.arrived: list[Task] = []
        self.to_cancel: list[tuple[int, int | None]] = []  # a choice of a job, or all of it
        self.waiting: deque[tuple[Task, int]] = deque()  # rows
        self.batches: dict[Decoding, Batch] = {}
        self.places: dict[int, Place] = {}
        self.constraints: dict[int, Constraint] = {}  # by number of a row
        self.working: deque[tuple[Task, Iterator[Any]]] = deque()
        self.untold: dict[Task, list[Event]] = {}
        self.numbers = itertools.count()
        self.next_look = 0.0
        self.metrics.waiting.set_function(lambda: len(self.waiting))
        self.metrics.running.set_function(lambda: len(self.places))
        self.metrics.batches.set_function(lambda: len(self.batches))
        self.thread = threading.Thread(target=self._run, name="apd-engine", daemon=True)

    # What other threads call.

    def start(self, deliver: Callable[[Events], None], on_end: Callable[[], None]) -> None:
        """Start the thread.

        Args:
            deliver: called in the thread with the events of a step, which it must not keep waiting.
            on_end: called when there will be no more events.
        """
        self.deliver, self.on_end = deliver, on_end
        self.thread.start()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive() and not (self.is_stopping or self.has_failed)

    def stop(self) -> None:
        """End the thread behind the current step; jobs that are not done get no more events."""
        with self.changed:
            self.is_stopping = True
            self.changed.notify()
        self.thread.join()

    def submit(self, number: int, job: Job) -> None:
        """Add a job; the events about it will have this number, another one than those of all jobs before."""
        task = Task(number, job)
        with self.changed:
            self.tasks[number] = task
            if job.schema is None:
                self._arrive(task)
        if job.schema is not None:  # a grammar may take seconds
            threading.Thread(target=self._prepare_apart, args=(task,), name="apd-grammar", daemon=True).start()

    def cancel(self, number: int, choice: int | None = None) -> None:
        """Free the rows of a job, or of one choice that has begun, before the next step."""
        with self.changed:
            self.to_cancel.append((number, choice))
            self.changed.notify()

    def metrics_text(self) -> bytes:
        """What the engine counts, in Prometheus' format."""
        return self.metrics.text()

    def _arrive(self, task: Task) -> None:
        self.arrived.append(task)
        self.changed.notify()

    def _prepare_apart(self, task: Task) -> None:
        self._prepare(task)
        with self.changed:
            self._arrive(task)

    # What the engine's thread calls.

    def _run(self) -> None:
        try:
            self._turn_until_stopped()
        except BaseException:  # what Rust's packages raise in a panic is no `Exception`
            log.exception("the decoding loop has ended")
            self.has_failed = True
        self.on_end()

    def _turn_until_stopped(self) -> None:
        while True:
            with self.changed:
                while not (self.is_stopping or self._has_work()):
                    self.changed.wait(_LOOK if self.tasks else None)
                    if self.tasks:  # a grammar is made, and may be late
                        break
                arrived, self.arrived = self.arrived, []
                cancelled, self.to_cancel = self.to_cancel, []
                if self.is_stopping:
                    return
            for number, choice in cancelled:
                self._cancel(number, choice)
            self._expire()
            for task in arrived:
                self._take(task)
            self._admit()
            self._tell()
            for settings in list(self.batches):
                self._step(settings)
                self._tell()
            self._work()
            self._tell()
            self.metrics.cpu.set(time.thread_time())

    def _has_work(self) -> bool:
        return bool(self.arrived or self.to_cancel or self.waiting or self.batches or self.working)

    def _event(self, task: Task, event: Event) -> None:
        self.untold.setdefault(task, []).append(event)

    def _tell(self) -> None:
        """Deliver the events since the last call."""
        if self.untold:
            events = [(task.number, of_task) for task, of_task in self.untold.items()]
            self.untold = {}
            self.deliver(events)

    def _expire(self) -> None:
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + _LOOK
        with self.changed:
            late = [task for task in self.tasks.values() if task.is_late]
        for task in late:
            seconds = now - task.arrived
            self._fail(task, APIError(504, f"The request timed out after {seconds:.1f} seconds.", code="timeout"))

    def _prepare(self, task: Task) -> None:
        """Check the job, and make the requests of its rows."""
        try:
            task.prepared = self.resolvers.prepared(task.job)
        except APIError as error:
            task.prepared = error
        except BaseException as error:  # see `_run`
            log.error("a job could not be checked", exc_info=error)
            task.prepared = of_row(error)

    def _take(self, task: Task) -> None:
        """Let the rows of a job that has arrived wait, or its work begin."""
        if task.is_over:
            return
        if task.prepared is None:
            self._prepare(task)
        if isinstance(task.prepared, APIError):
            self._fail(task, task.prepared)
        elif task.job.rows:
            self.waiting.extend((task, choice) for choice in range(len(task.job.rows)))
        else:
            self._complete(task)

    def _admit(self) -> None:
        """Let waiting rows in while there are free places."""
        while self.waiting and len(self.places) < self.max_rows:
            task, choice = self.waiting.popleft()
            settings = task.job.decoding
            number = next(self.numbers)
            batch = self.batches.get(settings)
            if batch is None:
                batch = self.batches[settings] = self.sampler.batch(logits=settings.has_logits)
            self.places[number] = Place(task, choice, task.arrived)
            task.places.append(number)
            assert isinstance(task.prepared, Prepared)
            if task.prepared.constraints:
                self.constraints[number] = task.prepared.constraints[choice]
            try:
                batch.add(task.prepared.requests[choice], number, follow=task.job.follow)
            except Exception as error:
                self._break(settings, error)

    def allowed(self, row: int, ids: Tensor) -> Any:
        """The ids that may come next in a row, for `prefix_allowed_tokens_fn`."""
        return self.constraints[row].allowed(ids)

    def _step(self, settings: Decoding) -> None:
        """One step of one batch, and what follows from it for its jobs."""
        batch = self.batches[settings]
        if not batch.num_rows:
            self.batches.pop(settings, None)
            return
        try:
            stepped = batch.step()
        except Exception as error:
            self._break(settings, error)
            return
        self.metrics.steps.inc()
        self.metrics.rows_of_step.inc(len(stepped.rows))
        self._time(batch, stepped.rows, stepped.ended)
        for progress in stepped.progress:
            if (place := self.places.get(progress.row)) is not None:
                self._event(place.task, place.stepped(progress))
        for answer in stepped.ended:
            if (place := self.places.get(answer.index)) is not None:  # else its job has failed in this step
                self._end_row(place, answer)
        for row, fault in stepped.failed.items():
            if (failed := self.places.get(row)) is not None:
                self._fail(failed.task, of_row(fault))
        if not batch.num_rows:
            self.batches.pop(settings, None)

    def _end_row(self, place: Place, answer: Generated) -> None:
        task = place.task
        try:
            if (constraint := self.constraints.get(answer.index)) is not None:
                constraint.check(answer.tokens)
        except APIError as error:
            self._fail(task, error)
            return
        del self.places[answer.index]
        self.constraints.pop(answer.index, None)
        self.metrics.count(answer, time.monotonic() - task.arrived)
        task.answers[place.choice] = answer
        self._event(task, place.ended(answer))
        if task.has_answers:
            self._complete(task)

    def _complete(self, task: Task) -> None:
        """No row is left: the job's work begins, or the job is over."""
        if task.job.work is not None:
            self.working.append((task, task.pieces(self.resolvers)))
            return
        if not task.job.rows:
            self._event(task, Result(None, is_last=True))
        self._forget(task)

    def _time(self, batch: Batch, rows: list[int], ended: list[Generated]) -> None:
        now, done = time.monotonic(), {answer.index: len(answer.tokens) for answer in ended}
        for row in rows:
            place, record = self.places.get(row), batch.recorder.rows.get(row)
            if place is None:
                continue
            num_tokens = done.get(row, 0 if record is None else record.num_tokens)
            new = num_tokens - place.num_tokens
            if new <= 0:
                continue
            if place.num_tokens:
                self.metrics.between_tokens.observe((now - place.last) / new)
            else:
                self.metrics.first_token.observe(now - place.task.arrived)
            place.num_tokens, place.last = num_tokens, now

    def _work(self) -> None:
        """One piece of the work that needs no batch."""
        if not self.working:
            return
        task, pieces = self.working[0]
        try:
            value = next(pieces)
        except StopIteration:
            self.working.popleft()
            self._event(task, Result(None, is_last=True))
            self._forget(task)
        except Exception as error:
            self._fail(task, of_row(error))
        else:
            self.working.rotate(-1)
            self._event(task, Result(value))

    def _break(self, settings: Decoding, error: Exception) -> None:
        """A batch cannot go on: its jobs fail, the others are untouched."""
        log.error("a batch failed", exc_info=error)
        tasks = {place.task for place in self.places.values() if place.task.job.decoding == settings}
        self.batches.pop(settings, None)
        for task in tasks:
            self._fail(
                task, APIError(500, f"Decoding failed: {type(error).__name__}: {error}", code="decoding_failed")
            )

    def _cancel(self, number: int, choice: int | None) -> None:
        task = self.tasks.get(number)
        if task is None or task.is_over:
            return
        if choice is None:
            self._end(task, "cancelled")
        elif (row := task.places[choice]) in self.places:
            self._leave(task, [row], "stop_string")
            task.answers[choice] = None
            if task.has_answers and not task.is_over:
                self._complete(task)

    def _leave(self, task: Task, rows: list[int], reason: str) -> None:
        """Take running rows out of their batch."""
        self.metrics.rows.labels(reason).inc(len(rows))
        for row in rows:
            del self.places[row]
            self.constraints.pop(row, None)
        if rows and (batch := self.batches.get(task.job.decoding)) is not None:
            try:
                batch.cancel(rows)
            except Exception as error:
                self._break(task.job.decoding, error)

    def _fail(self, task: Task, error: APIError) -> None:
        if not task.is_over:
            self._end(task, "failed")
            self._event(task, Failed(error))

    def _end(self, task: Task, reason: str) -> None:
        """Free whatever the job holds."""
        self._forget(task)
        self.untold.pop(task, None)
        self.waiting = deque(entry for entry in self.waiting if entry[0] is not task)
        self.working = deque(entry for entry in self.working if entry[0] is not task)
        self._leave(task, [row for row in task.places if row in self.places], reason)

    def _forget(self, task: Task) -> None:
        task.is_over = True
        with self.changed:
            self.tasks.pop(task.number, None)
