"""`apd serve` in replicas, with ray[serve]: python examples/ray_serve.py

Each has the models, and a GPU if there is one. --ask sends prompts and ends.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import torch

from apd import EXAMPLE_PROMPTS, APDSampler
from apd.serve.app import make_app
from apd.serve.settings import ServeSettings


def build():
    """What each replica serves; it also says its name with every answer."""
    import ray.serve

    app = make_app(APDSampler.from_included(), ServeSettings(max_new_tokens=32))  # or APDSampler.from_pretrained(...)
    replica = ray.serve.get_replica_context().replica_id.unique_id.encode()

    async def named(scope, receive, send):
        async def tell(message):
            message.get("headers", []).append((b"x-replica", replica))
            await send(message)

        await app(scope, receive, tell)

    return named


def ask(port: int, prompt: str) -> str:
    start, body = time.perf_counter(), {"prompt": prompt, "stream": True}
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as answer:
        times = [time.perf_counter() - start for line in answer.iter_lines() if line.startswith("data: {")]
    return f"replica {answer.headers['x-replica']}: {len(times)} chunks from {times[0]:.2f} to {times[-1]:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1, help="replicas at first, and the fewest")
    parser.add_argument("--most", type=int, default=4, help="the most; Ray adds some while requests wait")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--ask", action="store_true", help="send some prompts, then end")
    given = parser.parse_args()
    import ray.serve  # here: the help can be read without it

    ray.init(include_dashboard=False, log_to_driver=False)
    ray.serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    deployment = ray.serve.deployment(
        max_ongoing_requests=72,  # the rows of a batch, and those that may wait: more would get status 429
        autoscaling_config={"min_replicas": given.replicas, "max_replicas": given.most, "target_ongoing_requests": 8},
        ray_actor_options={"num_gpus": 1} if torch.cuda.is_available() else {"num_cpus": 1},
    )
    ray.serve.run(deployment(ray.serve.ingress(build)()).bind(), blocking=not given.ask)
    with ThreadPoolExecutor(8) as pool:
        print(*pool.map(ask, [given.port] * 24, EXAMPLE_PROMPTS * 2), sep="\n")


if __name__ == "__main__":
    main()
