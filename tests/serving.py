"""A server in this process, or in one of its own, and helpers to ask it."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from paths import ROOT

from apd import APDSampler
from apd.serve.app import make_app
from apd.serve.settings import ServeSettings

PROMPT = 'Reverse this list: ["Mia", "Leo", "Zoe"].'
ANSWER = ' ["Zoe", "Leo", "Mia"]'


class Served:
    """An application, its event loop in a thread, and a client that needs no socket.

    Args:
        served: an application, or a sampler, which is served by an engine in this process.
        **settings: of the server of a sampler.
    """

    def __init__(self, served: APDSampler | FastAPI, **settings: Any) -> None:
        if isinstance(served, APDSampler):
            served = make_app(served, ServeSettings(**{"max_new_tokens": 32, **settings}))
        self.app = served
        self.engine, self.dispatcher = self.app.state.engine, self.app.state.dispatcher
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Served:
        self.thread.start()
        self.lifespan = self.app.router.lifespan_context(self.app)
        self.run(self.lifespan.__aenter__())
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")
        return self

    def __exit__(self, *error: Any) -> None:
        self.run(self.client.aclose())
        self.run(self.lifespan.__aexit__(None, None, None))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def run(self, work: Any, timeout: float = 60) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.run(self.client.get(path, **more))

    def post(self, path: str, body: dict[str, Any], **more: Any) -> httpx.Response:
        return self.run(self.client.post(path, json=body, **more))

    def post_all(self, path: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
        """Send all at once."""

        async def all_of_them() -> list[httpx.Response]:
            return await asyncio.gather(*(self.client.post(path, json=body) for body in bodies))

        return self.run(all_of_them())

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", {"prompt": PROMPT, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, *messages: Any, **body: Any) -> dict[str, Any]:
        said = list(messages) or [{"role": "user", "content": PROMPT}]
        response = self.post("/v1/chat/completions", {"messages": said, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of a stream, which must end with [DONE]."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = response.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def refusal(self, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
        """The error of a request, which must have OpenAI's shape, with its status."""
        asked = (
            {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
        )
        return error_of(self.post(path, {**asked, **body}))

    def hang_up(self, path: str, body: dict[str, Any], when: Callable[[], bool], timeout: float = 30) -> int | None:
        """Send a request and go away as soon as `when()`; returns the status, if there was one."""
        status: int | None = None
        is_sent = False

        async def receive() -> dict[str, Any]:
            nonlocal is_sent
            if not is_sent:
                is_sent = True
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
            while not when():
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "root_path": "",
        }
        self.run(asyncio.wait_for(self.app(scope, receive, send), timeout))
        return status

    @property
    def is_idle(self) -> bool:
        return self.dispatcher.is_idle and not self.engine.tasks

    def until(self, holds: Callable[[], bool], seconds: float = 20) -> bool:
        """Wait until something holds; False if it does not in time."""
        end = time.monotonic() + seconds
        while not holds() and time.monotonic() < end:
            time.sleep(0.002)
        return holds()

    def metric(self, line: str) -> float:
        """A value of `/metrics`, by name and labels; 0 if it was never counted."""
        return value_of(self.get("/metrics").text, line)

    def metric_of_engine(self, line: str) -> float:
        """As `metric`, where the event loop may not be kept waiting."""
        return value_of(self.engine.metrics_text().decode(), line)


def value_of(metrics: str, line: str) -> float:
    """A value by name and labels; 0 if it was never counted."""
    found = re.search(rf"^{re.escape(line)} (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    return {**body["error"], "status": response.status_code}


@contextmanager
def process(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`apd serve` on a free port of this machine; yields the process and its address."""
    import os

    command = [sys.executable, "-m", "apd", "serve", "--port", "0", *options]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
    assert server.stderr is not None
    try:
        lines = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"serving (\{.*\})", line):
                break
        else:
            raise AssertionError("".join(lines))
        yield server, json.loads(found[1])["url"]
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
