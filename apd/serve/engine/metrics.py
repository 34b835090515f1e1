"""What `GET /metrics` shows of the engine, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from apd.generation.batch import Generated

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_TOKENS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """What an engine counts, in a registry of its own.

    Args:
        process: where the engine has a process of its own, what the names of its CPU seconds and memory begin with.
    """

    def __init__(self, process: str | None = None) -> None:
        self.registry = registry = CollectorRegistry()
        if process is not None:
            ProcessCollector(namespace=process, registry=registry)
        self.waiting = Gauge("apd_queue_rows", "Rows that wait for a free place.", registry=registry)
        self.running = Gauge("apd_running_rows", "Rows that are being decoded.", registry=registry)
        self.batches = Gauge("apd_running_batches", "Batches: rows of equal settings share one.", registry=registry)
        self.rows = Counter("apd_rows", "Rows that ended.", ["reason"], registry=registry)
        self.tokens = Counter("apd_tokens", "New tokens of rows that ended.", registry=registry)
        self.drafter_forwards = Counter(
            "apd_drafter_forwards", "Drafter forwards of rows that ended, counted for each row.", registry=registry
        )
        self.verifier_forwards = Counter(
            "apd_verifier_forwards", "Verifier forwards of rows that ended, counted for each row.", registry=registry
        )
        self.cpu = Gauge("apd_decoding_cpu_seconds", "CPU time of the decoding thread.", registry=registry)
        self.steps = Counter("apd_steps", "Decode steps of batches.", registry=registry)
        self.rows_of_step = Counter("apd_step_rows", "Rows of these steps.", registry=registry)
        self.tokens_per_forward = Histogram(
            "apd_tokens_per_forward", "Tokens per drafter forward of a row.", buckets=_TOKENS, registry=registry
        )
        self.first_token = Histogram(
            "apd_first_token_seconds",
            "From a request's arrival to a row's first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "apd_between_tokens_seconds",
            "Time per token of each commit behind a row's first.",
            buckets=_PER_TOKEN,
            registry=registry,
        )
        self.whole = Histogram(
            "apd_request_seconds", "From a row's arrival to its end.", buckets=_SECONDS, registry=registry
        )

    def count(self, answer: Generated, seconds: float) -> None:
        """Count a row that has ended, so many seconds after it arrived."""
        self.rows.labels(answer.finish).inc()
        self.tokens.inc(len(answer.tokens))
        self.drafter_forwards.inc(answer.drafter_forwards)
        self.verifier_forwards.inc(answer.verifier_forwards)
        self.tokens_per_forward.observe(answer.tokens_per_forward)
        self.whole.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
