r"""`apd serve` under load, on this machine alone: is every answer right, and what does serving cost?

    python -m benchmarks.serve
    python -m benchmarks.serve --requests 200 --clients 16 --batch-sizes 8

The included pair answers held-out instances of its tasks, over 127.0.0.1. Everything ends by itself, at the latest after
`--limit` seconds.

1. *Load*: `--clients` clients send `--requests` requests, whole and streamed, greedy and sampled, with limits of 4 to 32 new tokens.
   One in twenty hangs up, half of these at once and half at the first chunk. Every other answer is compared with that of
   `generate` for its prompt alone.
2. *SIGTERM* in the middle of a load: what was accepted must be answered, and the exit code is 0.
3. *Speed*: whole answers of 32 new tokens for each depth of the drafter and each batch size. The server and `generate_many`, in
   this process, answer the same prompts with the same batch size by turns, since machines are noisy. A deeper drafter has
   layers that add nothing: its answers stay what they are, and a step takes longer, so that one sees what HTTP costs beside a
   larger model. `first token` is measured by the server, from a request's arrival, its wait in the queue included. `ratio` is
   the server's tokens per second over those of `generate_many`, the median of the rounds; whatever else runs on the machine
   counts, the client and the server's HTTP included. `in one process` is that of a server that decodes in the process of its
   HTTP, as `make_app` does in other programs. `CPU ms per token` is the CPU time of the engine's process, and of
   `generate_many`, which is the fairer comparison on a busy machine; HTTP, JSON and tokenizing are in a process of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from apd.cli.settings import keep_memory
from apd.decoding.noise import mix_seed
from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.included.tasks import TASKS, instances
from apd.sampler import APDSampler

MODEL = "apd"


@dataclass(frozen=True)
class Asked:
    """One request: how it is sent, and what becomes of it."""

    prompt: str
    max_tokens: int
    stream: bool
    temperature: float
    seed: int
    hangs_up: str  # "", "at once" or "at a chunk"

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "seed": self.seed,
        }


@dataclass
class Load:
    """What a load has brought."""

    texts: dict[int, list[str]] = field(default_factory=dict)  # answers, by request: more than one would be a double
    finishes: dict[int, str | None] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0


def requests_of(count: int, seed: int, *, ragged: bool) -> list[Asked]:
    """Held-out instances of all tasks in turn, with the settings of each request."""
    draw = random.Random(seed)
    per_task = -(-count // len(TASKS))
    by_task = [instances(task, per_task, seed + 1000) for task in TASKS]
    prompts = [instance.prompt for several in zip(*by_task, strict=True) for instance in several][:count]
    found = []
    for i, prompt in enumerate(prompts):
        if ragged:
            hangs_up = draw.choice(("at once", "at a chunk")) if draw.random() < 0.05 else ""
            stream = draw.random() < 0.5 or hangs_up == "at a chunk"
            found.append(Asked(prompt, draw.choice((4, 8, 16, 32)), stream, draw.choice((0.0, 0.0, 0.7)), i, hangs_up))
        else:
            found.append(Asked(prompt, 32, False, 0.0, i, ""))
    return found


def deeper(layers: int, folder: Path) -> Path:
    """A copy of the included drafter with this many layers; those behind its own add nothing to their input."""
    config = json.loads((DRAFTER_DIR / "config.json").read_text("utf-8"))
    own = config["num_hidden_layers"]
    if layers == own:
        return DRAFTER_DIR
    if layers < own:
        raise ValueError(f"`--layers` must be at least {own}, the drafter's own, got {layers}.")
    shutil.copytree(DRAFTER_DIR, folder)
    weights = load_file(folder / "model.safetensors")
    start = f"model.layers.{own - 1}."
    for name, tensor in [(name, tensor) for name, tensor in weights.items() if name.startswith(start)]:
        adds_nothing = name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))
        for layer in range(own, layers):
            copied = torch.zeros_like(tensor) if adds_nothing else tensor.clone()
            weights[name.replace(start, f"model.layers.{layer}.")] = copied
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed = config | {"num_hidden_layers": layers, "max_window_layers": layers}
    (folder / "config.json").write_text(json.dumps(changed), "utf-8")
    return folder


#: A server that decodes in its own process, as programs do that use `make_app`.
_IN_ONE_PROCESS = """
import json, sys, torch, uvicorn
from apd import APDSampler
from apd.cli.listening import bound
from apd.cli.settings import keep_memory
from apd.serve.app import make_app
from apd.serve.settings import ServeSettings
drafter, verifier, model, size, queue = sys.argv[1:]
torch.set_num_threads(1)
keep_memory()
settings = ServeSettings(model_name=model, max_batch_size=int(size), max_queue=int(queue), max_new_tokens=32)
app = make_app(APDSampler.from_pretrained(drafter, verifier), settings)
sockets = bound("127.0.0.1", 0)
url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/v1"
print("serving", json.dumps({"url": url}), file=sys.stderr, flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=75)).run(sockets)
"""


@contextmanager
def server(
    size: int, queue: int, *, drafter: Path = DRAFTER_DIR, in_one_process: bool = False
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of a drafter and the included verifier on a free port; yields the process and its address."""
    if in_one_process:
        command = [
            sys.executable,
            "-c",
            _IN_ONE_PROCESS,
            str(drafter),
            str(VERIFIER_DIR),
            MODEL,
            str(size),
            str(queue),
        ]
    else:
        command = [sys.executable, "-m", "apd", "serve", "--port", "0", "--served-model-name", MODEL]
        command += ["--drafter", str(drafter), "--verifier", str(VERIFIER_DIR), "--max-new-tokens", "32"]
        command += ["--max-batch-size", str(size), "--max-queue", str(queue)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "APD_NUM_THREADS": "1"})
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"serving (\{.*\})", line):
                break
        else:
            raise RuntimeError("the server has not started")
        yield process, json.loads(found[1])["url"]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


