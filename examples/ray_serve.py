"""`apd serve` in many replicas behind one address, with Ray Serve: pip install "ray[serve]", then python examples/ray_serve.py

Each replica has the models, and a GPU if there is one. Ray adds replicas while requests wait. --ask sends some and ends.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import ray
import torch
from ray import serve

from apd import EXAMPLE_PROMPTS, APDSampler
from apd.serve.app import make_app
from apd.serve.settings import ServeSettings


def build():
    """What each replica serves; it also says its name with every answer."""
    app = make_app(APDSampler.from_included(), ServeSettings(max_new_tokens=32))  # or APDSampler.from_pretrained(...)
    replica = serve.get_replica_context().replica_id.unique_id.encode()

    async def named(scope, receive, send):
        async def tell(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-replica", replica)]
            await send(message)

        await app(scope, receive, tell)

    return named


def ask(port: int, prompt: str) -> str:
    start = time.perf_counter()
    body, url = {"prompt": prompt, "stream": True}, f"http://127.0.0.1:{port}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        times = [time.perf_counter() - start for line in answer.iter_lines() if line.startswith("data: {")]
    return f"replica {answer.headers['x-replica']}: {len(times)} chunks from {times[0]:.2f} to {times[-1]:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1, help="replicas at first, and the fewest")
    parser.add_argument("--most", type=int, default=4, help="the most replicas")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--ask", action="store_true", help="send some prompts, then end")
    given = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    deployment = serve.deployment(
        max_ongoing_requests=72,  # the rows of a batch, and those that may wait: more would get status 429
        autoscaling_config={"min_replicas": given.replicas, "max_replicas": given.most, "target_ongoing_requests": 8},
        ray_actor_options={"num_gpus": 1} if torch.cuda.is_available() else {"num_cpus": 1},
    )
    serve.run(deployment(serve.ingress(build)()).bind(), blocking=not given.ask)
    with ThreadPoolExecutor(8) as pool:
        print(*pool.map(ask, [given.port] * 24, EXAMPLE_PROMPTS * 2), sep="\n")


if __name__ == "__main__":
    main()
