"""`POST /watch` and the page's own text: what the browser test needs no browser for."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from paths import ROOT

from apd import EXAMPLE_PROMPTS, APDSampler, mix_seed
from apd.show.tokens import speller

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
from fastapi.testclient import TestClient

from apd.serve import watch
from apd.serve.app import make_app
from apd.serve.engine import steps
from apd.serve.settings import ServeSettings

PROMPT = EXAMPLE_PROMPTS[3]  # a new random order: several steps, and rejected drafts
STRATEGIES = ("apd:R=0.5,correction", "left-to-right:1", "threshold:0.9", "random:3", "checked", "wino:0.6,length=8")


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler.from_included()


@pytest.fixture(scope="module")
def client(sampler: APDSampler) -> Iterator[TestClient]:
    with TestClient(make_app(sampler, ServeSettings(max_new_tokens=32))) as client:
        yield client


def watched(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    answer = client.post("/watch", json={"prompt": PROMPT, **body})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    *events, last, rest = answer.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refused(client: TestClient, **body: Any) -> tuple[int, str]:
    answer = client.post("/watch", json={"prompt": PROMPT, **body})
    return answer.status_code, answer.json()["error"]["message"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_events_are_the_steps_of_the_trace(client: TestClient, sampler: APDSampler, strategy: str) -> None:
    """Positions, texts, rejected drafts and forwards, step by step; the texts spell the answer."""
    inputs = sampler.tokenizer(PROMPT, return_tensors="pt")
    settings = {"strategy": strategy, "max_new_tokens": 32, "seed": mix_seed(5, 0)}  # of the first choice
    output = sampler.generate(**inputs, **settings, return_dict_in_generate=True)
    (row,), decode = output.trace, sampler.tokenizer.decode
    spell, mask = speller(sampler.tokenizer, row.prompt[-1]), sampler.drafter.mask_token_id
    *events, end = watched(client, strategy=strategy, temperature=0, seed=5)

    assert len(events) == len(row.committed)
    assert "".join(end["texts"]) == decode(row.tokens) and end["finish"] == "stop"
    assert end["text"] == decode(row.tokens, skip_special_tokens=True)
    assert end["probs"]["target"] == row.target_probs and end["probs"]["drafter"] == row.drafter_probs
    decided: dict[int, str] = {}
    for k, event in enumerate(events):
        committed = {token["position"]: token["text"] for token in event["tokens"]}
        decided |= committed
        assert [i for i in committed if i < len(row.tokens)] == [i for i, step in enumerate(row.steps) if step == k]
        drafted = dict(enumerate(row.drafts[k], row.starts[k]))
        free = [[i, spell(token)] for i, token in drafted.items() if i not in decided and token != mask]
        assert event["rejected"] == free
        replaced = {token["position"]: token["draft"] for token in event["tokens"] if "draft" in token}
        differing = {i: spell(drafted[i]) for i in committed if i < len(row.tokens) and drafted[i] != row.tokens[i]}
        assert replaced == differing
        assert event["step"] == k
    assert [decided[i] for i in range(len(end["texts"]))] == end["texts"]  # words of this tokenizer need no context
    last = events[-1]
    assert last["length"] == len(row.tokens)
    counts = (last["drafter_forwards"], last["verifier_forwards"], last["canvases"])
    assert counts == tuple(int(n[0]) for n in (output.drafter_forwards, output.verifier_forwards, output.canvases))


def test_the_request_of_the_documentation_is_answered(client: TestClient) -> None:
    (body,) = re.findall(r"/watch -H .*?-d '(.*?)'", (ROOT / "docs/serve-page.md").read_text("utf-8"), flags=re.DOTALL)
    assert watched(client, **json.loads(body))[-1]["done"]


def test_something_is_rejected_and_something_replaced(client: TestClient) -> None:
    """Else the test above would compare nothing with nothing."""
    events = watched(client, strategy="apd:correction", mixture_weight=0.5, temperature=0)[:-1]
    assert any(event["rejected"] for event in events)
    assert any("draft" in token for event in events for token in event["tokens"])


def test_seconds_leave_out_what_passes_between_steps(sampler: APDSampler) -> None:
    """A step takes one second: the clock is read twice. Ten pass whenever an event is looked at."""
    ids, ticks = sampler.tokenizer(PROMPT, return_tensors="pt")["input_ids"], count()
    loop = sampler.loop(sampler.resolver(max_new_tokens=16)(ids, torch.ones_like(ids), 0))
    for event in steps.events(loop, sampler.tokenizer, clock=lambda: next(ticks)):
        for _ in range(10):
            next(ticks)
        assert event["seconds"] == event.get("step", event["drafter_forwards"] - 1) + 1


def test_a_window_is_at_most_the_servers(client: TestClient) -> None:
    assert len(watched(client, window_size=1)) > len(watched(client)) > 1
    narrow = APDSampler.from_included(window_size=4)
    with TestClient(make_app(narrow, ServeSettings(max_new_tokens=32))) as other:
        assert watched(other, window_size=2)
        assert refused(other, window_size=8)[1].startswith("`window_size` must be a number up to 4 here, got 8")
        assert refused(other, window_size="auto")[0] == 400


def test_bad_requests_are_told_before_the_stream(client: TestClient) -> None:
    status, message = refused(client, strategy="treshold:0.9")
    assert status == 400 and "Did you mean `threshold`?" in message
    assert refused(client, mixture_weight=2)[0] == 400
    assert refused(client, window_size=0)[0] == 400
    assert refused(client, prompt="x " * 5000)[0] == 400
    assert "n" in refused(client, n=2)[1]
    assert client.get("/watch").status_code == 405


def test_too_many_are_told_when_to_come_again(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_WATCHED", 0)
    answer = client.post("/watch", json={"prompt": PROMPT})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0


def test_the_page_is_open_and_its_stream_is_not(sampler: APDSampler) -> None:
    with TestClient(make_app(sampler, ServeSettings(api_key="secret"))) as client:
        assert '"needs_key": true' in client.get("/").text
        assert client.post("/watch", json={"prompt": PROMPT}).status_code == 401
        assert client.post("/watch", json={"prompt": PROMPT}, headers={"Authorization": "Bearer secret"}).is_success


def test_there_is_no_page_where_nothing_can_be_compared(sampler: APDSampler) -> None:
    with TestClient(make_app(sampler, ServeSettings(fixed_decoding=True))) as client:
        assert client.get("/").status_code == 404 and client.post("/watch", json={}).status_code == 404


def test_the_page_loads_nothing_and_runs_its_own_script_alone(client: TestClient) -> None:
    answer = client.get("/")
    page, policy = answer.text, answer.headers["content-security-policy"]
    assert not re.search(r"https?:|//\w|\bsrc=|\bhref=\"(?!data:,\")|url\(|@import|\son\w+=|\sstyle=", page)
    for element in ("script", "style"):
        (inline,) = re.findall(rf"<{element}(?: type=.module.)?>(.*?)</{element}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_models_name_cannot_become_markup(sampler: APDSampler) -> None:
    known: dict[str, Any] = {"model": "</script><script>alert(1)</script>", "examples": ["<!--"]}
    page, _ = watch.page(known)
    assert page.count("<script") == 2
    (data,) = re.findall(r'<script type="application/json" id="about">(.*?)</script>', page, flags=re.DOTALL)
    assert json.loads(data) == known
