"""Errors in the shape of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import difflib
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from apd.generation.elsewhere import LETTERS
from apd.serve.schemas import ChatBody, CompletionBody

INVALID, SERVER = "invalid_request_error", "server_error"


class APIError(Exception):
    """An error that ends a request.

    Args:
        status: the HTTP status.
        message: what is wrong, and the remedy.
        param: the field that is at fault.
        code: a short name for programs.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}

    @property
    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(self.status, SERVER if self.status >= 500 else INVALID)
        message = self.message.encode("utf-8", "replace").decode()  # it may quote half a surrogate pair of the request
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def refused(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A request that cannot be meant: status 400."""
    return APIError(400, message, param=param, code=code)


def of_row(error: Exception) -> APIError:
    """The error of a row that failed alone: a model gave NaN, or a grammar allowed nothing."""
    if isinstance(error, APIError):
        return error
    code = "invalid_logits" if isinstance(error, FloatingPointError) else "decoding_failed"
    return APIError(500, str(error), code=code)


async def on_api_error(request: Request, error: Any) -> JSONResponse:
    return error.response()


async def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    """A fault of the server; the log has it."""
    return APIError(500, "The server failed. Its log says where.", code="internal_error").response()


async def on_http_error(request: Request, error: Any) -> JSONResponse:
    """Unknown routes and methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"Unknown request URL: {request.method} {request.url.path}. See docs/serve.md for the routes.",
        405: f"Not allowed to {request.method} on {request.url.path}.",
    }.get(error.status_code, str(error.detail))
    return APIError(error.status_code, message, code={404: "unknown_url"}.get(error.status_code)).response()


def _meant(where: list[str], path: str) -> str:
    """The field that an unknown one was probably meant to be, as a sentence behind a full stop; "" if none is near."""
    if len(where) != 1 or not path.endswith("/completions"):
        return ""
    name, known = where[0], (ChatBody if path.endswith("/chat/completions") else CompletionBody).model_fields
    nearest = [LETTERS[name]] if LETTERS.get(name) in known else difflib.get_close_matches(name, known, n=1)
    return f". Did you mean {nearest[0]}?" if nearest else ""


async def on_invalid_body(request: Request, error: Any) -> JSONResponse:
    """The first thing that is wrong with a body, named as OpenAI's server names it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # Of a field that may have several types, the location also names the type.
    where = [str(part) for part in first["loc"] if part not in ("body", "str", "int") and "[" not in str(part)]
    param = ".".join(where) or None
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return refused(f"The body must be JSON, and could not be parsed: {reason}.", code="invalid_json").response()
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}{_meant(where, request.url.path)}"
        return refused(message, param, "unknown_parameter").response()
    if first["type"] == "missing":
        name = param or "body"
        return refused(f"Missing required parameter: '{name}'.", param, "missing_required_parameter").response()
    if not where:
        message = "The body must be a JSON object, sent with Content-Type: application/json."
        return refused(message, code="invalid_body").response()
    given = repr(first.get("input"))
    given = given if len(given) <= 100 else given[:97] + "..."
    return refused(f"Invalid value for '{param}': {first['msg']}, got {given}.", param, "invalid_value").response()
