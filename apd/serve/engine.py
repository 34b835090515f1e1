"""`Engine`: the one decoding loop, in one thread. Rows join between steps, and leave when they end or nobody waits for them."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from apd.generation.batch import Batch, Generated
from apd.sampler import APDSampler
from apd.serve.errors import APIError, of_row
from apd.serve.jobs import Ended, Event, Failed, Job, Result, Stepped
from apd.serve.metrics import Metrics

log = logging.getLogger("apd.serve")

_LOOK = 0.05  # seconds between two looks for jobs that are late


def _ended() -> APIError:
    return APIError(
        500, "Decoding has ended by a fault; the server's log has it. Restart the server.", code="engine_failed"
    )


def _cut_off() -> APIError:
    return APIError(503, "The server has shut down before the answer was done.", code="draining")


def _pieces(job: Job) -> Iterator[Any]:
    """The work of a job; nothing of it is done, and can fail, before the first piece."""
    assert job.work is not None
    yield from job.work([answer for _, answer in sorted(job.answers.items()) if answer is not None])


@dataclass
class _Place:
    """Where a row that is being decoded belongs."""

    job: Job
    choice: int
    last: float  # when its last tokens were committed
    num_tokens: int = 0


class Engine:
    """Decodes the rows of all jobs together: one thread, one step after the other.

    Rows of equal settings share a batch; each turn makes one step of every batch. No answer depends on the other rows.

    Args:
        sampler: decodes.
        max_rows: rows that are decoded together.
        max_queue: rows that may wait.
        metrics: counts; a new one if not given.

    Attributes:
        num_jobs: jobs that were taken.
        num_cut_off: those that the end of the thread has cut off.
        has_failed: the thread has ended by a fault.
    """

    def __init__(self, sampler: APDSampler, *, max_rows: int, max_queue: int, metrics: Metrics | None = None) -> None:
        self.sampler, self.max_rows, self.max_queue = sampler, max_rows, max_queue
        self.metrics = metrics or Metrics()
        self.changed = threading.Condition()
        self.arrived: deque[tuple[Job, int]] = deque()  # rows that wait
        self.to_cancel: list[tuple[Job, int | None]] = []  # a choice of a job, or all of it
        self.num_waiting = 0
        self.is_draining = self.is_stopping = self.has_failed = False
        self.batches: dict[Hashable, Batch] = {}
        self.places: dict[int, _Place] = {}
        self.working: deque[tuple[Job, Iterator[Any]]] = deque()
        self.new_work: deque[Job] = deque()
        self.constraints: dict[int, Any] = {}  # by number of a row
        self.numbers = itertools.count()
        self.next_look = 0.0
        self.num_jobs = self.num_cut_off = 0
        self.metrics.waiting.set_function(lambda: self.num_waiting)
        self.metrics.running.set_function(lambda: len(self.places))
        self.metrics.batches.set_function(lambda: len(self.batches))
        self.thread = threading.Thread(target=self._run, name="apd-engine", daemon=True)

    # What other threads call.

    def start(self) -> None:
        self.thread.start()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive() and not self.is_stopping

    @property
    def is_idle(self) -> bool:
        """True if every job is done."""
        return not (self._has_work() or self.places)

    def drain(self) -> None:
        """Take no more jobs; those that were submitted go on."""
        self.is_draining = True

    def stop(self) -> None:
        """End the thread behind the current step; jobs that are not done fail."""
        with self.changed:
            self.is_draining = self.is_stopping = True
            self.changed.notify()
        self.thread.join()

    def submit(self, job: Job) -> None:
        """Add a job.

        Raises:
            APIError: the queue is full (429), the server shuts down (503), or its decoding has failed (500).
        """
        with self.changed:
            if self.has_failed:
                raise _ended()
            if self.is_draining:
                raise APIError(503, "The server is shutting down. Ask another one.", code="draining", retry_after=5)
            most, works = self.max_rows + self.max_queue, len(self.new_work) + len(self.working)
            present = self.num_waiting + len(self.places) + works
            if len(job.rows) > most:
                raise APIError(400, f"A request may have {most} choices here, got {len(job.rows)}.", param="n")
            if present + max(1, len(job.rows)) > most:
                raise APIError(
                    429,
                    f"The queue is full: {self.num_waiting} rows wait, {len(self.places) + works} are being decoded. Try again "
                    "later.",
                    code="queue_full",
                    retry_after=1,
                )
            self.num_jobs += 1
            if job.rows:
                self.arrived.extend((job, choice) for choice in range(len(job.rows)))
                self.num_waiting += len(job.rows)
            else:
                self.new_work.append(job)
            self.changed.notify()

    def cancel(self, job: Job, choice: int | None = None) -> None:
        """Free the rows of a job, or of one choice that has begun, before the next step. There are no more events of it."""
        if job.is_over:
            return
        with self.changed:
            self.to_cancel.append((job, choice))
            self.changed.notify()

    # What the engine's thread calls.

    def _run(self) -> None:
        try:
            self._turn_until_stopped()
        except Exception:
            log.exception("the decoding loop has ended")
            with self.changed:
                self.has_failed = self.is_draining = True
        for job in self._jobs():
            self.num_cut_off += 1
            self._fail(job, _ended() if self.has_failed else _cut_off())

    def _turn_until_stopped(self) -> None:
        while True:
            with self.changed:
                while not (self.is_stopping or self._has_work()):
                    self.changed.wait()
                cancelled, self.to_cancel = self.to_cancel, []
                if self.is_stopping:
                    return
            for job, choice in cancelled:
                self._cancel(job, choice)
            self._expire()
            self._admit()
            for settings in list(self.batches):
                self._step(settings)
            self._work()
            self.metrics.cpu.set(time.thread_time())

    def _has_work(self) -> bool:
        return bool(self.arrived or self.to_cancel or self.batches or self.new_work or self.working)

    def _jobs(self) -> set[Job]:
        with self.changed:
            waiting = [*(job for job, _ in self.arrived), *self.new_work]
        placed = [place.job for place in self.places.values()]
        return {*waiting, *placed, *(job for job, _ in self.working)}

    def _expire(self) -> None:
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + _LOOK
        late = [job for job in self._jobs() if job.deadline is not None and job.deadline < now]
        for job in late:
            seconds = now - job.arrived
            self._fail(job, APIError(504, f"The request timed out after {seconds:.1f} seconds.", code="timeout"))

    def _admit(self) -> None:
        """Let waiting rows in while there are free places."""
        while len(self.places) < self.max_rows:
            with self.changed:
                if not self.arrived:
                    return
                job, choice = self.arrived.popleft()
                self.num_waiting -= 1
            number = next(self.numbers)
            batch = self.batches.get(job.settings)
            if batch is None:
                batch = self.batches[job.settings] = self.sampler.batch(logits=job.logits)
            self.places[number] = _Place(job, choice, job.arrived)
            job.numbers.append(number)
            if job.constraints:
                self.constraints[number] = job.constraints[choice]
            try:
                batch.add(job.rows[choice], number, follow=job.follow)
            except Exception as error:
                self._break(job.settings, error)

    def allowed(self, row: int, ids: Tensor) -> Any:
        """The ids that may come next in a row, for `prefix_allowed_tokens_fn`."""
        return self.constraints[row].allowed(ids)

    def _step(self, settings: Hashable) -> None:
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
        events: dict[Job, list[Event]] = {}
        for progress in stepped.progress:
            if (place := self.places.get(progress.row)) is not None:
                events.setdefault(place.job, []).append(Stepped(place.choice, progress))
        for answer in stepped.ended:
            if (place := self.places.get(answer.index)) is None:  # its job has failed in this step
                continue
            try:
                if (constraint := self.constraints.get(answer.index)) is not None:
                    constraint.check(answer.tokens)
            except APIError as error:
                self._fail(place.job, error)
                continue
            del self.places[answer.index]
            self.constraints.pop(answer.index, None)
            self._count(answer, place)
            place.job.answers[place.choice] = answer
            events.setdefault(place.job, []).append(Ended(place.choice, answer))
        for job, of_job in events.items():
            if job.is_over:
                continue
            self._complete(job)
            job.deliver(of_job)
        for row, fault in stepped.failed.items():
            if (failed := self.places.get(row)) is not None:
                self._fail(failed.job, of_row(fault))
        if not batch.num_rows:
            self.batches.pop(settings, None)

    def _complete(self, job: Job) -> None:
        """If no row is left, the job is over, or its work begins."""
        if len(job.answers) < len(job.rows):
            return
        if job.work is None:
            job.is_over = True
        else:
            self.new_work.append(job)

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
                self.metrics.first_token.observe(now - place.job.arrived)
            place.num_tokens, place.last = num_tokens, now

    def _count(self, answer: Generated, place: _Place) -> None:
        self.metrics.rows.labels(answer.finish).inc()
        self.metrics.tokens.inc(len(answer.tokens))
        self.metrics.drafter_forwards.inc(answer.drafter_forwards)
        self.metrics.verifier_forwards.inc(answer.verifier_forwards)
        self.metrics.tokens_per_forward.observe(answer.tokens_per_forward)
        self.metrics.whole.observe(time.monotonic() - place.job.arrived)

    def _work(self) -> None:
        """One piece of the work that needs no batch."""
        while self.new_work:
            job = self.new_work.popleft()
            self.working.append((job, _pieces(job)))
        if not self.working:
            return
        job, pieces = self.working[0]  # it stays: `is_idle` is asked meanwhile
        try:
            value = next(pieces)
        except StopIteration:
            job.is_over = True
            self.working.popleft()
            job.deliver([Result(None, is_last=True)])
        except Exception as error:
            self._fail(job, of_row(error))
        else:
            self.working.rotate(-1)
            job.deliver([Result(value)])

    def _break(self, settings: Hashable, error: Exception) -> None:
        """A batch cannot go on: its jobs fail, the others are untouched."""
        log.error("a batch failed", exc_info=error)
        jobs = {place.job for place in self.places.values() if place.job.settings == settings}
        self.batches.pop(settings, None)
        for job in jobs:
            self._fail(job, APIError(500, f"Decoding failed: {type(error).__name__}: {error}", code="decoding_failed"))

    def _cancel(self, job: Job, choice: int | None) -> None:
        if choice is None:
            self._end(job, "cancelled")
        elif (number := job.numbers[choice]) in self.places and not job.is_over:
            self._leave(job, [number], "stop_string")
            job.answers[choice] = None
            self._complete(job)

    def _leave(self, job: Job, numbers: list[int], reason: str) -> None:
        """Take running rows out of their batch."""
        self.metrics.rows.labels(reason).inc(len(numbers))
        for number in numbers:
            del self.places[number]
            self.constraints.pop(number, None)
        if numbers and (batch := self.batches.get(job.settings)) is not None:
            try:
                batch.cancel(numbers)
            except Exception as error:
                self._break(job.settings, error)

    def _fail(self, job: Job, error: APIError) -> None:
        if not job.is_over:
            self._end(job, "failed")
            job.deliver([Failed(error)])

    def _end(self, job: Job, reason: str) -> None:
        """Free whatever the job holds."""
        job.is_over = True
        with self.changed:
            kept = deque(entry for entry in self.arrived if entry[0] is not job)
            self.num_waiting -= len(self.arrived) - len(kept)
            self.arrived = kept
            self.new_work = deque(each for each in self.new_work if each is not job)
        self.working = deque(entry for entry in self.working if entry[0] is not job)
        self._leave(job, [number for number in job.numbers if number in self.places], reason)
