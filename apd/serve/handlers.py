"""From errors to HTTP responses."""

from __future__ import annotations

import difflib
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from apd.generation.elsewhere import LETTERS
from apd.serve.engine.errors import APIError, refused
from apd.serve.schemas import ChatBody, CompletionBody


def response_of(error: APIError) -> JSONResponse:
    """The error as an HTTP response."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    return JSONResponse(error.body, error.status, headers=headers)


async def on_api_error(request: Request, error: Any) -> JSONResponse:
    return response_of(error)


async def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    """A fault of the server; the log has it."""
    return response_of(APIError(500, "The server failed. Its log says where.", code="internal_error"))


async def on_http_error(request: Request, error: Any) -> JSONResponse:
    """Unknown routes and methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"Unknown request URL: {request.method} {request.url.path}. See docs/serve.md for the routes.",
        405: f"Not allowed to {request.method} on {request.url.path}.",
    }.get(error.status_code, str(error.detail))
    return response_of(APIError(error.status_code, message, code={404: "unknown_url"}.get(error.status_code)))


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
        return response_of(refused(f"The body must be JSON, and could not be parsed: {reason}.", code="invalid_json"))
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}{_meant(where, request.url.path)}"
        return response_of(refused(message, param, "unknown_parameter"))
    if first["type"] == "missing":
        name = param or "body"
        return response_of(refused(f"Missing required parameter: '{name}'.", param, "missing_required_parameter"))
    if not where:
        message = "The body must be a JSON object, sent with Content-Type: application/json."
        return response_of(refused(message, code="invalid_body"))
    given = repr(first.get("input"))
    given = given if len(given) <= 100 else given[:97] + "..."
    return response_of(refused(f"Invalid value for '{param}': {first['msg']}, got {given}.", param, "invalid_value"))