async def send(client: httpx.AsyncClient, number: int, asked: Asked, load: Load) -> None:
    """Send one request and keep what comes back."""
    if asked.hangs_up == "at once":
        try:
            await asyncio.wait_for(client.post("/completions", json=asked.body), 0.02)
        except (asyncio.TimeoutError, httpx.HTTPError):
            load.refused["hung up"] += 1
        return
    try:
        if asked.stream:
            await _read_stream(client, number, asked, load)
            return
        response = await client.post("/completions", json=asked.body)
    except httpx.HTTPError as error:
        load.refused[type(error).__name__] += 1
        return
    if response.status_code != 200:
        load.refused[str(response.status_code)] += 1
        return
    answer = response.json()
    _keep(load, number, answer["choices"][0]["text"], answer["choices"][0]["finish_reason"], answer["usage"])


async def _read_stream(client: httpx.AsyncClient, number: int, asked: Asked, load: Load) -> None:
    text, finish, usage = "", None, None
    body = asked.body | {"stream_options": {"include_usage": True}}
    async with client.stream("POST", "/completions", json=body) as response:
        if response.status_code != 200:
            load.refused[str(response.status_code)] += 1
            return
        async for line in response.aiter_lines():
            if asked.hangs_up:
                load.refused["hung up"] += 1
                return
            if line == "data: [DONE]":
                _keep(load, number, text, finish, usage)
            elif line:
                chunk = json.loads(line.removeprefix("data: "))
                for choice in chunk["choices"]:
                    text, finish = text + choice["text"], choice["finish_reason"] or finish
                usage = chunk.get("usage") or usage


def _keep(load: Load, number: int, text: str, finish: str | None, usage: Any) -> None:
    load.texts.setdefault(number, []).append(text)
    load.finishes[number] = finish
    load.tokens += usage["completion_tokens"]
    load.forwards += usage["apd"]["drafter_forwards"]


async def run(url: str, asked: Sequence[Asked], clients: int, *, limit: float, at_half: Any = None) -> Load:
    """Send all requests, each client one after the other.

    Each client has a connection of its own: in a common pool, every request would look at all of them, and the clients would
    take more time than the server.
    """
    load, waiting = Load(), iter(enumerate(asked))

    async def one_client(client: httpx.AsyncClient) -> None:
        for number, each in waiting:
            if at_half is not None and number == len(asked) // 2:
                at_half()
            await send(client, number, each, load)

    async with AsyncExitStack() as stack:
        made = [httpx.AsyncClient(base_url=url, timeout=limit, verify=False) for _ in range(clients)]
        several = [await stack.enter_async_context(client) for client in made]
        start = time.perf_counter()
        await asyncio.wait_for(asyncio.gather(*map(one_client, several)), limit)
        load.seconds = time.perf_counter() - start
    return load


