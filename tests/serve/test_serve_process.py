"""The engine in a process of its own: it answers as the one in this process does, and its end is told."""

from __future__ import annotations

import ast
import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`: pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`: pip install -e '.[serve]'")

import httpx
from loads import dying, unloadable, unspeakable
from paths import ROOT
from serving import ANSWER, PROMPT, Served, error_of, process

from apd import APDSampler
from apd.serve.app import app_of
from apd.serve.engine.errors import APIError
from apd.serve.engine.jobs import Decoding, Job
from apd.serve.engine.process import EngineProcess
from apd.serve.settings import ServeSettings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SETTINGS = ServeSettings(max_new_tokens=32, max_batch_size=4)
NAMES = {"type": "array", "items": {"enum": ["Ada", "Ben", "Mia"]}, "minItems": 2, "maxItems": 3}
FORMAT = {"type": "json_schema", "json_schema": {"name": "names", "schema": NAMES}}
#: Each goes through another part of what the two processes send each other.
BODIES: list[tuple[str, dict[str, Any]]] = [
    (TEXT, {"prompt": PROMPT}),
    (TEXT, {"prompt": [PROMPT, PROMPT], "n": 2, "temperature": 1.3, "seed": 3}),
    (TEXT, {"prompt": PROMPT, "stop": ["Leo"], "strategy": "left-to-right:1"}),
    (TEXT, {"prompt": PROMPT, "logprobs": 2, "echo": True}),
    (TEXT, {"prompt": PROMPT, "echo": True, "max_tokens": 0}),
    (TEXT, {"prompt": PROMPT, "logit_bias": {"9": 3}, "presence_penalty": 1.5, "max_tokens": 9}),
    (TEXT, {"prompt": PROMPT + ' ["Zoe", "', "suffix": '"]', "max_tokens": 4, "seed": 5}),
    (CHAT, {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True, "top_logprobs": 3}),
    (CHAT, {"messages": [{"role": "user", "content": PROMPT}], "response_format": FORMAT}),
    (TEXT, {"prompt": PROMPT, "mixture_weight": 2}),
    (TEXT, {"prompt": PROMPT, "strategy": "confidence:1", "frequency_penalty": 1}),
]


def started() -> EngineProcess:
    return EngineProcess(APDSampler.from_included, max_rows=SETTINGS.max_batch_size)


@pytest.fixture(scope="module")
def apart() -> Iterator[Served]:
    with started() as engine, Served(app_of(engine, engine.loaded(), SETTINGS)) as server:
        yield server
    assert engine.process.exitcode == 0  # it was not killed


@pytest.fixture(scope="module")
def here() -> Iterator[Served]:
    with Served(APDSampler.from_included(), max_batch_size=4) as server:
        yield server


def same(response: httpx.Response) -> dict[str, Any]:
    """What does not depend on when and where the answer was made."""
    return {name: value for name, value in response.json().items() if name not in ("id", "created")}


def test_it_answers_as_an_engine_in_this_process(apart: Served, here: Served) -> None:
    """Texts, log-probabilities, ends, usage, and errors; there also all at once."""

    async def all_at_once() -> list[httpx.Response]:
        return await asyncio.gather(*(apart.client.post(path, json=body) for path, body in BODIES))

    for (path, body), together in zip(BODIES, apart.run(all_at_once()), strict=True):
        if "response_format" in body:
            pytest.importorskip("llguidance", reason="needs the extra `grammar`: pip install -e '.[grammar]'")
        alone, beside = here.post(path, body), apart.post(path, body)
        assert beside.status_code == together.status_code == alone.status_code, body
        assert same(beside) == same(alone), body
        assert together.json().get("choices") == alone.json().get("choices"), body
    texts = [[each["choices"] for each in server.stream(TEXT, {"prompt": PROMPT})] for server in (apart, here)]
    assert texts[0] == texts[1] and len(texts[0]) > 1
    watched = [server.post("/watch", {"prompt": PROMPT}).text for server in (apart, here)]
    assert watched[0].count("data: {") == watched[1].count("data: {") > 1 and '"done"' in watched[0]


def test_its_queue_and_metrics_are_those_of_the_server(apart: Served) -> None:
    long = {"prompt": PROMPT, "strategy": "left-to-right:1", "max_tokens": 450, "logit_bias": {"1": -100}}
    before = apart.metric('apd_rows_total{reason="cancelled"}')
    apart.hang_up(TEXT, {**long, "stream": True}, when=lambda: apart.metric_of_engine("apd_running_rows") > 0)
    assert apart.until(lambda: apart.metric_of_engine("apd_running_rows") == 0)
    assert apart.metric('apd_rows_total{reason="cancelled"}') == before + 1
    assert apart.metric("apd_hang_ups_total") == 1
    assert apart.metric("process_cpu_seconds_total") > 0 < apart.metric("apd_engine_process_cpu_seconds_total")


