"""Errors that end a request, in the shape of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from functools import partial
from typing import Any

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
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def __reduce__(self) -> Any:  # it may come from another process
        make = partial(type(self), param=self.param, code=self.code, retry_after=self.retry_after)
        return make, (self.status, self.message)

    @property
    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(self.status, SERVER if self.status >= 500 else INVALID)
        message = self.message.encode("utf-8", "replace").decode()  # it may quote half a surrogate pair of the request
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def refused(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A request that cannot be meant: status 400."""
    return APIError(400, message, param=param, code=code)


def of_row(error: BaseException) -> APIError:
    """The error of a row that failed alone: a model gave NaN, or a grammar allowed nothing."""
    if isinstance(error, APIError):
        return error
    code = "invalid_logits" if isinstance(error, FloatingPointError) else "decoding_failed"
    return APIError(500, str(error), code=code)
