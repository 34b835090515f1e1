"""`EngineProcess`: an engine in a process of its own, whose Python lock HTTP, JSON and tokenizing do not take."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

# torch is imported where it is needed: the server's process starts the other one, and both import at the same time.
if TYPE_CHECKING:
    from apd.sampler import APDSampler
    from apd.serve.engine.facts import Facts
    from apd.serve.engine.jobs import Events, Job
    from apd.serve.engine.loop import Engine

log = logging.getLogger("apd.serve")

_PATIENCE = 10.0  # seconds for an answer about metrics, and for the process to end
_KILLED = "(-9: killed, as the system does where memory is short)"

# What is sent, pickled by `multiprocessing`, over a pipe that the two processes alone have: (name, *values). To the engine's
# process: the methods of `Engine` that other threads call. From there: `facts` or `error`, once; then `events` and `metrics`.


class EngineProcess:
    """An engine in a process of its own, which begins to load at once; it has the methods of `Engine`.

    With `with`, it ends at the end of the block.

    Args:
        load: loads the sampler, in that process: a function that pickle can name, or a `functools.partial` of one.
        max_rows: rows that are decoded together.

    Attributes:
        has_failed: the process has ended by a fault.
    """

    def __init__(self, load: Callable[[], APDSampler], *, max_rows: int) -> None:
        self.max_rows = max_rows
        self.has_failed = self.is_stopping = self.is_loaded = False
        self.sending, self.asking = threading.Lock(), threading.Lock()
        self.texts: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks, and no GPU survives it
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, load, max_rows), name="apd-engine", daemon=True)
        _start(self.process)
        theirs.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def loaded(self) -> Facts:
        """Wait for the sampler; returns what is known of it. To be called once, before `start`.

        Raises:
            Exception: what `load` raises.
            RuntimeError: the process has ended while it was loading.
        """
        try:
            name, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(
                f"The engine's process has ended while it was loading, with exit code {self.process.exitcode} {_KILLED}."
            ) from None
        if name == "error":
            error, where = value
            raise error from RuntimeError(where)
        self.is_loaded = True
        return value

    def start(self, deliver: Callable[[Events], None], on_end: Callable[[], None]) -> None:
        """As `Engine.start`; they are called in a thread of their own."""
        arguments = (deliver, on_end)
        threading.Thread(target=self._listen, args=arguments, name="apd-engine-events", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive() and not (self.is_stopping or self.has_failed)

    def submit(self, number: int, job: Job) -> None:
        """As `Engine.submit`."""
        self._send("submit", number, job)

    def cancel(self, number: int, choice: int | None = None) -> None:
        """As `Engine.cancel`."""
        self._send("cancel", number, choice)

    def metrics_text(self) -> bytes:
        """As `Engine.metrics_text`; empty if the process has ended."""
        with self.asking:
            while not self.texts.empty():  # the answer to one who has lost patience
                self.texts.get()
            self._send("metrics")
            try:
                return self.texts.get(timeout=_PATIENCE if self.is_alive else 0)
            except queue.Empty:
                return b""

    def stop(self) -> None:
        """As `Engine.stop`; the process ends, too."""
        self.is_stopping = True
        try:
            if self.is_loaded:
                self._send("stop")
                self.process.join(_PATIENCE)
        finally:  # also after Ctrl-C: at its exit, Python would wait for a process that ignores SIGTERM
            self.process.kill()
            self.process.join()

    def _send(self, name: str, *values: Any) -> None:
        with self.sending, contextlib.suppress(OSError):  # the process has ended: `_listen` tells whoever waits
            self.connection.send((name, *values))

    def _listen(self, deliver: Callable[[Events], None], on_end: Callable[[], None]) -> None:
        while True:
            try:
                name, value = self.connection.recv()
            except (EOFError, OSError):
                break
            if name == "events":
                deliver(value)
            else:
                self.texts.put(value)
        self.has_failed = not self.is_stopping
        self.texts.put(b"")  # for one who waits
        on_end()
        if self.has_failed:
            self.process.join(_PATIENCE)
            log.error("The engine's process has ended, with exit code %s %s.", self.process.exitcode, _KILLED)


def _start(process: BaseProcess) -> None:
    """Start it, with SIGINT blocked: a terminal sends it to both, and the new process cannot ignore it at once."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        process.start()
        return
    resource_tracker.ensure_running()  # lifts the block where it is the first to start it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _work(connection: Connection, load: Callable[[], APDSampler], max_rows: int) -> None:
    """The engine's process."""
    for each in (signal.SIGINT, signal.SIGTERM):  # a whole group may get them: the server decides when this ends
        signal.signal(each, signal.SIG_IGN)
    sending = threading.Lock()

    def send(name: str, value: Any) -> None:
        with sending, contextlib.suppress(OSError):  # the server's process has ended: `_obey` ends this one
            connection.send((name, value))

    engines: list[Engine] = []
    threading.Thread(target=_obey, args=(connection, engines, send), daemon=True).start()
    try:
        sampler = load()
        from apd.serve.engine.facts import Facts
        from apd.serve.engine.loop import Engine
        from apd.serve.engine.metrics import Metrics

        facts = Facts.of(sampler)
        engine = Engine(sampler, max_rows=max_rows, metrics=Metrics("apd_engine"))
        engines.append(engine)
        send("facts", facts)
    except Exception as error:
        send("error", (_portable(error), traceback.format_exc()))
        return
    engine.start(lambda events: send("events", events), lambda: None)
    engine.thread.join()
    # Behind `multiprocessing`'s own end, Python would take a second to tidy up what the system frees at once.
    atexit.register(os._exit, 1 if engine.has_failed else 0)


def _obey(connection: Connection, engines: list[Engine], send: Callable[[str, Any], None]) -> None:
    """Do what the server's process asks for, and end with it."""
    try:
        while True:
            name, *values = connection.recv()
            if name == "metrics":
                send("metrics", engines[0].metrics_text())
            else:
                getattr(engines[0], name)(*values)
    except (EOFError, OSError):  # nobody is left, whatever is being loaded or decoded
        pass
    except Exception:
        log.exception("the engine cannot be asked any more")
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, if it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