def test_a_job_that_cannot_be_sent_takes_no_place(apart: Served) -> None:
    class Unsendable:
        num_places = 1

        def take(self, events: Any) -> None:
            raise AssertionError("nobody waits")

    async def submit() -> None:
        apart.dispatcher.submit(Job(Decoding(), schema={"type": Unsendable}), Unsendable())

    with pytest.raises((AttributeError, pickle.PicklingError)):
        apart.run(submit())
    assert apart.dispatcher.is_idle


@pytest.mark.slow
def test_its_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with started() as engine, Served(app_of(engine, engine.loaded(), SETTINGS)) as server:
        assert server.complete()["choices"][0]["text"] == ANSWER
        long = {"prompt": PROMPT, "strategy": "left-to-right:1", "max_tokens": 450, "logit_bias": {"1": -100}}

        async def killed_meanwhile() -> httpx.Response:
            asked = asyncio.ensure_future(server.client.post(TEXT, json=long))
            await asyncio.sleep(0.2)
            os.kill(engine.process.pid or 0, signal.SIGKILL)
            return await asked

        cut_off = server.run(killed_meanwhile())
        late = server.post(TEXT, {"prompt": PROMPT})
        for response in (cut_off, late):
            assert (response.status_code, error_of(response)["code"]) == (500, "engine_failed")
        assert server.get("/health").status_code == server.get("/ready").status_code == 503
        assert server.until(lambda: "with exit code -9" in caplog.text)
        assert server.metric('apd_requests_total{route="/v1/completions",status="500"}') == 2


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (unloadable, ValueError, "^`drafter` must be something, got nothing. Give it.$"),
        (unspeakable, RuntimeError, "Unspeakable: no weights"),
        (dying, RuntimeError, "ended while it was loading, with exit code 7"),
    ],
)
def test_what_happens_while_it_loads_is_told(
    load: Callable[[], APDSampler], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught, EngineProcess(load, max_rows=1) as engine:
        engine.loaded()
    assert not engine.process.is_alive()
    assert load is dying or f"in {load.__name__}" in str(caught.value.__cause__)  # where it happened


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked here")
def test_an_interrupt_while_it_starts_is_the_servers() -> None:
    with pytest.raises(ValueError, match="Give it"), EngineProcess(unloadable, max_rows=1) as engine:
        os.kill(engine.process.pid or 0, signal.SIGINT)
        engine.loaded()


def test_it_ends_also_where_the_wait_for_its_end_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    engine = EngineProcess(unloadable, max_rows=1)
    engine.is_loaded = True
    monkeypatch.setattr(engine.process, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.stop()
    assert not engine.process.is_alive()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_it_ends_with_the_server_however_that_ends() -> None:
    with process() as (server, url):
        children = [int(each) for each in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]
        names = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        (engine,) = (pid for pid, name in names.items() if "spawn_main" in name)
        for number in (signal.SIGINT, signal.SIGTERM):  # as a terminal and systemd send them to all of a group
            os.kill(engine, number)
        assert httpx.post(f"{url}/completions", json={"prompt": PROMPT}, timeout=30).status_code == 200
        server.kill()
        server.wait()
    end = time.monotonic() + 20
    while Path(f"/proc/{engine}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{engine}").exists()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_and_says_so() -> None:
    long = {"prompt": PROMPT, "strategy": "left-to-right:1", "max_tokens": 450, "logit_bias": {"1": -100}, "n": 8}
    with process() as (server, url), ThreadPoolExecutor() as pool:
        asked = [pool.submit(httpx.post, f"{url}/completions", json=long, timeout=60) for _ in range(5)]
        time.sleep(0.5)
        for _ in range(2):
            server.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert server.wait(20) == 0 and server.stderr is not None
        said = server.stderr.read()
        assert {error_of(each.result())["code"] for each in asked} == {"draining"}
        assert '"cut_off": 5' in said and "Traceback" not in said


def test_an_error_is_the_same_on_the_other_side() -> None:
    error = APIError(429, "The queue is full.", param="n", code="queue_full", retry_after=3)
    other = pickle.loads(pickle.dumps(error))
    assert (str(other), other.body, other.retry_after) == (str(error), error.body, 3) and other.status == 429


def test_the_engine_knows_nothing_of_http() -> None:
    """Its process imports no web framework, so that it starts sooner."""
    files = sorted((ROOT / "apd/serve/engine").glob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] not in ("fastapi", "starlette", "uvicorn", "pydantic"), path
                assert not name.startswith("apd.serve") or name.startswith("apd.serve.engine"), path
    assert len(files) > 5


def test_the_server_starts_the_engine_before_it_imports_torch() -> None:
    code = "import sys, apd.cli.serve; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
