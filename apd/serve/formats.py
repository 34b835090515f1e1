"""`response_format`: the JSON schema that it asks for."""

from __future__ import annotations

from typing import Any

from apd.serve.engine.errors import refused
from apd.serve.schemas import ResponseFormat

_PARAM = "response_format"
#: Sizes of numbers in a schema. An integer that must be -2^63 or less ends the whole process in llguidance 1.9: a stack overflow.
_LARGEST, _SMALLEST = 2**62, 1e-15


def schema_of(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema that an answer must obey; `None` if anything may be written.

    Raises:
        APIError: there is none, or a number in it could end the process.
    """
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise refused("Missing required parameter: 'response_format.json_schema'.", f"{_PARAM}.json_schema")
    schema = wanted.json_schema.schema_ or {}
    _check_numbers(schema)
    return schema


def _check_numbers(schema: Any) -> None:
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, (int, float)) and value and not _SMALLEST <= abs(value) <= _LARGEST:
            raise refused(
                f"Invalid schema for `{_PARAM}`: the size of a number must be 0 or from {_SMALLEST} to 2^62, got {value!r:.40}.",
                _PARAM,
                "invalid_json_schema",
            )
