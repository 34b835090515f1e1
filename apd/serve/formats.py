"""`response_format`: the JSON schema that it asks for."""

from __future__ import annotations

from typing import Any

from apd.serve.engine.errors import APIError, refused
from apd.serve.schemas import ResponseFormat

_PARAM = "response_format"
#: Sizes of numbers in a schema. An integer of -2^63 or less overflows the stack in llguidance 1.9, which ends the process.
_LARGEST, _SMALLEST = 2**62, 1e-15
#: Lists and objects in each other: llguidance reads few more, and some hundreds could not be sent to the engine.
_DEEPEST = 100


def schema_of(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema that an answer must obey; `None` if anything may be written.

    Raises:
        APIError: there is none, it is too deep, or a number in it could end the process.
    """
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise refused("Missing required parameter: 'response_format.json_schema'.", f"{_PARAM}.json_schema")
    schema = wanted.json_schema.schema_ or {}
    _check(schema)
    return schema


def _check(schema: Any) -> None:
    left = [(schema, 1)]
    while left:
        value, depth = left.pop()
        if isinstance(value, (dict, list)):
            if depth > _DEEPEST:
                raise _invalid(f"lists and objects may be {_DEEPEST} deep, got more.")
            left += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, (int, float)) and value and not _SMALLEST <= abs(value) <= _LARGEST:
            raise _invalid(f"the size of a number must be 0 or from {_SMALLEST} to 2^62, got {value!r:.40}.")


def _invalid(reason: str) -> APIError:
    return refused(f"Invalid schema for `{_PARAM}`: {reason}", _PARAM, "invalid_json_schema")
