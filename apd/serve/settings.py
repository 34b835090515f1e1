"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Knobs that decide what a step costs everyone, so that no request may change them.
FIXED_KNOBS = ("window_size", "kv_window", "kv_refresh")


@dataclass(frozen=True)
class ServeSettings:
    """What a server is started with.

    Attributes:
        model_name: what `GET /v1/models` names, and what requests ask for.
        max_batch_size: rows that are decoded together; a choice is a row.
        max_queue: rows that may wait for a free one.
        max_new_tokens: new tokens of a request that names no number.
        max_length: most tokens of prompt and answer together; `None`: what the models allow.
        request_timeout: seconds from a request's arrival to its end; `None` for no limit.
        drain_timeout: seconds that running requests have to end after SIGTERM.
        max_body: most bytes of a request.
        api_key: what requests must carry as a bearer token; `None` for no key.
        cors_origins: origins whose pages may call the server.
        sampling: sampling of requests that name no temperature, by `generate()`'s names.
        fixed_decoding: no request may name a strategy or a knob.
    """

    model_name: str = "apd"
    max_batch_size: int = 8
    max_queue: int = 64
    max_new_tokens: int = 256
    max_length: int | None = None
    request_timeout: float | None = None
    drain_timeout: float = 30.0
    max_body: int = 2**20
    api_key: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    fixed_decoding: bool = False