def alone(sampler: APDSampler, asked: Sequence[Asked]) -> list[str]:
    """The text that `generate` gives for each request alone."""
    texts = []
    for each in asked:
        inputs = sampler.tokenizer([each.prompt], return_tensors="pt")
        sampling = {"do_sample": True, "temperature": each.temperature, "top_k": 0} if each.temperature else {}
        ids = sampler.generate(**inputs, max_new_tokens=each.max_tokens, seed=[mix_seed(each.seed, 0)], **sampling)
        texts.append(sampler.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def metrics(url: str) -> str:
    """What the server counts, as Prometheus reads it."""
    return httpx.get(url.removesuffix("/v1") + "/metrics").text


def histogram(url: str, name: str) -> list[tuple[float, float]]:
    """Upper ends of a histogram's buckets, and counts up to there."""
    found = re.findall(rf'^{name}_bucket{{le="([^"]+)"}} (\S+)$', metrics(url), re.MULTILINE)
    return [(float(end), float(count)) for end, count in found]


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """A quantile, on a straight line within its bucket, as Prometheus computes it."""
    wanted, start, below = share * buckets[-1][1], 0.0, 0.0
    for end, count in buckets:
        if count >= wanted:
            return start + (end - start) * (wanted - below) / max(count - below, 1)
        start, below = end, count
    return start


def cpu_seconds(url: str) -> tuple[float, float]:
    """CPU time so far of the engine's process, and of the server's."""
    text = metrics(url)
    decoding, http = (
        float(re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)[0])
        for name in ("apd_engine_process_cpu_seconds_total", "process_cpu_seconds_total")
    )
    return decoding, http


def correctness(sampler: APDSampler, count: int, clients: int, batch_size: int, limit: float) -> Iterator[str]:
    """The lines about the load and SIGTERM."""
    asked = requests_of(count, 0, ragged=True)
    with server(batch_size, clients) as (_, url):
        load = asyncio.run(run(url, asked, clients, limit=limit))
        text = metrics(url)
    wanted = [i for i, each in enumerate(asked) if not each.hangs_up]
    expected = dict(zip(wanted, alone(sampler, [asked[i] for i in wanted]), strict=True))
    lost = [i for i in wanted if i not in load.texts]
    doubled = [i for i, texts in load.texts.items() if len(texts) > 1]
    unequal = [i for i, texts in load.texts.items() if i in expected and texts[0] != expected[i]]
    unended = [i for i, finish in load.finishes.items() if finish not in ("stop", "length")]
    hung_up = sum(bool(each.hangs_up) for each in asked)
    left = re.search(r"^apd_running_rows (\S+)$", text, re.MULTILINE)
    yield (
        f"{len(asked)} requests of {clients} clients in {load.seconds:.0f} s: {len(load.texts)} answered, {hung_up} hung up, "
        f"{len(lost)} lost, {len(doubled)} doubled, {len(unequal)} not equal to `generate` alone, {len(unended)} without a "
        f"reason for their end; refused or hung up: {dict(load.refused)}; rows left in the server: {left[1] if left else '?'}."
    )
    assert not (lost or doubled or unequal or unended), (lost, doubled, unequal, unended)
    yield ""
    yield terminated(requests_of(10 * clients, 1, ragged=False), sampler, clients, batch_size, limit)


def terminated(asked: Sequence[Asked], sampler: APDSampler, clients: int, batch_size: int, limit: float) -> str:
    """The line about SIGTERM in the middle of a load."""
    with server(batch_size, clients) as (process, url):
        load = asyncio.run(run(url, asked, clients, limit=limit, at_half=lambda: process.send_signal(signal.SIGTERM)))
        code = process.wait(60)
        assert process.stderr is not None
        stopped = re.search(r"stopped (\{.*\})", process.stderr.read())
    assert stopped is not None
    jobs = json.loads(stopped[1])
    expected = alone(sampler, [asked[i] for i in load.texts])
    unequal = sum(texts != [wanted] for texts, wanted in zip(load.texts.values(), expected, strict=True))
    answered, turned_away = len(load.texts), sum(load.refused.values())
    assert answered + turned_away == len(asked) and not unequal and code == 0, (load.refused, unequal, code)
    assert jobs == {"jobs": answered, "cut_off": 0}, jobs
    return (
        f"SIGTERM behind half of {len(asked)} requests: {jobs['jobs']} taken by the server, {answered} answered, {unequal} not "
        f"equal, {turned_away} turned away ({dict(load.refused)}); exit code {code}."
    )


