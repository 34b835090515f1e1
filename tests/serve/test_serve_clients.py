"""What people use: the official client, langchain, lm-eval, curl, a second server, and README's three commands."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`: pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="needs the extra `serve`: pip install -e '.[serve]'")
pytest.importorskip("openai", reason="needs the extra `test`: pip install -e '.[test]'")

import httpx
import openai
from paths import ROOT
from pydantic import BaseModel
from serving import ANSWER, PROMPT, Served, process
from tongues import CHAT as TEMPLATE
from tongues import random_lm, tokenizer_of

from apd import APDSampler
from apd.integrations.scoring import sequential_logprobs

pytestmark = pytest.mark.slow

USER = [{"role": "user", "content": PROMPT}]
#: Hundreds of steps, unless somebody ends it.
LONG: dict[str, Any] = {"max_tokens": 450, "logit_bias": {"1": -100}, "extra_body": {"strategy": "left-to-right:1"}}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with process(SECRET="key") as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


@contextmanager
def listening(sampler: APDSampler) -> Iterator[str]:
    """The server of a sampler on a free port, in this process; yields its address."""
    import uvicorn

    from apd.serve.app import make_app
    from apd.serve.settings import ServeSettings

    app = make_app(sampler, ServeSettings(max_new_tokens=48))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def test_the_official_client_whole_streamed_and_refused(client: Any) -> None:
    answer = client.chat.completions.create(model="apd", messages=USER, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == ANSWER and answer.usage.apd["drafter_forwards"] >= 1
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == answer.choices[0].logprobs.content[0].token
    assert client.completions.create(model="apd", prompt=PROMPT, n=2).choices[1].text == ANSWER
    stream = client.chat.completions.create(
        model="apd", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["apd"]
    careful = client.completions.create(model="apd", prompt=PROMPT, extra_body={"acceptance_threshold": 1.0})
    assert careful.choices[0].text == ANSWER
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=USER)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="apd", messages=USER, tools=[{"type": "function", "function": {"name": "f"}}]
        )


def test_the_async_client_and_one_that_is_cancelled_in_the_middle(url: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            answers = [client.completions.create(model="apd", prompt=PROMPT, temperature=1, seed=i) for i in range(4)]
            texts = [answer.choices[0].text for answer in await asyncio.gather(*answers)]
            whole = asyncio.create_task(client.completions.create(model="apd", prompt=PROMPT, **LONG))
            stream = await client.completions.create(model="apd", prompt=PROMPT, stream=True, **LONG)
            async for _ in stream:
                break
            await stream.close()
            whole.cancel()
            return texts

    texts = asyncio.run(ask())
    assert len(texts) == 4

    def rows() -> float:
        text = httpx.get(url.removesuffix("/v1") + "/metrics").text
        return float(re.findall(r"^apd_running_rows (\S+)$", text, re.MULTILINE)[0])

    end = time.monotonic() + 10
    while rows() and time.monotonic() < end:
        time.sleep(0.05)
    assert rows() == 0


def test_structured_output_parses_into_a_model_of_pydantic() -> None:
    pytest.importorskip("llguidance", reason="needs the extra `grammar`: pip install -e '.[grammar]'")

    class Fox(BaseModel):
        colour: Literal["brown", "red"]
        legs: Literal[4]

    tokenizer = tokenizer_of("byte_bpe")
    sampler = APDSampler(random_lm("byte_bpe", is_causal=False), random_lm("byte_bpe"), tokenizer, spec="dream")
    with listening(sampler) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        for seed in range(2):
            answer = client.chat.completions.parse(
                model="apd",
                messages=[{"role": "user", "content": "the quick fox"}],
                response_format=Fox,
                max_tokens=100,
                temperature=1,
                seed=seed,
            )
            assert answer.choices[0].finish_reason == "stop"
            assert answer.choices[0].message.parsed.legs == 4


def test_langchain(url: str) -> None:
    chat_models = pytest.importorskip(
        "langchain_openai", reason="needs the extra `clients`: pip install -e '.[clients]'"
    )
    model = chat_models.ChatOpenAI(base_url=url, api_key="none", model="apd", temperature=0)
    assert model.invoke(PROMPT).content == ANSWER
    assert "".join(chunk.content for chunk in model.stream(PROMPT)) == ANSWER


def test_curl(url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"prompt": PROMPT, "stream": True, "max_tokens": 3})
    command = ["curl", "-sN", f"{url}/completions", "-H", "Content-Type: application/json", "-d", body]
    *events, done, _ = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert done == "data: [DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "length"
    refused = subprocess.run([*command[:-1], "{"], capture_output=True, text=True, check=True).stdout
    assert json.loads(refused)["error"]["code"] == "invalid_json"


def test_lm_eval_generates_and_scores_over_http(url: str, tmp_path: Path) -> None:
    models = pytest.importorskip("lm_eval.models.openai_completions", reason="needs lm-eval: pip install -e '.[test]'")
    from lm_eval.api.instance import Instance

    sampler = APDSampler.from_included()
    sampler.tokenizer.save_pretrained(tmp_path)

    def instances(kind: Any, *arguments: Any) -> list[Any]:
        return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]

    local = models.LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model="apd",
        tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
        add_bos_token=False,
    )
    assert local.generate_until(instances("generate_until", (PROMPT, {"until": ["Mia"], "max_gen_toks": 16}))) == [
        ANSWER[: ANSWER.index("Mia")]
    ]
    pairs = [(PROMPT, ANSWER), (PROMPT, ' ["Zoe", "Mia"]')]
    found = local.loglikelihood(instances("loglikelihood", *pairs))
    ids = [tuple(sampler.tokenizer(text)["input_ids"] for text in pair) for pair in pairs]
    scores = sequential_logprobs(sampler.drafter, ids, vocab_size=sampler.vocab_size, batch_size=8)
    for i, expected, is_greedy, _ in scores:
        assert found[i][0] == pytest.approx(expected, abs=1e-3) and found[i][1] == is_greedy
    chat = models.LocalChatCompletion(base_url=f"{url}/chat/completions", model="apd")
    rendered = chat.apply_chat_template(USER) if hasattr(chat, "apply_chat_template") else json.dumps(USER)
    from lm_eval.models.api_models import JsonChatStr

    rendered = rendered if isinstance(rendered, JsonChatStr) else JsonChatStr(json.dumps(USER))
    assert chat.generate_until(instances("generate_until", (rendered, {"until": [], "max_gen_toks": 32}))) == [ANSWER]


def test_sigterm_lets_a_running_answer_end_and_turns_others_away() -> None:
    with process("--api-key-env", "SECRET", SECRET="key") as (server, url):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        client = openai.OpenAI(base_url=url, api_key="key", max_retries=0)
        more = {**LONG, "max_tokens": 60}
        stream = client.completions.create(model="apd", prompt=PROMPT, stream=True, **more)
        next(stream)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            client.completions.create(model="apd", prompt=PROMPT)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert server.wait(30) == 0
        assert server.stderr is not None and '"cut_off": 0' in server.stderr.read()


def test_readme_serves_and_asks_in_three_commands(url: str) -> None:
    """The server of these tests stands for its first command: port 8000 of this machine may be taken."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert '```sh\npip install -q ".[serve]" && apd serve\n```' in readme
    [block] = re.findall(r"^```py\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert len(block.split("\n\n")) + block.split("\n\n")[1].strip().count("\n") == 3
    code = block.replace("http://127.0.0.1:8000/v1", url)
    assert code != block
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == ANSWER + "\n"


def test_one_clients_requests_to_this_server_and_to_that_of_transformers(tmp_path: Path) -> None:
    """With the verifier decoding alone, both are one model: the texts are equal. docs/serve.md lists where they differ."""
    import os

    from transformers import AutoTokenizer

    model = random_lm("byte_bpe")
    model.save_pretrained(tmp_path)
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    tokenizer.chat_template = None
    drafter, read = random_lm("byte_bpe", is_causal=False), AutoTokenizer.from_pretrained(tmp_path)
    sampler = APDSampler(drafter, model, read, spec="dream", strategy="autoregressive")
    command = [
        Path(sys.executable).parent / "transformers",
        "serve",
        str(tmp_path),
        "--device",
        "cpu",
        "--port",
        "8197",
    ]
    theirs = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ})
    try:
        url = "http://127.0.0.1:8197"
        end = time.monotonic() + 90
        while time.monotonic() < end:
            try:
                httpx.get(f"{url}/health", timeout=2)
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        said = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 12, "temperature": 0}

        def ask(more: dict[str, Any]) -> httpx.Response:
            return httpx.post(f"{url}/v1/chat/completions", json={"model": str(tmp_path), **said, **more}, timeout=60)

        with Served(sampler, model_name=str(tmp_path)) as mine:
            whole, other = mine.chat(*said["messages"], max_tokens=12, temperature=0), ask({}).json()
            ours, its = whole["choices"][0], other["choices"][0]
            # Theirs repeats the prompt with this tokenizer, and shows stop tokens and the bytes of a cut character.
            text = its["message"]["content"].rpartition("<|assistant|>")[2].removesuffix("<eos>").rstrip("\ufffd")
            assert text == ours["message"]["content"] and len(text) > 5
            assert its["finish_reason"] == ours["finish_reason"]
            assert other["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
            # Where they differ.
            assert len(ask({"n": 2}).json()["choices"]) == 1 and len(mine.chat(n=2)["choices"]) == 2
            assert "logprobs" not in ask({"logprobs": True}).json()["choices"][0]
            assert (ask({"surprise": 1}).status_code, mine.refusal(surprise=1)["status"]) == (422, 400)
            assert "error" not in ask({"surprise": 1}).json()
    finally:
        theirs.terminate()
        theirs.wait()
