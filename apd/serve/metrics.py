"""What `GET /metrics` shows of the server, in Prometheus' format; the engine has `apd.serve.engine.metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest


class ServerMetrics:
    """What a server counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # CPU seconds and memory of the process
        self.requests = Counter("apd_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.hang_ups = Counter("apd_hang_ups", "Requests whose client went away.", registry=registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
