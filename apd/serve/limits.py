"""What every request passes: the key, the size of its body, and the count of its answers."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apd.serve.dispatch import Dispatcher
from apd.serve.engine.errors import APIError
from apd.serve.handlers import response_of
from apd.serve.metrics import ServerMetrics
from apd.serve.settings import ServeSettings


class Limits:
    """ASGI middleware; pure, since one that wraps requests would hide a client's hang-up.

    Args:
        app: what is behind it.
        settings: of the server.
        metrics: counts answers by route and status.
        dispatcher: while it drains, connections are closed.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: ServerMetrics, dispatcher: Dispatcher) -> None:
        self.app, self.settings, self.metrics, self.dispatcher = app, settings, metrics, dispatcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        is_counted = False

        def count(status: int) -> None:
            nonlocal is_counted
            is_counted = True
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                if self.dispatcher.is_draining:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
                count(message["status"])
            await send(message)

        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
        except APIError as error:
            await response_of(error)(scope, receive, counted)
            return
        try:
            await self.app(scope, _again(body, receive), counted)
        except Exception:
            if not is_counted:
                count(500)  # which is sent outside of here
            raise

    def _check_key(self, scope: Scope) -> None:
        is_open = scope["method"] in ("GET", "HEAD", "OPTIONS") and not scope["path"].startswith("/v1/")
        if self.settings.api_key is None or is_open:
            return
        header = dict(scope["headers"]).get(b"authorization", b"")
        if not header:
            raise APIError(
                401, "You didn't provide an API key: send Authorization: Bearer KEY.", code="missing_api_key"
            )
        if not is_allowed(header, self.settings.api_key):
            raise APIError(401, "Incorrect API key provided.", code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self.settings.max_body
        length = dict(scope["headers"]).get(b"content-length", b"0")
        parts, num_read, size, is_whole = [], 0, int(length) if length.isdigit() else 0, False
        while size <= most and not is_whole:
            message = await receive()
            if message["type"] != "http.request":  # a hang-up in the middle of the body
                break
            parts.append(message.get("body", b""))
            num_read += len(parts[-1])
            size, is_whole = max(size, num_read), not message.get("more_body", False)
        if size > most:
            raise APIError(413, f"The body may have {most} bytes, got {size} or more.", code="body_too_large")
        return b"".join(parts)


def is_allowed(header: bytes, api_key: str) -> bool:
    """Whether an `Authorization` header carries the key; takes the same time for every wrong key."""
    scheme, _, given = header.partition(b" ")
    return hmac.compare_digest(given.strip(), api_key.encode()) and scheme.lower() == b"bearer"


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, then what follows it."""
    is_read = False

    async def after_body() -> Any:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return after_body
