"""What happens to a request besides its answer: queues, hang-ups, faults of others, keys and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`: pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`: pip install -e '.[serve]'")

import httpx
from poisoned import Poisoned
from serving import ANSWER, PROMPT, Served, error_of

from apd import EXAMPLE_PROMPTS, APDSampler
from apd.cli import main

TEXT = "/v1/completions"
#: Hundreds of steps, unless somebody ends it.
LONG = {"prompt": PROMPT, "strategy": "left-to-right:1", "max_tokens": 450, "logit_bias": {"1": -100}}


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler.from_included()


@pytest.fixture(scope="module")
def served(sampler: APDSampler) -> Iterator[Served]:
    poison = sampler.tokenizer("Kira")["input_ids"][0]
    ill = APDSampler(Poisoned(sampler.drafter, poison), sampler.verifier, sampler.tokenizer)
    with Served(ill, max_batch_size=2, max_queue=2) as server:
        yield server


def test_a_row_that_fails_fails_alone(served: Served) -> None:
    good = {"prompt": PROMPT, "strategy": "left-to-right:1"}
    ill = {"prompt": 'Reverse this list: ["Kira", "Leo"].', "strategy": "left-to-right:1"}
    first, second, third = served.post_all(TEXT, [good, ill, good])
    assert first.json()["choices"][0]["text"] == third.json()["choices"][0]["text"] == ANSWER
    error = error_of(second)
    assert (error["status"], error["type"], error["code"]) == (500, "server_error", "invalid_logits")
    assert "NaN" in error["message"]
    assert served.complete()["choices"][0]["text"] == ANSWER  # the server goes on


@pytest.mark.parametrize("stream", [False, True])
def test_a_hang_up_frees_its_row(served: Served, stream: bool) -> None:
    before = served.metric('apd_rows_total{reason="cancelled"}')
    served.hang_up(TEXT, {**LONG, "stream": stream}, when=lambda: bool(served.engine.places))
    assert served.until(lambda: not served.engine.places)
    assert served.metric('apd_rows_total{reason="cancelled"}') == before + 1
    assert served.complete()["choices"][0]["text"] == ANSWER


def test_a_full_queue_says_when_to_come_back(served: Served) -> None:
    """Two rows run, two wait; the fifth is turned away, and the others are not disturbed."""
    bodies: list[dict[str, Any]] = [{**LONG, "max_tokens": 20}] * 5
    responses = served.post_all(TEXT, bodies)
    assert sorted(response.status_code for response in responses) == [200, 200, 200, 200, 429]
    full = next(response for response in responses if response.status_code == 429)
    assert error_of(full)["code"] == "queue_full" and int(full.headers["retry-after"]) >= 1
    assert len({response.json()["choices"][0]["text"] for response in responses if response.status_code == 200}) == 1


def test_an_answer_does_not_depend_on_who_else_is_served(sampler: APDSampler) -> None:
    """Mixed sampling, lengths, strategies and seeds at once, against each request alone."""
    bodies = [
        {
            "prompt": EXAMPLE_PROMPTS[i % len(EXAMPLE_PROMPTS)],
            "max_tokens": (5, 32, 12)[i % 3],
            "temperature": (0, 0.7, 1.3, 1.3)[i % 4],
            "seed": i,
            **({"strategy": "threshold:0.9"} if i % 5 == 0 else {"mixture_weight": 0.8} if i % 5 == 1 else {}),
        }
        for i in range(16)
    ]
    with Served(sampler, max_batch_size=5) as server:
        together = server.post_all(TEXT, bodies)
        for body, response in zip(bodies, together, strict=True):
            assert response.json()["choices"] == server.post(TEXT, body).json()["choices"]
        assert server.metric("apd_running_rows") == server.metric("apd_queue_rows") == 0
        assert server.metric("apd_tokens_per_forward_count") == 2 * len(bodies)
        assert server.metric("apd_first_token_seconds_count") == 2 * len(bodies)


def test_keys_bodies_routes_and_draining(sampler: APDSampler) -> None:
    with Served(sampler, api_key="secret", max_body=2000, request_timeout=0.3, fixed_decoding=True) as server:
        key = {"Authorization": "Bearer secret"}
        for headers, code in (({}, "missing_api_key"), ({"Authorization": "Bearer secre"}, "invalid_api_key")):
            error = error_of(server.post(TEXT, {"prompt": PROMPT}, headers=headers))
            assert (error["status"], error["code"]) == (401, code) and "secre" not in error["message"]
        assert server.post(TEXT, {"prompt": PROMPT}, headers=key).status_code == 200
        large = server.post(TEXT, {"prompt": PROMPT * 100}, headers=key)
        assert error_of(large)["status"] == 413
        broken = server.run(
            server.client.post(TEXT, content=b'{"prompt":', headers={**key, "Content-Type": "application/json"})
        )
        assert error_of(broken)["code"] == "invalid_json" and broken.status_code == 400
        assert error_of(server.get("/v1/nothing", headers=key))["status"] == 404
        assert error_of(server.get(TEXT, headers=key))["status"] == 405
        assert error_of(server.post(TEXT, LONG, headers=key))["param"] == "strategy"
        late = server.post(
            TEXT, {**{k: v for k, v in LONG.items() if k != "strategy"}, "echo": True, "logprobs": 1}, headers=key
        )
        assert (error_of(late)["status"], error_of(late)["code"]) == (504, "timeout")
        assert [model["id"] for model in server.get("/v1/models", headers=key).json()["data"]] == ["apd"]
        assert server.get("/v1/models/apd", headers=key).json()["object"] == "model"
        assert server.get("/ready").status_code == server.get("/health").status_code == 200
        server.dispatcher.drain()
        assert (server.get("/ready").status_code, server.get("/health").status_code) == (503, 200)
        turned_away = server.post(TEXT, {"prompt": PROMPT}, headers=key)
        assert error_of(turned_away)["status"] == 503 and turned_away.headers["connection"] == "close"
        assert "secret" not in repr(server.app.state.settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-queue", "-1"], "--max-queue must be at least 0"),
        (["--max-batch-size", "0"], "--max-batch-size must be at least 1"),
        (["--request-timeout", "0"], "--request-timeout must be above 0"),
        (["--api-key-env", "APD_NO_SUCH_KEY"], "APD_NO_SUCH_KEY, which is not set"),
        (["--temperature", "0.5"], "without --do-sample"),
        (["--api-key-env", ""], "--api-key-env must name a variable"),
        (["--cors-origin", "https://example.org/"], "without a path, got 'https://example.org/'"),
        (["--cors-origin", ""], "--cors-origin must be"),
    ],
)
def test_options_are_refused_before_weights_are_read(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--drafter", "nowhere", "--verifier", "nowhere", *options]) == 2
    assert message in capsys.readouterr().err


def test_what_the_engine_finds_wrong_is_told_before_more_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing:
        def __init__(self, load: Any, **_: Any) -> None:
            self.loaded = load

        def __enter__(self) -> Refusing:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("apd.cli.serve.EngineProcess", Refusing)
    monkeypatch.setattr("apd.cli.serve.settle_new_tokens", lambda _: pytest.fail("read"))
    assert main(["serve", "--port", "0", "--drafter", "nowhere"]) == 2
    assert "--drafter needs --verifier" in capsys.readouterr().err


def test_what_is_cut_off_is_told(served: Served) -> None:
    """As at the end of the time to drain, or at a second signal."""

    async def cut_off_meanwhile() -> tuple[httpx.Response, httpx.Response]:
        asked = [
            asyncio.ensure_future(served.client.post(TEXT, json={**LONG, "stream": each})) for each in (True, False)
        ]
        while len(served.engine.places) < 2:
            await asyncio.sleep(0.005)
        served.dispatcher.cut_off()
        return await asked[0], await asked[1]

    before = served.dispatcher.num_cut_off
    streamed, whole = served.run(cut_off_meanwhile())
    assert (whole.status_code, error_of(whole)["code"]) == (503, "draining")
    assert streamed.status_code == 503 or (
        '"draining"' in streamed.text and streamed.text.endswith("data: [DONE]\n\n")
    )
    assert served.dispatcher.num_cut_off == before + 2 and served.until(lambda: served.is_idle)
    assert served.complete()["choices"][0]["text"] == ANSWER


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"strategy": "checked:K=1000000000/confidence:1"}, "invalid_value"),
        ({"strategy": "checked:breadth=1000000/confidence:1"}, "invalid_value"),
        ({"strategy": f"left-to-right:{10**20}"}, "invalid_value"),
        ({"prompt": [[5]] * 100, "n": 20}, None),
        ({"prompt": [-5], "echo": True}, "invalid_value"),
        ({"prompt": [2**40]}, "invalid_value"),
        ({"suffix": " b", "max_tokens": 10**9}, None),
        ({"logit_bias": {"9" * 5000: 1}}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_request_that_would_keep_everyone_waiting_is_refused_at_once(
    served: Served, body: dict[str, Any], code: str | None
) -> None:
    error = error_of(served.post(TEXT, {"prompt": PROMPT, **body}))
    assert error["status"] == 400 and (code is None or error["code"] == code), error
    assert served.until(lambda: served.is_idle) and served.complete()["choices"][0]["text"] == ANSWER


def test_a_stop_string_in_an_echoed_answer_ends_it(served: Served) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "stop": ["Leo"], "strategy": "left-to-right:1"}
    choice = served.post(TEXT, body).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == PROMPT + ' ["Zoe", "'
    assert served.until(lambda: served.is_idle)


def test_work_that_cannot_begin_and_rows_that_cannot_leave_fail_alone(
    sampler: APDSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with Served(sampler) as server:
        with monkeypatch.context() as patch:
            patch.setattr(type(sampler.drafter), "open", broken)
            assert error_of(server.post("/watch", {"prompt": PROMPT}))["status"] == 500
            assert error_of(server.post(TEXT, {"prompt": PROMPT}))["status"] == 500
        with monkeypatch.context() as patch:
            patch.setattr("apd.generation.batch.Batch.cancel", broken)
            server.hang_up(TEXT, LONG, when=lambda: bool(server.engine.places))
            assert server.until(lambda: server.is_idle)
        assert server.engine.is_alive and server.complete()["choices"][0]["text"] == ANSWER


def test_a_fault_of_the_server_itself_is_counted(sampler: APDSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a fault")

    with Served(sampler) as server:
        monkeypatch.setattr(server.app.state.planner, "completion", broken)
        with pytest.raises(RuntimeError):  # the client without a socket sees the exception itself
            server.post(TEXT, {"prompt": PROMPT})
        assert server.metric('apd_requests_total{route="/v1/completions",status="500"}') == 1


class Panic(BaseException):
    """As packages in Rust raise it: no `Exception`."""


def test_a_check_that_panics_is_answered(sampler: APDSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise Panic("a fault")

    with Served(sampler) as server:
        with monkeypatch.context() as patch:
            patch.setattr(server.engine.resolvers, "prepared", broken)
            for wanted in ("text", "json_object"):  # the latter is checked in a thread of its own
                assert server.refusal("/v1/chat/completions", response_format={"type": wanted})["status"] == 500
        assert server.is_idle and server.complete()["choices"][0]["text"] == ANSWER


@pytest.mark.parametrize("fault", [RuntimeError, Panic])
def test_a_decoding_loop_that_has_ended_says_so(
    sampler: APDSampler, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    def broken(*_: Any) -> None:
        raise fault("a fault")

    with Served(sampler) as server:
        monkeypatch.setattr(server.engine.metrics.steps, "inc", broken)
        for _ in range(2):  # one that is being decoded, and one that comes too late
            error = error_of(server.post(TEXT, {"prompt": PROMPT}))
            assert (error["status"], error["code"]) == (500, "engine_failed") and "log" in error["message"]
        assert server.until(lambda: not server.engine.is_alive)
        for route in ("/health", "/ready"):
            assert (server.get(route).status_code, server.get(route).json()["status"]) == (
                503,
                "the engine has ended",
            )


def test_a_row_that_fails_where_none_can_leave_ends_no_more_than_its_batch(
    sampler: APDSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    poison = sampler.tokenizer("Kira")["input_ids"][0]
    ill = APDSampler(Poisoned(sampler.drafter, poison), sampler.verifier, sampler.tokenizer)
    with Served(ill) as server:
        with monkeypatch.context() as patch:
            patch.setattr("apd.generation.batch.Batch.cancel", broken)
            assert error_of(server.post(TEXT, {"prompt": 'Reverse this list: ["Kira", "Leo"].'}))["status"] == 500
        assert server.complete()["choices"][0]["text"] == ANSWER