_HEAD = (
    *(
        "drafter's layers",
        "batch size",
        "requests/s",
        "first token p50, ms",
        "p95, ms",
        "tokens per forward",
        "tokens/s",
    ),
    *(
        "`generate_many`, tokens/s",
        "ratio (lowest – highest)",
        "in one process",
        "CPU ms per token",
        "`generate_many`",
    ),
    "HTTP, CPU ms per request",
)


def speed(
    count: int, rounds: int, clients: int, depths: Sequence[int], sizes: Sequence[int], limit: float, folder: Path
) -> Iterator[str]:
    """The lines of the table of speeds."""
    asked = requests_of(count, 2, ragged=False)
    yield f"| {' | '.join(_HEAD)} |"
    yield f"| {' | '.join(['--:'] * len(_HEAD))} |"
    for layers, size in itertools.product(depths, sizes):
        drafter = deeper(layers, folder / f"{layers}-{size}")
        sampler = APDSampler.from_pretrained(drafter, VERIFIER_DIR)
        two, one = server(size, clients, drafter=drafter), server(size, clients, drafter=drafter, in_one_process=True)
        with two as (_, url), one as (_, url_of_one):
            for each in (url, url_of_one):  # warm
                asyncio.run(run(each, asked[: 4 * size], clients, limit=limit))
            direct(sampler, asked[:size], size)
            before, served, in_one, many = cpu_seconds(url), [], [], []
            for _ in range(rounds):
                served.append(asyncio.run(run(url, asked, clients, limit=limit)))
                many.append(direct(sampler, asked, size))
                in_one.append(asyncio.run(run(url_of_one, asked, clients, limit=limit)))
            decoding, http = (now - then for now, then in zip(cpu_seconds(url), before, strict=True))
            first = histogram(url, "apd_first_token_seconds")
        speeds, speeds_of_many = ([each.tokens / each.seconds for each in several] for several in (served, many))
        tokens = sum(load.tokens for load in served)
        cells = [
            *(str(layers), str(size), f"{statistics.median(len(asked) / load.seconds for load in served):.1f}"),
            *(f"{1000 * quantile(first, share):.0f}" for share in (0.5, 0.95)),
            f"{tokens / sum(load.forwards for load in served):.2f}",
            f"{statistics.median(speeds):.0f}",
            f"{statistics.median(speeds_of_many):.0f}",
            ratio(speeds, speeds_of_many),
            ratio([load.tokens / load.seconds for load in in_one], speeds_of_many),
            f"{1000 * decoding / tokens:.2f}",
            f"{1000 * sum(each.cpu for each in many) / sum(each.tokens for each in many):.2f}",
            f"{1000 * http / (rounds * len(asked)):.1f}",
        ]
        yield f"| {' | '.join(cells)} |"


def ratio(speeds: Sequence[float], others: Sequence[float]) -> str:
    """The median of what the rounds give, with the lowest and the highest."""
    found = [100 * speed / other for speed, other in zip(speeds, others, strict=True)]
    return f"{statistics.median(found):.0f} % ({min(found):.0f} – {max(found):.0f})"


@dataclass(frozen=True)
class Direct:
    """What `generate_many` took: tokens, and seconds of the clock and of the processor."""

    tokens: int
    seconds: float
    cpu: float


def direct(sampler: APDSampler, asked: Sequence[Asked], size: int) -> Direct:
    """The same prompts without a server."""
    start, cpu = time.perf_counter(), time.process_time()
    answers = sampler.generate_many([each.prompt for each in asked], batch_size=size, max_new_tokens=32)
    tokens = sum(len(answer.tokens) for answer in answers)
    return Direct(tokens, time.perf_counter() - start, time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument(
        "--batch-size", type=int, default=16, help="of the load whose answers are compared (default 16)"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8, 32], help="of the table of speeds")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="*",
        default=[4, 32],
        help="of the drafters of that table (default 4, its own, and 32)",
    )
    parser.add_argument("--speed-requests", type=int, default=150, help="of each round (default 150)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="server and `generate_many` take turns so often (default 5)"
    )
    parser.add_argument(
        "--limit", type=float, default=900, help="seconds after which a load is given up (default 900)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()  # as the server does
    sampler = APDSampler.from_included()
    limit = arguments.limit
    for line in correctness(sampler, arguments.requests, arguments.clients, arguments.batch_size, limit):
        print(line, flush=True)
    print(flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sizes = arguments.layers, arguments.batch_sizes
        for line in speed(arguments.speed_requests, arguments.rounds, arguments.clients, *sizes, limit, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
